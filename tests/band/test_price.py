"""`PriceBand`: 60-digit roots, closed forms, the theorem behind it, membership, tables, losses."""

from __future__ import annotations

import pickle
from typing import Literal

import numpy as np
import pytest
from mpmath import mp, mpf
from numpy.typing import NDArray

import bandpo
from bandpo import Band, BandTable, Clip, Divergence, PriceBand, region_from_spec, sides
from bandpo.caption import caption_of
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.region import Region, from_description
from bandpo.spec import spec_from_region
from support.contract import ILL_CONDITIONED
from support.prices import bound, derivative, price
from support.reference import parse

SMOOTH = (
    "kl",
    "reverse-kl",
    "pearson-chi2",
    "neyman-chi2",
    "hellinger",
    "le-cam",
    "jensen-shannon",
    "jeffreys",
    "bhattacharyya",
    "alpha:-3",
    "alpha:0.001",
    "alpha:0.5",
    "alpha:1.5",
    "alpha:4",
    "renyi:2",
    "vajda:1.5",
    "vajda:4",
    "bwcs:0.3",
    "bwcs:0.99",
)

KINKED = ("tv", "vajda:1", "hockey-stick:1", "hockey-stick:1.2", "hockey-stick:4")

LOGP = np.array(
    [
        *np.log([1e-300, 1e-100, 1e-20, 1e-9, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.8]),
        *(-0.01, -1e-4, -1e-9, -1.1e-16),
    ]
)
"""Old log-probabilities from p = 1e-300 to 1 - 1e-16."""

PRICES = (1e-6, 1e-3, 0.1, 0.5, 1.0, 1.5, 2.0)
"""1/2, 1, 3/2 and 2 are limits of f' of several divergences."""

RELATIVE = 1e-14
"""Relative error of a log bound whose condition number is at most `ILL_CONDITIONED`."""

RESIDUAL = 1e-12
"""Distance of a price from the given one, relative to that, where the condition number allows."""

TABLE_ERROR = 3e-7
"""Error of a table beyond one float32 ulp of the bound."""

FIRST_ORDER = 1e-12
"""Rounding of a sum of gains, relatively."""


@pytest.mark.parametrize("spec", SMOOTH)
def test_derivatives_of_the_reference_are_those_of_its_generators(spec: str) -> None:
    f, slope = parse(spec).f, derivative(spec)
    with mp.workdps(60):
        for u in map(mpf, ("0.001", "0.3", "0.99", "1.01", "2.5", "1000")):
            at = mp.diff(lambda v: f(v, v - 1, mp.log(v)), u) - mp.diff(
                lambda v: f(v, v - 1, mp.log(v)), mpf(1) + mpf(10) ** -40
            )
            assert abs(at - slope.at(u, u - 1, mp.log(u))) < mpf(10) ** -15


@pytest.mark.parametrize("spec", SMOOTH)
def test_bounds_are_inside_and_next_to_the_roots_of_60_digits(spec: str) -> None:
    worst = 0.0
    for w in PRICES:
        both = PriceBand(spec, w).log_bounds(LOGP)
        for upper, values in enumerate(both):
            for logp, value in zip(LOGP.tolist(), values.tolist(), strict=True):
                root, condition = bound(spec, logp, w, bool(upper))
                place = (spec, w, logp, value, condition)
                edge = -logp if upper else -np.inf
                if value == edge or root == edge:
                    assert value == root, place
                    continue
                assert abs(mpf(value)) <= abs(root), place
                error = float(1 - mpf(value) / root)
                if condition <= ILL_CONDITIONED:
                    worst = max(worst, error)
                else:
                    # The root that belongs to the next price or log-probability may lie beyond.
                    assert error <= 2.0 * np.finfo(float).eps * condition, place
    assert worst <= RELATIVE


@pytest.mark.parametrize("spec", SMOOTH)
def test_the_price_of_a_bound_is_the_given_one(spec: str) -> None:
    """KKT: every token that is not at an end of the simplex pays the same price."""
    for w in (1e-4, 0.05, 0.7):
        both = PriceBand(spec, w).log_bounds(LOGP)
        for upper, values in enumerate(both):
            sign = 1 if upper else -1
            for logp, value in zip(LOGP.tolist(), values.tolist(), strict=True):
                if value in (-np.inf, -logp):
                    continue
                with mp.workdps(60):
                    paid = sign * price(spec, logp, value)
                    assert paid <= w
                    # By how much a price moves where the bound moves by itself.
                    step = mpf(value) * (1 + mpf(10) ** -30)
                    moves = abs(sign * price(spec, logp, step) - paid) * mpf(10) ** 30
                    place = (spec, w, logp, value)
                    assert w - paid <= RELATIVE * max(mpf(w), moves), place
                    if moves <= ILL_CONDITIONED * w:
                        assert w - paid <= RESIDUAL * w, place


