"""The reason why the kernels cannot run here, if CuPy, a driver or a device is missing."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from bandpo.backends.cuda import launch
from bandpo.error import BackendWarning, BrokenExtraError, MissingExtraError


def obstacle() -> ImportError | None:
    """Returns the error with the reason why the kernels cannot run here, or None if they can."""
    version = torch.version.cuda
    if torch.version.hip is not None:
        return BrokenExtraError("the kernels need CUDA, this torch is built for ROCm")
    # CuPy 14 needs CUDA 12 or newer; a newer CUDA than 13 runs code for 13.
    extra = "cuda12" if version and int(version.partition(".")[0]) <= 12 else "cuda13"
    try:
        cupy = launch.cupy_module()
    except ModuleNotFoundError as missing:
        if missing.name == "cupy":
            return MissingExtraError("cupy", extra)
        return BrokenExtraError(f"cupy, of bandpo[{extra}], cannot be imported: {missing}")
    except (ImportError, OSError) as broken:
        return BrokenExtraError(f"cupy, of bandpo[{extra}], cannot be imported: {broken}")
    if not hasattr(cupy.cuda.Stream, "from_external"):
        return BrokenExtraError(f"bandpo[{extra}] needs CuPy 14 or newer, got {cupy.__version__}")
    if version is None:
        return BrokenExtraError(
            f"the kernels of bandpo[{extra}] need a torch built with CUDA, "
            f"torch {torch.__version__} is not"
        )
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as reason:
        return BrokenExtraError(f"the kernels of bandpo[{extra}] need a CUDA driver: {reason}")
    if devices == 0:
        return BrokenExtraError(f"the kernels of bandpo[{extra}] need a CUDA device: there is none")
    try:
        launch.compiled(launch.TOTALS_KERNEL, torch.cuda.current_device())
    except Exception as reason:  # each part of CuPy has its own class
        line = str(reason).strip().partition("\n")[0]
        return BrokenExtraError(f"the kernels of bandpo[{extra}] cannot be compiled: {line}")
    return None


@cache
def kernels_run() -> bool:
    """Returns True if the kernels can run here; otherwise warns why not, once."""
    reason = obstacle()
    if reason is not None:
        message = f"CUDA tensors take the torch backend: {reason}"
        warnings.warn(message, BackendWarning, stacklevel=1)
    return reason is None
