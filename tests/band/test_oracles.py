"""Bands of known f against results of others: confidence intervals, bandit indices, masks.

A band of radius delta around p is, in terms of q = r p, the set of Bernoulli parameters q whose
f-divergence from p is at most delta. For some f that set is an interval that statistics has long
known: p is then the observed share k/n, and delta follows from z, the normal quantile. Interval
estimation for a binomial proportion is reviewed by Brown, Cai and DasGupta (2001).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import logit
from scipy.stats import binomtest, norm

from bandpo import Band
from bandpo.check import Float64Array
from support.tokens import wide_tokens

CLOSED_FORM = 2e-13
"""Relative tolerance of an end of an interval from a closed form.

A log bound is good to 1e-14 of itself. The closed forms, evaluated as the literature writes them,
subtract: half the width from p, an angle from an angle.
"""

ROOT_FINDER = 1e-12
"""Relative tolerance of an end from brentq on the Bernoulli KL as the literature writes it.

Its two terms are rounded to about 1e-16 of 1, which moves a root by 1e-16/sqrt(delta) or so.
"""

IDENTITY = 1e-12
"""Relative tolerance of Jeffreys' identity: logit q magnifies an error of q by up to 1/(1-q)."""

TIE = 1e-9
"""Tokens whose divergence is within this of delta, relatively, are ties: the plain formula of a
mask cannot decide them in double precision."""

TRIALS = [(1, 10), (3, 10), (9, 10), (1, 1000), (37, 1000), (500, 1000), (999, 1000), (7, 10**6)]
"""Successes k of n."""

QUANTILES = [0.1, 1.0, 1.959963984540054, 3.5]


def interval(spec: str, p: float, delta: float) -> tuple[float, float]:
    """The band in terms of the new probability, p lower and p upper."""
    lower, upper = Band(spec, delta).bounds(np.log(p))
    return p * float(lower), p * float(upper)


@pytest.mark.parametrize("z", QUANTILES)
@pytest.mark.parametrize(("k", "n"), TRIALS)
def test_neyman_chi_square_is_the_wilson_score_interval(k: int, n: int, z: float) -> None:
    """Wilson (1927): the q with (p - q)^2 / (q (1 - q)) <= z^2 / n, as scipy computes it."""
    confidence = 2 * norm.cdf(z) - 1
    z = norm.ppf(0.5 + 0.5 * confidence)  # as scipy computes it
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    actual = interval("neyman-chi2", k / n, z * z / n)
    assert actual == pytest.approx((expected.low, expected.high), rel=CLOSED_FORM, abs=0)


def test_the_lower_end_of_wilson_keeps_its_digits_for_rare_outcomes() -> None:
    """Wilson (1927): the ends q of the interval are the roots of (1+d) q^2 - (2p+d) q + p^2.

    For rare outcomes the lower ratio q/p, as the quadratic formula gives it, is 1 minus a number
    next to 1. By the product of both ends, p^2/(1+d), nothing cancels.
    """
    delta = 0.05
    p = 1e-12 * np.linspace(1, 2, 101)
    spread = np.sqrt(delta * (delta + 4 * p * (1 - p)))
    naive = 1 + (delta * (1 - 2 * p) - spread) / (2 * p * (1 + delta))
    product = 2 * p / (2 * p + delta + spread)  # p^2/(1+d), over the upper end, over p
    lower, _ = Band("neyman-chi2", delta).bounds(np.log(p))
    np.testing.assert_allclose(lower, product, rtol=CLOSED_FORM, atol=0)
    assert np.abs(naive / lower - 1).max() > 1e5


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_wilson_at_no_failure_is_the_limit_at_p_1(n: int) -> None:
    """Wilson (1927) at k = n: the lower end is n / (n + z^2)."""
    expected = binomtest(n, n).proportion_ci(0.95, method="wilson")
    lower, upper = Band("neyman-chi2", norm.ppf(0.975) ** 2 / n).bounds(0.0)
    assert lower == pytest.approx(expected.low, rel=CLOSED_FORM, abs=0)
    assert upper == expected.high == 1.0


