"""Kernels by CuPy, which compiles them at their first use and keeps them on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bandpo import _core
from bandpo.error import KernelError


def cupy_module() -> Any:
    """CuPy, imported late, because that takes longer than importing bandpo."""
    import cupy  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return cupy


def load(
    kernel: str, device_index: int, options: tuple[str, ...]
) -> Callable[[int, int, int, str, tuple[float, ...], int], None]:
    """Compiles a kernel for a device and loads it; see `bandpo.backends.cuda.driver.Kernel`.

    Raises:
        KernelError: If CuPy is older than 14.
        ModuleNotFoundError: If it is not installed.
    """
    cupy = cupy_module()
    of_cupy = cupy.cuda
    if not hasattr(of_cupy.Stream, "from_external"):
        raise KernelError(f"needs CuPy 14 or newer, got {cupy.__version__}")
    with of_cupy.Device(device_index):
        module = cupy.RawModule(
            code=_core.KERNEL_SOURCE, options=options, name_expressions=(kernel,)
        )
        function = module.get_function(kernel)

    def run(
        grid: int,
        threads: int,
        stream: int,
        types: str,
        arguments: tuple[float, ...],
        shared_bytes: int,
    ) -> None:
        scalars = numpy_scalars(types, arguments)
        external = of_cupy.Stream.from_external(_Stream(stream))
        with of_cupy.Device(device_index), external:
            function((grid,), (threads,), scalars, shared_mem=shared_bytes)

    return run


_SCALARS: dict[str, type[np.generic]] = {
    "P": np.uint64,
    "q": np.int64,
    "i": np.int32,
    "I": np.uint32,
    "f": np.float32,
    "d": np.float64,
}


def numpy_scalars(types: str, arguments: tuple[float, ...]) -> tuple[np.generic, ...]:
    """Returns the arguments of `bandpo.backends.cuda.launch.launch` as CuPy takes them."""
    return tuple(_SCALARS[one](number) for one, number in zip(types, arguments, strict=True))


class _Stream(NamedTuple):
    """A stream of torch in CuPy's protocol, which streams of old versions of torch lack."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """Returns the version of the protocol, and the handle."""
        return 0, self.pointer
