"""The kernels through NVIDIA's compiler, as launchers call it, for every architecture.

No GPU is needed. Registers and spills come from the log of its assembler.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch")

import torch

import bandpo
from bandpo import _core
from bandpo.backends.cuda import kernels
from bandpo.backends.cuda.compiler import ADDED_OPTIONS, cubin, nvrtc_module
from bandpo.backends.cuda.launch import COMPILER_OPTIONS, THREADS
from bandpo.backends.cuda.raw_module import cupy_module
from bandpo.backends.native import token_loss_op
from bandpo.error import KernelError
from bandpo.tensors.bounds import MAX_TABLE_WORDS, bounds_of
from support.batches import random_batch
from support.emulated import KERNELS
from support.nvrtc import ADDED_BY_CUPY, compiler, disassembler
from support.sass import PARAMETERS, Machine

ARCHITECTURES = {12: (70, 90, 120), 13: (75, 80, 86, 89, 90, 100, 120)}
"""By the major version of CUDA, what users have; the last line of compilers with sm_70 is 12, of
which the oldest, the newest and one between are compiled."""

REGISTERS_OF_AN_SM = 65536
THREADS_THAT_HIDE_MEMORY = {False: 768, True: 512}
"""Threads of a multiprocessor: with 52 bytes on their way for each, 40 KB, more than twice the
product of its share of the bandwidth (3.4 TB/s by 132 on an H100) and some 600 ns of latency. The
extended kernels, True, have 68 bytes of an anchor's loss on their way, 35 KB."""

SHARED_BYTES = 48 * 1024
"""Of a block, without asking for more: those of the kernel and a table of the largest size."""


class Resources(NamedTuple):
    """Resources of a thread of a kernel, and of its block."""

    registers: int
    shared_bytes: int
    spilled: list[int]  # bytes stored and loaded, by the kernel and by functions that it calls


def resources(log: str) -> dict[str, Resources]:
    """The resources of each kernel by its name in the binary."""
    found = {}
    for text in log.split("Compiling entry function '")[1:]:
        name = text.partition("'")[0]
        [registers] = re.findall(r"Used (\d+) registers", text)
        shared = re.findall(r"(\d+) bytes smem", text)
        spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        assert spilled
        found[name] = Resources(
            int(registers),
            sum(map(int, shared)),
            [int(size) for pair in spilled for size in pair],
        )
    return found


TARGETS = [(major, arch) for major, archs in ARCHITECTURES.items() for arch in archs]


@pytest.mark.parametrize(("major", "architecture"), TARGETS)
def test_every_kernel_compiles_everywhere_without_spills(major: int, architecture: int) -> None:
    nvrtc = compiler(major)
    if nvrtc is None:
        pytest.skip(f"needs NVRTC {major}: pip install '.[nvrtc]'")
    options = [
        *COMPILER_OPTIONS, *ADDED_BY_CUPY, f"-arch=sm_{architecture}", "--ptxas-options=-v",
    ]  # fmt: skip
    log, names, *_ = nvrtc.compile(_core.KERNEL_SOURCE, KERNELS, options)
    warned = [line for line in log.splitlines() if "warning" in line]
    # NVRTC 12 warns that sm_70 is deprecated.
    assert [line for line in warned if "deprecated" not in line] == []
    found = resources(log)
    assert len(set(names)) == len(KERNELS) == len(found)
    for kernel, name in zip(KERNELS, names, strict=True):
        registers, shared_bytes, spilled = found[name]
        assert set(spilled) == {0}, kernel
        assert registers * THREADS <= REGISTERS_OF_AN_SM, kernel
        assert shared_bytes + 4 * MAX_TABLE_WORDS <= SHARED_BYTES, kernel
        if "policy_loss<" in kernel and "double" not in kernel:
            threads = THREADS_THAT_HIDE_MEMORY["EXTENDED" in kernel]
            assert registers * threads <= REGISTERS_OF_AN_SM, kernel