@pytest.mark.parametrize("z", QUANTILES)
@pytest.mark.parametrize(("k", "n"), TRIALS)
def test_pearson_chi_square_is_the_wald_interval(k: int, n: int, z: float) -> None:
    """Laplace (1812), named after Wald (1943): p +- z sqrt(p (1 - p) / n), cut off at 0 and 1."""
    p = k / n
    half = z * np.sqrt(p * (1 - p) / n)
    expected = max(p - half, 0.0), min(p + half, 1.0)
    actual = interval("pearson-chi2", p, z * z / n)
    assert actual == pytest.approx(expected, rel=CLOSED_FORM, abs=0)


@pytest.mark.parametrize("z", QUANTILES)
@pytest.mark.parametrize(("k", "n"), TRIALS)
def test_hellinger_is_the_arcsine_interval(k: int, n: int, z: float) -> None:
    """Anscombe (1948): sin^2(arcsin sqrt p +- z / (2 sqrt n)), cut off at 0 and 1.

    sqrt(p q) + sqrt((1-p)(1-q)) is the cosine of the difference of the two angles, and hellinger
    in this project's normalisation 1 minus that.
    """
    angle, turn = np.arcsin(np.sqrt(k / n)), z / (2 * np.sqrt(n))
    delta = 2 * np.sin(turn / 2) ** 2  # 1 - cos(turn)
    expected = (
        np.sin(max(angle - turn, 0.0)) ** 2,
        np.sin(min(angle + turn, np.pi / 2)) ** 2,
    )
    actual = interval("hellinger", k / n, delta)
    assert actual == pytest.approx(expected, rel=CLOSED_FORM, abs=0)


