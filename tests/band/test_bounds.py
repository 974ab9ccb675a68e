"""Exact bounds: against 60-digit references, published values, identities and other solvers."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.optimize import elementwise

import bandpo
from bandpo import Band, Clip, Divergence
from bandpo._core import DIVERGENCES
from bandpo.check import BoolArray, Float64Array
from bandpo.error import InvalidTypeError, InvalidValueError
from conftest import REFERENCE_FILES, Reference, read_reference
from support.contract import BACKWARD, ILL_CONDITIONED, RELATIVE
from support.reference import bound, divergence, to_double
from support.reference import log_bounds as reference_log_bounds

ROOT = Path(__file__).parents[2]
ACCURACY = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")

REFERENCE = 1e-60
"""Relative error of a reference. A bound that is outside by less counts as inside."""

SPECS = [*DIVERGENCES, "alpha:-3", "alpha:4", "renyi:0.5"]


def misses_the_documented_accuracy(
    reference: Reference, upper: bool, actual: Float64Array
) -> BoolArray:
    """True for each bound of a side that misses the accuracy of docs/accuracy.md."""
    if upper:
        exact, rest, kappa = reference.log_upper, reference.log_upper_rest, reference.kappa_upper
    else:
        exact, rest, kappa = reference.log_lower, reference.log_lower_rest, reference.kappa_lower
    determined = np.isinf(exact) | (exact == 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Neighbouring doubles subtract exactly, so that errors far below one ulp remain.
        error = (actual - exact) - rest
        relative = error / exact
        ulp = np.abs(exact) - np.nextafter(np.abs(exact), 0.0)
        good = (relative <= REFERENCE) & ((relative >= -RELATIVE) | (np.abs(error) <= ulp))
    for i in np.flatnonzero(
        ~determined & ~good & (relative <= REFERENCE) & (kappa > ILL_CONDITIONED)
    ):
        delta = float(reference.delta[i])
        missing = delta - divergence(reference.spec, float(reference.logp[i]), float(actual[i]))
        good[i] = 0 <= missing <= BACKWARD * np.spacing(delta)
    wrong: BoolArray = np.where(determined, actual != exact, ~good)
    return wrong


def test_bounds_meet_the_documented_accuracy(reference: Reference) -> None:
    for upper, bounds in enumerate(
        Band(reference.spec, reference.delta).log_bounds(reference.logp)
    ):
        broken = np.flatnonzero(misses_the_documented_accuracy(reference, bool(upper), bounds))
        i = broken[0] if broken.size else 0
        place = upper, reference.logp[i].hex(), reference.delta[i].hex(), bounds[i].hex()
        assert broken.size == 0, place


def test_the_documented_accuracy_is_the_one_that_is_checked() -> None:
    assert "| bounds outside the exact one | 0 | 0 |" in ACCURACY
    assert f"relative error above {RELATIVE:.0e} and above 1 ULP" in ACCURACY
    assert f"condition number up to {ILL_CONDITIONED:.0f} | 0 | 0 |" in ACCURACY
    assert (
        f"| the same above {ILL_CONDITIONED:.0f}, "
        f"unless D is within {BACKWARD:.0f} ULP of delta | 0 | 0 |" in ACCURACY
    )


@pytest.mark.parametrize("spec", ["kl", "pearson-chi2", "bhattacharyya"])
def test_bounds_that_miss_the_documented_accuracy_are_reported(spec: str) -> None:
    path = next(path for path in REFERENCE_FILES if f"band_{spec}." in path.name)
    reference = read_reference(path)
    for upper, exact in enumerate((reference.log_lower, reference.log_upper)):
        finite = np.isfinite(exact) & (exact != 0.0) & (np.abs(exact) > 1e-300)
        finite &= np.abs(exact) < np.finfo(float).max
        outside = np.nextafter(exact, np.copysign(np.finfo(float).max, exact))
        assert misses_the_documented_accuracy(reference, bool(upper), outside)[finite].all()
        inside = exact * (1 - 2e-14)
        kappa = reference.kappa_upper if upper else reference.kappa_lower
        well = finite & (kappa <= ILL_CONDITIONED)
        assert misses_the_documented_accuracy(reference, bool(upper), inside)[well].all()
        # D is 2 ULP of delta short after a move by 2 eps/kappa, give or take the share of logp.
        far = exact * (1 - 1e-3)
        assert misses_the_documented_accuracy(reference, bool(upper), far)[
            finite & (kappa < 1e6)
        ].all()
        other = np.where(np.isinf(exact), 1.0, exact)
        assert misses_the_documented_accuracy(reference, bool(upper), other)[np.isinf(exact)].all()


def test_work_is_bounded_as_documented(reference: Reference) -> None:
    documented = re.search(r"takes\s+at most (\d+) holds by construction", ACCURACY)
    assert documented is not None
    for side in Band(reference.spec, reference.delta).diagnose(reference.logp):
        assert 2 * side.iterations.max() <= int(documented[1])


def test_each_reference_has_more_than_800_points(reference: Reference) -> None:
    assert reference.logp.size > 800


@pytest.mark.parametrize(
    ("p", "lower", "upper"),
    [
        (1e-3, 7.099e-23, 53.54809),
        (0.01, 0.002497386, 7.809846),
        (0.05, 0.1620217, 2.981250),
        (0.1, 0.3127840, 2.200786),
        (0.3, 0.5708725, 1.515323),
        (0.5, 0.6915157, 1.308484),
        (0.8, 0.8205804, 1.131015),
        (0.95, 0.8957237, 1.044104),
        (0.99, 0.9312137, 1.010076),
    ],
)
def test_known_values_of_kl_at_005(p: float, lower: float, upper: float) -> None:
    actual_lower, actual_upper = Band("kl", 0.05).bounds(np.log(p))
    # Half a unit in the last digit that is printed.
    assert actual_lower == pytest.approx(lower, rel=1e-4 if p < 0.01 else 4e-7, abs=0)
    assert actual_upper == pytest.approx(upper, rel=4e-7, abs=0)


def test_bounds_of_kl_equal_the_root_finder_of_scipy() -> None:
    rng = np.random.default_rng(0)
    logp = np.log(rng.uniform(1e-4, 0.99, 2000))
    p = np.exp(logp)

    def residual(log_ratio: Float64Array, p: Float64Array) -> Float64Array:
        r = np.exp(log_ratio)
        c = (1 - r * p) / (1 - p)
        shifted: Float64Array = p * (r - 1 - log_ratio) + (1 - p) * (c - 1 - np.log(c)) - 0.05
        return shifted

    upper = elementwise.find_root(residual, (np.zeros_like(p), -logp * (1 - 1e-12)), args=(p,))
    _, log_upper = Band("kl", 0.05).log_bounds(logp)
    np.testing.assert_allclose(log_upper, upper.x, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("delta", "p"), [(0.05, 0.3), (0.2, 0.7), (1e-6, 1e-3)])
def test_closed_forms_of_tv_and_chi_square(delta: float, p: float) -> None:
    lower, upper = Band("tv", delta).bounds(np.log(p))
    assert lower == pytest.approx(max(1 - delta / p, 0.0), rel=1e-13, abs=0)
    assert upper == pytest.approx(min(1 + delta / p, 1 / p), rel=1e-13, abs=0)
    half = np.sqrt(delta * (1 - p) / p)
    lower, upper = Band("pearson-chi2", delta).bounds(np.log(p))
    assert lower == pytest.approx(max(1 - half, 0.0), rel=1e-13, abs=0)
    assert upper == pytest.approx(min(1 + half, 1 / p), rel=1e-13, abs=0)


probabilities = st.floats(min_value=-690.0, max_value=-1e-15)
radii = st.floats(min_value=1e-8, max_value=10.0)
specs = st.sampled_from(SPECS)


# `mirror` in rust/band/tests.rs ends at p = 1e-3.
@given(specs, radii, st.integers(min_value=1, max_value=2**20 - 1))
def test_mirror_identity(spec: str, delta: float, numerator: int) -> None:
    p = numerator / 2**20  # so that 1 - p is exact
    band = Band(spec, delta)
    _, log_upper = band.log_bounds(np.log(p))
    log_lower, _ = band.log_bounds(np.log1p(-p))
    up, down = p * np.exp(log_upper), (1 - p) * np.exp(log_lower)
    # Each log bound is off by its relative error, each logarithm by half an ulp.
    slack = RELATIVE * (up * log_upper - (down * log_lower if down > 0 else 0.0)) + 4e-15
    assert abs(up + down - 1) <= slack


# `nested_in_delta` in rust/band/tests.rs ends at a factor of 100.
@given(specs, radii, st.floats(min_value=1.0, max_value=1e3), probabilities)
def test_nested_in_delta(spec: str, delta: float, more: float, logp: float) -> None:
    log_lower, log_upper = Band(spec, delta).log_bounds(logp)
    wider_lower, wider_upper = Band(spec, delta * more).log_bounds(logp)
    assert wider_lower <= log_lower * (1 - 2 * RELATIVE)
    assert wider_upper >= log_upper * (1 - 2 * RELATIVE)


every_log_prob = st.one_of(
    st.floats(min_value=-323.3, max_value=3.0).map(lambda power: -(10.0**power)),
    st.sampled_from([0.0, -5e-324, -np.finfo(float).smallest_normal, -745.2, -1e9, -np.inf]),
)


@given(specs, radii, every_log_prob)
def test_bounds_are_contained_at_any_probability(spec: str, delta: float, logp: float) -> None:
    band = Band(spec, delta)
    log_lower, log_upper = band.log_bounds(logp)
    assert log_lower <= 0.0 <= log_upper <= -logp
    assert band.contains(logp, log_lower)
    assert band.contains(logp, log_upper)
    assert not band.contains(logp, np.nextafter(-logp, np.inf)) or logp == -np.inf


def test_committed_references_equal_a_fresh_solution(reference: Reference) -> None:
    # A few of each, because all take minutes.
    for i in range(100, reference.logp.size, 250):
        logp, delta = float(reference.logp[i]), float(reference.delta[i])
        for upper, nearest, rest in [
            (False, reference.log_lower[i], reference.log_lower_rest[i]),
            (True, reference.log_upper[i], reference.log_upper_rest[i]),
        ]:
            if not np.isfinite(nearest) or abs(nearest) == np.finfo(float).max:
                continue
            exact, _ = bound(reference.spec, logp, delta, upper)
            assert to_double(exact) == nearest
            assert to_double(mp.fsub(exact, float(nearest), exact=True)) == rest


def test_limits_at_both_ends_and_nan() -> None:
    logp = np.array([0.0, 0.03125, -np.inf, np.nan, -1.0])
    for spec in SPECS:
        log_lower, log_upper = Band(spec, 0.05).log_bounds(logp)
        np.testing.assert_array_equal(log_upper[:4], [0.0, 0.0, np.inf, np.nan])
        np.testing.assert_array_equal(log_lower[2:4], [-np.inf, np.nan])
        assert log_lower[0] == log_lower[1]
        assert np.isfinite([log_lower[4], log_upper[4]]).all(), "a NaN spoils no neighbour"
    assert Band("kl", 0.05).log_bounds(0.0)[0] == pytest.approx(-0.05, rel=RELATIVE, abs=0)


def test_saturation_is_exact_where_f_at_0_is_finite() -> None:
    # tv allows every ratio on the lower side where delta >= p, on the upper one where >= 1 - p.
    logp = np.log([0.3, 0.6, 0.9])
    log_lower, log_upper = Band("tv", 0.35).log_bounds(logp)
    assert log_lower[0] == -np.inf
    assert log_upper[2] == -logp[2]
    assert np.isfinite(log_lower[1:]).all()
    lower, _ = Band("tv", 0.35).bounds(logp)
    assert lower[0] == 0.0


def test_nothing_saturates_where_f_at_0_is_infinite() -> None:
    logp = np.array([-1e-300, -1e-10, -0.1, -1.0, -300.0, -740.0, -1e6])
    for spec in ["kl", "jeffreys", "neyman-chi2", "alpha:-2"]:
        band = Band(spec, 5.0)
        log_lower, log_upper = band.log_bounds(logp)
        assert np.all(log_upper < -logp)
        assert np.all(log_lower >= -np.finfo(float).max)
        assert np.all(band.bounds(logp)[0] > 0.0)


def test_delta_as_a_number_a_pair_and_an_array() -> None:
    logp = np.log([[0.1, 0.5], [0.01, 0.9]])
    low, high = Band("kl", 0.01), Band("kl", 0.2)
    pair = Band("kl", (0.01, 0.2))
    np.testing.assert_array_equal(pair.log_bounds(logp)[0], low.log_bounds(logp)[0])
    np.testing.assert_array_equal(pair.log_bounds(logp)[1], high.log_bounds(logp)[1])
    rows = Band("kl", np.array([[0.01], [0.2]]))
    np.testing.assert_array_equal(rows.log_bounds(logp)[1][0], low.log_bounds(logp)[1][0])
    np.testing.assert_array_equal(rows.log_bounds(logp)[1][1], high.log_bounds(logp)[1][1])
    inside = rows.contains(logp, np.full((2, 2), 0.3))
    assert inside[0, 0] == low.contains(logp[0, 0], 0.3)
    assert inside[1, 0] == high.contains(logp[1, 0], 0.3)


def test_shape_dtype_and_layout_are_kept_or_converted() -> None:
    logp = np.log(np.linspace(0.1, 0.9, 24)).reshape(2, 3, 4)
    expected = Band("kl", 0.05).log_bounds(logp)[1]
    strided = Band("kl", 0.05).log_bounds(logp.transpose(2, 0, 1))[1]
    np.testing.assert_array_equal(strided, expected.transpose(2, 0, 1))
    assert Band("kl", 0.05).log_bounds(logp.astype(np.float32))[1].dtype == np.float64
    assert Band("kl", 0.05).log_bounds(np.empty((0, 3)))[0].shape == (0, 3)
    assert Band("kl", 0.05).log_bounds(-1)[0].shape == ()


def test_clip_is_the_constant_interval() -> None:
    lower, upper = Clip(0.2, 0.28).bounds([-1.0, -9.0, np.nan])
    np.testing.assert_allclose(lower, [0.8, 0.8, np.nan], rtol=1e-15)
    np.testing.assert_allclose(upper, [1.28, 1.28, np.nan], rtol=1e-15)
    assert Clip(0.2) == Clip(0.2, 0.2)
    lower, upper = Clip(1.0, np.inf).bounds(-1.0)
    assert lower == 0.0
    assert upper == np.inf


def test_regions_compare_hash_print_and_pickle() -> None:
    regions = [Band("alpha:0.5", (0.1, 0.2)), Band("kl", np.array([0.1, 0.2])), Clip(0.2, 0.28)]
    for region in regions:
        copy = pickle.loads(pickle.dumps(region))  # noqa: S301 -- our own bytes
        assert copy == region
        assert hash(copy) == hash(region)
    assert repr(regions[0]) == "Band('alpha:0.5', (0.1, 0.2))"
    assert Band("kl", 0.1) != Band("kl", 0.2)
    assert Band("kl", 0.1) != Clip(0.1)
    assert pickle.loads(pickle.dumps(Divergence("kl"))) == Divergence("kl")  # noqa: S301


@pytest.mark.parametrize("delta", [0.0, -0.05, float("nan"), float("inf")])
def test_bad_delta_is_refused_by_name_and_value(delta: float) -> None:
    forms: list[Any] = [delta, (0.1, delta), np.array([0.1, delta])]
    for given_delta in forms:
        with pytest.raises(
            InvalidValueError, match=f"delta must be finite and above 0, got {delta}"
        ):
            Band("kl", given_delta)


def test_unknown_divergence_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"\"wasserstein\" is not known; known are: kl, reverse-kl"
    ):
        Band("wasserstein", 0.05)
    with pytest.raises(InvalidTypeError, match="divergence must be a name"):
        Divergence(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    ["alpha", "alpha:", "alpha:nan", "alpha:inf", "renyi:0", "renyi:-1", "vajda:0.5", "bwcs:1.5",
     "bwcs:-0.1", "hockey-stick:0.9", "kl:2", "alpha:1:2"],
)  # fmt: skip
def test_bad_parameters_are_refused_with_what_is_allowed(spec: str) -> None:
    with pytest.raises(InvalidValueError, match=f'divergence "{spec}": .*(takes)'):
        Divergence(spec)


def test_wrong_types_and_shapes_name_the_argument() -> None:
    band = Band("kl", 0.05)
    with pytest.raises(InvalidTypeError, match="logp must hold real numbers, got dtype <U1"):
        band.log_bounds(["a"])
    with pytest.raises(InvalidTypeError, match="logp must hold real numbers, got dtype complex128"):
        band.log_bounds(np.array([1j]))
    with pytest.raises(InvalidTypeError, match="logp must be an array of real numbers"):
        band.log_bounds([[1.0], [1.0, 2.0]])
    with pytest.raises(InvalidTypeError, match="delta must be a number, a pair"):
        Band("kl", "0.05")  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="pair"):
        Band("kl", (0.1, 0.2, 0.3))  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match=r"do not broadcast: logp \(3,\), delta \(2,\)"):
        Band("kl", np.array([0.1, 0.2])).log_bounds([-1.0, -2.0, -3.0])
    with pytest.raises(InvalidValueError, match=r"logp \(3,\), log_ratio \(2,\)"):
        band.contains([-1.0, -2.0, -3.0], [0.0, 0.0])
    with pytest.raises(InvalidValueError, match=r"eps_low must be in \[0, 1\], got 1.2"):
        Clip(1.2)
    with pytest.raises(InvalidValueError, match=r"eps_high must be at least 0, got -0\.1"):
        Clip(0.2, -0.1)
    with pytest.raises(InvalidTypeError, match="eps_low must be one number"):
        Clip([0.2, 0.3])  # type: ignore[arg-type]


def test_every_error_is_a_bandpo_error() -> None:
    with pytest.raises(bandpo.BandpoError):
        Band("kl", 0.0)
    with pytest.raises(bandpo.BandpoError):
        Divergence("nope")


@pytest.mark.parametrize(
    "spec",
    [
        "vajda:1.000000001",
        "vajda:1.0001",
        "alpha:1.0000000001",
        "alpha:-1e-11",
        "bwcs:0.9995",
        "bwcs:1e-8",
        "hockey-stick:1.0000000001",
        "renyi:0.9999999999",
    ],
)
def test_parameters_next_to_special_ones_meet_the_documented_accuracy(spec: str) -> None:
    rng = np.random.default_rng(8)
    rare, sure = rng.uniform(-690.0, 0.0, 8), -np.exp(rng.uniform(np.log(1e-16), 0.0, 8))
    delta = np.exp(rng.uniform(np.log(1e-8), np.log(10.0), 16))
    for logp, radius in zip(np.concatenate([rare, sure]), delta, strict=True):
        exact = reference_log_bounds(spec, float(logp), float(radius))
        for actual, wanted in zip(Band(spec, radius).log_bounds(logp), exact, strict=True):
            if mp.isinf(wanted):
                assert actual == float(wanted)
            else:
                assert 0 <= (wanted - mpf(float(actual))) / wanted <= RELATIVE, (logp, radius)


@pytest.mark.parametrize("g", [1.2, 1.5, 4.0])
def test_saturation_is_decided_exactly_with_a_kink_away_from_1(g: float) -> None:
    # A grown outcome next to its kink leaves a small u - g of a large u: D there has lost digits in
    # double precision, and in double-double still some.
    with mp.workdps(60):
        for shortage in 10.0 ** np.random.default_rng(3).uniform(-7, -2, 60):
            for upper in (False, True):
                p = (1 - shortage) / g
                logp = float(np.log(p if upper else 1 - p))
                token = mp.exp(mpf(logp))
                everything = 1 - mpf(g) * (token if upper else 1 - token)
                for ulps in (-1, 0, 1):
                    delta = float(everything) + ulps * float(np.spacing(float(everything)))
                    band = Band(f"hockey-stick:{g}", delta)
                    end = -logp if upper else -np.inf
                    saturated = bool(everything <= delta)
                    bound = float(band.log_bounds(logp)[int(upper)])
                    assert (bound == end) == saturated, (logp.hex(), delta.hex(), upper)
                    assert bool(band.contains(logp, end)) == saturated, (
                        logp.hex(),
                        delta.hex(),
                        upper,
                    )
                    if not saturated:
                        ratio = mp.exp(mpf(bound))
                        others = (1 - ratio * token) / (1 - token)
                        grown = token * max(ratio - mpf(g), 0) + (1 - token) * max(
                            others - mpf(g), 0
                        )
                        assert grown <= delta, (logp.hex(), delta.hex(), upper)


def test_equality_at_an_end_saturates() -> None:
    for spec, logp, delta in [("reverse-kl", -0.7, 0.7), ("renyi:3", -40.0, 40.0)]:
        assert Band(spec, delta).log_bounds(logp)[1] == -logp
        assert Band(spec, np.nextafter(delta, 0.0)).log_bounds(logp)[1] < -logp
    for spec, sup in [("tv", 1.0), ("le-cam", 1.0), ("hellinger", 1.0), ("alpha:0.5", 4.0)]:
        for logp in (-100.0, -1.0, -1e-100):
            lower, upper = Band(spec, sup).log_bounds(logp)
            assert (float(lower), float(upper)) == (-np.inf, -logp)


def test_far_tokens_are_inside_their_own_bounds() -> None:
    names = [Divergence(name) for name in ("vajda:1.5", "tv", "reverse-kl")]
    for divergence_of in [Divergence.from_expression("abs(u-1)^1.5"), *names]:
        band = Band(divergence_of, 0.05)
        for logp in (-300.0, -690.0, -691.0, -1e4, -7.9e14, -3.4028234663852886e38):
            lower, upper = band.log_bounds(logp)
            assert lower == -np.inf
            assert 0.3 * -logp < upper < -logp
            assert band.contains(logp, upper)
            assert band.contains(logp, 0.9 * upper)
            assert not band.contains(logp, -logp)
