"""Compilation of kernels, and their launch on torch's stream. The only module with CuPy."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from bandpo import _core

THREADS = 256
"""Threads of a block, as in ``cuda/``."""

WIDTH = 4
"""Tokens that a thread of the loss reads at a time, as in ``cuda/``."""

CHUNK = 8192
"""Tokens that a block of the loss adds up, as in ``cuda/``."""

COMPILER_OPTIONS = ("-std=c++17", "-fmad=false")
"""No fused multiply-adds, so that float32 has the bits that it has in Rust."""

BLOCKS_A_PROCESSOR = 8
"""Max blocks of a launch. Each copies the table to shared memory, so more would cost more."""

TOTALS_KERNEL = "bandpo::policy_loss_totals<float>"
"""The kernel that every loss needs."""


def cupy_module() -> Any:
    """CuPy, imported late, because that takes longer than importing bandpo."""
    import cupy  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return cupy


def launch(
    kernel: str,
    device: torch.device,
    blocks: int,
    arguments: tuple[np.generic, ...],
    shared_bytes: int = 0,
) -> None:
    """Enqueues a kernel on torch's current stream of a device.

    Tensors allocated for that stream may be released at once, because the allocator reuses their
    memory in the order of the stream.

    Args:
        kernel: Name of an instance of a template in ``cuda/``.
        device: A CUDA device.
        blocks: Blocks that the work needs; fewer run, and each strides over the work.
        arguments: The kernel's, as numpy scalars.
        shared_bytes: Dynamic shared memory of a block.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    grid = max(1, min(blocks, BLOCKS_A_PROCESSOR * processors))
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
    function = compiled(kernel, index)
    of_cupy = cupy_module().cuda
    with of_cupy.Device(index), of_cupy.Stream.from_external(stream):
        function((grid,), (THREADS,), arguments, shared_mem=shared_bytes)


class _Stream(NamedTuple):
    """A stream of torch in CuPy's protocol, which streams of old versions of torch lack."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """Returns the version of the protocol, and the handle."""
        return 0, self.pointer


@cache
def compiled(kernel: str, device_index: int) -> Any:
    """Compiles and loads a kernel for a device."""
    cupy = cupy_module()
    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(
            code=_core.KERNEL_SOURCE, options=COMPILER_OPTIONS, name_expressions=(kernel,)
        )
        return module.get_function(kernel)
