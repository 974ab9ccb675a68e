"""Code and commands of the documentation, run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import bandpo
from bandpo.presets import PRESETS

ROOT = Path(__file__).parents[2]


DOCUMENTS = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")})
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(document: Path) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return FENCE.findall(document.read_text(encoding="utf-8"))


def test_every_block_has_a_language_that_a_test_executes() -> None:
    for document in DOCUMENTS:
        assert {language for language, _ in blocks(document)} <= {"python", "sh", "text"}, document


@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if any(x == "python" for x, _ in blocks(d))],
    ids=lambda d: d.name,
)
def test_python_of_a_document_prints_what_it_shows(document: Path) -> None:
    pytest.importorskip("torch")
    sessions = [text for language, text in blocks(document) if language == "python"]
    if ">>> " in sessions[0]:
        assert all(text.startswith(">>> ") for text in sessions)
        failed, tried = doctest.testfile(str(document), module_relative=False)
        assert (failed, tried > 0) == (0, True)
    else:
        for text in sessions:
            exec(compile(text, document.name, "exec"), {})  # noqa: S102 -- our own text


def test_commands_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shell = [text for d in DOCUMENTS for language, text in blocks(d) if language == "sh"]
    commands = [line.split("#")[0].split() for text in shell for line in text.splitlines()]
    assert commands
    for command in filter(None, commands):
        if command[0] == "make":
            assert set(command[1:]) <= targets, command
        else:
            assert command[:2] == ["pip", "install"], command
            extras = re.findall(r"\[(\w+)\]", " ".join(command))
            assert all(f"\n{extra} = " in (ROOT / "pyproject.toml").read_text() for extra in extras)


def test_the_readme_has_a_row_for_every_preset() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Rules\n")[2]
    cells = re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.MULTILINE)
    listed = [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]
    assert sorted(listed) == sorted(PRESETS)


def modules_with_sessions() -> list[str]:
    """Modules of the package whose source holds a session of the interpreter."""
    package = Path(bandpo.__file__).parent
    files = [file for file in package.rglob("*.py") if ">>> " in file.read_text(encoding="utf-8")]
    parts = [file.relative_to(package.parent).with_suffix("").parts for file in files]
    return sorted(".".join(part for part in path if part != "__init__") for path in parts)


@pytest.mark.parametrize("name", modules_with_sessions())
def test_the_docstrings_of_modules_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except bandpo.error.MissingExtraError as reason:
        pytest.skip(str(reason))
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 0) == (0, True)


def test_importing_bandpo_imports_no_framework() -> None:
    import subprocess
    import sys

    code = (
        "import sys, bandpo; "
        "print([m for m in ('torch', 'matplotlib', 'rich', 'cupy', 'scipy') if m in sys.modules])"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert outcome.stdout == "[]\n"
