"""One version everywhere, and one set of tools for a release."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import bandpo

ROOT = Path(__file__).parents[2]


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_version_of_cargo_toml_is_the_version() -> None:
    found = re.search(r'^version = "(.+)"$', text("Cargo.toml"), re.MULTILINE)
    assert found
    heading = re.search(r"^## (\S+), (unreleased|\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.M)
    assert heading
    assert bandpo.__version__ == metadata.version("bandpo") == found[1] == heading[1]


def test_the_release_is_built_by_the_maturin_of_make_wheel() -> None:
    pinned = re.search(r"^maturin==(\S+)$", text("tools/release-requirements.txt"), re.MULTILINE)
    used = re.search(r"maturin-version: v(\S+)", text(".github/workflows/release.yml"))
    assert pinned
    assert used
    assert pinned[1] == used[1]
