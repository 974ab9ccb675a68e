"""Bounds of divergences given as text, against D at 60 digits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from mpmath import mp, mpf

from bandpo import Band, Divergence
from bandpo.check import Float64Array

TEXTS: dict[str, Callable[[mpf], mpf]] = {
    "-ln(u) + u - 1": lambda u: u - 1 - mp.log(u),
    "u*ln(u) - u + 1": lambda u: u * mp.log(u) - u + 1,
    "(u-1)^2": lambda u: (u - 1) ** 2,
    "(sqrt(u)-1)^2": lambda u: (mp.sqrt(u) - 1) ** 2,
    "0.3*(u*ln(u)-u+1) + 0.7*(u-1)^2": lambda u: (
        mpf(0.3) * (u * mp.log(u) - u + 1) + mpf(0.7) * (u - 1) ** 2
    ),
    "abs(u-1)": lambda u: abs(u - 1),
    "abs(u-1)^1.5": lambda u: abs(u - 1) ** mpf(1.5),
    "max(u-1.25, 0)": lambda u: max(u - mpf(1.25), mpf(0)),
    "max((u-1)^2, abs(u-1))": lambda u: max((u - 1) ** 2, abs(u - 1)),
    "u^1.3 - 1 - 1.3*(u-1)": lambda u: u ** mpf(1.3) - 1 - mpf(1.3) * (u - 1),
    "u^-3/12 - 1/12 + (u-1)/4": lambda u: u**-3 / 12 - mpf(1) / 12 + (u - 1) / 4,
    "exp(u-1) - u": lambda u: mp.exp(u - 1) - u,
    "(u*ln(u) - (u+1)*ln((u+1)/2))/2": lambda u: (
        (u * mp.log(u) - (u + 1) * mp.log((u + 1) / 2)) / 2
    ),
    "(u-1)^2 + 0*sin(u)": lambda u: (u - 1) ** 2,
}
"""Texts with their functions; vectors have all operations but sin."""

RELATIVE = 1e-14
"""Relative distance beyond a bound at which D exceeds delta."""


def tokens(count: int) -> Float64Array:
    """Returns log-probs whose logits are normal, so that both p and 1 - p become small."""
    logits = np.random.default_rng(20).normal(1.0, 4.0, count)
    return np.asarray(-np.logaddexp(0.0, -logits))


def value(f: Callable[[mpf], mpf], logp: float, log_ratio: mpf) -> mpf:
    """Returns D."""
    p, r = mp.exp(mpf(logp)), mp.exp(log_ratio)
    return p * f(r) + (1 - p) * f((1 - p * r) / (1 - p))


@pytest.mark.parametrize("delta", [0.05, 1e-3, 1e-7])
@pytest.mark.parametrize("text", TEXTS)
def test_bounds_of_text_are_inside_and_next_to_the_edge(text: str, delta: float) -> None:
    f = TEXTS[text]
    logp = tokens(150)
    lower, upper = Band(Divergence.from_expression(text), delta).log_bounds(logp)
    roots = 0
    with mp.workdps(60):
        for token, *bounds in zip(logp, lower, upper, strict=True):
            for bound, end in zip(bounds, (-np.inf, -token), strict=True):
                if bound == end:
                    continue  # saturation has tests of its own
                assert value(f, token, mpf(bound)) <= mpf(delta), (text, token, bound)
                beyond = mpf(bound) * (1 + mpf(RELATIVE))
                if beyond < -token:
                    roots += 1
                    assert value(f, token, beyond) > mpf(delta), (text, token, bound)
    assert roots > 20


def test_a_bound_of_text_does_not_depend_on_its_batch() -> None:
    logp = np.concatenate([tokens(203), [0.0, -np.inf, np.nan, -1e-320, -1e4, 0.04]])
    for text in TEXTS:
        band = Band(Divergence.from_expression(text), (0.05, 0.1))
        for whole, alone in zip(
            band.log_bounds(logp),
            np.transpose([band.log_bounds(token) for token in logp]),
            strict=True,
        ):
            np.testing.assert_array_equal(whole, alone, err_msg=text)


@pytest.mark.parametrize("delta", [1e-12, 1e-6, 1.0])
def test_the_larger_of_two_overflows_is_that_of_the_larger_logarithm(delta: float) -> None:
    logp = np.array([-0.1, -4.7, -20.0, -300.0, -650.0, -1e-100, -2e-242])
    # The first argument is the larger one everywhere.
    for text, same in (
        ("1e-9*(max(u^-1, exp(-u)) - 1)", "1e-9*(u^-1 - 1)"),
        ("max(u^2, 1 + 2*ln(u)) - 1", "u^2 - 1"),
        ("max(u^2/(u+1), exp(-u) - 1) - 0.5", "u^2/(u+1) - 0.5"),
    ):
        found, wanted = (
            Band(Divergence.from_expression(one), delta).log_bounds(logp) for one in (text, same)
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-12, err_msg=text)
