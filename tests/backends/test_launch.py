"""Launches of kernels by ``cuda.bindings`` on a stub of the driver; the choice of a launcher.

The stub runs kernels in the emulator, from the arguments as they are packed. The bindings are a
stub too, and those of NVIDIA if they are installed.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
from bandpo.backends.cuda import availability, compiler, driver, kernels, launch, raw_module
from bandpo.backends.native import token_loss_op
from bandpo.error import BrokenExtraError, InvalidValueError, KernelError, MissingExtraError
from bandpo.tensors.bounds import bounds_of
from conftest import SANITIZED
from support import stub_cuda
from support.batches import random_batch
from support.emulated import Emulator
from support.stub_cuda import Status, StubDriver, StubNvrtc

KL = bandpo.Band("kl", 0.05)
CPU = torch.device("cpu")
PROCESSORS = 2
STREAM = 2**47 + 77

pytestmark = pytest.mark.skipif(SANITIZED, reason="no kernel of its own")


class Device:
    """Simulated devices of torch with the stubs of CUDA's libraries."""

    def __init__(self, driver: StubDriver, bindings: Any, nvrtc: StubNvrtc) -> None:
        self.driver = driver
        self.bindings = bindings  # the driver as Python calls it
        self.nvrtc = nvrtc
        self.index = 0


def simulate_torch(device: Device, patch: pytest.MonkeyPatch) -> None:
    """Two devices of torch, sm_90 and sm_80."""
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch.version, "hip", None)
    patch.setattr(torch.cuda, "device_count", lambda: 2)
    patch.setattr(torch.cuda, "current_device", lambda: device.index)
    patch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - index, 0))
    properties = SimpleNamespace(multi_processor_count=PROCESSORS)
    patch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    streams = "_cuda_getCurrentRawStream"
    patch.setattr(torch._C, streams, lambda index: STREAM + index, raising=False)


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory, library: Path) -> ctypes.CDLL:
    """The stub of the driver, which has to be the only one in this process."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return stub_cuda.library(tmp_path_factory.mktemp("driver"))
    return pytest.skip("there is a driver of NVIDIA")


@pytest.fixture(params=["stub", "NVIDIA's bindings"])
def device(
    request: pytest.FixtureRequest,
    libcuda: ctypes.CDLL,
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Device]:
    stub = StubDriver(libcuda, Emulator(library))
    bindings: Any = stub
    if request.param != "stub":
        reason = "needs cuda.bindings: pip install '.[nvrtc]'"
        bindings = pytest.importorskip("cuda.bindings.driver", reason=reason)
    device = Device(stub, bindings, StubNvrtc())
    simulate_torch(device, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(driver, "driver_module", lambda: bindings)
    monkeypatch.setattr(compiler, "nvrtc_module", lambda: device.nvrtc)
    forget(monkeypatch)
    assert stub.current() == 0
    yield device
    assert stub.current() == 0


def forget(patch: pytest.MonkeyPatch) -> None:
    """What a process has found and loaded is found and loaded again."""
    for name in ("compiled", "_loaded", "launcher"):
        patch.setattr(launch, name, cache(getattr(launch, name).__wrapped__))


def loss(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A loss by the kernels, and by Rust."""
    old, new, advantages, valid = random_batch(shape, 3, torch.float32, extremes=True)
    bounds = bounds_of(KL, old)
    old, new = old.to(dtype), new.to(dtype)
    more = advantages, valid, bounds, "min-clip", [3.0], True
    found = kernels.token_loss(old, new, None, *more)
    return found, token_loss_op(old.float(), new.float(), None, *more)


