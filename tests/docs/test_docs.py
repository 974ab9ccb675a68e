"""What the documentation shows is run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import bandpo

ROOT = Path(__file__).parents[2]


def test_the_example_of_the_readme_runs_and_does_what_it_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch = pytest.importorskip("torch")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "policy_loss" in block)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 -- our own text
    gradient = names["log_prob"].grad
    # -A r over three tokens; all of them are inside the band at these ratios.
    expected = -torch.exp(torch.tensor([[2.0, -0.2, 0.05]])) / 3
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0.0)
    assert names["result"].metrics["clip_fraction_high"] == 0.0
    assert capsys.readouterr().out


def test_the_sessions_of_the_readme_print_what_they_show() -> None:
    failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert (failed, tried > 0) == (0, True)


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
