"""Reports of doctor, with GPUs and drivers that are simulated."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import numpy as np
import pytest

import bandpo
from bandpo import doctor
from bandpo.cli import main
from bandpo.error import MissingExtraError

torch = pytest.importorskip("torch")

Report = dict[str, object]


@pytest.fixture
def report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Report]:
    """Returns the report for a number of GPUs, torch's verdict and the obstacle of the kernels."""
    from bandpo.backends import select
    from bandpo.backends.cuda import availability, launch

    def made(gpus: int, gpu: str, obstacle: ImportError | None = None, code: int = 0) -> Report:
        monkeypatch.setattr(doctor, "_driver", lambda: (gpus, "13.0" if gpus else None))
        monkeypatch.setattr(select, "gpu_report", lambda: gpu)
        monkeypatch.setattr(availability, "obstacle", lambda: obstacle)
        taken = launch.Launcher("cupy", {"cuda-bindings": "not installed"})
        monkeypatch.setattr(launch, "launcher", lambda: taken)
        assert main(["doctor", "--json", "--check"]) == code
        found: Report = json.loads(capsys.readouterr().out)
        assert main(["doctor", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == found
        return found

    return made


def test_this_machine_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bandpo"] == bandpo.__version__
    assert found["numpy"] == np.__version__
    assert found["torch"] == torch.__version__
    assert found["backend_cpu"] == "native"
    assert isinstance(found["threads"], int)
    assert isinstance(found["gpus"], int)
    assert found["simd"] in ("portable", "avx2", "avx512")
    assert (found["gpu"] is not None) == (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )
    assert all(name == name.lower() and " " not in name for name in found)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["bandpo", bandpo.__version__]
    assert any(line.startswith("GPU ") for line in lines)


def test_without_a_gpu_nothing_is_recommended(
    report: Callable[..., Report], capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(0, "not usable: torch is built without CUDA", MissingExtraError("cupy", "x"))
    assert (found["gpu"], found["backend_gpu"], found["problems"]) == (None, None, [])
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "none found" in text
    assert "pip install" not in text


def test_a_gpu_that_torch_cannot_use_is_a_problem(report: Callable[..., Report]) -> None:
    found = report(2, "not usable: torch is built without CUDA", code=1)
    assert found["problems"] == ["torch cannot use the GPU: torch is built without CUDA"]
    assert (found["gpus"], found["cuda_driver"], found["backend_gpu"]) == (2, "13.0", None)


def test_a_gpu_whose_kernels_cannot_run_is_a_problem(report: Callable[..., Report]) -> None:
    found = report(1, "usable: H100", MissingExtraError("cuda-bindings", "cuda13"), code=1)
    assert (found["gpu"], found["backend_gpu"], found["launcher"]) == ("H100", "torch", None)
    assert found["problems"] == [
        "the kernels for the GPU cannot run: cuda-bindings is not installed; run: pip install "
        "'.[cuda13]' in a checkout of bandpo, which is not on PyPI yet"
    ]


def test_a_gpu_that_works_takes_the_kernels(
    report: Callable[..., Report], capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(1, "usable: H100")
    assert (found["gpu"], found["backend_gpu"], found["problems"]) == ("H100", "cuda", [])
    assert found["launcher"] == "cupy"
    assert found["launchers_refused"] == {"cuda-bindings": "not installed"}
    dtypes = "float32", "float64", "bfloat16", "float16"
    assert found["dtypes_gpu"] == {dtype: dtype for dtype in dtypes}
    half = {"bfloat16": "float32", "float16": "float32"}
    assert found["dtypes_cpu"] == {"float32": "float32", "float64": "float64", **half}
    assert main(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "native: float32 float64, bfloat16 as float32, float16 as float32" in text
    assert "cuda: float32 float64 bfloat16 float16; kernels loaded by cupy (cuda-" in text


def test_a_gpu_of_another_maker_takes_torch(report: Callable[..., Report]) -> None:
    found = report(0, "usable: MPS")
    assert (found["gpu"], found["backend_gpu"], found["problems"]) == ("MPS", "torch", [])


def test_without_torch_the_loss_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name.startswith(("bandpo.backends", "bandpo.tensors")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor", "--check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["backend_cpu"] is None
    [problem] = found["problems"]
    assert problem.startswith("the loss cannot run: torch is not installed")
