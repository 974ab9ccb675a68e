"""Kernels on torch's stream and device. The one module that imports CuPy."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from bandpo import _core
from bandpo.error import BackendWarning, BrokenExtraError, MissingExtraError

# As in cuda/band.cu.
THREADS = 256
CHUNK = 8192

COMPILER_OPTIONS = ("-std=c++17", "-fmad=false")
"""No fused multiply-adds, so that float32 has the bits that it has in Rust."""

BLOCKS_A_PROCESSOR = 8
"""More blocks than run at a time would copy the table again."""

TOTALS_KERNEL = "bandpo::policy_loss_totals<double>"
"""The kernel that every loss needs."""


def _cupy() -> Any:
    """CuPy, whose import takes longer than all of bandpo's."""
    import cupy  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return cupy


def obstacle() -> ImportError | None:
    """Returns the error that says why the kernels cannot run here, or None if they can."""
    version = torch.version.cuda
    if torch.version.hip is not None:
        return BrokenExtraError("the kernels need CUDA, this torch is built for ROCm")
    # Of an older CUDA there is no CuPy 14; a newer one runs what was made for 13.
    extra = "cuda12" if version and int(version.partition(".")[0]) <= 12 else "cuda13"
    try:
        cupy = _cupy()
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
        _compiled(TOTALS_KERNEL, torch.cuda.current_device())
    except Exception as reason:  # CuPy has one of its own for each of its parts
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


def launch(
    kernel: str,
    device: torch.device,
    blocks: int,
    arguments: tuple[np.generic, ...],
    shared_bytes: int = 0,
) -> None:
    """Enqueues a kernel on torch's current stream of a device.

    Tensors that were allocated for that stream may be released at once: the allocator hands their
    memory on in the order of the stream.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    grid = max(1, min(blocks, BLOCKS_A_PROCESSOR * processors))
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
    function = _compiled(kernel, index)
    of_cupy = _cupy().cuda
    with of_cupy.Device(index), of_cupy.Stream.from_external(stream):
        function((grid,), (THREADS,), arguments, shared_mem=shared_bytes)


class _Stream(NamedTuple):
    """A stream of torch as CuPy takes it; those of old versions of torch do not say it."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """The version of the protocol, and the handle."""
        return 0, self.pointer


@cache
def _compiled(kernel: str, device_index: int) -> Any:
    """The kernel, compiled and loaded, for the device of this index."""
    cupy = _cupy()
    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(
            code=_core.KERNEL_SOURCE, options=COMPILER_OPTIONS, name_expressions=(kernel,)
        )
        return module.get_function(kernel)
