"""Packages of others in tests: contracts that stand for them, and parts of them that load alone.

A test takes the package where it is installed, otherwise the contract, and never both in a process.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import pytest


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    """A module with these contents under this name, and its packages, until the test ends."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        path = ".".join(parts[:length])
        if path not in sys.modules:
            module = ModuleType(path)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
            if length > 1:
                setattr(sys.modules[".".join(parts[: length - 1])], parts[length - 1], module)
    module = sys.modules[name]
    vars(module).update(contents)
    return module


def without_init(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Packages whose modules can be imported, though their own ``__init__`` does not run."""
    for name in names:
        parent = name.rpartition(".")[0]
        spec = PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
        assert spec is not None
        module = ModuleType(name)
        module.__path__ = list(spec.submodule_search_locations or [])
        module.__spec__ = spec
        monkeypatch.setitem(sys.modules, name, module)
        if parent:
            setattr(sys.modules[parent], name.rpartition(".")[2], module)


def fresh(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """The module of that name, imported anew, and dropped again when the test ends."""
    parent, _, child = name.rpartition(".")
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)  # so that the end of the test removes it
    monkeypatch.delattr(sys.modules[parent], child, raising=False)
    return module


def version_of(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Makes this the version of every package."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)


def is_installed(name: str) -> bool:
    """Whether a package can be found; it is not imported."""
    return PathFinder.find_spec(name) is not None
