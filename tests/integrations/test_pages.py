"""The pages of the trainers: each adapter has one, and the names in their lines exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ROOT / "python/bandpo/integrations"
PAGES = ROOT / "docs/integrations"
README = (PAGES / "README.md").read_text(encoding="utf-8")

SHARED = {
    "__init__",
    "clamps",
    "epsilons",
    "loss",
    "ray_workers",
    "recording",
    "settings",
    "steps",
    "version",
}
OF_OTHERS = {
    "torchrl_ppo",
    "trl_async",
    "trl_callbacks",
    "trl_config",
    "trl_fields",
    "trl_run",
    "verl_config",
}
"""Modules that the page of another one describes."""

ADAPTERS = sorted(file.stem for file in MODULES.glob("*.py") if file.stem not in SHARED | OF_OTHERS)

PARTS = ("Old log-probs.", "Refused.", "Metrics.")
"""What every page states."""


def page(adapter: str) -> str:
    return (PAGES / f"{adapter}.md").read_text(encoding="utf-8")


def defined(module: str) -> set[str]:
    """Names of the classes and functions of an adapter, or of a module that adapters share."""
    tree = ast.parse((MODULES / f"{module}.py").read_text(encoding="utf-8"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = {node.name for node in tree.body if isinstance(node, kinds)}
    for node in tree.body:  # names of the other modules of an adapter
        if isinstance(node, ast.ImportFrom) and f"{module}_" in str(node.module):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_page_states_what_is_read_refused_and_logged(adapter: str) -> None:
    text = page(adapter)
    headings = [line.strip("# ") + "." for line in text.splitlines() if line.startswith("## ")]
    assert [part for part in PARTS if f"**{part}**" not in text and part not in headings] == []
    assert f"]({adapter}.md)" in README


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_page_says_how_it_was_tested(adapter: str) -> None:
    text = page(adapter)
    assert ("Tested with" in text) != ("Not run against the real thing" in text)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_names_of_a_page_exist(adapter: str) -> None:
    text = page(adapter)
    paths = re.findall(r"bandpo\.integrations\.(\w+)\.(\w+)", text)
    imports = re.findall(r"from bandpo\.integrations\.(\w+) import (.+)", text)
    names = {(module, name) for module, found in imports for name in found.split(", ")}
    assert {module for module, _ in {*paths, *names}} >= {adapter}
    for module, name in {*paths, *names}:
        assert name in defined(module), f"{module}.{name}"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_python_of_a_page_can_be_compiled(adapter: str) -> None:
    for block in re.findall(r"^```text\n(.*?)^```$", page(adapter), re.MULTILINE | re.DOTALL):
        if re.match(r"(from|import|class|def) ", block):
            compile(block, adapter, "exec")
