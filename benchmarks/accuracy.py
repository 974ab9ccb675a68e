"""Errors of bounds and tables, tracked like times."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import bandpo
from benchmarks.solver import DIVERGENCES
from benchmarks.tokens import DELTA

ROOT = Path(__file__).resolve().parents[1]


class Bounds:
    """Exact bounds against the 60-digit references in tests/data."""

    params: ClassVar = [DIVERGENCES]
    param_names: ClassVar = ["divergence"]

    def setup(self, divergence: str) -> None:
        """Compares all bounds with a reference; raises NotImplementedError without one."""
        path = ROOT / "tests" / "data" / f"band_{divergence.replace(':', '_')}.csv.gz"
        if not path.exists():
            raise NotImplementedError(f"there is no reference of {divergence}")
        sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]
        import make_accuracy

        from conftest import read_reference
        from support.contract import ILL_CONDITIONED

        measured = make_accuracy.compare(read_reference(path))
        self.ulp = measured.ulp[measured.kappa <= ILL_CONDITIONED]
        self.outside = measured.outside()

    def track_max_ulp_error(self, *_: object) -> float:
        """Returns the max error of a log bound that is not ill-conditioned."""
        return float(self.ulp.max())

    def track_outside(self, *_: object) -> int:
        """Returns the number of bounds outside the exact one."""
        return self.outside

    track_max_ulp_error.unit = "ulp"  # type: ignore[attr-defined]
    track_outside.unit = "bounds"  # type: ignore[attr-defined]


class Table:
    """Tables against exact bounds, at samples in every cell."""

    params: ClassVar = [DIVERGENCES, (1e-4, DELTA, 1.0)]
    param_names: ClassVar = ["divergence", "delta"]

    def track_max_error(self, divergence: str, delta: float) -> float:
        """Returns the max error of log_upper and of lower, beyond one float32 ulp."""
        return max(bandpo.Band(divergence, delta).table().max_error)

    track_max_error.unit = "absolute error"  # type: ignore[attr-defined]