def test_a_spill_is_reported() -> None:
    nvrtc = compiler(13)
    if nvrtc is None:
        pytest.skip("needs NVRTC 13: pip install '.[nvrtc]'")
    options = [*COMPILER_OPTIONS, "-arch=sm_90", "--ptxas-options=-v"]
    one, eight = (f"__launch_bounds__(THREADS, {blocks}) band_solve" for blocks in (1, 8))
    assert one in _core.KERNEL_SOURCE
    source = _core.KERNEL_SOURCE.replace(one, eight)  # so that a thread has 32 registers
    log, [name], *_ = nvrtc.compile(source, ["bandpo::band_solve<double>"], options)
    assert max(resources(log)[name].spilled) > 0


@pytest.mark.parametrize(
    ("stored", "loads", "stores"),
    [("float", 4, 3), ("bandpo::Half", 4, 3), ("bandpo::BFloat16", 4, 3), ("double", 8, 6)],
)
def test_tokens_are_read_and_written_in_vectors(stored: str, loads: int, stores: int) -> None:
    """Log-probs, log-ratios and advantages; losses, gradients and weighted gradients: four tokens
    by one instruction, of float64 by two. Otherwise a warp would write 4 of every 16 bytes at a
    time. The mask of four tokens is one word.
    """
    nvrtc = compiler(13)
    if nvrtc is None:
        pytest.skip("needs NVRTC 13: pip install '.[nvrtc]'")
    options = [*COMPILER_OPTIONS, *ADDED_BY_CUPY, "-arch=sm_90"]
    kernel = f"bandpo::policy_loss<{stored}, bandpo::Table, bandpo::MIN_CLIP_ALONE>"
    ptx = nvrtc.compile(_core.KERNEL_SOURCE, [kernel], options).ptx
    for instruction, wanted in (("ld", loads), ("st", stores)):
        assert len(re.findall(rf"\b{instruction}\.global\.v\d", ptx)) == wanted


