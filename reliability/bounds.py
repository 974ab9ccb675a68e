"""Exact bounds against ball arithmetic, which encloses D_f.

python -m reliability.bounds --cases 500000
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bandpo import Band, Divergence
from reliability.intervals import excess
from reliability.result import Row, run_cases
from reliability.tokens import NAMES, SEED, log_probs

NORMAL = sys.float_info.min
"""Min delta that keeps all of its digits."""

USUAL = (1e-12, 10.0)
"""Deltas that are counted apart from others."""

TIGHT = 1e-14
"""Relative distance of a bound from the exact one, by docs/accuracy.md, if well-conditioned."""

FARTHER = f"farther in than {TIGHT:g} of it (of a large condition number or next to saturation)"


def _spec(rng: np.random.Generator) -> str:
    kind = int(rng.integers(0, 15))
    if kind < 10:
        return NAMES[kind]
    parameter = {
        10: lambda: (
            f"alpha:{rng.choice([rng.uniform(-4, 5), rng.normal(0, 1e-3), 2.0, -1.0, 0.5])!r}"
        ),
        11: lambda: (
            f"renyi:{rng.choice([rng.uniform(0.05, 5), 2.0, 0.5, 1 + rng.normal(0, 1e-3)])!r}"
        ),
        12: lambda: f"vajda:{rng.choice([1.0, 2.0, rng.uniform(1.01, 5), rng.uniform(5, 300)])!r}",
        13: lambda: f"bwcs:{rng.choice([0.0, 1.0, rng.uniform(0, 1)])!r}",
        14: lambda: f"hockey-stick:{rng.choice([1.0, rng.uniform(1, 5)])!r}",
    }
    return parameter[kind]().replace("np.float64(", "").replace(")", "")


def _deltas(rng: np.random.Generator, spec: str, logp: Any) -> Any:
    """Deltas of all sizes; some saturate a side within a few floats, and some are subnormal."""
    count = len(logp)
    delta = 10.0 ** rng.uniform(-13.0, 2.0, count)
    kind = rng.integers(0, 6, count)
    divergence = Divergence(spec)
    with np.errstate(all="ignore"):
        for end, ratios in ((0, np.full(count, -np.inf)), (1, -logp)):
            edge = divergence.between(logp, ratios) * (1.0 + rng.integers(-3, 4, count) * 2.0**-52)
            usable = (kind == end) & np.isfinite(edge) & (edge > 0.0)
            delta[usable] = edge[usable]
    delta[kind == 3] = (10.0 ** rng.uniform(-307.0, 2.0, count))[kind == 3]
    delta[kind == 2] = (5e-324 * 2.0 ** rng.integers(0, 60, count))[kind == 2]
    return delta


def bounds(cases: int, seed: int = SEED) -> Iterator[Row]:
    """Both bounds of random f, delta and p: inside, and next to the edge.

    Raises:
        AssertionError: If a bound is outside the exact one, or saturates where the exact one does
            not.
    """
    rng = np.random.default_rng(seed)
    done = 0
    usual = f"from {USUAL[0]:g} to {USUAL[1]:g}"
    counts = {name: _Counts() for name in (usual, "others", "subnormal")}
    while done < cases:
        spec, count = _spec(rng), min(200, cases - done)
        logp = log_probs(rng, count)
        delta = _deltas(rng, spec, logp)
        log_lower, log_upper = Band(spec, delta).log_bounds(logp)
        for place in range(count):
            case = spec, float(logp[place]), float(delta[place])
            name = usual if USUAL[0] <= case[2] <= USUAL[1] else "others"
            found = counts[name if case[2] >= NORMAL else "subnormal"]
            for side, bound in (("lower", log_lower[place]), ("upper", log_upper[place])):
                inside = is_inside(case, side, float(bound))
                found.sides += 1
                found.outside += inside is False
                assert not found.outside, (case, side, bound, "outside")
                found.undecided += inside is None
                found.farther += is_far(case, side, float(bound))
        done += count
    for name, each in counts.items():
        words = {"outside": each.outside, FARTHER: each.farther}
        words["undecided at 40000 bits"] = each.undecided
        yield Row(f"sides of exact bounds, delta {name}", each.sides, words)


@dataclass
class _Counts:
    """What was found for some deltas."""

    sides: int = 0
    outside: int = 0
    farther: int = 0
    undecided: int = 0


def _is_saturated(logp: float, side: str, bound: float) -> bool:
    return bound == -math.inf if side == "lower" else bound >= -logp


def is_inside(case: tuple[str, float, float], side: str, bound: float) -> bool | None:
    """Whether a bound is inside the exact one; None if that is undecided."""
    spec, logp, delta = case
    end = -math.inf if side == "lower" else math.inf
    sign = excess(spec, logp, end if _is_saturated(logp, side, bound) else bound, delta)
    return None if sign is None else sign < 0


def is_far(case: tuple[str, float, float], side: str, bound: float) -> bool:
    """True if the point `TIGHT` and a denormal farther out is still inside."""
    spec, logp, delta = case
    if _is_saturated(logp, side, bound):
        return False
    from flint import arb

    def outer() -> Any:
        return arb(bound) * (1 + arb(TIGHT)) + arb(math.copysign(5e-324, bound))

    if side == "upper" and bound * (1.0 + TIGHT) + 5e-324 >= -logp:
        return False
    return excess(spec, logp, outer, delta) == -1


if __name__ == "__main__":
    run_cases("bounds", __doc__, bounds, cases=500_000, seed=SEED, of="tokens, with two sides each")
