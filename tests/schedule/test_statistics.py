"""Clips learnt from a batch: their widths, states and errors, and a loss that follows them."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest

from bandpo import Clip, Region, order, parts
from bandpo.check import Float64Array
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.schedule import Bapo, Quantile, RegionSource, SecondMoment

ROUNDING = 1e-13
"""Relative: sums of up to 10^4 squares, added up in another order."""

SOURCES = [SecondMoment(0.04), SecondMoment(1e-3), Quantile(0.9), Quantile(0.25)]


def moved(count: int, seed: int = 0, scale: float = 0.3) -> tuple[Float64Array, Float64Array]:
    """Advantages and log-ratios; some of both are 0."""
    rng = np.random.default_rng(seed)
    advantages, log_ratio = rng.normal(size=count), scale * rng.standard_t(3, count)
    advantages[::9], log_ratio[::11] = 0.0, 0.0
    return advantages, log_ratio


def harmful(advantages: Float64Array, log_ratio: Float64Array) -> list[float]:
    found = []
    for a, x in zip(advantages, log_ratio, strict=True):
        if (a > 0.0 and x > 0.0) or (a < 0.0 and x < 0.0):
            found.append(float(x))
    return found


def capped_moment(log_ratios: list[float], width: float) -> float:
    return math.fsum(min(x * x, width * width) for x in log_ratios) / len(log_ratios)


def assert_clips_at(source: SecondMoment | Quantile, width: float) -> None:
    assert source.width == width
    assert source.region == Clip.from_log_ratio(width)
    lower, upper = source.region.log_bounds([-3.0, -0.01])
    np.testing.assert_allclose(lower, -width, rtol=1e-15)
    np.testing.assert_allclose(upper, width, rtol=1e-15)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 10_000])
@pytest.mark.parametrize("budget", [1e-6, 1e-3, 0.04, 0.3])
def test_the_mean_of_capped_squares_is_the_budget(budget: float, count: int) -> None:
    for seed in range(20 if count < 1000 else 1):
        advantages, log_ratio = moved(count, seed)
        source = SecondMoment(budget)
        source.update(advantages, log_ratio)
        outward = harmful(advantages, log_ratio)
        if not outward or capped_moment(outward, math.inf) <= budget:
            assert source.width == math.inf
            continue
        assert_clips_at(source, source.width)
        assert math.isclose(capped_moment(outward, source.width), budget, rel_tol=ROUNDING)
        assert source.width < max(abs(x) for x in outward)


@pytest.mark.parametrize(
    ("log_ratios", "budget", "width"),
    [
        ([math.sqrt(0.05)] * 10, 0.04, 0.2),  # equal ones, for which a breakpoint would be 0
        ([0.1, 0.2, 0.3, 0.6], 0.04, math.sqrt((0.16 - 0.01 - 0.04) / 2.0)),
        ([0.5], 0.04, 0.2),
        ([0.25, 0.25], 0.0625, math.inf),  # exactly at the budget
        ([0.0, 0.0, 0.0], 0.04, math.inf),
        ([30.0, 1e-9], 0.5, math.sqrt(1.0 - 1e-18)),
    ],
)
def test_widths_by_hand(log_ratios: list[float], budget: float, width: float) -> None:
    for sign in (1.0, -1.0):
        source = SecondMoment(budget)
        values = sign * np.array(log_ratios)
        source.update(np.full_like(values, sign), values)
        assert math.isclose(source.width, width, rel_tol=1e-14)
        # Tokens that move back, or have no advantage, change nothing.
        more = np.concatenate([values, [-5.0 * sign, 7.0, 0.0]])
        source.update([*[sign] * len(values), sign, 0.0, sign], more)
        assert math.isclose(source.width, width, rel_tol=1e-14)


def test_no_harmful_token_needs_no_bound() -> None:
    source = SecondMoment()
    source.update([1.0], [0.5])
    assert source.width == 0.2
    for advantages, log_ratio in (([], []), ([1.0, -1.0], [-9.0, 9.0]), ([0.0], [9.0])):
        source.update(advantages, log_ratio)
        assert source.width == math.inf
        assert source.region == Clip.from_log_ratio(math.inf)


def test_any_shape_is_taken_and_the_old_log_prob_is_not_used() -> None:
    advantages, log_ratio = moved(60)
    for source in SOURCES:
        flat, shaped = copy.deepcopy(source), copy.deepcopy(source)
        flat.update(advantages, log_ratio)
        shaped.step(advantages.reshape(6, 10), log_ratio.reshape(6, 10), np.zeros(3))
        assert flat.region == shaped.region


@pytest.mark.parametrize("level", [0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 10, 1001])
def test_a_quantile_lies_between_its_neighbours(count: int, level: float) -> None:
    advantages, log_ratio = moved(count)
    source = Quantile(level)
    source.update(advantages, log_ratio)
    sizes = sorted(abs(float(x)) for x in log_ratio)
    place = level * (count - 1)
    low = math.floor(place)
    high = min(low + 1, count - 1)
    wanted = sizes[low] + (place - low) * (sizes[high] - sizes[low])
    assert math.isclose(source.width, wanted, rel_tol=1e-12, abs_tol=1e-300)
    inside = np.abs(log_ratio) <= source.width
    assert inside.mean() >= level - 1.0 / count


@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_nothing_is_clipped_before_the_first_batch(source: SecondMoment | Quantile) -> None:
    fresh = copy.deepcopy(source)
    assert isinstance(fresh, RegionSource)
    assert fresh.width == math.inf
    assert fresh.region == Clip.from_log_ratio(math.inf)
    assert eval(repr(fresh)).__dict__.keys() == fresh.__dict__.keys()  # noqa: S307 -- our own text


@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_the_state_is_restored_through_json(source: SecondMoment | Quantile) -> None:
    for batch in (None, moved(50, seed=1), ([1.0], [0.0])):
        one = copy.deepcopy(source)
        if batch is not None:
            one.update(*batch)
        state = json.loads(json.dumps(one.state_dict(), allow_nan=False))
        other = copy.deepcopy(source)
        seen: list[Region] = []

        def note(region: Region, to: list[Region] = seen) -> None:
            to.append(region)

        other.update([1.0, -1.0], [3.0, -3.0])
        other.subscribe(note)
        other.load_state_dict(state)
        assert seen == [one.region]
        assert (other.width, other.region) == (one.width, one.region)
        assert other.state_dict() == state
        again = pickle.loads(pickle.dumps(one))  # noqa: S301 -- our own bytes
        assert (again.width, again.region) == (one.width, one.region)


def test_a_state_without_bound_is_minus_1() -> None:
    assert Quantile().state_dict() == {"width": -1.0}
    source = SecondMoment()
    source.update([1.0], [0.5])
    assert source.state_dict() == {"width": 0.2}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"width": -0.5}, InvalidValueError, "width must be at least 0, or -1 for none, got -0.5"),
        ({"width": math.inf}, InvalidValueError, "width must be finite, got inf"),
        ({"width": "1"}, InvalidTypeError, "width must be a real number"),
        ({}, InvalidValueError, "state must have the entries"),
        ({"width": 0.1, "level": 0.9}, InvalidValueError, "state must have the entries"),
        ([0.1], InvalidTypeError, "state must be a mapping"),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(
    state: Any, error: type[Exception], message: str
) -> None:
    source = Quantile()
    source.update([1.0], [0.5])
    with pytest.raises(error, match=message):
        source.load_state_dict(state)
    assert source.width == 0.5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: SecondMoment(0.0),
            InvalidValueError,
            "budget must be finite and above 0, got 0.0",
        ),
        (lambda: SecondMoment(math.inf), InvalidValueError, "budget must be finite and above 0"),
        (lambda: SecondMoment(math.nan), InvalidValueError, "budget must be finite and above 0"),
        (lambda: SecondMoment(True), InvalidTypeError, "budget must be a real number, got bool"),
        (lambda: Quantile(0.0), InvalidValueError, "level must be above 0 and at most 1, got 0.0"),
        (lambda: Quantile(1.1), InvalidValueError, "level must be above 0 and at most 1, got 1.1"),
        (lambda: Quantile(math.nan), InvalidValueError, "level must be above 0 and at most 1"),
        (lambda: Quantile("0.9"), InvalidTypeError, "level must be a real number"),  # type: ignore[arg-type]
        (lambda: Quantile().update([], []), InvalidValueError, "there is no quantile of nothing"),
    ],
)
def test_bad_numbers_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("source", [SecondMoment(), Quantile()], ids=repr)
@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        (([1.0], [0.0, 1.0]), InvalidValueError, r"log_ratio must have shape \(1,\), got \(2,\)"),
        (([math.nan], [0.0]), InvalidValueError, "advantages must be finite, got nan"),
        (([1.0], [-math.inf]), InvalidValueError, "log_ratio must be finite, got -inf"),
        ((["a"], [0.0]), InvalidTypeError, "advantages must"),
        (([1.0], [1j]), InvalidTypeError, "log_ratio must"),
    ],
)
def test_a_bad_batch_is_refused_and_changes_nothing(
    source: SecondMoment | Quantile, arrays: Any, error: type[Exception], message: str
) -> None:
    fresh = copy.deepcopy(source)
    with pytest.raises(error, match=message):
        fresh.update(*arrays)
    assert fresh.width == math.inf


@pytest.mark.parametrize("source", SOURCES, ids=repr)
@pytest.mark.parametrize("surrogate", ["min-clip", "mask", "weight", "soft-gate"])
def test_a_loss_has_the_bounds_of_the_last_batch(
    source: SecondMoment | Quantile, surrogate: Any, backend: str
) -> None:
    torch = pytest.importorskip("torch")
    from support.batches import random_batch

    source = copy.deepcopy(source)
    batch = random_batch((12, 20), dtype=torch.float64)
    valid = batch.response_mask
    options: dict[str, Any] = {"surrogate": surrogate, "backend": backend}
    shares = set()
    for scale in (None, 1.0, 0.2, 3.0):
        if scale is not None:
            log_ratio = scale * (batch.log_prob - batch.old_log_prob)[valid]
            source.update(batch.advantages[valid], log_ratio)
        bounds = Clip.from_log_ratio(source.width)
        wanted = batch.loss(region=bounds, **options)
        found = batch.loss(region=source, **options)
        assert torch.equal(found.loss, wanted.loss)
        assert torch.equal(found.per_token, wanted.per_token)
        gradients = [batch.gradient(region=region, **options) for region in (bounds, source)]
        assert torch.equal(*gradients)
        shares.add(float(found.metrics["gradient_removed"]))
    assert len(shares) > 2, "the bounds move"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("source", SOURCES[1:3], ids=repr)
def test_a_compiled_loss_follows_an_update_without_compiling_again(
    source: SecondMoment | Quantile, backend: Any
) -> None:
    torch = pytest.importorskip("torch")
    from bandpo.loss import PolicyLoss
    from support.batches import random_batch

    source = copy.deepcopy(source)
    batch = random_batch((6, 20))
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    torch.compiler.reset()
    compiled = torch.compile(PolicyLoss(source, backend=backend), fullgraph=True, backend=count)
    seen = set()
    for scale in (None, 1.0, 0.3):
        if scale is not None:
            source.update(batch.advantages, scale * (batch.log_prob - batch.old_log_prob))
        wanted = batch.loss(region=source.region, backend=backend)
        torch.testing.assert_close(compiled(*batch).per_token, wanted.per_token, rtol=0, atol=0)
        seen.add(float(wanted.loss))
    assert len(seen) == 3
    assert graphs == 1


def test_per_token_is_that_of_the_region_at_the_call(backend: str) -> None:
    torch = pytest.importorskip("torch")
    from support.batches import random_batch

    source, batch = Quantile(0.5), random_batch((6, 20))
    source.update([1.0], [0.05])
    result = batch.loss(region=source, backend=backend)
    wanted = batch.loss(region=source.region, backend=backend, loss_agg_mode="none").loss
    leaf = batch.log_prob.clone().requires_grad_()
    loss = batch._replace(log_prob=leaf).loss(region=source, backend=backend).loss
    gradient = batch.gradient(region=source.region, backend=backend)
    source.update([1.0], [5.0])
    assert torch.equal(result.per_token, wanted)
    (found,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(found, gradient)


def test_a_budget_that_is_met_but_for_rounding_bounds_nothing_much() -> None:
    """A sum by pairs and one in order differ in the last digits."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        x = np.abs(rng.normal(0.0, 0.1, rng.integers(2, 60)))
        source = SecondMoment(float(np.nextafter((x**2).mean(), 0.0)))
        source.update(np.ones_like(x), x)
        assert source.width >= x.max() * (1.0 - 1e-6)


