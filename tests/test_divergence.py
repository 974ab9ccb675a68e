"""Divergences from text, calibration between them, and what a diagnosis says."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from bandpo import Band, Divergence
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.region import Status

CUSTOM = 1e-10
"""What a custom f may differ from the built-in it equals, relatively, for delta >= 1e-5."""

EXPRESSIONS = [
    ("kl", "-ln(u) + u - 1"),
    ("reverse-kl", "u*ln(u) - u + 1"),
    ("tv", "abs(u - 1)/2"),
    ("pearson-chi2", "(u-1)^2"),
    ("neyman-chi2", "(u-1)**2/u"),
    ("hellinger", "(sqrt(u) - 1)^2/2"),
    ("le-cam", "(u-1)^2/(2*(u+1))"),
    ("jensen-shannon", "(u*ln(u) - (u+1)*ln((u+1)/2))/2"),
    ("jeffreys", "(u-1)*ln(u)"),
    ("alpha:1.5", "(u^1.5 - 1 - 1.5*(u-1))/0.75"),
    ("vajda:3", "abs(u-1)^3"),
    ("hockey-stick:1.25", "max(u - 1.25, 0)"),
]


@pytest.mark.parametrize(("spec", "text"), EXPRESSIONS)
def test_an_expression_equals_the_built_in_it_spells(spec: str, text: str) -> None:
    rng = np.random.default_rng(0)
    p = np.concatenate([np.exp(rng.uniform(-600, 0, 500)), 1 - np.exp(rng.uniform(-30, -1, 500))])
    logp, delta = np.log(p), np.exp(rng.uniform(np.log(1e-5), np.log(10), 1000))
    custom = Band(Divergence.from_expression(text), delta).log_bounds(logp)
    built_in = Band(spec, delta).log_bounds(logp)
    for actual, expected in zip(custom, built_in, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=CUSTOM, atol=0)


def test_any_multiple_of_u_minus_1_may_be_added() -> None:
    logp = np.log([1e-5, 0.1, 0.9])
    plain = Band(Divergence.from_expression("u*ln(u) - u + 1"), 0.05).log_bounds(logp)
    tilted = Band(Divergence.from_expression("u*ln(u) + 7.5*(u - 1)"), 0.05).log_bounds(logp)
    np.testing.assert_allclose(tilted, plain, rtol=1e-14)


def test_an_expression_has_a_table() -> None:
    table = Band(Divergence.from_expression("u^2 - 1 - ln(u)"), 0.05).table()
    assert max(table.max_error) <= 1e-6
    assert table.region == Band(Divergence.from_expression("u^2 - 1 - ln(u)"), 0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("u*ln(v)", r"column 6: \"v\" is not known; the variable is u"),
        ("u*foo(u)", r"column 3: function \"foo\" is not known; known are ln, log"),
        ("u*(u-1", "column 7"),
        ("u ** ", "column 6"),
        ("max(u)", "column 1: max takes 2 arguments, got 1"),
        ("__import__('os')", "column 1"),
        ("u^2", r"f\(1\) must be 0, it is 1"),
        ("(u-1)^3", r"f must be convex, at u = .* above a chord"),
        ("ln(u)", "f must be convex"),
        ("5*(u-1)", "linear"),
        ("ln(u-0.5) - ln(0.5)", r"finite on \(0, inf\)"),
        ("1 - u^0.001", r"f\(0\) could not be found out; give it"),
    ],
)
def test_bad_expressions_say_what_is_wrong_and_where(text: str, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        Divergence.from_expression(text)


def test_limits_may_be_given() -> None:
    divergence = Divergence.from_expression("1 - u^0.001", at_zero=1.0, slope_at_infinity=0.0)
    log_lower, log_upper = Band(divergence, 0.001).log_bounds(np.log(0.3))
    assert log_lower < 0.0 < log_upper
    assert pickle.loads(pickle.dumps(divergence)) == divergence  # noqa: S301
    assert "at_zero=1.0" in repr(divergence)
    assert Divergence.from_description(divergence.describe()) == divergence
    with pytest.raises(InvalidTypeError, match="text must be an expression"):
        Divergence.from_expression(3)  # type: ignore[arg-type]


def square(u: np.ndarray) -> np.ndarray:
    return (u - 1.0) ** 2


def test_a_python_function_is_a_divergence_too() -> None:
    divergence = Divergence.from_callable(square)
    logp = np.log([1e-4, 0.1, 0.6, 0.99])
    for actual, expected in zip(
        Band(divergence, 0.05).log_bounds(logp),
        Band("pearson-chi2", 0.05).log_bounds(logp),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, rtol=CUSTOM, atol=0)
    assert Band(divergence, 0.05).contains(logp, np.zeros(4)).all()
    table = Band(divergence, 0.05).table()
    assert max(table.max_error) <= 1e-6
    assert pickle.loads(pickle.dumps(divergence)) == divergence  # noqa: S301
    with pytest.raises(InvalidValueError, match="was made from the Python function square"):
        table.verify(1000)
    assert max(table.verify(1000, region=Band(divergence, 0.05)).max_error) <= 1e-6


def test_calibration_by_curvature_gives_the_same_local_width() -> None:
    kl = Band("kl", 1e-6)
    logp = np.log(0.3)
    for spec in ["pearson-chi2", "hellinger", "jensen-shannon", "jeffreys", "le-cam", "alpha:3",
                 "renyi:2", "renyi:0.5", "bhattacharyya", "neyman-chi2"]:  # fmt: skip
        other = kl.calibrated(spec)
        for actual, expected in zip(other.log_bounds(logp), kl.log_bounds(logp), strict=True):
            assert actual == pytest.approx(expected, rel=5e-3, abs=0), spec
    assert Band("kl", 0.05).calibrated("pearson-chi2") == Band("pearson-chi2", 0.1)
    expression = Divergence.from_expression("(u-1)^2")
    assert Band("kl", 0.05).calibrated(expression).delta_low == pytest.approx(0.1, rel=1e-9)


def test_calibration_at_a_probability_matches_both_bounds() -> None:
    kl = Band("kl", (0.02, 0.05))
    for spec in ["tv", "pearson-chi2", "renyi:2", "bhattacharyya", "vajda:3"]:
        other = kl.calibrated(spec, p=0.2)
        for actual, expected in zip(
            other.log_bounds(np.log(0.2)), kl.log_bounds(np.log(0.2)), strict=True
        ):
            assert actual == pytest.approx(expected, rel=1e-12, abs=0), spec


def test_calibration_refuses_what_has_no_answer() -> None:
    for spec in ["tv", "hockey-stick:1.2", "vajda:3"]:
        with pytest.raises(InvalidValueError, match=r"has no f''\(1\); match at a reference"):
            Band("kl", 0.05).calibrated(spec)
        with pytest.raises(InvalidValueError, match=r"has no f''\(1\)"):
            Band(spec, 0.05).calibrated("kl")
    with pytest.raises(InvalidValueError, match=r"p must be in \(0, 1\), got 1\.0"):
        Band("kl", 0.05).calibrated("tv", p=1.0)
    with pytest.raises(InvalidValueError, match=r"allows everything at p = 0\.01"):
        Band("tv", 0.05).calibrated("kl", p=0.01)


def test_a_diagnosis_has_brackets_statuses_and_bounded_work() -> None:
    logp = np.array([[-1.0, 0.0, 2.0], [-np.inf, np.nan, -0.01]])
    band = Band("tv", 0.05)
    found = band.diagnose(logp)
    log_lower, log_upper = band.log_bounds(logp)
    np.testing.assert_array_equal(found.lower.log_bound, log_lower)
    np.testing.assert_array_equal(found.upper.log_bound, log_upper)
    expected = [
        [Status.CONVERGED, Status.LIMIT, Status.READ_AS_CERTAIN],
        [Status.LIMIT, Status.NOT_A_NUMBER, Status.SATURATED],
    ]
    np.testing.assert_array_equal(found.upper.status, expected)
    assert band.contains(-1.0, found.upper.log_bound[0, 0])
    assert not band.contains(-1.0, found.upper.outside[0, 0])
    assert not band.contains(-1.0, found.lower.outside[0, 0])

    rng = np.random.default_rng(0)
    logp = np.concatenate([-rng.exponential(5.0, 20_000), -np.exp(rng.uniform(-700, 700, 5_000))])
    for spec in ["kl", "reverse-kl", "jensen-shannon", "jeffreys", "alpha:-3", "alpha:4", "tv"]:
        found = Band(spec, np.exp(rng.uniform(-18, 2.3, 25_000))).diagnose(logp)
        for side in found:
            assert side.iterations.max() <= 196, spec  # MOST_BOUND_EVALUATIONS
            assert side.iterations[:20_000].mean() <= 8.0, spec