def check(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
    found, wanted = loss(shape, dtype)
    for mine, rusts in zip(found[:3], wanted[:3], strict=True):
        assert torch.equal(mine.nan_to_num(nan=12345.0), rusts.nan_to_num(nan=12345.0))


class TestBindings:
    def test_a_loss_is_that_of_rust(self, device: Device) -> None:
        """On the grid, threads, stream and device that torch has now."""
        check((5, 8192))
        (kernel, *first), (totals, *second) = device.driver.log
        assert kernel.startswith("bandpo::policy_loss<float, bandpo::Table")
        assert totals == launch.TOTALS_KERNEL
        words = bounds_of(KL, torch.zeros(1)).numel()
        max_blocks = launch.BLOCKS_A_PROCESSOR * PROCESSORS
        assert first == [0, max_blocks, launch.THREADS, 4 * words, STREAM]
        assert second == [0, max_blocks, launch.THREADS, 0, STREAM]

    def test_kernels_of_every_type_of_argument(self, device: Device) -> None:
        check((2, 100), torch.bfloat16)
        old = torch.linspace(-5.0, -0.1, 50, dtype=torch.float64)
        bounds = kernels.log_bounds(bandpo.Band("renyi:2", 0.1), old)  # float64 by value
        assert bounds is not None
        wanted = bandpo.Band("renyi:2", 0.1).log_bounds(old.numpy())
        np.testing.assert_allclose(bounds.numpy(), wanted, rtol=1e-10)
        moved, _ = kernels.clipped(
            torch.tensor([-0.25, 0.5], dtype=torch.float64), old, 10.0 * old, False
        )
        assert torch.equal(moved, (10.0 * old).clamp(-0.25, 0.5))

    def test_every_device_has_kernels_of_its_own(self, device: Device) -> None:
        for device.index in (0, 1, 0, 1):
            check((1, 9))
        assert [entry[1] for entry in device.driver.log] == [0, 0, 1, 1, 0, 0, 1, 1]
        assert [entry[5] - STREAM for entry in device.driver.log] == [0, 0, 1, 1, 0, 0, 1, 1]
        # The launcher is chosen on one device by a kernel that is loaded on the other later.
        assert sorted(architecture for _, architecture in device.nvrtc.compiled) == [
            "sm_80", "sm_80", "sm_90", "sm_90",
        ]  # fmt: skip

    def test_a_thread_gets_back_its_context(self, device: Device) -> None:
        check((1, 9))
        _, other = device.bindings.cuDevicePrimaryCtxRetain(1)
        device.bindings.cuCtxPushCurrent(other)
        handle = device.driver.current()
        try:
            check((1, 9))  # on device 0
            device.driver.status = Status.CUDA_ERROR_LAUNCH_FAILED
            with pytest.raises(KernelError, match="cuLaunchKernel fails: CUDA_ERROR_LAUNCH_FAILED"):
                check((1, 9))
            assert device.driver.current() == handle
        finally:
            device.bindings.cuCtxPopCurrent()

    def test_a_context_that_is_current_is_not_pushed(
        self, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check((1, 9))
        _, own = device.bindings.cuDevicePrimaryCtxRetain(0)
        device.bindings.cuCtxPushCurrent(own)
        with monkeypatch.context() as patch:
            patch.setattr(device.bindings, "cuCtxPushCurrent", None)
            check((1, 9))
        device.bindings.cuCtxPopCurrent()

    def test_launches_of_two_threads_have_arguments_of_their_own(self, device: Device) -> None:
        """Both have packed theirs before either is read."""
        run, _ = launch.compiled("bandpo::band_clip<float, bandpo::Constant>", 0)
        both = threading.Barrier(2)

        def wait() -> None:
            both.wait(20.0)

        bounds = torch.tensor([-0.25, 0.5])
        log_prob = torch.full((9,), -1.0)
        tensors = [torch.full((9,), value) for value in (0.1, 0.2)]
        moved = [torch.zeros(9) for _ in tensors]

        def one(k: int) -> None:
            pointers = [each.data_ptr() for each in (log_prob, tensors[k], bounds)]
            arguments = *pointers[:2], 9, 0, pointers[2], 0, moved[k].data_ptr()
            run(1, 256, 7, "PPqiPiP", arguments, 0)

        one(0)  # whose memory one of the two takes
        moved[0].zero_()
        device.driver.before = wait
        threads = [threading.Thread(target=one, args=(k,)) for k in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(torch.stack(moved), torch.stack(tensors))

    def test_numbers_keep_every_bit(self, device: Device) -> None:
        """Of each type, next to one another with and without gaps."""
        received: list[bytes] = []
        scalars: tuple[np.generic, ...] = (
            np.int32(-(2**31)), np.uint64(2**64 - 1), np.uint32(2**32 - 1), np.float32(math.inf),
            np.int64(-(2**63)), np.float32(-0.0), np.float64(math.nan), np.float32(2.0**-149),
            np.float32(0.1), np.float32(math.inf),
        )  # fmt: skip
        # The last two are rounded as numpy does it.
        numbers = *(scalar.item() for scalar in scalars[:-2]), 0.1, 1e40
        types = "iPIfqfdfff"

        class Recorder(StubDriver):
            def _launched(self, *given: Any) -> int:
                addresses = (ctypes.c_void_p * len(scalars)).from_address(given[-1])
                for address, number in zip(addresses, scalars, strict=True):
                    received.append(ctypes.string_at(address or 0, number.nbytes))
                    assert (address or 0) % number.nbytes == 0
                return 0

        recorder = Recorder(device.driver._library, device.driver._emulator)
        for _ in range(2):  # the second in the memory of the first
            launch.launch("anything", torch.device("cuda", 0), 1, types, numbers)
        assert received == [scalar.tobytes() for scalar in scalars] * 2
        assert recorder.log == []

    def test_another_process_compiles_nothing(
        self, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check((1, 9))
        assert len(device.nvrtc.compiled) == 2
        forget(monkeypatch)
        check((1, 9))
        assert len(device.nvrtc.compiled) == 2
        device.nvrtc.version = (13, 1)
        forget(monkeypatch)
        check((1, 9))
        assert len(device.nvrtc.compiled) == 4

    def test_a_damaged_file_is_compiled_again(
        self, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check((1, 9))
        for path in tmp_path.glob("bandpo/*.cubin"):
            path.write_bytes(path.read_bytes()[:-1])
        forget(monkeypatch)
        check((1, 9))
        assert len(device.nvrtc.compiled) == 4

    def test_errors_have_code_and_reason(self, device: Device) -> None:
        assert launch.launcher().name == "cuda-bindings"
        device.nvrtc.error = b"bandpo.cu(7): note\nbandpo.cu(9): error: no such thing\nmore"
        with pytest.raises(
            KernelError, match=r"NVRTC_ERROR_COMPILATION: bandpo.cu\(9\): error: no"
        ):
            launch.compiled("bandpo::nothing", 0)
        device.nvrtc.error = None
        device.nvrtc.image = b"nonsense"
        with pytest.raises(KernelError, match="cuModuleLoadData fails: CUDA_ERROR_INVALID_IMAGE"):
            launch.compiled("bandpo::nothing", 0)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two devices of torch, and what the launchers return or raise, by name."""
    simulate_torch(SimpleNamespace(index=0), monkeypatch)  # type: ignore[arg-type]
    outcome: dict[str, Any] = {"cuda-bindings": lambda *call: None, "cupy": lambda *call: None}

    def load(name: str) -> Any:
        def loaded(*call: Any) -> Any:
            if isinstance(outcome[name], Exception):
                raise outcome[name]
            return outcome[name]

        return loaded

    monkeypatch.setattr(launch, "LAUNCHERS", {name: load(name) for name in launch.LAUNCHERS})
    forget(monkeypatch)
    # The one that availability has imported.
    monkeypatch.setattr(availability, "launcher", launch.launcher)
    return outcome


def absent(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


class TestChoice:
    def test_the_bindings_come_first(self, simulated: dict[str, Any]) -> None:
        assert launch.launcher() == ("cuda-bindings", {})
        assert availability.obstacle() is None

    @pytest.mark.parametrize("name", ["cuda", "cuda.bindings"])
    def test_cupy_comes_second(self, name: str, simulated: dict[str, Any]) -> None:
        simulated["cuda-bindings"] = absent(name)
        assert launch.launcher() == ("cupy", {"cuda-bindings": "not installed"})
        assert availability.obstacle() is None

    def test_bindings_that_cannot_load_a_kernel_are_passed_over(
        self, simulated: dict[str, Any]
    ) -> None:
        simulated["cuda-bindings"] = KernelError("cuModuleLoadData fails: X\nmore")
        assert launch.launcher() == ("cupy", {"cuda-bindings": "cuModuleLoadData fails: X"})

    @pytest.mark.parametrize(
        ("version", "extra"),
        [("11.8", "cuda12"), ("12.9", "cuda12"), ("13.0", "cuda13"), ("14.1", "cuda13")],
    )
    def test_without_both_an_extra_that_exists_is_named(
        self,
        version: str,
        extra: str,
        simulated: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch.version, "cuda", version)
        simulated |= {"cuda-bindings": absent("cuda.bindings"), "cupy": absent("cupy")}
        reason = availability.obstacle()
        assert isinstance(reason, MissingExtraError)
        assert (reason.module, reason.extra) == ("cuda-bindings", extra)
        project = Path(__file__).parents[2] / "pyproject.toml"
        assert f"\n{extra} = [" in project.read_text(encoding="utf-8")

    def test_both_reasons_are_given_if_one_is_broken(self, simulated: dict[str, Any]) -> None:
        simulated |= {"cuda-bindings": absent("cuda"), "cupy": OSError("no libnvrtc.so")}
        reason = availability.obstacle()
        assert isinstance(reason, BrokenExtraError)
        assert str(reason) == (
            "the kernels of bandpo[cuda13] cannot be loaded: cuda-bindings: not installed; "
            "cupy: no libnvrtc.so"
        )
        # A module that is missing in an installed package is no missing package.
        simulated |= {"cuda-bindings": absent("cuda.pathfinder"), "cupy": absent("cupy")}
        reason = availability.obstacle()
        assert isinstance(reason, BrokenExtraError)
        assert "cuda-bindings: No module named 'cuda.pathfinder'; cupy: not" in str(reason)

    def test_a_first_use_in_a_graph_is_refused_and_is_no_obstacle_later(
        self, simulated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A driver that captures a stream loads no kernel."""
        simulated["cuda-bindings"] = KernelError("cuModuleLoadData fails")
        simulated["cupy"] = absent("cupy")
        kernels_run = cache(availability.kernels_run.__wrapped__)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(InvalidValueError, match="once before a CUDA graph"):
            kernels_run()
        simulated["cuda-bindings"] = lambda *call: None
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert kernels_run()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert kernels_run()

    def test_torch_and_device_are_the_first_reasons(
        self, simulated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        simulated |= {"cuda-bindings": absent("cuda"), "cupy": absent("cupy")}
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert "need a CUDA device and its driver" in str(availability.obstacle())
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "need a torch built with CUDA" in str(availability.obstacle())
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert "built for ROCm" in str(availability.obstacle())


def test_the_names_of_missing_packages_are_those_that_python_reports() -> None:
    """So that a missing launcher is not taken for a broken one."""
    for module, package in ((driver.driver_module, "cuda"), (raw_module.cupy_module, "cupy")):
        name: str | None = package
        try:
            module()
        except ModuleNotFoundError as reason:
            name = reason.name
        assert name in (package, f"{package}.bindings")


def test_the_launchers_are_imported_late() -> None:
    """By torch, if at all: its versions with the bindings import them."""
    code = (
        "import sys, torch\n"
        "def launchers():\n"
        "    return [name for name in sys.modules if name.partition('.')[0] in ('cuda', 'cupy')]\n"
        "before = launchers()\n"
        "import bandpo.backends.select\n"
        "assert launchers() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