def test_kl_has_its_closed_form() -> None:
    """r = 2 / (1 - w + sqrt((1 - w)^2 + 4 w p)), with -w below."""
    for w in (1e-3, 0.3, 0.999, 1.0, 1.7):
        both = PriceBand("kl", w).log_bounds(LOGP)
        for signed, values in zip((-w, w), both, strict=True):
            with mp.workdps(800):
                for logp, value in zip(LOGP.tolist(), values.tolist(), strict=True):
                    v, p = mpf(signed), mp.exp(mpf(logp))
                    ratio = 2 / (1 - v + mp.sqrt((1 - v) ** 2 + 4 * v * p))
                    assert abs(mpf(value) / mp.log(ratio) - 1) <= RELATIVE, (w, logp)


def test_pearson_has_its_closed_form() -> None:
    p = np.array([1e-9, 0.01, 0.3, 0.7])
    lower, upper = PriceBand("pearson-chi2", 0.6).bounds(np.log(p))
    step = 0.6 * (1.0 - p) / 2.0
    np.testing.assert_allclose(lower, 1.0 - step, rtol=1e-13)
    np.testing.assert_allclose(upper, np.minimum(1.0 + step, 1.0 / p), rtol=1e-13)


def test_rare_tokens_rise_by_a_constant() -> None:
    rare = np.array([-690.0, -np.inf])
    for spec, ratio in (
        ("kl", 1.0 / 0.75),
        ("reverse-kl", np.exp(0.25)),
        ("pearson-chi2", 1.125),
        ("neyman-chi2", 0.75**-0.5),
        ("hellinger", 4.0),
        ("hockey-stick:1.2", 1.2),
    ):
        upper = PriceBand(spec, 0.25).bounds(rare)[1]
        np.testing.assert_allclose(upper, ratio, rtol=RELATIVE)
    log_upper = PriceBand("kl", 1.5).log_bounds(rare)[1]
    assert log_upper[0] == pytest.approx(690.0 + np.log(1.0 / 3.0), rel=1e-14)
    assert log_upper[1] == np.inf


def test_certain_tokens_do_not_move_unless_the_price_exceeds_the_limit_of_the_slope() -> None:
    np.testing.assert_array_equal(PriceBand("kl", 0.9).bounds(0.0), 1.0)
    lower, upper = PriceBand("kl", 4.0).bounds([0.0, 1e-9])
    np.testing.assert_allclose(lower, 0.25, rtol=RELATIVE)
    assert upper.tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(PriceBand("reverse-kl", 9.0).bounds(0.0), 1.0)


@pytest.mark.parametrize(("spec", "jump"), [("tv", 1.0), ("vajda:1", 2.0)])
def test_a_generator_of_two_lines_allows_nothing_or_everything(spec: str, jump: float) -> None:
    below = PriceBand(spec, np.nextafter(jump, 0.0))
    assert not np.any(below.log_bounds(LOGP))
    assert below.contains(LOGP, 0.0).all()
    assert not below.contains(LOGP, [[-1e-300], [5e-324]]).any()
    above = PriceBand(spec, jump)
    assert np.all(above.log_bounds(LOGP)[0] == -np.inf)
    np.testing.assert_array_equal(above.log_bounds(LOGP)[1], -LOGP)


@pytest.mark.parametrize("threshold", [1.0, 1.2, 4.0])
def test_hockey_stick_is_the_clip_of_ppo_inside_the_simplex(threshold: float) -> None:
    region = PriceBand(f"hockey-stick:{threshold}", 0.5)
    p = np.array([1e-9, 0.01, 0.2, 0.5, 0.8, 0.9])
    lower, upper = region.bounds(np.log(p))
    np.testing.assert_allclose(upper, np.minimum(threshold, 1.0 / p), rtol=1e-14)
    fall = np.maximum(1.0 - (threshold - 1.0) * (1.0 - p) / p, 0.0)
    np.testing.assert_allclose(lower, fall, rtol=1e-13)
    assert np.all(PriceBand(f"hockey-stick:{threshold}", 1.0).bounds(np.log(p))[0] == 0.0)


