"""An f given as a Python callable: against built-ins, closed forms and 50-digit bisection."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf

from bandpo import Band, BandpoError
from bandpo.check import BoolArray, Float64Array
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.generator import BLOCK, LOG_REACH, MAX_CALLS, CallableGenerator
from bandpo.generator.function import _grid
from support.tokens import log_probs

RELATIVE = 1e-10
"""Relative tolerance of a log bound against the built-in's, for delta >= 1e-5."""

Function = Callable[[Float64Array], Any]


def kl(u: Float64Array) -> Any:
    return -np.log(u) + u - 1


def reverse_kl(u: Float64Array) -> Any:
    return u * np.log(u) - u + 1


def jensen_shannon(u: Float64Array) -> Any:
    return (u * np.log(u) - (u + 1) * np.log((u + 1) / 2)) / 2


# Written as by a user, not for minimal rounding errors.
FUNCTIONS: dict[str, Function] = {
    "kl": kl,
    "reverse-kl": reverse_kl,
    "tv": lambda u: np.abs(u - 1) / 2,
    "pearson-chi2": lambda u: (u - 1) ** 2,
    "neyman-chi2": lambda u: (u - 1) ** 2 / u,
    "hellinger": lambda u: (np.sqrt(u) - 1) ** 2 / 2,
    "le-cam": lambda u: (u - 1) ** 2 / (2 * (u + 1)),
    "jensen-shannon": jensen_shannon,
    "jeffreys": lambda u: (u - 1) * np.log(u),
    "alpha:0.5": lambda u: (u**0.5 - 1 - 0.5 * (u - 1)) / (0.5 * -0.5),
    "alpha:-3": lambda u: (u**-3.0 - 1 + 3 * (u - 1)) / 12,
    "alpha:4": lambda u: (u**4 - 1 - 4 * (u - 1)) / 12,
    "vajda:1.5": lambda u: np.abs(u - 1) ** 1.5,
    "bwcs:0.3": lambda u: (u - 1) ** 2 / (0.7 + 0.3 * u),
    "hockey-stick:1.2": lambda u: np.maximum(u - 1.2, 0),
}

WITH_MULTIPLE_OF_U_MINUS_1: dict[str, tuple[str, Function]] = {
    "-ln u": ("kl", lambda u: -np.log(u)),
    "-ln u - 7(u-1)": ("kl", lambda u: -np.log(u) - 7 * (u - 1)),
    "u ln u": ("reverse-kl", lambda u: u * np.log(u)),
    "max(u-1, 0)": ("tv", lambda u: np.maximum(u - 1, 0)),
    "u^2 - 1": ("pearson-chi2", lambda u: u * u - 1),
    "1/u - 1": ("neyman-chi2", lambda u: 1 / u - 1),
    "1 - sqrt u": ("hellinger", lambda u: 1 - np.sqrt(u)),
}


def radii(seed: int, count: int, low: float = -5.0) -> Float64Array:
    return np.asarray(10.0 ** np.random.default_rng(seed).uniform(low, 1.0, count))


class Counted:
    """Counts the calls of a function and checks their arguments."""

    def __init__(self, fn: Function) -> None:
        self.fn = fn
        self.calls = 0
        self.fewest = 10**9

    def __call__(self, u: Float64Array) -> Any:
        assert isinstance(u, np.ndarray)
        assert u.ndim == 1
        assert u.dtype == np.float64
        assert np.all(u > 0)
        self.calls += 1
        self.fewest = min(self.fewest, u.size)
        return self.fn(u)


# --- agreement ---------------------------------------------------------------------------------


def assert_agrees(fn: Function, spec: str, logp: Float64Array, delta: Float64Array) -> None:
    generator = CallableGenerator(fn)
    log_bounds = generator.log_bounds(delta, delta, logp)
    for actual, exact in zip(log_bounds, Band(spec, delta).log_bounds(logp), strict=True):
        normal = np.abs(exact) < LOG_REACH
        np.testing.assert_allclose(actual[normal], exact[normal], rtol=RELATIVE, atol=0)
        np.testing.assert_array_equal(np.isinf(actual), np.isinf(exact))
        # The limits are on the inner side.
        assert np.all(np.abs(actual) <= np.abs(exact) * (1 + RELATIVE))
        assert generator.contains(delta, delta, logp, actual).all()


