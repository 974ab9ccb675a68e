"""What is installed, which backend would run, and whether a GPU is usable and why not."""

from __future__ import annotations

import platform
from importlib import metadata

from bandpo import _core
from bandpo.error import BrokenExtraError, MissingExtraError

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
        from bandpo.backends.cuda.launch import obstacle
        from bandpo.backends.select import default_backend, gpu_report
    except (BrokenExtraError, MissingExtraError) as reason:
        none = f"none: {reason}"
        return {"backend on a CPU": none, "backend on a GPU": none, "GPU": "unknown without torch"}
    missing = obstacle()
    return {
        "backend on a CPU": default_backend("cpu"),
        "backend on a GPU": "cuda" if missing is None else f"torch (not cuda: {missing})",
        "GPU": gpu_report(),
    }