@pytest.mark.parametrize("spec", [*SMOOTH, *KINKED])
def test_membership_agrees_with_the_bounds(spec: str) -> None:
    logp = np.concatenate([LOGP, [0.0, -np.inf, -1e4, -1e-305]])
    for w in PRICES:
        region = PriceBand(spec, (w, 0.7 * w))
        for sign, values in zip((-1.0, 1.0), region.log_bounds(logp), strict=True):
            assert region.contains(logp, values).all()
            assert region.contains(logp, 0.9 * values).all()
            # In the far tails a price that is a limit of f' has terms below the smallest double.
            near = (logp >= np.log(1e-300)) & (logp <= -1e-300)
            open_end = np.isfinite(values) & (np.abs(values) > 1e-290) & near
            beyond = values + sign * (1e-13 * np.abs(values) + 1e-12 * (w == 2.0))
            inside = region.contains(logp, beyond)[open_end & (values < -logp)]
            ties = np.isclose(-values, -logp, rtol=1e-9) & (sign < 0.0)
            assert not inside[~ties[open_end & (values < -logp)]].any(), (spec, w)
        assert not region.contains([np.nan, -1.0], [0.0, np.nan]).any()
        assert not region.contains(logp[logp > -np.inf], 1e-9 - logp[logp > -np.inf]).any()


def _divergence(spec: str, p: NDArray[np.float64], ratio: NDArray[np.float64]) -> float:
    with np.errstate(divide="ignore"):
        return float(Divergence(spec).between(np.log(p), np.log(ratio)).sum())


def _equal_price(
    spec: str, p: NDArray[np.float64], advantages: NDArray[np.float64], budget: float
) -> NDArray[np.float64]:
    """The ratios of the multiplier at which the tokens spend the budget."""

    def ratios(log_multiplier: float) -> NDArray[np.float64]:
        found = []
        for token, advantage in zip(p, advantages, strict=True):
            region = PriceBand(spec, abs(advantage) * np.exp(-log_multiplier))
            found.append(region.bounds(np.log(token))[int(advantage > 0.0)])
        return np.array(found)

    low, high = -25.0, 25.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        too_much = _divergence(spec, p, ratios(middle)) > budget
        low, high = (middle, high) if too_much else (low, middle)
    return ratios(high)


@pytest.mark.parametrize("spec", ["kl", "reverse-kl", "hellinger", "jeffreys", "alpha:-0.5"])
@pytest.mark.parametrize("delta", [1e-3, 0.02])
def test_equal_prices_gain_the_most_of_a_budget(spec: str, delta: float) -> None:
    rng = np.random.default_rng(7)
    p = np.exp(-rng.exponential(2.0, 12) - 0.02)
    advantages = rng.normal(size=12)
    band = Band(spec, delta).bounds(np.log(p))
    equal_radius = np.where(advantages > 0.0, band[1], band[0])
    budget = _divergence(spec, p, equal_radius)
    best = _equal_price(spec, p, advantages, budget)
    assert _divergence(spec, p, best) <= budget * (1.0 + 1e-12)

    def gain(ratio: NDArray[np.float64]) -> float:
        return float((advantages * p * (ratio - 1.0)).sum())

    assert gain(best) > gain(equal_radius)
    feasible = 0
    for scale in np.geomspace(1e-4, 1.0, 200):
        other = np.clip(best * np.exp(scale * rng.normal(size=12)), 1e-12, 0.999999 / p)
        for _ in range(60):  # towards 1, until it is affordable
            if _divergence(spec, p, other) <= budget:
                feasible += 1
                assert gain(other) <= gain(best) * (1.0 + FIRST_ORDER)
                break
            other = 1.0 + 0.9 * (other - 1.0)
    assert feasible == 200


@pytest.mark.parametrize("spec", [*SMOOTH, *KINKED])
@pytest.mark.parametrize("w", [1e-4, 0.1, 1.0])
def test_tables_hold_the_accuracy_of_those_of_bands(spec: str, w: float) -> None:
    table = PriceBand(spec, w).table().verify(20_000)
    assert max(table.max_error) <= TABLE_ERROR
    assert table.nbytes <= 32 * 1024
    assert table.region == PriceBand(spec, w)