@pytest.mark.parametrize("spec", FUNCTIONS)
def test_bounds_equal_the_built_in_divergence(spec: str) -> None:
    logp = log_probs(1, 30_000)
    assert_agrees(FUNCTIONS[spec], spec, logp, radii(2, logp.size))


@pytest.mark.parametrize("text", WITH_MULTIPLE_OF_U_MINUS_1)
def test_a_multiple_of_u_minus_1_does_not_change_bounds(text: str) -> None:
    spec, fn = WITH_MULTIPLE_OF_U_MINUS_1[text]
    logp = log_probs(3, 9_000)
    assert_agrees(fn, spec, logp, radii(4, logp.size))


@pytest.mark.parametrize("spec", ["kl", "reverse-kl", "tv", "hellinger", "neyman-chi2"])
def test_small_deltas_lose_few_digits_if_f_is_smooth(spec: str) -> None:
    logp = log_probs(5, 9_000)
    delta = radii(6, logp.size, low=-12.0)
    generator = CallableGenerator(FUNCTIONS[spec])
    for actual, exact in zip(
        generator.log_bounds(delta, delta, logp), Band(spec, delta).log_bounds(logp), strict=True
    ):
        normal = np.abs(exact) < LOG_REACH
        np.testing.assert_allclose(actual[normal], exact[normal], rtol=1e-9, atol=0)


def test_delta_as_numbers_and_as_arrays() -> None:
    generator, logp = CallableGenerator(kl), np.linspace(-3.0, -0.01, 300)
    of_numbers = generator.log_bounds(0.01, 0.2, logp)
    of_arrays = generator.log_bounds(np.full(300, 0.01), np.full(300, 0.2), logp)
    np.testing.assert_array_equal(of_numbers, of_arrays)
    np.testing.assert_allclose(of_numbers, Band("kl", (0.01, 0.2)).log_bounds(logp), rtol=RELATIVE)


def test_blocks_do_not_change_the_bounds() -> None:
    logp = np.resize(log_probs(8, 999), BLOCK + 12_345)
    log_lower, log_upper = CallableGenerator(kl).log_bounds(0.05, 0.05, logp)
    expected = Band("kl", 0.05).log_bounds(logp)
    np.testing.assert_allclose(log_upper, expected[1], rtol=RELATIVE, atol=0)
    normal = expected[0] > -LOG_REACH
    np.testing.assert_allclose(log_lower[normal], expected[0][normal], rtol=RELATIVE, atol=0)


# --- kinks and flat parts ----------------------------------------------------------------------


def bisected(f: Callable[[mpf], mpf], logp: float, delta: float, upper: bool) -> float:
    """The log bound by 200 halvings of the log-ratio on the definition of D, at 50 digits."""
    with mp.workdps(50):
        p, rest = mp.exp(mpf(logp)), -mp.expm1(mpf(logp))

        def divergence(log_ratio: mpf) -> mpf:
            r = mp.exp(log_ratio)
            return p * f(r) + rest * f((1 - r * p) / rest)

        inside, outside = mpf(0), -mpf(logp) if upper else mpf(-700)
        assert divergence(outside) > delta
        for _ in range(200):
            middle = (inside + outside) / 2
            if divergence(middle) <= delta:
                inside = middle
            else:
                outside = middle
        return float(inside)


