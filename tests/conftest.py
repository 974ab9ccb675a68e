"""What several test files share: the list of divergences and the reference data."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Reference:
    """60-digit bounds of one divergence; every field is an array over the points."""

    spec: str
    logp: NDArray[np.float64]
    delta: NDArray[np.float64]
    log_lower: NDArray[np.float64]
    log_upper: NDArray[np.float64]
    log_lower_rest: NDArray[np.float64]
    log_upper_rest: NDArray[np.float64]


def _read(path: Path) -> Reference:
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    columns = {
        name: np.array([float.fromhex(row[name]) for row in rows])
        for name in rows[0]
        if not name.startswith("kappa")
    }
    return Reference(path.stem.removeprefix("band_").replace("_", ":", 1), **columns)


REFERENCE_FILES = sorted(DATA.glob("band_*.csv"))


@pytest.fixture(params=REFERENCE_FILES, ids=lambda path: path.stem.removeprefix("band_"))
def reference(request: pytest.FixtureRequest) -> Reference:
    return _read(request.param)
