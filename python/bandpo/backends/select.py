"""Which backend runs on a device, and why another one cannot."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch

from bandpo.backends.cuda.launch import obstacle
from bandpo.error import BackendWarning


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def default_backend(device: str) -> str:
    """Returns the backend that ``"auto"`` stands for on a type of device, such as ``"cuda"``.

    Warns once, with a `BackendWarning`, where the kernels for CUDA cannot run.
    """
    if device == "cuda":
        return "torch" if kernels() is None else "cuda"
    return "native" if device == "cpu" else "torch"


@cache
def kernels() -> ModuleType | None:
    reason = obstacle()
    if reason is None:
        from bandpo.backends.cuda import kernels

        return kernels
    warnings.warn(f"CUDA tensors take the torch backend: {reason}", BackendWarning, stacklevel=1)
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def require_kernels() -> bool:
    """Returns True if the kernels for CUDA can run.

    Raises:
        MissingExtraError: If CuPy is not installed.
        BrokenExtraError: If it cannot be used, or there is no CUDA driver or device.
    """
    reason = obstacle()
    if reason is not None:
        raise reason
    import bandpo.backends.cuda.kernels  # noqa: F401

    return True


def gpu_report() -> str:
    """Returns whether torch can use a GPU here, and why not, in one line."""
    if torch.version.cuda is None and torch.version.hip is None:
        if torch.backends.mps.is_available():
            return "usable: MPS"
        return f"not usable: torch {torch.__version__} is built without CUDA"
    try:
        name = torch.cuda.get_device_name()
        torch.zeros(1, device="cuda").cpu()
    except (RuntimeError, AssertionError) as reason:
        return f"not usable: {str(reason).splitlines()[0]}"
    return f"usable: {name}"
