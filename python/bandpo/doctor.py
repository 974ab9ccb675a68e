"""What is installed, which backend would run, and whether a GPU is usable and why not."""

from __future__ import annotations

import ctypes
import platform
import sys
from importlib import metadata
from typing import Any

from bandpo import _core
from bandpo.error import BrokenExtraError, MissingExtraError

_PACKAGES = {
    "numpy": ("numpy",),
    "rich": ("rich",),
    "torch": ("torch",),
    "matplotlib": ("matplotlib",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "trl": ("trl",),
    "verl": ("verl",),
}
"""Packages of interest, each with the names of its distributions."""


def report() -> dict[str, Any]:
    """Returns findings by name, as JSON takes them.

    A version is None where the package is not installed, ``gpu`` where torch can use none, a
    backend where it has no use. ``problems`` are what keeps the loss, or the kernels for a GPU that
    is there, from running.
    """
    gpus, cuda_driver = _driver()
    return {
        "bandpo": _core.__version__,
        **_backends(gpus),
        "gpus": gpus,
        "cuda_driver": cuda_driver,
        "simd": _core.simd_level(),
        "threads": _core.thread_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(distributions) for name, distributions in _PACKAGES.items()},
    }


def as_text(report: dict[str, Any]) -> dict[str, str]:
    """Returns a report as a reader takes it, by name."""
    gpu = report["gpu"] or ("none found" if report["gpus"] == 0 else "found, but torch has none")
    driver = "" if report["cuda_driver"] is None else f", driver for CUDA {report['cuda_driver']}"
    return {
        "bandpo": report["bandpo"],
        "backend on a CPU": report["backend_cpu"] or "none",
        "GPU": gpu + driver,
        **({"backend on a GPU": report["backend_gpu"]} if report["backend_gpu"] else {}),
        "problems": "; ".join(report["problems"]) or "none",
        "vector instructions": report["simd"],
        "threads": str(report["threads"]),
        "python": report["python"],
        "platform": report["platform"],
        **{name: report[name] or "not installed" for name in _PACKAGES},
    }


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return None


def _driver() -> tuple[int, str | None]:
    """How many GPUs NVIDIA's driver has found, and the newest CUDA that it runs."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0, None
    version, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return 0, None
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        count.value = 0
    return count.value, f"{version.value // 1000}.{version.value % 1000 // 10}"


def _backends(gpus: int) -> dict[str, Any]:
    found: dict[str, Any] = {"backend_cpu": None, "gpu": None, "backend_gpu": None, "problems": []}
    try:
        from bandpo.backends.cuda.availability import obstacle
        from bandpo.backends.select import default_backend, gpu_report
    except (BrokenExtraError, MissingExtraError) as reason:
        return {**found, "problems": [f"the loss cannot run: {reason}"]}
    found["backend_cpu"] = default_backend("cpu")
    state, _, detail = gpu_report().partition(": ")
    if state != "usable":
        # Without a GPU that is no problem, and nothing has to be installed.
        problems = [f"torch cannot use the GPU: {detail}"] if gpus else []
        return {**found, "problems": problems}
    found["gpu"] = detail
    hindrance = obstacle() if gpus else None
    found["backend_gpu"] = "cuda" if gpus and hindrance is None else "torch"
    if hindrance is not None:
        found["problems"] = [f"the kernels for the GPU cannot run: {hindrance}"]
    return found
