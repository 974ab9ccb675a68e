"""``cuda.bindings`` without a GPU: a stub of NVRTC, and a stub of the driver in the emulator.

The driver is a library by the name of NVIDIA's, so the real bindings run on it as well.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

from bandpo import _core
from bandpo.backends.cuda.compiler import ADDED_OPTIONS
from bandpo.backends.cuda.launch import COMPILER_OPTIONS
from support.emulated import Emulator

_SOURCE = Path(__file__).with_name("stub_driver.cpp")

_LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint,
    ctypes.c_size_t, ctypes.c_void_p,
)  # fmt: skip


class Status(IntEnum):
    """Codes of NVRTC and of the driver."""

    SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    NVRTC_ERROR_COMPILATION = 6
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_LAUNCH_FAILED = 719


class StubNvrtc:
    """NVRTC of ``cuda.bindings`` that returns the name of a kernel in place of machine code."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, str]] = []  # kernels and architectures
        self.version = (13, 0)
        self.error: bytes | None = None
        self.image = b"\x7fELF"

    def nvrtcVersion(self) -> tuple[Any, ...]:  # noqa: N802
        return Status.SUCCESS, *self.version

    def nvrtcCreateProgram(  # noqa: N802
        self, source: bytes, name: bytes, count: int, headers: list[bytes], names: list[bytes]
    ) -> tuple[Any, ...]:
        assert source.decode() == _core.KERNEL_SOURCE
        assert (name, count, headers, names) == (b"bandpo.cu", 0, [], [])
        return Status.SUCCESS, SimpleNamespace(kernel=None, compiled=False)

    def nvrtcAddNameExpression(self, program: Any, name: bytes) -> tuple[Any, ...]:  # noqa: N802
        program.kernel = name
        return (Status.SUCCESS,)

    def nvrtcCompileProgram(  # noqa: N802
        self, program: Any, count: int, options: list[bytes]
    ) -> tuple[Any, ...]:
        *given, architecture = (option.decode() for option in options)
        assert count == len(options)
        assert tuple(given) == (*COMPILER_OPTIONS, *ADDED_OPTIONS)
        if self.error is not None:
            return (Status.NVRTC_ERROR_COMPILATION,)
        self.compiled.append((program.kernel.decode(), architecture.removeprefix("-arch=")))
        program.compiled = True
        return (Status.SUCCESS,)

    def nvrtcGetProgramLogSize(self, program: Any) -> tuple[Any, ...]:  # noqa: N802
        return Status.SUCCESS, len(self.error or b"") + 1

    def nvrtcGetProgramLog(self, program: Any, log: bytearray) -> tuple[Any, ...]:  # noqa: N802
        log[:] = (self.error or b"") + b"\0"
        return (Status.SUCCESS,)

    def nvrtcGetLoweredName(self, program: Any, name: bytes) -> tuple[Any, ...]:  # noqa: N802
        assert program.compiled
        return Status.SUCCESS, b"_Z" + name

    def nvrtcGetCUBINSize(self, program: Any) -> tuple[Any, ...]:  # noqa: N802
        return Status.SUCCESS, len(self.image + program.kernel)

    def nvrtcGetCUBIN(self, program: Any, code: bytearray) -> tuple[Any, ...]:  # noqa: N802
        code[:] = self.image + program.kernel
        return (Status.SUCCESS,)

    def nvrtcDestroyProgram(self, program: Any) -> tuple[Any, ...]:  # noqa: N802
        return (Status.SUCCESS,)


@cache
def library(folder: Path) -> ctypes.CDLL:
    """The stub of the driver, compiled and loaded as ``libcuda.so.1``."""
    path = folder / "libcuda.so.1"
    flags = "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"
    subprocess.run(["g++", *flags, f"-Wl,-soname,{path.name}", _SOURCE, "-o", path], check=True)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


class StubDriver:
    """The driver of ``cuda.bindings`` on the stub.

    Attributes:
        log: Launches: kernel, device, grid, threads, shared bytes and stream.
        status: What a launch returns.
        before: Called by a launch before it reads its arguments.
    """

    def __init__(self, library: ctypes.CDLL, emulator: Emulator) -> None:
        self._library = library
        self._emulator = emulator
        self._one = Lock()  # the emulator runs one kernel at a time
        self.log: list[tuple[str, int, int, int, int, int]] = []
        self.status = Status.SUCCESS
        self.before: Callable[[], None] = lambda: None
        self._callback = _LAUNCHED(self._launched)  # which the library does not keep
        library.stub_reset(self._callback)

    def _launched(
        self, name: bytes, device: int, grid: int, threads: int, shared: int, stream: int, at: int
    ) -> int:
        self.before()
        kernel = name.decode().removeprefix("_Z")
        self.log.append((kernel, device, grid, threads, shared, stream))
        with self._one:
            self._emulator.launch_packed(kernel, grid, threads, at, shared)
        return self.status

    def current(self) -> int:
        """The context of this thread, 0 if there is none."""
        [_, context] = self.cuCtxGetCurrent()
        return int(context)

    def _call(self, name: str, *arguments: Any) -> Status:
        return Status(getattr(self._library, name)(*arguments))

    def _made(self, name: str, *arguments: Any) -> tuple[Status, int]:
        """A call that writes a handle."""
        handle = ctypes.c_void_p()
        status = self._call(name, ctypes.byref(handle), *arguments)
        return status, handle.value or 0

    def cuInit(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return (self._call("cuInit", flags),)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:  # noqa: N802
        device = ctypes.c_int()
        return self._call("cuDeviceGet", ctypes.byref(device), ordinal), device.value

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        return self._made("cuDevicePrimaryCtxRetain", device)

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:  # noqa: N802
        return self._made("cuCtxGetCurrent")

    def cuCtxPushCurrent(self, context: Any) -> tuple[Any, ...]:  # noqa: N802
        return (self._call("cuCtxPushCurrent", ctypes.c_void_p(int(context))),)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:  # noqa: N802
        return self._made("cuCtxPopCurrent")

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:  # noqa: N802
        return self._made("cuModuleLoadData", image)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, ...]:  # noqa: N802
        return self._made("cuModuleGetFunction", ctypes.c_void_p(module), name)

    def cuLaunchKernel(self, function: int, *given: Any) -> tuple[Any, ...]:  # noqa: N802
        *sizes, stream, arguments, extra = given
        numbers = map(ctypes.c_uint, sizes)
        pointers = map(ctypes.c_void_p, (stream, arguments, extra))
        return (self._call("cuLaunchKernel", ctypes.c_void_p(function), *numbers, *pointers),)

    def cuGetErrorString(self, status: int) -> tuple[Any, ...]:  # noqa: N802
        text = ctypes.c_char_p()
        return self._call("cuGetErrorString", int(status), ctypes.byref(text)), text.value
