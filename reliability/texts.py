"""Exact bounds of random formulas against ball arithmetic, which encloses D_f.

A formula that is accepted has bounds at tokens from one end to the other. D at a bound, as balls,
has to be at most delta. A side that is allowed whole is decided by `bounds` for divergences with a
name, and is left out here.

    python -m reliability.texts --cases 5000
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bandpo import Band, Divergence
from bandpo.error import InvalidValueError
from reliability.convexity import Formula, formula
from reliability.intervals import Generator, excess_of
from reliability.result import Row, run_cases
from reliability.tokens import SEED, log_probs

TOKENS = 48
"""Tokens of a formula, half of them ordinary."""

FARTHER_BY = 1e-11
"""Relative distance beyond a bound that is reported if it is inside."""

LISTED = 6


def texts(cases: int, seed: int = SEED) -> Iterator[Row]:
    """Bounds of so many accepted formulas, each with a delta from 1e-8 to 10.

    Raises:
        AssertionError: If a bound is outside.
    """
    rng = np.random.default_rng(seed)
    found = {
        "formulas": cases,
        "outside": 0,
        f"farther in than {FARTHER_BY:g} of it": 0,
        "undecided": 0,
    }
    sides, farther = 0, []
    for _ in range(cases):
        law, divergence = _accepted(rng)
        delta = float(10.0 ** rng.uniform(-8.0, 1.0))
        half = TOKENS // 2
        logp = np.concatenate([log_probs(rng, half), -rng.exponential(3.0, TOKENS - half)])
        logp = logp[(logp > -690.0) & (logp < -1e-300)]  # p and 1 - p are numbers
        lower, upper = Band(divergence, delta).log_bounds(logp)
        for token, low, high in zip(logp.tolist(), lower.tolist(), upper.tolist(), strict=True):
            for bound in (low, high):
                if bound in (0.0, -np.inf) or bound >= -token:
                    continue
                sides += 1
                case = f"{law.text}, delta {delta!r}, logp {token!r}, bound {bound!r}"
                is_inside = _is_inside(law, token, bound, delta)
                assert is_inside is not False, f"{case} is outside"
                found["undecided"] += is_inside is None
                beyond = bound * (1.0 + FARTHER_BY)
                if beyond < -token and _is_inside(law, token, beyond, delta):
                    found[f"farther in than {FARTHER_BY:g} of it"] += 1
                    farther.append(case)
    yield Row("sides of exact bounds, delta from 1e-8 to 10", sides, found, farther[:LISTED])


def _accepted(rng: np.random.Generator) -> tuple[Formula, Divergence]:
    """A random formula that is a generator."""
    while True:
        law = formula(rng)
        try:
            return law, Divergence.from_expression(law.text)
        except InvalidValueError:
            continue


def _is_inside(law: Formula, logp: float, log_ratio: float, delta: float) -> bool | None:
    """Whether D is at most delta; None if all precisions leave it open."""
    sign = excess_of(Generator(lambda u, x, t: law.at(u), None), logp, log_ratio, delta)
    return None if sign is None else sign < 0


if __name__ == "__main__":
    run_cases("texts", __doc__, texts, cases=5000, seed=SEED, of="formulas")