class TestMachineCode:
    """Binaries for each architecture that tools/count_sass.py counts, run by tests/support/sass.py.

    All ways through the kernel, those that only a GPU takes included.
    """

    @pytest.fixture(autouse=True)
    def _tools(self) -> None:
        if compiler(13) is None or disassembler() is None:
            pytest.skip("needs NVRTC 13 and nvdisasm: pip install '.[nvrtc]'")

    @staticmethod
    def launch(architecture: int) -> Any:
        from count_sass import binary_of

        def launch(kernel: str, *arguments: Any) -> None:
            program = binary_of(kernel, architecture).program
            Machine(program, architecture, grid=2).launch(kernel, *arguments)

        return launch

    @pytest.mark.parametrize("architecture", PARAMETERS)
    @pytest.mark.parametrize(
        ("dtype", "shape", "rule", "region"),
        [
            (torch.float32, (2, 1024), ("min-clip", [3.0]), bandpo.Band("kl", 0.05)),
            (torch.bfloat16, (2, 300), ("mask", [1.5, 1.0]), bandpo.Band("pearson-chi2", 0.05)),
        ],
        ids=str,
    )
    def test_results_are_those_of_rust(
        self,
        dtype: torch.dtype,
        shape: tuple[int, int],
        rule: tuple[str, list[float]],
        region: bandpo.Region,
        architecture: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(kernels, "launch", self.launch(architecture))
        old, new, advantages, valid = random_batch(shape, 1, torch.float32, extremes=True)
        bounds = bounds_of(region, old)
        old, new = old.to(dtype), new.to(dtype)
        more = advantages, valid, bounds, *rule, True
        found = kernels.token_loss(old, new, None, *more)
        wanted = token_loss_op(old.float(), new.float(), None, *more)
        for mine, rusts in zip(found[:3], wanted[:3], strict=True):
            assert torch.equal(mine.nan_to_num(nan=12345.0), rusts.nan_to_num(nan=12345.0))


class TestBindings:
    """NVIDIA's bindings, by which kernels are compiled at their first use."""

    @pytest.fixture(autouse=True)
    def _bindings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reason = "needs cuda.bindings: pip install '.[nvrtc]'"
        pytest.importorskip("cuda.bindings.nvrtc", reason=reason)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
    @pytest.mark.parametrize("kernel", ["policy_loss_totals<double>", "band_bounds<bandpo::Half>"])
    def test_machine_code_is_that_of_the_compiler_alone(
        self, kernel: str, architecture: str
    ) -> None:
        kernel = f"bandpo::{kernel}"
        _, major, _ = nvrtc_module().nvrtcVersion()
        nvrtc = compiler(major)
        assert nvrtc is not None
        options = [*COMPILER_OPTIONS, *ADDED_BY_CUPY, f"-arch={architecture}"]
        wanted = nvrtc.compile(_core.KERNEL_SOURCE, [kernel], options)
        found = [cubin(kernel, architecture, COMPILER_OPTIONS) for _ in range(2)]
        assert found[0] == found[1]  # the second from the cache
        assert found[0].name == wanted.names[0]
        # Local symbols have eight digits that depend on the time.
        own, others = (
            re.sub(rb"bandpo_cu_[0-9a-f]{8}", b"bandpo_cu_", code)
            for code in (found[0].code, wanted.binary)
        )
        assert own == others
        assert len(own) > 10_000

    def test_refusals_have_the_first_error(self) -> None:
        with pytest.raises(KernelError, match=r"error: namespace .bandpo. has no member"):
            cubin("bandpo::nothing", "sm_90", COMPILER_OPTIONS)
        with pytest.raises(KernelError, match=r"invalid value for --gpu-architecture"):
            cubin("bandpo::policy_loss_totals<double>", "sm_1", COMPILER_OPTIONS)

    def test_options_are_those_that_cupy_adds(self) -> None:
        assert {*ADDED_OPTIONS, "--std=c++17"} == set(ADDED_BY_CUPY)


class TestCupy:
    """CuPy itself, as far as it runs without a device."""

    @pytest.fixture(autouse=True)
    def _cupy(self) -> None:
        pytest.importorskip("cupy", reason="needs CuPy: pip install '.[nvrtc]'")

    def test_options_are_those_that_cupy_passes(self) -> None:
        from cupy._core import core

        own = core.assemble_cupy_compiler_options(COMPILER_OPTIONS)
        added = [option for option in own if not option.startswith("-I")]
        assert set(added) <= {*COMPILER_OPTIONS, *ADDED_BY_CUPY}

    def test_the_source_compiles_with_the_headers_of_cupy(self) -> None:
        from cupy._core import core
        from cupy.cuda import nvrtc

        assert nvrtc.getVersion()[0] == 13
        kernel = "bandpo::policy_loss<bandpo::Half, bandpo::Table, bandpo::PLAIN>"
        options = (*core.assemble_cupy_compiler_options(COMPILER_OPTIONS), *ADDED_BY_CUPY)
        program = nvrtc.createProgram(_core.KERNEL_SOURCE, "bandpo.cu", (), ())
        nvrtc.addNameExpression(program, kernel)
        nvrtc.compileProgram(program, (*options, "-arch=sm_90"))
        assert nvrtc.getLoweredName(program, kernel).startswith("_ZN6bandpo11policy_loss")
        assert len(nvrtc.getCUBIN(program)) > 1000
        nvrtc.destroyProgram(program)

    def test_cupy_has_the_interface_that_a_launch_uses(self) -> None:
        """None of it is deprecated, because warnings are errors here."""
        import cupy

        assert cupy_module() is cupy
        assert issubclass(cupy.cuda.runtime.CUDARuntimeError, Exception)
        with pytest.raises(TypeError, match="2-tuple"):
            cupy.cuda.Stream.from_external(SimpleNamespace(__cuda_stream__=lambda: 77))
        assert callable(cupy.cuda.Device)