def bisected_width(squares: Float64Array, budget: float) -> float:
    """The width at which the capped squares have the budget as their mean, by halving."""
    low, high = 0.0, float(squares.max())
    for _ in range(200):
        middle = 0.5 * (low + high)
        inside = math.fsum(np.minimum(squares, middle)) <= budget * len(squares)
        low, high = (middle, high) if inside else (low, middle)
    return math.sqrt(low)


@pytest.mark.parametrize("kind", ["random", "equal", "two values", "zeros", "one scale"])
def test_many_log_ratios_are_ordered_by_their_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "_SORTED", 5)
    monkeypatch.setattr(parts, "_PART", 64)
    rng = np.random.default_rng(4)
    moves = {
        "random": 0.3 * rng.standard_t(2, 1000) * np.exp(rng.normal(size=1000) * 9.0),
        "equal": np.full(1000, 0.3),
        "two values": np.where(rng.random(1000) < 0.5, 0.1, 0.7),
        "zeros": np.where(rng.random(1000) < 0.5, 0.0, rng.normal(size=1000)),
        "one scale": 1.0 + 1e-9 * rng.random(1000),
    }[kind]
    for level in (1e-4, 0.25, 0.5, 0.9, 0.9995, 1.0):
        source = Quantile(level)
        source.update(np.ones(1000), moves)
        assert source.width == np.quantile(np.abs(moves), level)
    for budget in (1e-12, 1e-3, 0.04, 0.3, 2.0):
        moment = SecondMoment(budget)
        moment.update(np.sign(moves), moves)
        squares = moves[moves != 0.0] ** 2
        if math.fsum(squares) <= budget * len(squares) * (1.0 + ROUNDING):
            continue
        assert moment.width == pytest.approx(bisected_width(squares, budget), rel=1e-9)


def test_a_sum_over_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    advantages, log_ratio = moved(1000)
    logp = -np.random.default_rng(2).exponential(2.0, 1000)
    whole, found = Bapo(), Bapo()
    whole.update(advantages, log_ratio, logp)
    monkeypatch.setattr(parts, "_PART", 7)
    found.update(advantages, log_ratio, logp)
    assert found.region == whole.region
