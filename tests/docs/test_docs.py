"""Code and commands of the documentation, run."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import bandpo
from bandpo.cli import main
from bandpo.conform import vectors
from bandpo.presets import PRESETS
from support.logs import random_log
from support.token_files import write_json_lines, write_npz

ROOT = Path(__file__).parents[2]


DOCUMENTS = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")})
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(document: Path) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return FENCE.findall(document.read_text(encoding="utf-8"))


def commands() -> list[list[str]]:
    """The words of each command in a block of shell."""
    shell = [text for d in DOCUMENTS for language, text in blocks(d) if language == "sh"]
    found = [line.split("#")[0].split() for text in shell for line in text.splitlines()]
    return list(filter(None, found))


def test_every_block_has_a_language_that_a_test_executes() -> None:
    for document in DOCUMENTS:
        assert {language for language, _ in blocks(document)} <= {"python", "sh", "text"}, document
        for language, text in blocks(document):
            assert language != "text" or not re.search(r"^\$ ", text, re.MULTILINE), document


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
        # In a process that ends without destructors: that of a process group waits for threads of
        # its own, which may wait for the interpreter.
        for text in sessions:
            code = f"{text}\nimport os\nos._exit(0)\n"
            subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_commands_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands():
        if command[0] == "make":
            assert set(command[1:]) <= targets, command
        elif command[0] != "bandpo":
            assert command[:2] == ["pip", "install"], command
            extras = re.findall(r"\[(\w+)\]", " ".join(command))
            assert all(f"\n{extra} = " in (ROOT / "pyproject.toml").read_text() for extra in extras)


@pytest.fixture
def files_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with small files in place of those that the documents name."""
    safetensors = pytest.importorskip("safetensors.numpy")
    monkeypatch.chdir(tmp_path)
    # The vectors of one preset, because tests/conform/test_conform.py runs those of all.
    few = {
        name: tensor
        for name, tensor in safetensors.load_file(vectors.FILE).items()
        if name.startswith(("inputs/", "gpg/"))
    }
    safetensors.save_file(few, "other.safetensors", {"format": vectors.FORMAT})
    monkeypatch.setattr(vectors, "FILE", tmp_path / "other.safetensors")
    log = random_log(2000)
    columns = {name: getattr(log, name) for name in ("log_prob", "advantages")}
    Path("run/tokens").mkdir(parents=True)
    write_npz(Path("run/tokens/part.npz"), {"old_log_prob": log.old_log_prob, **columns})
    write_json_lines(Path("tokens.jsonl"), {"old_logprobs": log.old_log_prob, **columns})


@pytest.mark.usefixtures("files_of_commands")
@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "bandpo"], ids=" ".join)
def test_a_bandpo_command_of_the_documents_runs(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # a narrow terminal gets a record a row, no table
    pytest.importorskip("torch")
    if "--html" in command:
        pytest.importorskip("matplotlib")
    assert main(command[1:]) == 0
    output = capsys.readouterr().out
    if "--json" in command:
        assert json.loads(output)["passed"]
    elif command[1] == "conform":
        assert re.search(r"^ *bandpo native +1 +45 +45 ", output, re.MULTILINE), output
    else:
        assert [v for o, v in pairwise(command) if o == "--rule" and v not in output.split()] == []
        assert all(Path(v).exists() for o, v in pairwise(command) if o == "--html")


def test_the_readme_has_a_row_for_every_preset() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Rules\n")[2]
    cells = re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.MULTILINE)
    listed = [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]
    assert sorted(listed) == sorted(PRESETS)


def test_the_readme_lists_every_document() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Develop\n")[2]
    for document in (*(ROOT / "docs").glob("*.md"), *ROOT.glob("[A-Z]*.md")):
        path = document.relative_to(ROOT).as_posix()
        assert path in ("README.md", "THIRD-PARTY-LICENSES.md") or f"]({path})" in section, path


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