@pytest.mark.parametrize(
    ("fn", "f"),
    [
        (
            lambda u: np.maximum((u - 1) ** 2, np.abs(u - 1)),
            lambda u: max((u - 1) ** 2, abs(u - 1)),
        ),
        (
            lambda u: np.maximum(u - 1.5, 0) + np.maximum(0.75 - u, 0),
            lambda u: max(u - 1.5, mpf(0)) + max(mpf(0.75) - u, mpf(0)),
        ),
        (
            lambda u: np.where(np.abs(u - 1) < 0.25, (u - 1) ** 2 / 2, (np.abs(u - 1) - 0.125) / 4),
            lambda u: (u - 1) ** 2 / 2 if abs(u - 1) < 0.25 else (abs(u - 1) - mpf(0.125)) / 4,
        ),
        (lambda u: np.cosh(u - 1) - 1, lambda u: mp.cosh(u - 1) - 1),
    ],
    ids=["max of two", "flat bottom", "Huber", "cosh"],
)
def test_bounds_equal_bisection(fn: Function, f: Callable[[mpf], mpf]) -> None:
    generator = CallableGenerator(fn)
    logp = np.log([1e-6, 0.003, 0.2, 0.5, 0.7, 0.99])
    for delta in [1e-5, 0.01, 0.1]:
        log_lower, log_upper = generator.log_bounds(delta, delta, logp)
        for i, token in enumerate(logp):
            if log_lower[i] > -np.inf:
                exact = bisected(f, token, delta, upper=False)
                assert log_lower[i] == pytest.approx(exact, rel=RELATIVE, abs=0)
            if log_upper[i] < -token:
                exact = bisected(f, token, delta, upper=True)
                assert log_upper[i] == pytest.approx(exact, rel=RELATIVE, abs=0)


def test_twice_tv_equals_its_closed_form() -> None:
    # p |r - 1| = delta / 2 for |u - 1|.
    p = np.array([0.01, 0.3, 0.9])
    log_lower, log_upper = CallableGenerator(lambda u: np.abs(u - 1)).log_bounds(
        0.004, 0.004, np.log(p)
    )
    np.testing.assert_allclose(log_lower, np.log1p(-0.002 / p), rtol=1e-13, atol=0)
    np.testing.assert_allclose(log_upper, np.log1p(0.002 / p), rtol=1e-13, atol=0)


def test_a_flat_bottom_of_f_allows_its_whole_width() -> None:
    # D = 0 for ratios of token and rest in [0.5, 2], which every band therefore contains.
    generator = CallableGenerator(lambda u: np.maximum(u - 2, 0) + np.maximum(0.5 - u, 0))
    log_lower, log_upper = generator.log_bounds(1e-12, 1e-12, np.log([0.5, 0.01]))
    np.testing.assert_allclose(np.exp(log_lower), [0.5, 0.5], rtol=1e-9)
    np.testing.assert_allclose(np.exp(log_upper), [1.5, 2.0], rtol=1e-9)


# --- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FUNCTIONS)
def test_limits_at_both_ends_and_nan(spec: str) -> None:
    logp = np.array([0.0, 3.0, np.inf, -np.inf, np.nan, -1.0])
    generator = CallableGenerator(FUNCTIONS[spec])
    log_lower, log_upper = generator.log_bounds(0.05, 0.05, logp)
    np.testing.assert_array_equal(log_upper[:5], [0.0, 0.0, 0.0, np.inf, np.nan])
    np.testing.assert_array_equal(log_lower[3:5], [-np.inf, np.nan])
    expected, _ = Band(spec, 0.05).log_bounds(0.0)
    np.testing.assert_allclose(log_lower[:3], np.full(3, expected), rtol=RELATIVE, atol=0)
    assert np.isfinite([log_lower[5], log_upper[5]]).all(), "a NaN spoils no neighbour"
    assert all(
        array.shape == (0,) for array in generator.bounds_with_slopes(0.05, 0.05, np.empty(0))
    )


@pytest.mark.parametrize("spec", ["kl", "jeffreys", "neyman-chi2", "alpha:-3"])
def test_nothing_saturates_where_f_at_0_is_infinite(spec: str) -> None:
    logp = np.array([-1e-300, -1e-10, -0.1, -1.0, -300.0, -740.0, -1e6, -1e300])
    generator = CallableGenerator(FUNCTIONS[spec])
    assert generator.at_zero == np.inf
    log_lower, log_upper = generator.log_bounds(5.0, 5.0, logp)
    assert np.all(log_upper < -logp)
    assert np.all(log_upper >= 0.0)
    assert np.all((log_lower <= 0.0) & (log_lower >= -LOG_REACH))


