"""Launch of kernels on torch's stream, and the choice of the package that compiles and loads them.

Launchers are tried in the order of `LAUNCHERS`. The first one that loads a kernel here is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from bandpo.backends.cuda import driver, raw_module
from bandpo.error import BrokenExtraError, MissingExtraError

THREADS = 256
"""Threads of a block, as in ``cuda/``."""

WIDTH = 4
"""Tokens that a thread of the loss reads at a time, as in ``cuda/``."""

CHUNK = 8192
"""Max tokens that a block of the loss adds up, as in ``cuda/``."""

COMPILER_OPTIONS = ("-std=c++17", "-fmad=false")
"""No fused multiply-adds, so that float32 has the bits that it has in Rust."""

BLOCKS_A_PROCESSOR = 8
"""Max blocks of a launch. Each copies the table to shared memory, so more would cost more."""

TOTALS_KERNEL = "bandpo::policy_loss_totals<float>"
"""The kernel that every loss needs."""

Run = Callable[[int, int, int, str, tuple[float, ...], int], None]
"""A kernel on a device, of grid, threads, stream's handle, types, arguments and shared bytes."""

LAUNCHERS: dict[str, Callable[[str, int, tuple[str, ...]], Run]] = {
    "cuda-bindings": driver.load,
    "cupy": raw_module.load,
}
"""Functions of kernel, index of a device and options of the compiler, by name of the package."""


class Launcher(NamedTuple):
    """The package that loads kernels here."""

    name: str
    refused: dict[str, str]
    """Those before it, with the reasons."""


class _Compiled(NamedTuple):
    run: Run
    max_blocks: int


def launch(
    kernel: str,
    device: torch.device,
    blocks: int,
    types: str,
    arguments: tuple[float, ...],
    shared_bytes: int = 0,
) -> None:
    """Enqueues a kernel on torch's current stream of a device.

    Tensors allocated for that stream may be released at once, because the allocator reuses their
    memory in the order of the stream.

    Args:
        kernel: Name of an instance of a template in ``cuda/``.
        device: A CUDA device.
        blocks: Blocks that the work needs; fewer run, and each strides over the work.
        types: Those of the kernel's parameters, a character each, as `struct` and numpy name them:
            P for a pointer, q for int64, i for int32, I for uint32, f and d for floats.
        arguments: Numbers of these types; a pointer is an address.
        shared_bytes: Dynamic shared memory of a block.

    Raises:
        KernelError: If the compiler or the driver refuses it.
        MissingExtraError: If no launcher is installed.
        BrokenExtraError: If none can be used.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    run, max_blocks = compiled(kernel, index)
    grid = max(1, min(blocks, max_blocks))
    run(grid, THREADS, _stream(index), types, arguments, shared_bytes)


def _stream(index: int) -> int:
    """The handle of torch's current stream of a device."""
    try:
        # As code that torch generates; the public way makes an object, which takes longer.
        return torch._C._cuda_getCurrentRawStream(index)
    except AttributeError:
        return torch.cuda.current_stream(index).cuda_stream


@cache
def compiled(kernel: str, device_index: int) -> _Compiled:
    """Compiles and loads a kernel for a device."""
    run = _loaded(launcher().name, kernel, device_index)
    processors = torch.cuda.get_device_properties(device_index).multi_processor_count
    return _Compiled(run, BLOCKS_A_PROCESSOR * processors)


@cache
def _loaded(name: str, kernel: str, device_index: int) -> Run:
    return LAUNCHERS[name](kernel, device_index, COMPILER_OPTIONS)


@cache
def launcher() -> Launcher:
    """Returns the first launcher that loads a kernel on torch's current device.

    Raises:
        MissingExtraError: If none is installed.
        BrokenExtraError: If one is installed and none can be used.
    """
    refused: dict[str, str] = {}
    missing = set()
    for name in LAUNCHERS:
        try:
            _loaded(name, TOTALS_KERNEL, torch.cuda.current_device())
        except Exception as reason:  # each part of a package has its own class
            refused[name] = str(reason).strip().partition("\n")[0]
            # A package of NVIDIA's, such as cuda-pathfinder, makes ``cuda`` without ``bindings``.
            names = ("cupy", "cuda", "cuda.bindings")
            if isinstance(reason, ModuleNotFoundError) and reason.name in names:
                refused[name] = "not installed"
                missing.add(name)
        else:
            return Launcher(name, refused)
    if missing == set(LAUNCHERS):
        raise MissingExtraError("cuda-bindings", extra())
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise BrokenExtraError(f"the kernels of bandpo[{extra()}] cannot be loaded: {reasons}")


def extra() -> str:
    """Returns the name of the extra for this torch."""
    version = torch.version.cuda
    # A newer CUDA than 13 runs code for 13.
    return "cuda12" if version and int(version.partition(".")[0]) <= 12 else "cuda13"
