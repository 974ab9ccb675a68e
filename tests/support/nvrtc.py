"""NVIDIA's compiler of kernels and its disassembler, from the libraries in their wheels."""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ADDED_BY_CUPY = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space")
"""Options that CuPy 14 adds to `COMPILER_OPTIONS`, without folders of headers, not used here."""


class Compiled(NamedTuple):
    """Kernels in a binary."""

    log: str
    names: list[str]  # in the binary
    ptx: str
    binary: bytes


class Nvrtc:
    """The compiler of one major version of CUDA, from the library in its wheel."""

    def __init__(self, library: Path) -> None:
        # It finds its builtins, a library beside it, where they are loaded already.
        for builtins in library.parent.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library))

    @property
    def version(self) -> str:
        """Major and minor version."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, source: str, kernels: Sequence[str], options: list[str]) -> Compiled:
        """Compiles kernels to a binary."""
        program = ctypes.c_void_p()
        given = ctypes.byref(program), source.encode(), b"bandpo.cu", 0, None, None
        self._call("nvrtcCreateProgram", *given)
        try:
            for kernel in kernels:
                self._call("nvrtcAddNameExpression", program, kernel.encode())
            strings = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), strings)
            size = ctypes.c_size_t()
            self._call("nvrtcGetProgramLogSize", program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            self._call("nvrtcGetProgramLog", program, log)
            assert status == 0, log.value.decode()
            self._call("nvrtcGetCUBINSize", program, ctypes.byref(size))
            binary = ctypes.create_string_buffer(size.value)
            self._call("nvrtcGetCUBIN", program, binary)
            names = []
            for kernel in kernels:
                name = ctypes.c_char_p()
                self._call("nvrtcGetLoweredName", program, kernel.encode(), ctypes.byref(name))
                assert name.value is not None
                names.append(name.value.decode())
            self._call("nvrtcGetPTXSize", program, ctypes.byref(size))
            ptx = ctypes.create_string_buffer(size.value)
            self._call("nvrtcGetPTX", program, ptx)
            return Compiled(log.value.decode(), names, ptx.value.decode(), binary.raw)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        assert status == 0, f"{name} returned {status}"


def _in_wheels(pattern: str) -> Iterator[Path]:
    """Files of wheels, which install into the namespace package ``nvidia``."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        yield from Path(folder).glob(pattern)


@cache
def compiler(major: int) -> Nvrtc | None:
    """The compiler of a major version of CUDA, None if its wheel is not installed."""
    library = next(_in_wheels(f"*/lib/libnvrtc.so.{major}"), None)
    return None if library is None else Nvrtc(library)


def disassembler() -> Path | None:
    """The path of ``nvdisasm``, None if its wheel is not installed."""
    return next(_in_wheels("*/bin/nvdisasm"), None)


def section(binary: bytes, prefix: str) -> bytes:
    """Returns the first section of a binary, an ELF file of 64 bits, whose name has a prefix."""
    [headers] = struct.unpack_from("<Q", binary, 0x28)
    size, number, names = struct.unpack_from("<HHH", binary, 0x3A)
    found = [struct.unpack_from("<IIQQQQ", binary, headers + size * k) for k in range(number)]
    start_of_names = found[names][4]
    for name, _, _, _, start, length in found:
        at = start_of_names + name
        if binary[at : binary.index(b"\0", at)].decode().startswith(prefix):
            return binary[start : start + length]
    return b""


def disassembled(binary: bytes) -> str:
    """Returns the text of ``nvdisasm`` for a binary."""
    program = disassembler()
    assert program is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(program), "--print-code", "--no-dataflow", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