def test_log_lower_is_a_limit_where_the_ratio_is_no_normal_float() -> None:
    logp = np.array([-20.0, -745.0, -1e9])
    log_lower, _ = CallableGenerator(kl).log_bounds(0.05, 0.05, logp)
    np.testing.assert_array_equal(log_lower, [-LOG_REACH] * 3)
    assert not CallableGenerator(kl).contains(0.05, 0.05, logp, log_lower * 1.01).any()


def test_saturation_is_exact_where_f_at_0_is_finite() -> None:
    logp = np.log([0.3, 0.6, 0.9, 1e-200])
    generator = CallableGenerator(FUNCTIONS["tv"])
    log_lower, log_upper = generator.log_bounds(0.35, 0.35, logp)
    np.testing.assert_array_equal(np.isneginf(log_lower), [True, False, False, True])
    np.testing.assert_array_equal(log_upper == -logp, [False, False, True, False])
    everything = generator.log_bounds(1.5, 1.5, np.array([-1e-9, -1.0, -1e200]))
    np.testing.assert_array_equal(everything, [[-np.inf] * 3, [1e-9, 1.0, 1e200]])


@pytest.mark.parametrize("spec", FUNCTIONS)
def test_bounds_are_monotone_into_the_far_tails(spec: str) -> None:
    ends = -np.concatenate([10.0 ** -np.linspace(0, 320, 400), 10.0 ** np.linspace(0, 308, 400)])
    logp = np.sort(ends)
    generator = CallableGenerator(FUNCTIONS[spec])
    for delta in [1e-12, 0.05, 100.0]:
        log_lower, log_upper = generator.log_bounds(delta, delta, logp)
        assert np.all(log_lower <= 0.0)
        assert np.all((log_upper >= 0.0) & (log_upper <= -logp))
        assert generator.contains(delta, delta, logp, log_lower).all()
        assert generator.contains(delta, delta, logp, log_upper).all()
        # log_upper does not rise in p and log_lower does not fall.
        assert np.all(np.diff(log_upper) <= 1e-9 * log_upper[1:])
        finite = log_lower[log_lower > -np.inf]
        assert np.all(np.diff(finite) >= 1e-9 * finite[1:])


@pytest.mark.parametrize(
    ("fn", "at_zero", "slope_at_infinity"),
    [
        (kl, np.inf, 1.0),
        (reverse_kl, 1.0, np.inf),
        (jensen_shannon, np.log(2) / 2, np.log(2) / 2),
        (lambda u: u**4 - 1, -1.0, np.inf),
        (lambda u: 1 / u**3 - 1, np.inf, 0.0),
        (lambda u: np.exp(u - 1) - 1, np.exp(-1) - 1, np.inf),
        (lambda u: (u - 1) ** 2 / u, np.inf, 1.0),
        (lambda u: np.maximum(u - 1e50, 0), 0.0, 1.0),
        (lambda u: (u**0.1 - 1 - 0.1 * (u - 1)) / (0.1 * -0.9), 10.0, 1 / 0.9),
    ],
)
def test_limits_of_f_are_found(fn: Function, at_zero: float, slope_at_infinity: float) -> None:
    generator = CallableGenerator(fn)
    assert generator.at_zero == pytest.approx(at_zero, rel=1e-11, abs=1e-15)
    assert generator.slope_at_infinity == pytest.approx(slope_at_infinity, rel=1e-11, abs=1e-15)


def slowly_to_100(u: Float64Array) -> Any:
    return (u**0.01 - 1 - 0.01 * (u - 1)) / (0.01 * -0.99)


def test_an_unclear_limit_of_f_is_an_error_that_names_the_argument() -> None:
    with pytest.raises(InvalidValueError, match=r"f\(0\) is not clear .* as at_zero=\.\.\."):
        CallableGenerator(slowly_to_100)
    generator = CallableGenerator(slowly_to_100, at_zero=100.0)
    assert generator.at_zero == 100.0
    logp = log_probs(9, 3000)
    log_lower, log_upper = generator.log_bounds(0.05, 0.05, logp)
    expected = Band("alpha:0.01", 0.05).log_bounds(logp)
    normal = np.abs(expected[0]) < LOG_REACH
    np.testing.assert_allclose(log_lower[normal], expected[0][normal], rtol=RELATIVE, atol=0)
    np.testing.assert_allclose(log_upper, expected[1], rtol=RELATIVE, atol=0)
    with pytest.raises(InvalidValueError, match=r"f'\(inf\) is not clear .* slope_at_infinity="):
        CallableGenerator(lambda u: u * np.log1p(np.log1p(u)) - u * np.log1p(np.log(2)))


