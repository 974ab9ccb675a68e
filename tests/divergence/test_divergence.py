"""Divergences from text, calibration between them, and diagnoses."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf

from bandpo import Band, Divergence
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.generator import MAX_CALLS
from bandpo.region import Status

CUSTOM = 1e-10
"""Relative tolerance of a custom f against the built-in it equals, for delta >= 1e-5."""

EXPRESSIONS = [
    ("kl", "-ln(u) + u - 1"),
    ("kl", "-ln(u)"),
    ("reverse-kl", "u*ln(u) - u + 1"),
    ("tv", "abs(u - 1)/2"),
    ("tv", "max(u - 1, 0)"),
    ("pearson-chi2", "(u-1)^2"),
    ("pearson-chi2", "u^2 - 1"),
    ("neyman-chi2", "(u-1)**2/u"),
    ("hellinger", "(sqrt(u) - 1)^2/2"),
    ("hellinger", "1 - u^0.5"),
    ("le-cam", "(u-1)^2/(2*(u+1))"),
    ("jensen-shannon", "(u*ln(u) - (u+1)*ln((u+1)/2))/2"),
    ("jeffreys", "(u-1)*ln(u)"),
    ("jeffreys", "u*ln(u) - ln(u)"),
    *((f"alpha:{a}", f"(u^{a} - 1 - {a}*(u-1))/({a}*({a}-1))") for a in (-3, -1, 0.25, 1.5, 2, 4)),
    *((f"vajda:{k}", f"abs(u-1)^{k}") for k in (1, 1.25, 2, 3, 4)),
    *((f"bwcs:{weight}", f"(u-1)^2/(1-{weight}+{weight}*u)") for weight in (0.001, 0.5, 0.999)),
    *((f"hockey-stick:{g}", f"max(u-{g}, 0)") for g in (1, 1.25, 4)),
]


@pytest.mark.parametrize(("spec", "text"), EXPRESSIONS)
def test_an_expression_equals_the_built_in_it_spells(spec: str, text: str) -> None:
    rng = np.random.default_rng(0)
    rare = np.exp(rng.uniform(np.log(1e-300), 0, 1000))
    sure = 1 - np.exp(rng.uniform(np.log(1e-16), -1, 1000))
    logp = np.log(np.concatenate([rare, sure, [1e-300, 1 - 1.2e-16] * 2]))
    delta = np.exp(rng.uniform(np.log(1e-5), np.log(10), 2000))
    delta = np.concatenate([delta, [1e-5, 1e-5, 10.0, 10.0]])
    custom = Band(Divergence.from_expression(text), delta).log_bounds(logp)
    built_in = Band(spec, delta).log_bounds(logp)
    for actual, expected in zip(custom, built_in, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=CUSTOM, atol=0)


@pytest.mark.parametrize(("spec", "text"), [pair for pair in EXPRESSIONS if pair[0] != "kl"][::3])
def test_an_expression_equals_the_built_in_below_the_min_float(spec: str, text: str) -> None:
    rng = np.random.default_rng(1)
    logp = -np.exp(rng.uniform(np.log(600), np.log(1e6), 200))
    delta = np.exp(rng.uniform(np.log(1e-5), np.log(10), 200))
    custom = Band(Divergence.from_expression(text), delta).log_bounds(logp)
    for actual, expected in zip(custom, Band(spec, delta).log_bounds(logp), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=CUSTOM, atol=0)


def bisected(f: Callable[[mpf], mpf], logp: float, delta: float, upper: bool) -> float:
    """The log bound by 220 halvings on the definition of D, at 80 digits."""
    with mp.workdps(80):
        p = mp.exp(mpf(logp))
        inside, outside = mpf(0), (-mpf(logp) if upper else mpf(-4000))
        for _ in range(220):
            middle = (inside + outside) / 2
            r = mp.exp(middle)
            if p * f(r) + (1 - p) * f((1 - r * p) / (1 - p)) <= delta:
                inside = middle
            else:
                outside = middle
        return float(inside)


@pytest.mark.parametrize(
    ("text", "f"),
    [
        ("exp(1000*(u-1)) - 1", lambda u: mp.exp(1000 * (u - 1)) - 1),
        ("exp(1000*(u-1)) - 1 - 1000*(u-1)", lambda u: mp.exp(1000 * (u - 1)) - 1),
        ("ln(1+exp(50*(u-1))) - ln(2)", lambda u: mp.log(1 + mp.exp(50 * (u - 1))) - mp.log(2)),
        ("exp(1/u) - exp(1)", lambda u: mp.exp(1 / u) - mp.e),
        ("u^u - 1", lambda u: u**u - 1),
        ("(u^4 + 1)/u^2 - 2", lambda u: u**2 + u**-2 - 2),
        ("(u-1)^2\n + abs(u-77.7)\n - 76.7", lambda u: (u - 1) ** 2 + abs(u - 77.7) - 76.7),
        ("sqrt((u-1)^2)", lambda u: abs(u - 1)),
        ("max(0, u-1)^2", lambda u: max(0, u - 1) ** 2),
        ("max(abs(u-1) - 0.1, 0)^3", lambda u: max(abs(u - 1) - 0.1, 0) ** 3),
        ("max((u-1)^2, abs(u-1)/3)", lambda u: max((u - 1) ** 2, abs(u - 1) / 3)),
    ],
)
def test_unusual_expressions_equal_bisection(text: str, f: Callable[[mpf], mpf]) -> None:
    divergence = Divergence.from_expression(text)
    for logp in (-600.0, -30.0, -1.0, -0.01):
        for delta in (1e-4, 0.05):
            log_lower, log_upper = Band(divergence, delta).log_bounds(logp)
            if log_lower > -np.inf:
                exact = bisected(f, logp, delta, upper=False)
                assert log_lower == pytest.approx(exact, rel=CUSTOM, abs=0) or exact < -3999
            exact = bisected(f, logp, delta, upper=True)
            assert log_upper == pytest.approx(exact, rel=CUSTOM, abs=0)


def test_the_scale_of_an_expression_does_not_matter() -> None:
    logp = np.log([1e-200, 1e-5, 0.1, 0.9])
    plain = Band("pearson-chi2", 0.05).log_bounds(logp)
    for scale in (1e-8, 1e8):
        scaled = Divergence.from_expression(f"{scale}*(u-1)^2")
        np.testing.assert_allclose(
            Band(scaled, 0.05 * scale).log_bounds(logp), plain, rtol=CUSTOM, atol=0
        )
    # D is at most 1e-308 p + 1e-308 p^2/(1-p) on the lower side, so everything is allowed.
    tiny = Divergence.from_expression("(u-1)^2*1e-308")
    np.testing.assert_array_equal(Band(tiny, 0.05).log_bounds(-1.0), [-np.inf, 1.0])


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
        ("u*(u-1", r"column 7: the \( at column 3 is not closed"),
        ("u)", r"column 2: there is no \( for this \)"),
        ("u ** ", "column 6: u, a number, a function or .* is missing at the end"),
        ("u^/2", "column 3: u, a number, .* is missing before '/'"),
        ("2u", r"column 2: an operator is missing before 'u'; a product needs its \*, as in 2\*u"),
        ("u*(u-1)(u-2)", r"column 8: an operator is missing before '\('"),
        ("u(u-1)", r"column 1: u is no function; a product needs its \*"),
        ("ln u", r"column 4: ln needs parentheses, as in ln\(u\)"),
        ("u*ln", r"column 3: ln is a function, as in ln\(u\)"),
        ("u!", "column 2: '!' is not known; there are u, numbers"),
        ("\u00b5 - 1", "column 1: '\u00b5' is not known"),
        ("|u-1|", r"column 1: '\|' is not known; write abs"),
        ("u\u00b2 - 1", r"column 2: '\u00b2' is not known; write \^2"),
        ("u, 1", "column 2: a comma may only stand between the two arguments of min or max"),
        ("  ", "column 3: empty; write a function of u"),
        ("u*\n(u-1)\n + v", 'line 3, column 4: "v" is not known'),
        (
            "u+" * 300 + "v" + "+u" * 100,
            r'"\u2026[u+]{30}v[u+]{29}\u2026", column 601: "v" is not known',
        ),
        ("u+" * 600, "column 1025: longer than 1024 characters"),
        ("(" * 65 + "u" + ")" * 65, "column 65: more than 64 parentheses inside each other"),
        ("ln(u, 2)", "column 1: ln takes 1 argument, got 2"),
        ("max(u)", "column 1: max takes 2 arguments, got 1"),
        ("__import__('os')", "column 1"),
        ("u^2", r"f\(1\) must be 0, it is 1"),
        ("(u-1)^2 + 1e-16", r"f\(1\) must be 0, it is 1e-16"),
        ("1e-20*(u-1)^2 + 1e-17", r"f\(1\) must be 0, it is 1e-17"),
        ("(u-1)^3", r"f must be convex, its slope falls by .* from u = 0\.99999"),
        ("ln(u)", "f must be convex"),
        # A fall of the slope that is far below the rounding of f'(1).
        ("1e-9*ln(u)+2.42*u^-0.841-2.42", r"its slope falls at the rate .* at u = 2\..*e11"),
        ("(u-1)^2-abs(u-77.7)+76.7", r"its slope falls by 2 at u = 77\.7"),
        ("1000*(u-1)^2 + min(u, 1.00123)/1e6 - 1e-6", r"its slope falls by 1e-6 at u = 1\.00123"),
        ("1e6*(u-1)^2 + 1e-9/(u-2)^2 - 1e-9", r"finite on \(0, inf\), it goes from .* at u = 2"),
        ("9*(u-1)^2 + abs(u-2)/(u-2) + 1", r"it goes from 9 to 11 at u = 2"),
        ("(u-1)^2 + 3e-13*sin(1e7*u)-3e-13*sin(1e7)", "f must be convex"),
        ("5*(u-1)", "linear"),
        ("1e-300*(u-1)", "linear"),
        ("ln(0.5) - ln(u-0.5)", r"finite on \(0, inf\), it is NaN at u = 0\.49"),
        ("1 - u^1e-14", r"f\(0\) cannot be determined, f reaches .*; give it as at_zero"),
        ("u*ln(1+ln(1+u)) - u*ln(1+ln(2))", r"f'\(inf\) cannot be determined"),
    ],
)
def test_bad_expressions_are_refused_with_reason_and_place(text: str, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        Divergence.from_expression(text)


@pytest.mark.parametrize(
    ("text", "f", "place"),
    [
        (
            "abs(u-1) + 1e-9*(sqrt(u)-1) + u^-3 - 1",
            lambda u: abs(u - 1) + mpf(1e-9) * (mp.sqrt(u) - 1) + u**-3 - 1,
            1e12,
        ),
        (
            "2*(u-1)^2/(u+2) + 1e-9*ln((1+u)/2)",
            lambda u: 2 * (u - 1) ** 2 / (u + 2) + mpf(1e-9) * mp.log((1 + u) / 2),
            1e13,
        ),
        (
            "sqrt((u-1)^2+2) - sqrt(2) + 1e-9*(abs(ln(u)-1)-1)",
            lambda u: mp.sqrt((u - 1) ** 2 + 2) - mp.sqrt(2) + mpf(1e-9) * (abs(mp.log(u) - 1) - 1),
            1e11,
        ),
        (
            "ln(1+exp(u)) - ln(1+exp(1)) + 1/u - 1 + 1e-9*u^-0.5 - 1e-9 + 1e-20*ln(u)",
            lambda u: (
                (u + mp.log1p(mp.exp(-u)) - mp.log1p(mp.e))
                + (1 / u - 1 + mpf(1e-9) * (u**-0.5 - 1) + mpf(1e-20) * mp.log(u))
            ),
            1e30,
        ),
    ],
)
def test_a_small_concave_term_is_refused_where_it_outweighs_the_rest(
    text: str, f: Callable[[mpf], mpf], place: float
) -> None:
    with pytest.raises(InvalidValueError, match="f must be convex, its slope falls"):
        Divergence.from_expression(text)
    with mp.workdps(300):
        # The middle of a chord is above it: f is not convex.
        assert abs(f(mpf(1))) < 1e-15
        left, middle, right = mpf(place), 2 * mpf(place), 3 * mpf(place)
        assert f(middle) > (f(left) + f(right)) / 2


@pytest.mark.parametrize(
    "text",
    [
        "(u-2)^2/(u+2) - 1/3 - 1e-9*ln(u)",
        "sqrt((u-1)^2+2) - sqrt(2)",
        "ln(1+exp(u)) - ln(1+exp(1))",
        "max(0.1*u+0.2*u-0.3, 0.3*u-0.3) + abs(u-1)",
        "u*(1/u) - 1e-3*sqrt(u) - 0.999",
    ],
)
def test_a_convex_expression_that_cancels_far_from_1_is_accepted(text: str) -> None:
    assert Divergence.from_expression(text)


def test_limits_may_be_given() -> None:
    divergence = Divergence.from_expression("1 - u^1e-14", at_zero=1.0, slope_at_infinity=0.0)
    log_lower, log_upper = Band(divergence, 1e-15).log_bounds(np.log(0.3))
    assert log_lower < 0.0 < log_upper
    divergence = Divergence.from_expression("1 - u^0.001", at_zero=1.0, slope_at_infinity=0.0)
    found = Divergence.from_expression("1 - u^0.001")
    np.testing.assert_array_equal(
        Band(divergence, 0.001).log_bounds(-3.0), Band(found, 0.001).log_bounds(-3.0)
    )
    for limits, message in [
        ({"at_zero": 1.1}, r"at_zero is 1\.1, and f contradicts it: f\(0\) reaches 1"),
        ({"at_zero": np.nan}, "at_zero must be a number or inf, got nan"),
        ({"slope_at_infinity": np.inf}, r"slope_at_infinity is inf, and f contradicts it"),
    ]:
        with pytest.raises(InvalidValueError, match=message):
            Divergence.from_expression("1 - u^0.001", **limits)
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


def test_calibration_without_a_solution_is_refused() -> None:
    for spec in ["tv", "hockey-stick:1.2", "vajda:3"]:
        with pytest.raises(InvalidValueError, match=r"has no f''\(1\); match at a reference"):
            Band("kl", 0.05).calibrated(spec)
        with pytest.raises(InvalidValueError, match=r"has no f''\(1\)"):
            Band(spec, 0.05).calibrated("kl")
    with pytest.raises(InvalidValueError, match=r"p must be in \(0, 1\), got 1\.0"):
        Band("kl", 0.05).calibrated("tv", p=1.0)
    with pytest.raises(InvalidValueError, match=r"allows everything at p = 0\.01"):
        Band("tv", 0.05).calibrated("kl", p=0.01)


def minus_ln(u: np.ndarray) -> np.ndarray:
    return np.asarray(-np.log(u))


def test_calibration_takes_python_functions() -> None:
    function = Divergence.from_callable(minus_ln)
    assert function.curvature == pytest.approx(1.0, rel=1e-9)
    assert Band(function, 0.05).calibrated("pearson-chi2").delta_low == pytest.approx(0.1, rel=1e-9)
    assert Band("pearson-chi2", 0.1).calibrated(function).delta_high == pytest.approx(
        0.05, rel=1e-9
    )
    pairs: list[tuple[Divergence | str, Divergence | str]] = [(function, "tv"), ("tv", function)]
    for mine, theirs in pairs:
        calibrated = Band(mine, 0.05).calibrated(theirs, p=0.2)
        for actual, expected in zip(
            calibrated.log_bounds(np.log(0.2)),
            Band(mine, 0.05).log_bounds(np.log(0.2)),
            strict=True,
        ):
            assert actual == pytest.approx(expected, rel=CUSTOM, abs=0)
    for kinked in (lambda u: np.abs(u - 1), lambda u: np.abs(u - 1) ** 3):
        divergence = Divergence.from_callable(kinked)
        assert divergence.curvature is None
        with pytest.raises(InvalidValueError, match=r"has no f''\(1\); match at a reference"):
            Band("kl", 0.05).calibrated(divergence)


@pytest.mark.parametrize(
    ("fn", "curvature"),
    [
        (lambda u: (u - 1) ** 2, 2.0),
        (lambda u: u * u - 2 * u + 1, 2.0),
        (lambda u: (u - 1) ** 2 / u, 2.0),
        (lambda u: u**3 - 1, 6.0),
        (lambda u: (u - 1) ** 2 / (2 * (u + 1)), 0.5),
        (lambda u: (u - 1) ** 4, None),
        (lambda u: np.abs(u - 1) ** 2.5, None),
    ],
)
def test_polynomials_in_python_have_their_curvature(
    fn: Callable[[np.ndarray], np.ndarray], curvature: float | None
) -> None:
    found = Divergence.from_callable(fn).curvature
    assert found == (None if curvature is None else pytest.approx(curvature, rel=1e-9))


@pytest.mark.parametrize("name", ["at_zero", "slope_at_infinity"])
def test_limits_that_are_no_numbers_are_refused(name: str) -> None:
    limits: list[tuple[Any, type[Exception], str]] = [
        ("1", InvalidTypeError, f"{name} must be a real number, got str"),
        (np.nan, InvalidValueError, f"{name} must be a number or inf, got nan"),
    ]
    for limit, error, message in limits:
        with pytest.raises(error, match=message):
            Divergence.from_expression("-ln(u)", **{name: limit})
        with pytest.raises(error, match=message):
            Divergence.from_callable(minus_ln, **{name: limit})


def test_calibration_to_a_flat_function_is_refused() -> None:
    with pytest.raises(
        InvalidValueError, match=r"is 0 at the lower bound .* at p = 0\.9.* another p"
    ):
        Band("kl", 0.05).calibrated("hockey-stick:4", p=0.9)
    with pytest.raises(InvalidTypeError, match="p must"):
        Band("kl", 0.05).calibrated("tv", p="0.1")  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["kl", "tv"])
def test_a_diagnosis_of_a_python_function_equals_the_built_in(spec: str) -> None:
    f = {"kl": minus_ln, "tv": lambda u: np.abs(u - 1) / 2}[spec]
    logp = np.array([[-1.0, 0.0, 0.04, -700.0], [-np.inf, np.nan, -0.01, -1e-9]])
    band = Band(Divergence.from_callable(f), 0.05)
    found, built_in = band.diagnose(logp), Band(spec, 0.05).diagnose(logp)
    expected = [side.status.copy() for side in built_in]
    if spec == "kl":
        expected[0][0, 3] = Status.LIMIT  # a ratio that is no normal float64
    for side, status, log_bound in zip(found, expected, band.log_bounds(logp), strict=True):
        np.testing.assert_array_equal(side.log_bound, log_bound)
        np.testing.assert_array_equal(side.status, status)
        converged = side.status == Status.CONVERGED
        assert converged.sum() >= 2
        assert band.contains(logp, side.log_bound)[converged].all()
        assert not band.contains(logp, side.outside)[converged].any()
        np.testing.assert_allclose(
            side.outside[converged], side.log_bound[converged], rtol=1e-12, atol=0
        )
        assert np.all((side.iterations[converged] > 0) & (side.iterations[converged] <= MAX_CALLS))


def test_a_diagnosis_has_brackets_statuses_and_bounded_work() -> None:
    logp = np.array([[-1.0, 0.0, 0.04], [-np.inf, np.nan, -0.01]])
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
            assert side.iterations.max() <= 196, spec  # MAX_BOUND_EVALUATIONS
            assert side.iterations[:20_000].mean() <= 8.0, spec
