"""What is installed, which backend would run, and whether a GPU is usable and why not."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
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
    "cuda-bindings": ("cuda-bindings",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "trl": ("trl",),
    "verl": ("verl",),
}
"""Packages of interest, each with the names of its distributions."""


_VERL_ADAPTER = "bandpo.integrations.verl"

_VERL_PROBE = f"""
from verl.trainer.ppo.core_algos import get_policy_loss_fn
assert get_policy_loss_fn("bandpo").__module__ == "{_VERL_ADAPTER}"
"""

_VERL_PLUGINS = "verl.plugins"
"""Group of entry points that verl imports since 0.9."""


def report(*, verl: bool = False) -> dict[str, Any]:
    """Returns findings by name, as JSON takes them.

    A version is None where the package is not installed, ``gpu`` where torch can use none, a
    backend where it has no use. ``dtypes_cpu`` and ``dtypes_gpu`` have the dtype that the backend
    reads, by the dtype of log-probs. ``launcher`` is the package that loads the kernels, and
    ``launchers_refused`` has the reasons why another one does not. ``problems`` are what keeps the
    loss, or the kernels for a GPU that is there, from running.

    Args:
        verl: Look up verl's loss bandpo in a new process, which takes seconds: ``verl_loss``.
    """
    found = _report()
    if not verl:
        return found
    problem = _verl_problem()
    problems = [*found["problems"], *([] if problem is None else [problem])]
    return {**found, "verl_loss": problem is None, "problems": problems}


def _report() -> dict[str, Any]:
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
        "backend on a CPU": _backend(report["backend_cpu"], report["dtypes_cpu"]),
        "GPU": gpu + driver,
        **({"backend on a GPU": _backend_on_a_gpu(report)} if report["backend_gpu"] else {}),
        **(
            {"verl's loss bandpo": "registered" if report["verl_loss"] else "not registered"}
            if "verl_loss" in report
            else {}
        ),
        "problems": "; ".join(report["problems"]) or "none",
        "vector instructions": report["simd"],
        "threads": str(report["threads"]),
        "python": report["python"],
        "platform": report["platform"],
        **{name: report[name] or "not installed" for name in _PACKAGES},
    }


def _backend(name: str | None, dtypes: dict[str, str] | None) -> str:
    """A backend, with the dtypes that it reads, and those that are converted for it."""
    if name is None or dtypes is None:
        return "none"
    read = " ".join(dtype for dtype, as_dtype in dtypes.items() if dtype == as_dtype)
    converted = [f"{dtype} as {other}" for dtype, other in dtypes.items() if dtype != other]
    return f"{name}: {', '.join([read, *converted])}"


def _backend_on_a_gpu(report: dict[str, Any]) -> str:
    """The same with the package that loads the kernels, and the reason why not another."""
    backend = _backend(report["backend_gpu"], report["dtypes_gpu"])
    if report["launcher"] is None:
        return backend
    name, refused = report["launcher"], report["launchers_refused"]
    reasons = "".join(f" ({other}: {reason})" for other, reason in refused.items())
    return f"{backend}; kernels loaded by {name}{reasons}"


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
    found: dict[str, Any] = {
        "backend_cpu": None,
        "dtypes_cpu": None,
        "gpu": None,
        "backend_gpu": None,
        "dtypes_gpu": None,
        "launcher": None,
        "launchers_refused": {},
        "problems": [],
    }
    try:
        from bandpo.backends.cuda.availability import obstacle
        from bandpo.backends.cuda.launch import launcher
        from bandpo.backends.select import default_backend, dtypes_read, gpu_report
    except (BrokenExtraError, MissingExtraError) as reason:
        return {**found, "problems": [f"the loss cannot run: {reason}"]}
    found["backend_cpu"] = default_backend("cpu")
    found["dtypes_cpu"] = dtypes_read(found["backend_cpu"])
    state, _, detail = gpu_report().partition(": ")
    if state != "usable":
        # Without a GPU that is no problem, and nothing has to be installed.
        problems = [f"torch cannot use the GPU: {detail}"] if gpus else []
        return {**found, "problems": problems}
    found["gpu"] = detail
    hindrance = obstacle() if gpus else None
    found["backend_gpu"] = "cuda" if gpus and hindrance is None else "torch"
    found["dtypes_gpu"] = dtypes_read(found["backend_gpu"])
    if found["backend_gpu"] == "cuda":
        found["launcher"], found["launchers_refused"] = launcher()
    if hindrance is not None:
        found["problems"] = [f"the kernels for the GPU cannot run: {hindrance}"]
    return found


def _verl_problem() -> str | None:
    """The reason why verl has no loss bandpo in a new process, where verl itself hides it."""
    version = _version(("verl",))
    if version is None:
        return "verl is not installed"
    lookup = _error_of(_VERL_PROBE)
    if lookup is None:
        return None
    adapter = _error_of(f"import {_VERL_ADAPTER}")
    if adapter is not None:
        return f"the adapter to verl {version} cannot be imported: {adapter}"
    by_variable = f"set VERL_USE_EXTERNAL_MODULES={_VERL_ADAPTER}"
    if not metadata.entry_points(group=_VERL_PLUGINS, name="bandpo"):
        return (
            f"verl cannot find bandpo, because no distribution of it with an entry point is "
            f"installed: run pip install, or {by_variable}"
        )
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    if policy not in ("auto", "bandpo"):
        return (
            f"VERL_USE_EXTERNAL_PLUGINS is {policy!r}, which may leave bandpo out: let it be "
            f"'auto' or name bandpo, or {by_variable}"
        )
    return f"verl {version} does not load bandpo, as versions before 0.9: {by_variable} ({lookup})"


def _error_of(code: str) -> str | None:
    """The last line of the error that a new process prints; None if there is no error."""
    done = subprocess.run(  # noqa: S603 -- our own code
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
