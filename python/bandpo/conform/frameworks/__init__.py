"""Adapters for the losses of frameworks; each calls their functions and holds no mathematics.

A file has ``DISTRIBUTION``, the name of its package in an index, and ``loss_of``, which returns the
loss of a vector or None where the framework has no function for it. It is imported only where the
framework is installed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from bandpo.conform.compare import Report, report
from bandpo.conform.vectors import Vector

ADAPTERS = ("verl", "trl", "torchrl", "skyrl", "openrlhf", "liger_kernel")
"""Packages with an adapter here, by the name that they are imported by."""


def framework_report(name: str, vectors: list[Vector]) -> Report:
    """Returns the comparison of a framework, or a note why there is none."""
    if find_spec(name) is None:
        return Report(name, [], "not installed")
    try:
        installed = version(name.replace("_", "-"))
    except PackageNotFoundError:
        installed = "of an unknown version"
    title = f"{name} {installed}"
    try:
        adapter = import_module(f"bandpo.conform.frameworks.{name}_losses")
    except Exception as error:  # code of others may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Report(title, [], f"installed, cannot be imported: {reason}")
    return report(title, vectors, adapter.loss_of)
