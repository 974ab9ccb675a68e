"""Which backend computes a loss on a device, and why another one cannot.

If the kernels for CUDA cannot run, "auto" warns once and takes plain torch, and "cuda" raises an
error; `bandpo.backends.cuda.availability` finds the reason.
"""

from __future__ import annotations

import torch

from bandpo.backends import autograd, plain
from bandpo.backends.contract import Backend
from bandpo.backends.cuda import kernels
from bandpo.backends.cuda.availability import kernels_run, obstacle
from bandpo.backends.native import count_valid
from bandpo.error import InvalidValueError

_BACKENDS = {
    "native": Backend(
        autograd.token_losses,
        runs_on="cpu",
        weighted_sum=autograd.weighted_sum,
        count_valid=count_valid,
    ),
    "cuda": Backend(
        autograd.token_losses,
        runs_on="cuda",
        reads_half=True,
        weighted_sum=autograd.weighted_sum,
        count_valid=kernels.count_valid,
    ),
    "torch": Backend(plain.token_losses),
}


def select(name: str, device: torch.device) -> Backend:
    """Returns the backend of a name, ``"auto"`` included, for tensors on a device.

    Raises:
        InvalidValueError: If it does not run on the device.
        MissingExtraError: If it is "cuda" and neither cuda-bindings nor CuPy is installed.
        BrokenExtraError: If it is "cuda" and the kernels cannot run.
    """
    if name == "auto":
        return _BACKENDS[default_backend(device.type)]
    if name == "cuda":
        _require_kernels()
    backend = _BACKENDS[name]
    if backend.runs_on not in (None, device.type):
        raise InvalidValueError(
            f"backend {name!r} runs on {backend.runs_on.upper()} tensors, "
            f"log_prob is on {device}; use 'torch' or 'auto'"
        )
    return backend


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def default_backend(device: str) -> str:
    """Returns the backend that ``"auto"`` stands for on a type of device, such as ``"cuda"``.

    Warns once, with a `BackendWarning`, where the kernels for CUDA cannot run.
    """
    if device == "cuda":
        return "cuda" if kernels_run() else "torch"
    return "native" if device == "cpu" else "torch"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _require_kernels() -> bool:
    reason = obstacle()
    if reason is not None:
        raise reason
    return True


def dtypes_read(name: str) -> dict[str, str]:
    """Returns the dtype that a backend reads, by the dtype of log-probs; others are converted."""
    half = _BACKENDS[name].reads_half
    read = {dtype: dtype if half else "float32" for dtype in ("bfloat16", "float16")}
    return {"float32": "float32", "float64": "float64", **read}


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
