"""Bernoulli divergences in torch against their definition at 60 digits and more."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from mpmath import mp, mpf

from bandpo.check import Float64Array
from bandpo.error import InvalidValueError
from bandpo.region.budget import DIVERGENCES
from bandpo.tensors.divergence import bernoulli_divergence, k3

F: dict[str, Callable[[mpf], mpf]] = {
    "tv": lambda u: abs(u - 1) / 2,
    "kl": lambda u: u - 1 - mp.log(u),
    "reverse-kl": lambda u: u * mp.log(u) - u + 1,
    "hellinger": lambda u: (mp.sqrt(u) - 1) ** 2 / 2,
    "pearson-chi2": lambda u: (u - 1) ** 2,
    "neyman-chi2": lambda u: (u - 1) ** 2 / u,
    "jensen-shannon": lambda u: (u * mp.log(u) - (u + 1) * mp.log((u + 1) / 2)) / 2,
}
"""Generators as `bandpo.Divergence` lists them."""

DIGITS = 400
"""Digits that are left after u - 1 and 1 - p have cancelled."""

EPS_ERROR = 8.0
"""Max relative error in units of machine epsilon: six functions, each of about an ulp."""

EXPONENT_ERROR = 1.0
"""The same for each unit of an exponent, which chi2 takes where p or q is below the normal floats.

The error of ``exp(t)`` is the absolute one of t.
"""


def definition(name: str, old: float, new: float) -> mpf:
    p, q = mp.exp(mpf(old)), mp.exp(mpf(new))
    return p * F[name](q / p) + (1 - p) * F[name]((1 - q) / (1 - p))


def log_probs() -> tuple[Float64Array, Float64Array]:
    """p from 1e-344 to 1 - 1e-12, with steps from 1e-10 to 30 or to another such token."""
    rng = np.random.default_rng(0)
    count = 160
    old = np.concatenate([-(10.0 ** rng.uniform(-12, 2.9, count)), -rng.exponential(3.0, count)])
    step = rng.choice([-1, 1], 2 * count) * 10.0 ** rng.uniform(-10, 1.5, 2 * count)
    other = -(10.0 ** rng.uniform(-12, 2.9, 2 * count))
    new = np.where(rng.random(2 * count) < 0.5, old + step, other)
    return old, np.where(new > 0.0, old * rng.uniform(0.0, 2.0, 2 * count), new)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_errors_are_a_few_units_of_the_last_place(name: str, dtype: torch.dtype) -> None:
    old, new = (torch.from_numpy(values).to(dtype) for values in log_probs())
    found = bernoulli_divergence(name, old, new)
    assert found.dtype == dtype
    limits = torch.finfo(dtype)
    compared = 0
    with mp.workdps(DIGITS):
        for p, q, value in zip(old.tolist(), new.tolist(), found.tolist(), strict=True):
            exact = definition(name, p, q)
            if limits.tiny < exact < limits.max:
                slack = EPS_ERROR
                if name.endswith("chi2") and min(p, q) < math.log(limits.tiny):
                    slack += EXPONENT_ERROR * (abs(p) + abs(q))
                assert abs(mpf(value) - exact) <= slack * limits.eps * exact, (p, q)
                compared += 1
            else:
                assert value <= 2 * limits.tiny or value == math.inf, (p, q)
    assert compared > 200


FAR = (-1e30, -1e4, -800.0, -745.5, -710.0, -104.5, -95.0, -88.9, -88.0, -0.7, -1e-3)
"""Log-probs around those whose probability or odds leave the range of a dtype."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_probabilities_that_underflow_give_their_limit(name: str, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    pairs = [(p, q) for p in FAR for q in FAR if p != q]
    old, new = (torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True))
    for p, q, value in zip(old.tolist(), new.tolist(),
                           bernoulli_divergence(name, old, new).tolist(), strict=True):  # fmt: skip
        # A probability below e^-1e4 is 0 beside any of the others.
        with mp.workdps(4400):
            exact = definition(name, max(p, -1e4), max(q, -1e4)) if min(p, q) > -1e30 else None
        if exact is not None and limits.tiny < exact < limits.max:
            # Subnormal probabilities have few digits; half of a divergence would be far off.
            assert abs(mpf(value) - exact) <= math.sqrt(limits.eps) * exact, (p, q, value)
        else:
            assert value >= 0.0, (p, q, value)  # no NaN


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_underflowed_old_probability_has_its_limits(dtype: torch.dtype) -> None:
    rare = torch.tensor(-1e4, dtype=dtype)
    half, none = torch.tensor(-math.log(2.0), dtype=dtype), torch.tensor(-INF, dtype=dtype)
    torch.testing.assert_close(bernoulli_divergence("tv", rare, half), half.exp())
    torch.testing.assert_close(bernoulli_divergence("kl", rare, half), -half)
    assert bernoulli_divergence("kl", rare, none) == INF
    assert bernoulli_divergence("reverse-kl", none, rare) == INF
    assert bernoulli_divergence("tv", rare, none) == 0.0


