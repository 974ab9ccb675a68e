"""The kernels through NVIDIA's compiler, as CuPy calls it, for every architecture, without a GPU.

Registers and spills come from the log of its assembler.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("torch")

from bandpo import _core, cuda
from emulated import KERNELS

ARCHITECTURES = {12: (70, 75, 80, 86, 89, 90, 100, 120), 13: (75, 80, 86, 89, 90, 100, 120)}
"""By the major version of CUDA, what users have; the last line of compilers with sm_70 is 12."""

ADDED_BY_CUPY = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space")
"""What CuPy 14 adds to `bandpo.cuda.COMPILER_OPTIONS`, beside folders of headers, not used here."""

REGISTERS_OF_AN_SM = 65536
THREADS_THAT_HIDE_MEMORY = 768
"""Threads of a multiprocessor: with 52 bytes on their way for each, 40 KB, more than twice the
product of its share of the bandwidth (3.4 TB/s by 132 on an H100) and some 600 ns of latency."""


class Nvrtc:
    """The compiler of one major version of CUDA, from the library in its wheel."""

    def __init__(self, library: Path) -> None:
        # It finds its builtins, a library beside it, where they are loaded already.
        for builtins in library.parent.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library))

    def compile(self, source: str, kernel: str, options: list[str]) -> str:
        """Returns the log of a kernel that was compiled to a binary."""
        program = ctypes.c_void_p()
        given = ctypes.byref(program), source.encode(), b"band.cuh", 0, None, None
        self._call("nvrtcCreateProgram", *given)
        try:
            self._call("nvrtcAddNameExpression", program, kernel.encode())
            strings = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), strings)
            size = ctypes.c_size_t()
            self._call("nvrtcGetProgramLogSize", program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            self._call("nvrtcGetProgramLog", program, log)
            assert status == 0, log.value.decode()
            self._call("nvrtcGetCUBINSize", program, ctypes.byref(size))
            assert size.value > 1000
            return log.value.decode()
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        assert status == 0, f"{name} returned {status}"


@cache
def compiler(major: int) -> Nvrtc | None:
    """That of a wheel, which installs into the namespace package ``nvidia``."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for library in Path(folder).glob(f"*/lib/libnvrtc.so.{major}"):
            return Nvrtc(library)
    return None


def log_of(major: int, architecture: int, kernel: str) -> str:
    nvrtc = compiler(major)
    if nvrtc is None:
        pytest.skip(f"needs NVRTC {major}: pip install '.[nvrtc]'")
    options = [
        *cuda.COMPILER_OPTIONS, *ADDED_BY_CUPY, f"-arch=sm_{architecture}", "--ptxas-options=-v",
    ]  # fmt: skip
    return nvrtc.compile(_core.KERNEL_SOURCE, kernel, options)


def resources(log: str) -> tuple[int, int, int]:
    """Registers of a thread, and bytes spilled and loaded again, in functions that it calls too."""
    [registers] = re.findall(r"Used (\d+) registers", log)
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    stores, loads = (sum(int(pair[side]) for pair in spilled) for side in (0, 1))
    assert spilled
    return int(registers), stores, loads


def check_warnings(log: str) -> None:
    """None, but that NVRTC 12 says of sm_70 that it is old."""
    warned = [line for line in log.splitlines() if "warning" in line]
    assert [line for line in warned if "deprecated" not in line] == []


TARGETS = [(major, arch) for major, archs in ARCHITECTURES.items() for arch in archs]
FLOAT32 = "bandpo::policy_loss<float, bandpo::Table>"


@pytest.mark.parametrize(("major", "architecture"), TARGETS)
@pytest.mark.parametrize("kernel", [FLOAT32, "bandpo::band_solve<double>"])
def test_compiles_everywhere_without_spills(major: int, architecture: int, kernel: str) -> None:
    log = log_of(major, architecture, kernel)
    registers, *spilled = resources(log)
    assert spilled == [0, 0], log
    check_warnings(log)
    if kernel == FLOAT32:
        assert registers * THREADS_THAT_HIDE_MEMORY <= REGISTERS_OF_AN_SM


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_compiles_without_spills(kernel: str) -> None:
    log = log_of(13, 90, kernel)
    registers, *spilled = resources(log)
    assert spilled == [0, 0], log
    check_warnings(log)
    if "policy_loss<" in kernel and "double" not in kernel:
        assert registers * THREADS_THAT_HIDE_MEMORY <= REGISTERS_OF_AN_SM


def test_the_options_are_those_of_cupy() -> None:
    core = pytest.importorskip("cupy._core.core", reason="needs CuPy")
    own = core.assemble_cupy_compiler_options(cuda.COMPILER_OPTIONS)
    added = [option for option in own if not option.startswith("-I")]
    assert set(added) <= {*cuda.COMPILER_OPTIONS, *ADDED_BY_CUPY}
