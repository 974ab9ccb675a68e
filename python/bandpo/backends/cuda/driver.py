"""Kernels by the CUDA driver, through NVIDIA's bindings for Python (``cuda.bindings``).

torch requires the bindings and NVRTC: its wheels for Linux on PyPI do since torch 2.10 on x86-64
(with CUDA 12.8) and since torch 2.11 on ARM as well (with CUDA 13). Those of torch 2.9 bring NVRTC
alone.
"""

from __future__ import annotations

import ctypes
import struct
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from bandpo.backends.cuda.compiler import cubin
from bandpo.error import KernelError


def driver_module() -> Any:
    """The driver of ``cuda.bindings``, imported late, for CUDA tensors alone."""
    from cuda.bindings import driver

    return driver


class Kernel:
    """A kernel that is loaded on a device.

    A call costs the host a few microseconds. It may come from any thread, also while a stream is
    captured to a graph, and waits for nothing.
    """

    def __init__(self, driver: Any, context: Any, function: Any) -> None:
        self._driver = driver
        self._context = context
        self._handle = int(context)
        self._function = function
        self._packer: struct.Struct | None = None
        self._idle: list[_Packed] = []

    def __call__(
        self,
        grid: int,
        threads: int,
        stream: int,
        types: str,
        arguments: tuple[float, ...],
        shared_bytes: int,
    ) -> None:
        """Enqueues the kernel on a stream of its device, given by its handle."""
        driver = self._driver
        # A thread has no context before its first call of the CUDA runtime, or that of another
        # device. It gets back what it has.
        status, current = driver.cuCtxGetCurrent()
        other = status or int(current) != self._handle
        if other:
            _checked(driver, "cuCtxPushCurrent", driver.cuCtxPushCurrent(self._context))
        try:
            packed = self._pack(types, arguments)
            [status] = driver.cuLaunchKernel(
                self._function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, packed.address, 0
            )
            self._idle.append(packed)  # the driver has copied it
            if status:
                _checked(driver, "cuLaunchKernel", (status,))
        finally:
            if other:
                driver.cuCtxPopCurrent()

    def _pack(self, types: str, arguments: tuple[float, ...]) -> _Packed:
        """Arguments in memory that no other thread has, because a launch releases Python's lock."""
        packer = self._packer
        if packer is None:
            packer = self._packer = struct.Struct(types)  # the same at every launch
        try:
            packed = self._idle.pop()
        except IndexError:
            packed = _Packed.of(packer)
        packer.pack_into(packed.values, 0, *arguments)
        return packed


class _Packed(NamedTuple):
    """Arguments of a launch, and the array of their addresses that the driver takes."""

    values: ctypes.Array[ctypes.c_char]
    addresses: ctypes.Array[ctypes.c_void_p]
    address: int

    @classmethod
    def of(cls, packer: struct.Struct) -> _Packed:
        values = ctypes.create_string_buffer(packer.size)
        start = ctypes.addressof(values)
        # The end of a value less its size, because a value is aligned.
        ends = map(struct.calcsize, accumulate(packer.format))
        sizes = map(struct.calcsize, packer.format)
        offsets = [end - size for end, size in zip(ends, sizes, strict=True)]
        addresses = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))
        return cls(values, addresses, ctypes.addressof(addresses))


def load(kernel: str, device_index: int, options: tuple[str, ...]) -> Kernel:
    """Compiles a kernel for a device and loads it.

    Raises:
        KernelError: If NVRTC or the driver refuses it.
        ModuleNotFoundError: If ``cuda.bindings`` is not installed.
    """
    driver = driver_module()
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device_index))
    name, code = cubin(kernel, architecture, options)
    _checked(driver, "cuInit", driver.cuInit(0))
    [device] = _checked(driver, "cuDeviceGet", driver.cuDeviceGet(device_index))
    # The context of torch, which uses the CUDA runtime.
    retained = driver.cuDevicePrimaryCtxRetain(device)
    [context] = _checked(driver, "cuDevicePrimaryCtxRetain", retained)
    _checked(driver, "cuCtxPushCurrent", driver.cuCtxPushCurrent(context))
    try:
        [module] = _checked(driver, "cuModuleLoadData", driver.cuModuleLoadData(code))
        found = driver.cuModuleGetFunction(module, name.encode())
        [function] = _checked(driver, "cuModuleGetFunction", found)
    finally:
        driver.cuCtxPopCurrent()
    return Kernel(driver, context, function)


def _checked(driver: Any, what: str, result: tuple[Any, ...]) -> list[Any]:
    status, *values = result
    if status:
        _, text = driver.cuGetErrorString(status)
        raise KernelError(f"{what} fails: {status.name}: {(text or b'').decode()}")
    return values
