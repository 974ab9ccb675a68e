"""What is installed, which backend would run, and whether a GPU is usable and why not."""

from __future__ import annotations

import platform
from importlib import metadata

from bandpo import _core
from bandpo.error import MissingExtraError

_DISTRIBUTIONS = ("numpy", "torch", "matplotlib", "rich")


def report() -> dict[str, str | None]:
    """Returns findings by name; a version is None where the package is not installed."""
    return {
        "bandpo": _core.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in _DISTRIBUTIONS},
        "threads": str(_core.thread_count()),
        **_backends(),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _backends() -> dict[str, str | None]:
    try:
        from bandpo.loss import backend_for
        from bandpo.torch import torch
    except MissingExtraError as missing:
        none = f"none: {missing}"
        return {"backend on a CPU": none, "backend on a GPU": none, "GPU": "unknown without torch"}
    return {
        "backend on a CPU": backend_for("auto", torch.device("cpu")),
        "backend on a GPU": f"{backend_for('auto', torch.device('cuda'))} (this version of bandpo "
        "has no CUDA kernel)",
        "GPU": _gpu(),
    }


def _gpu() -> str:
    from bandpo.torch import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"not usable: torch {torch.__version__} is built for the CPU alone"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"usable: {', '.join(names)}"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"not usable: {str(error).splitlines()[0]}"
    return "not usable: torch finds no device"
