"""Shared by several test files: the reference data, and the devices of CUDA kernels."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from support.emulated import SANITIZERS, Emulator, build, missing_compiler

if TYPE_CHECKING:
    import torch

DATA = Path(__file__).parent / "data"

BACKENDS = ("native", "torch")
"""Backends of a loss that run on a CPU."""

SANITIZED = "BANDPO_SANITIZED" in os.environ
"""True if the emulator runs under sanitizers, which have to be loaded before Python."""


@dataclass(frozen=True)
class Reference:
    """60-digit bounds of one divergence; every field is an array over the points.

    The exact log bound is the float64 plus its rest. kappa is its condition number.
    """

    spec: str
    logp: NDArray[np.float64]
    delta: NDArray[np.float64]
    log_lower: NDArray[np.float64]
    log_upper: NDArray[np.float64]
    log_lower_rest: NDArray[np.float64]
    log_upper_rest: NDArray[np.float64]
    kappa_lower: NDArray[np.float64]
    kappa_upper: NDArray[np.float64]


@cache
def read_reference(path: Path) -> Reference:
    """Reads a file that tools/make_reference.py wrote."""
    with gzip.open(path, "rt", encoding="ascii") as file:
        lines = [line.rstrip("\n").split(",") for line in file if not line.startswith("#")]
    columns = {}
    for name, *values in zip(*lines, strict=True):
        read = float if name.startswith("kappa") else float.fromhex
        columns[name] = np.array([read(value) for value in values])
    spec = path.name.removeprefix("band_").removesuffix(".csv.gz").replace("_", ":", 1)
    return Reference(spec, **columns)


REFERENCE_FILES = sorted(DATA.glob("band_*.csv.gz"))


@pytest.fixture(
    params=REFERENCE_FILES,
    ids=lambda path: path.name.removeprefix("band_").removesuffix(".csv.gz"),
)
def reference(request: pytest.FixtureRequest) -> Reference:
    return read_reference(request.param)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := missing_compiler():
        pytest.skip(reason)
    flags = SANITIZERS if SANITIZED else ()
    return build(tmp_path_factory.mktemp("kernels"), flags=flags)


@pytest.fixture
def emulator(library: Path, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """Runs the CUDA kernels on tensors of the CPU."""
    from bandpo.backends.cuda import kernels

    emulator = Emulator(library)
    monkeypatch.setattr(kernels, "launch", emulator.launch)
    return emulator


@pytest.fixture
def gpu() -> torch.device:
    """A GPU, if there is one."""
    import torch

    from bandpo.backends.cuda.availability import obstacle

    if SANITIZED:
        pytest.skip("the sanitizers check the emulator alone")
    if reason := obstacle():
        pytest.skip(f"needs a GPU: {reason}")
    return torch.device("cuda")