def token(probability: float) -> torch.Tensor:
    return torch.tensor(probability, dtype=torch.float64).log()


INF = math.inf

LIMITS = [
    # name, p, q, D: p f(q/p) with f(0) and f'(inf) where a probability is 0
    *[("tv", *case) for case in ((0, 0.25, 0.25), (1, 0.25, 0.75), (0.25, 0, 0.25), (0, 1, 1))],
    *[
        ("kl", *case)
        for case in ((0, 0.25, -math.log(0.75)), (1, 0.25, -math.log(0.25)), (0.25, 0, INF),
                     (0.25, 1, INF), (0, 1, INF))
    ],
    *[
        ("reverse-kl", *case)
        for case in ((0.25, 0, -math.log(0.75)), (0.25, 1, -math.log(0.25)), (0, 0.25, INF),
                     (1, 0.25, INF), (1, 0, INF))
    ],
    *[
        ("hellinger", *case)
        for case in ((0, 0.25, 1 - math.sqrt(0.75)), (1, 0.25, 0.5), (0.25, 0, 1 - math.sqrt(0.75)),
                     (0, 1, 1))
    ],
    *[("pearson-chi2", *case) for case in ((0.25, 0, 1 / 3), (0.25, 1, 3), (0, 0.25, INF),
                                           (1, 0.25, INF))],
    *[("neyman-chi2", *case) for case in ((0, 0.25, 1 / 3), (1, 0.25, 3), (0.25, 0, INF),
                                          (0.25, 1, INF))],
    *[("jensen-shannon", *case) for case in ((0, 1, math.log(2)), (1, 0, math.log(2)))],
]  # fmt: skip


@pytest.mark.parametrize(("name", "p", "q", "wanted"), LIMITS)
def test_infinite_log_probs_give_the_limit(name: str, p: float, q: float, wanted: float) -> None:
    found = bernoulli_divergence(name, token(p), token(q))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_policies_have_none_and_nan_stays(name: str) -> None:
    same = torch.tensor([-INF, -800.0, -1.0, -1e-30, 0.0, 1e-7], dtype=torch.float64)
    assert torch.equal(bernoulli_divergence(name, same, same), torch.zeros(6, dtype=torch.float64))
    nan = torch.tensor([math.nan, -1.0])
    assert bernoulli_divergence(name, nan, nan.flip(0)).isnan().all()
    assert bernoulli_divergence(name, nan, nan)[0].isnan()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_log_prob_above_0_is_read_as_0(name: str) -> None:
    above, one, half = torch.tensor(1e-6), torch.tensor(0.0), torch.tensor(-0.7)
    for pair, wanted in (((above, half), (one, half)), ((half, above), (half, one))):
        assert torch.equal(bernoulli_divergence(name, *pair), bernoulli_divergence(name, *wanted))


def test_other_divergences_are_refused_with_the_names() -> None:
    half = torch.tensor([-0.7])
    with pytest.raises(InvalidValueError, match=r"must be one of tv, kl, .* got 'renyi:2'"):
        bernoulli_divergence("renyi:2", half, half)
    with pytest.raises(InvalidValueError, match="did you mean 'pearson-chi2'"):
        bernoulli_divergence("chi2", half, half)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_k3_has_all_its_digits(dtype: torch.dtype) -> None:
    sizes = torch.from_numpy(10.0 ** np.linspace(-12, 1.9, 200)).to(dtype)
    x = torch.cat([-sizes, sizes])
    with mp.workdps(60):
        for value, at in zip(k3(x).tolist(), x.tolist(), strict=True):
            exact = mp.expm1(mpf(at)) - mpf(at)
            assert abs(mpf(value) - exact) <= EPS_ERROR * torch.finfo(dtype).eps * exact, at
    ends = k3(torch.tensor([-INF, INF, math.nan, 0.0]))
    assert ends[:2].tolist() == [INF, INF]
    assert ends[2].isnan()
    assert ends[3] == 0.0