def test_it_combines_like_any_region() -> None:
    region = PriceBand("kl", (0.2, 1.5))
    logp = np.log([1e-6, 0.1, 0.9])
    for combined in (
        region.cap(10),
        region | Clip(0.2),
        region & Clip(0.2, 0.28),
        region.at_least(0.1),
        sides(lower=Clip(0.2), upper=region),
    ):
        assert from_description(combined.describe()) == combined
        assert region_from_spec(spec_from_region(combined)) == combined
        lower, upper = combined.log_bounds(logp)
        tabulated = combined.table().log_bounds(logp)
        # A table keeps to the simplex, which a clip does not.
        np.testing.assert_allclose(tabulated, (lower, np.minimum(upper, -logp)), atol=2e-6)
    assert region.cap(10).bounds(logp)[1].max() == pytest.approx(10.0)
    assert not region.per_token


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ("price:kl@0.1", "PriceBand('kl', 0.1)"),
        ("price:alpha:0.5@0.1/0.2", "PriceBand('alpha:0.5', (0.1, 0.2))"),
        (
            'price:"u*ln(u) - u + 1"@1',
            "PriceBand(Divergence.from_expression('u*ln(u) - u + 1'), 1.0)",
        ),
    ],
)
def test_its_spec_its_repr_and_its_description_are_those_of_one_value(
    spec: str, shown: str
) -> None:
    region = region_from_spec(spec)
    assert repr(region) == shown
    assert spec_from_region(region) == spec
    for same in (from_description(region.describe()), pickle.loads(pickle.dumps(region))):  # noqa: S301
        assert same == region
        assert hash(same) == hash(region)
    assert region != PriceBand("kl", 0.3)
    assert region != Band("kl", 0.1)
    assert "price 0.1" in caption_of(PriceBand("kl", 0.1))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("price:kl", "a price is missing, as in price:kl@0.1"),
        ('price:"u*ln(u)"', "an expression needs a price"),
        ("price:kl@0.1,0.2", "prices below and above 1 are written price:kl@0.1/0.2"),
        ("price:kk@0.1", "not known"),
        ("price:kl@-1", "price must be finite and above 0"),
    ],
)
def test_specs_that_mean_nothing_are_refused_with_the_reason(spec: str, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        region_from_spec(spec)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0.0, InvalidValueError),
        (-1.0, InvalidValueError),
        (np.inf, InvalidValueError),
        (np.nan, InvalidValueError),
        ((0.1, 0.0), InvalidValueError),
        ((0.1, 0.2, 0.3), InvalidValueError),
        ("0.1", InvalidTypeError),
        (None, InvalidTypeError),
        (np.array([0.1, 0.2]), InvalidTypeError),
        (True, InvalidTypeError),
    ],
)
def test_prices_that_mean_nothing_are_refused(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="price"):
        PriceBand("kl", value)  # type: ignore[arg-type]


def test_a_python_function_is_refused_because_its_slope_is_needed() -> None:
    square = Divergence.from_callable(lambda u: (u - 1.0) ** 2)
    with pytest.raises(InvalidTypeError, match=r"PriceBand needs f'.*from_expression"):
        PriceBand(square, 0.1)
    with pytest.raises(InvalidValueError, match="not known"):
        PriceBand("kk", 0.1)


def test_text_has_the_bounds_of_the_name() -> None:
    by_text = PriceBand(Divergence.from_expression("-ln(u) + u - 1"), 0.3)
    np.testing.assert_allclose(
        by_text.log_bounds(LOGP), PriceBand("kl", 0.3).log_bounds(LOGP), rtol=RELATIVE
    )
    assert by_text.contains(LOGP, by_text.log_bounds(LOGP)[1]).all()


@pytest.mark.parametrize(
    "region", [PriceBand("kl", 0.3), PriceBand("reverse-kl", 0.2).cap(10)], ids=repr
)
@pytest.mark.parametrize("surrogate", ["min-clip", "weight"])
def test_losses_take_it_and_backends_agree(
    region: Region, surrogate: Literal["min-clip", "weight"]
) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    old = torch.tensor(-rng.exponential(2.0, (8, 64)))
    change = torch.tensor(rng.normal(scale=0.5, size=(8, 64)))
    advantages = torch.tensor(rng.normal(size=(8, 64)))
    mask = torch.ones((8, 64), dtype=torch.bool)
    losses, gradients = [], []
    for backend in ("native", "torch"):
        new = (old + change).clamp(max=0.0).requires_grad_()
        result = bandpo.policy_loss(
            old, new, advantages, mask, region=region, surrogate=surrogate, backend=backend
        )
        result.loss.backward()  # type: ignore[no-untyped-call]
        losses.append(result.loss.item())
        gradients.append(new.grad.numpy())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-12, atol=1e-300)
    assert isinstance(region.table(), BandTable)
