"""How far an implementation is from the vectors, in units in the last place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from bandpo.conform.batch import LossOf, Outcome, is_half, run
from bandpo.conform.vectors import Vector

MAX_ULP = 128.0
"""Max distance of a value that agrees.

A table puts a bound, and so a loss, off by 1e-6 at most, which is 17 ulp of float32. The gradient
of spo cancels next to its bound, to 53 ulp in these batches. The rest is room for the exp of other
libraries.
"""

HALF_ULP = 2.0**16
"""An ulp of bfloat16 in ulp of float32."""


class Verdict(NamedTuple):
    """The comparison of one vector."""

    preset: str
    case: str
    mode: str
    loss_ulp: float  # infinite where a value is not finite, or raised
    gradient_ulp: float
    finite: bool
    counts_agree: bool
    error: str = ""
    known: str = ""  # why it is not expected to agree

    @property
    def agrees(self) -> bool:
        """True if both distances are at most `MAX_ULP` and the counts are the same."""
        return max(self.loss_ulp, self.gradient_ulp) <= MAX_ULP and self.counts_agree


class Report(NamedTuple):
    """The comparison of an implementation."""

    name: str
    verdicts: list[Verdict]
    note: str = ""

    @property
    def agrees(self) -> bool:
        """True if every vector does, but for those with a known reason."""
        return all(verdict.agrees or verdict.known for verdict in self.verdicts)


def distance(actual: Any, expected: Any, size: Any, half: bool = False) -> float:
    """Returns the max distance in ulp of float32, or of bfloat16, at a size of each value.

    Args:
        actual: Values of an implementation.
        expected: Values of the vectors.
        size: What the ulp is taken at, where it is larger than the expected value.
        half: Take the ulp of bfloat16.
    """
    at = np.maximum(np.abs(np.asarray(expected, dtype=np.float64)), size)
    at = np.maximum(at, float(np.finfo(np.float32).tiny))
    ulp = np.exp2(np.floor(np.log2(at)) - 23) * (HALF_ULP if half else 1.0)
    with np.errstate(invalid="ignore"):
        off = np.abs(np.asarray(actual, dtype=np.float64) - expected) / ulp
    return float(np.where(np.isfinite(off), off, np.inf).max(initial=0.0))


def compared(vector: Vector, outcome: Outcome) -> Verdict:
    """Returns the comparison of what an implementation made of a vector."""
    counts = outcome.counts
    return Verdict(
        vector.preset,
        vector.case,
        vector.mode,
        distance(outcome.loss, vector.loss, vector.loss_size),
        distance(outcome.gradient, vector.gradient, 0.0, is_half(vector)),
        bool(np.isfinite(outcome.loss) and np.isfinite(outcome.gradient).all()),
        counts is None or bool((counts[:2] == vector.counts[:2]).all()),
    )


def report(
    name: str,
    vectors: Iterable[Vector],
    loss_of: Callable[[Vector], LossOf | None],
    device: str = "cpu",
    known: Mapping[tuple[str, str], str] = MappingProxyType({}),
) -> Report:
    """Returns the comparison of an implementation with the vectors that it has a rule for.

    Args:
        name: The name of the implementation.
        vectors: The vectors.
        loss_of: Its loss of a vector's preset, or None where it has none.
        device: Where it runs.
        known: Why a preset and a case are not expected to agree.
    """
    verdicts = _verdicts(vectors, loss_of, device)
    return Report(
        name, [each._replace(known=known.get((each.preset, each.case), "")) for each in verdicts]
    )


def _verdicts(
    vectors: Iterable[Vector], loss_of: Callable[[Vector], LossOf | None], device: str
) -> Iterator[Verdict]:
    for vector in vectors:
        found = loss_of(vector)
        if found is None:
            continue
        try:
            outcome = run(vector, found, device)
        except Exception as error:  # code of others may raise anything
            place = vector.preset, vector.case, vector.mode
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Verdict(*place, np.inf, np.inf, False, False, text)
        else:
            yield compared(vector, outcome)