# --- bad input ---------------------------------------------------------------------------------


def raises(u: Float64Array) -> Any:
    raise ZeroDivisionError("no such f")


def branches(u: Float64Array) -> Any:
    return u - 1 if u > 1 else 0 * u


def in_place(u: Float64Array) -> Any:
    u -= 1
    return u * u


def with_hole(u: Float64Array) -> Any:
    return np.where((u > 5) & (u < 6), np.inf, (u - 1) ** 2)


BAD: list[tuple[Any, type[Exception], str]] = [
    (3, InvalidTypeError, "f must be a callable over arrays, got int"),
    (raises, InvalidValueError, r"f raised ZeroDivisionError on .*shape \(4001,\).*: no such f"),
    (branches, InvalidValueError, "f raised ValueError .* truth value of an array"),
    (in_place, InvalidValueError, "f raised ValueError .* read-only"),
    (lambda u: 0.0, InvalidValueError, r"f must return the shape .*got \(\) on .*shape \(4001,\)"),
    (lambda u: (u - 1)[:-1] ** 2, InvalidValueError, r"f must return the shape .*got \(4000,\)"),
    (
        lambda u: (u - 1)[:, None] ** 2,
        InvalidValueError,
        r"f must return the shape .*got \(4001, 1\)",
    ),
    (lambda u: (u - 1) ** 2 + 0j, InvalidTypeError, "got dtype complex128"),
    (lambda u: u > 1, InvalidTypeError, "got dtype bool"),
    (lambda u: np.float32(u - 1) ** 2, InvalidTypeError, "double precision, got dtype float32"),
    (lambda u: np.log(u - 1), InvalidValueError, r"finite on \(0, inf\), got f\(1\) = -inf"),
    (
        lambda u: np.where(u < 0.5, np.nan, (u - 1) ** 2),
        InvalidValueError,
        r"finite on \(0, inf\), got f\(0\.49\d+\) = nan",
    ),
    (with_hole, InvalidValueError, r"got f\(5\.0\d+\) = inf"),
    (
        lambda u: np.where(u > 5, np.inf, (u - 1) ** 2),
        InvalidValueError,
        r"got f\(5\.0\d+\) = inf next to f\(4\.9\d+\) = 15\.\d+",
    ),
    (lambda u: np.inf * u, InvalidValueError, "inf everywhere"),
    (lambda u: (u - 1) ** 2 + 1e-10, InvalidValueError, r"f\(1\) must be 0, got 1e-10; .*shifted"),
    (lambda u: -np.log(u) + u, InvalidValueError, r"f\(1\) must be 0, got 1\.0"),
    (lambda u: -((u - 1) ** 2), InvalidValueError, "f is not convex: at u = "),
    (lambda u: (u - 1) ** 3, InvalidValueError, r"not convex: at u = 0\.\d+ it lies 0\.\d+ above"),
    (
        lambda u: (u - 1) ** 2 - np.abs(u - 77.7) + 76.7,
        InvalidValueError,
        r"not convex: at u = 77\.\d+ its slope falls by",
    ),
    (
        lambda u: 1e3 * (u - 1) ** 2 - 1e-3 * (np.abs(u - 1.00123) - 0.00123),
        InvalidValueError,
        r"not convex: at u = 1\.0012\d+ its slope falls by",
    ),
    (np.log, InvalidValueError, r"not convex: .* above its chord from \S+ to \S+"),
    (lambda u: 0 * u, InvalidValueError, "f is 0 everywhere"),
    (lambda u: 3 * u - 3, InvalidValueError, r"f is 3 \(u - 1\) everywhere"),
    (lambda u: 0.1 * u - 0.1, InvalidValueError, r"f is 0\.1 \(u - 1\) everywhere"),
    (lambda u: (u - u.mean()) ** 2, InvalidValueError, "f must work element by element"),
    (lambda u: np.cumsum(u - 1) ** 2, InvalidValueError, "f must work element by element"),
]