def bernoulli_kl(p: float, q: float) -> float:
    """KL(Bernoulli(p) || Bernoulli(q)), Kullback and Leibler (1951)."""
    return float(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


def kl_interval(p: float, radius: float) -> tuple[float, float]:
    """Both q with KL(p || q) = radius, by bracketing from p to the ends of (0, 1)."""

    def excess(q: float) -> float:
        return bernoulli_kl(p, q) - radius

    # KL(p || q) >= p ln(p/q) + (1-p) ln(1-p), which is `radius` at this q.
    floor = p * np.exp(-(radius - (1 - p) * np.log1p(-p)) / p)
    low = brentq(excess, max(0.5 * floor, 1e-300), p, xtol=1e-300, rtol=1e-14)
    return low, brentq(excess, p, 1 - 1e-16, xtol=1e-300, rtol=1e-14)


@pytest.mark.parametrize("z", [1.0, 1.959963984540054, 3.5])
@pytest.mark.parametrize(("k", "n"), [(1, 10), (3, 10), (9, 10), (37, 1000), (500, 1000)])
def test_kl_is_the_likelihood_ratio_interval(k: int, n: int, z: float) -> None:
    """Wilks (1938): the q whose log-likelihood is at most z^2/2 below that of p = k/n."""
    actual = interval("kl", k / n, z * z / (2 * n))
    assert actual == pytest.approx(kl_interval(k / n, z * z / (2 * n)), rel=ROOT_FINDER, abs=0)


@pytest.mark.parametrize("mean", [0.02, 0.3, 0.5, 0.93])
@pytest.mark.parametrize(("pulls", "time"), [(5, 100), (80, 1000), (3000, 10**6)])
def test_kl_is_the_kl_ucb_index(mean: float, pulls: int, time: int) -> None:
    """Garivier and Cappe (2011): the max q with pulls KL(mean || q) <= ln t + 3 ln ln t."""
    radius = (np.log(time) + 3 * np.log(np.log(time))) / pulls
    _, index = interval("kl", mean, radius)
    assert index == pytest.approx(kl_interval(mean, radius)[1], rel=ROOT_FINDER, abs=0)


@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.05, 0.3])
@pytest.mark.parametrize("p", [1e-6, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_le_cam_has_a_closed_form(p: float, delta: float) -> None:
    """Vincze (1981), Le Cam (1986): their divergence of two Bernoulli laws is a quadratic in q.

    p r = [p + d (1-p) +- sqrt(d (d + 4 p (1-p)))] / (1 + d), cut off at 0 and 1.
    """
    middle = p + delta * (1 - p)
    root = np.sqrt(delta * (delta + 4 * p * (1 - p)))
    low, high = (middle - root) / (1 + delta), (middle + root) / (1 + delta)
    lost = middle / abs(middle - root)  # factor by which the difference magnifies a rounding
    actual_low, actual_high = interval("le-cam", p, delta)
    if delta >= p / (2 - p):  # D at r = 0
        low = 0.0
    if delta >= (1 - p) / (1 + p):  # D at r = 1/p
        high = 1.0
    assert actual_low == pytest.approx(low, rel=CLOSED_FORM * max(lost, 1.0), abs=0)
    assert actual_high == pytest.approx(high, rel=CLOSED_FORM, abs=0)


@pytest.mark.parametrize("delta", [1e-4, 0.01, 0.05, 0.5])
def test_jeffreys_divergence_at_the_bounds_is_delta(delta: float) -> None:
    """Jeffreys (1946): for two Bernoulli laws it is (q - p)(logit q - logit p)."""
    p = np.array([0.003, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9])
    for bound in Band("jeffreys", delta).bounds(np.log(p)):
        q = p * bound
        np.testing.assert_allclose((q - p) * (logit(q) - logit(p)), delta, rtol=IDENTITY, atol=0)


def random_tokens(count: int) -> tuple[Float64Array, Float64Array]:
    """Log-probs of a language model, sure and rare ones, and log-ratios on both sides of a band."""
    old, new, *_ = wide_tokens(count, 20260304, logits=(-12, 12))
    # Without ratios outside the simplex, or so near its edge that 1 - q loses its digits.
    kept = new < -1e-7
    return old[kept], (new - old)[kept]


Mask = Callable[[Float64Array, Float64Array], Float64Array]


def old_new(logp: Float64Array, log_ratio: Float64Array) -> tuple[Float64Array, Float64Array]:
    return np.exp(logp), np.exp(logp + log_ratio)


def binary_kl(logp: Float64Array, log_ratio: Float64Array) -> Float64Array:
    p, q = old_new(logp, log_ratio)
    value: Float64Array = -p * log_ratio + (1 - p) * (np.log1p(-p) - np.log1p(-q))
    return value


def binary_tv(logp: Float64Array, log_ratio: Float64Array) -> Float64Array:
    p, q = old_new(logp, log_ratio)
    value: Float64Array = np.abs(q - p)
    return value


@pytest.mark.parametrize("delta", [0.01, 0.05, 0.15])
@pytest.mark.parametrize(("spec", "mask"), [("kl", binary_kl), ("tv", binary_tv)])
def test_contains_equals_the_mask_of_dppo(spec: str, mask: Mask, delta: float) -> None:
    """DPPO (arXiv 2602.04879, 2026), binary KL(old || new) and TV: dropped where D > delta.

    DPPO drops a token only where its advantage pushes it further out; that does not concern the
    region. Its guard of 1e-8 against log 0 is left out.
    """
    logp, log_ratio = random_tokens(160_000)
    value = mask(logp, log_ratio)
    clear = np.abs(value / delta - 1) > TIE
    assert clear.sum() >= 100_000
    band = Band(spec, delta)
    inside = band.contains(logp, log_ratio)
    dropped = value > delta
    assert 0.1 < dropped[clear].mean() < 0.9, "both answers are common"
    assert np.count_nonzero(inside[clear] == dropped[clear]) == 0
    # The bounds decide alike.
    log_lower, log_upper = band.log_bounds(logp)
    between = (log_lower <= log_ratio) & (log_ratio <= log_upper)
    assert np.count_nonzero(between[clear] == dropped[clear]) == 0