@pytest.mark.parametrize(("fn", "error", "message"), BAD)
def test_bad_functions_are_refused(fn: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        CallableGenerator(fn)
    assert isinstance(caught.value, BandpoError)


def test_the_exception_of_the_function_is_the_cause() -> None:
    with pytest.raises(InvalidValueError) as caught:
        CallableGenerator(raises)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


GROWING: dict[str, Callable[[Any], Any]] = {
    "exp(u)": np.exp,
    "exp(5u)": lambda u: np.exp(5.0 * u),
    "exp(u^2)": lambda u: np.exp(u * u),
    "exp(1/u)": lambda u: np.exp(1.0 / u),
    "u^8": lambda u: u**8.0,
    "u^-3": lambda u: u**-3.0,
    "u ln u": lambda u: u * np.log(u),
}


@pytest.mark.parametrize("share", [0.3, 0.03, 0.01])
@pytest.mark.parametrize("kink", [0.7, 1.3, 2.9])
@pytest.mark.parametrize("name", GROWING)
def test_a_concave_kink_shows_where_the_curvature_grows_fast(
    name: str, kink: float, share: float
) -> None:
    """f' falls by a share of what it gains between two points of the grid."""
    smooth = GROWING[name]
    grid = np.exp(_grid())
    points = grid[np.searchsorted(grid, kink) + np.array([-1, 0, 1])]
    slopes = np.diff(smooth(points)) / np.diff(points)
    fall = share * (slopes[1] - slopes[0])

    def concave(u: Any) -> Any:
        return smooth(u) - 0.5 * fall * np.abs(u - kink)

    with pytest.raises(InvalidValueError, match="not convex"):
        CallableGenerator(lambda u: concave(u) - concave(np.ones(1)))
    CallableGenerator(lambda u: smooth(u) - smooth(np.ones(1)))


@pytest.mark.parametrize("multiple", [0.0, 1.0, -30.0, 1e6])
def test_convexity_is_judged_alike_for_any_multiple_of_u_minus_1(multiple: float) -> None:
    # The second derivative of the first is at least 1, that of the second falls to -1.
    CallableGenerator(lambda u: (u - 1) ** 2 + 1e-4 * np.sin(100 * (u - 1)) + multiple * (u - 1))
    with pytest.raises(InvalidValueError, match=r"not convex: at u = \d"):
        CallableGenerator(
            lambda u: (u - 1) ** 2 + 3e-4 * np.sin(100 * (u - 1)) + multiple * (u - 1)
        )


@pytest.mark.parametrize(
    "fn",
    [
        lambda u: list((u - 1) ** 2),
        lambda u: (u.astype(np.longdouble) - 1) ** 2,
        lambda u: 1e-20 * (u - 1) ** 2,
        lambda u: 1e20 * (u - 1) ** 2,
        lambda u: np.exp(np.exp(u)) - np.exp(np.exp(1)),
        lambda u: np.exp(1000 * (u - 1)) - 1,
        lambda u: 1e-308 * (u - 1) ** 2,
        lambda u: (u - 1) ** 2 + np.abs(u - 77.7) - 76.7,
        lambda u: np.logaddexp(0, u - 1) - np.log(2),
        lambda u: np.maximum(u - 3, 0) + np.maximum(0.1 - u, 0),
        lambda u: 1 - np.minimum(u, 1),
        lambda u: (u - 1) ** 2 / (2 * (u + 1)) - (u - 1) / 2,
        lambda u: (u - 2 * np.sqrt(u) + 1) / 2,
    ],
)
def test_unusual_functions_are_accepted(fn: Function) -> None:
    CallableGenerator(fn)


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"at_zero": 0.7}, InvalidValueError, r"at_zero is 0\.7, but f reaches 0\.5"),
        ({"at_zero": 0.2}, InvalidValueError, r"at_zero is 0\.2, but f reaches 0\.5"),
        ({"slope_at_infinity": -np.inf}, InvalidValueError, r"slope_at_infinity is -inf, but"),
        ({"slope_at_infinity": np.nan}, InvalidValueError, "slope_at_infinity must be a number"),
        ({"at_zero": "1"}, InvalidTypeError, "at_zero must be a real number, got str"),
        ({"at_zero": True}, InvalidTypeError, "at_zero must be a real number, got bool"),
    ],
)
def test_bad_limits_are_refused(
    limits: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CallableGenerator(FUNCTIONS["tv"], **limits)


def test_a_function_that_fails_after_construction_is_an_error() -> None:
    def fails_between_the_points(u: Float64Array) -> Any:
        return np.where((u > 1.99) & (u < 1.9901), np.nan, (u - 1) ** 2)

    generator = CallableGenerator(fails_between_the_points)
    with pytest.raises(InvalidValueError, match=r"got f\(1\.99\d*\) = nan"):
        generator.contains(0.05, 0.05, np.array([-3.0]), np.log([1.99005]))


# --- calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FUNCTIONS)
def test_calls_are_few_and_on_arrays(spec: str) -> None:
    counted = Counted(FUNCTIONS[spec])
    generator = CallableGenerator(counted)
    assert counted.calls <= 15
    logp = np.concatenate([log_probs(10, 3000), -(10.0 ** np.linspace(-320, 308, 1000))])
    for delta in [1e-12, 1e-5, 0.05, 20.0]:
        counted.calls = 0
        generator.log_bounds(delta, delta, logp)
        assert counted.calls <= MAX_CALLS
    counted.calls, counted.fewest = 0, 10**9
    generator.contains(0.05, 0.05, logp, np.zeros_like(logp) - 0.1)
    assert counted.calls == 1
    assert counted.fewest == 2 * logp.size


def test_the_number_of_calls_does_not_grow_with_the_batch() -> None:
    counted = Counted(kl)
    generator = CallableGenerator(counted)
    calls = []
    for count in [30, 30_000]:
        counted.calls = 0
        generator.log_bounds(0.05, 0.05, log_probs(11, count))
        calls.append(counted.calls)
    assert max(calls) <= MAX_CALLS


# --- membership --------------------------------------------------------------------------------


def test_contains_equals_divergence_at_most_delta() -> None:
    logp = log_probs(12, 3000)
    rng = np.random.default_rng(13)
    log_ratio = np.where(rng.uniform(size=logp.size) < 0.5, 1.0, 1e-3) * rng.normal(size=logp.size)
    for spec in FUNCTIONS:
        generator = CallableGenerator(FUNCTIONS[spec])
        inside = generator.contains(0.01, 0.3, logp, log_ratio)
        expected = Band(spec, (0.01, 0.3)).contains(logp, log_ratio)
        np.testing.assert_array_equal(inside, expected)
        assert not inside[log_ratio > -logp].any()


def test_contains_at_the_ends() -> None:
    def contains(logp: float, log_ratio: float) -> BoolArray:
        return CallableGenerator(FUNCTIONS["tv"]).contains(
            0.05, 0.05, np.array([logp]), np.array([log_ratio])
        )

    assert contains(-1.0, 0.0)
    assert contains(0.0, 0.0)
    assert contains(0.0, -0.05)
    assert not contains(0.0, -0.06)
    assert not contains(0.0, 0.01)
    assert contains(-5.0, -np.inf)
    assert not contains(-1.0, -np.inf)
    assert contains(-0.01, 0.01)
    assert not contains(-0.01, 0.0100001)
    assert contains(-np.inf, 700.0)
    for logp, log_ratio in [(np.nan, 0.0), (-1.0, np.nan), (-np.inf, np.nan), (0.0, np.nan)]:
        assert not contains(logp, log_ratio)


@pytest.mark.parametrize("spec", FUNCTIONS)
def test_nothing_beyond_the_bounds_is_inside(spec: str) -> None:
    generator, logp = CallableGenerator(FUNCTIONS[spec]), log_probs(14, 3000)
    log_lower, log_upper = generator.log_bounds(0.05, 0.05, logp)
    assert not generator.contains(0.05, 0.05, logp, log_upper * (1 + 1e-9)).any()
    solved = log_lower > -LOG_REACH
    beyond = generator.contains(0.05, 0.05, logp[solved], log_lower[solved] * (1 + 1e-7))
    assert not beyond.any()


# --- slopes ------------------------------------------------------------------------------------


def differentiated(
    spec: str, delta: float, logp: Float64Array
) -> list[tuple[Float64Array, Float64Array]]:
    """``d log bound / d logp`` of a built-in by differences, each side with its uncertainty."""

    def differences(step: float) -> list[Float64Array]:
        after = Band(spec, delta).log_bounds(logp * (1 + step))
        before = Band(spec, delta).log_bounds(logp * (1 - step))
        return [(a - b) / (2 * step * logp) for a, b in zip(after, before, strict=True)]

    with np.errstate(invalid="ignore"):
        return [
            ((4 * fine - coarse) / 3, np.abs(fine - coarse))
            for fine, coarse in zip(differences(1e-3), differences(2e-3), strict=True)
        ]


@pytest.mark.parametrize("spec", FUNCTIONS)
@pytest.mark.parametrize("delta", [1e-4, 0.05, 0.5])
def test_slopes_equal_differences_of_bounds(spec: str, delta: float) -> None:
    logp = np.concatenate([log_probs(15, 900)[:600], -np.linspace(1e-3, 3.0, 300)])
    log_lower, log_upper, *slopes = CallableGenerator(FUNCTIONS[spec]).bounds_with_slopes(
        delta, delta, logp
    )
    expected = differentiated(spec, delta, logp)
    for slope, bound, (exact, doubt) in zip(slopes, (log_lower, log_upper), expected, strict=True):
        # Compared are slopes whose differences are accurate, within reach of the callable, and for
        # -logp large enough that rounding errors of f do not hide 1 - p.
        fair = np.isfinite(exact) & (doubt <= 1e-6 * np.abs(exact))
        fair &= (bound > -LOG_REACH * 0.9) & (logp < -1e-7)
        assert np.count_nonzero(fair) > 100
        np.testing.assert_allclose(slope[fair], exact[fair], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("spec", FUNCTIONS)
def test_slopes_have_their_signs_and_limits(spec: str) -> None:
    logp = np.concatenate([log_probs(16, 3000), [0.0, 1.0, -np.inf, -1e-300, -1e3, -1e300]])
    generator = CallableGenerator(FUNCTIONS[spec])
    log_lower, log_upper, of_lower, of_upper = generator.bounds_with_slopes(0.05, 0.2, logp)
    expected = generator.log_bounds(0.05, 0.2, logp)
    np.testing.assert_array_equal([log_lower, log_upper], expected)
    assert np.all((of_lower >= 0.0) & (of_lower < np.inf))
    assert np.all((of_upper >= -1.0) & (of_upper <= 0.0))
    assert np.all(of_upper[(log_upper == -logp) & np.isfinite(log_upper) & (logp < 0)] == -1.0)
    assert np.all(of_lower[np.isneginf(log_lower)] == 0.0)
    nan = generator.bounds_with_slopes(0.05, 0.05, np.array([np.nan]))
    assert np.isnan(nan).all()


# --- as a value --------------------------------------------------------------------------------


def test_compares_hashes_prints_and_pickles() -> None:
    generator = CallableGenerator(slowly_to_100, at_zero=100)
    copy = pickle.loads(pickle.dumps(generator))  # noqa: S301 -- our own bytes
    assert copy == generator
    assert hash(copy) == hash(generator)
    logp = log_probs(17, 300)
    np.testing.assert_array_equal(
        copy.log_bounds(0.05, 0.05, logp), generator.log_bounds(0.05, 0.05, logp)
    )
    assert repr(generator) == "CallableGenerator(slowly_to_100, at_zero=100.0)"
    assert CallableGenerator(kl) == CallableGenerator(kl)
    assert CallableGenerator(kl) != CallableGenerator(reverse_kl)
    assert CallableGenerator(kl) != CallableGenerator(kl, slope_at_infinity=1.0)
    assert CallableGenerator(kl) != kl
