"""Schedules and region sources: their rules, their states and their subscribers."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest

from bandpo import Band, Clip, Region
from bandpo.check import Float64Array
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.schedule import (
    Bapo,
    Constant,
    Cosine,
    EntropyTargeted,
    Linear,
    RegionSource,
    Schedule,
    ScheduledBand,
)
from bandpo.spec import region_from_spec
from support.tokens import wide_tokens

ROUNDING = 1e-15
"""Relative tolerance of a value that is computed with a few roundings."""

SUM = 1e-13
"""Relative distance from the target below which shares are ties, because sums are rounded in
another order."""


def values(schedule: Schedule, steps: int, entropy: float | None = None) -> list[float]:
    seen = [schedule.value]
    for _ in range(steps):
        schedule.step(entropy)
        seen.append(schedule.value)
    return seen


def test_constant_linear_and_cosine_equal_their_formulas() -> None:
    assert values(Constant(0.05), 3) == [0.05] * 4
    share = np.arange(9) / 8
    expected = {Linear: 0.1 + (0.02 - 0.1) * share}
    expected[Cosine] = 0.02 + (0.1 - 0.02) * (1 + np.cos(np.pi * share)) / 2  # type: ignore[index]
    for kind, formula in expected.items():
        seen = values(kind(0.1, 0.02, 8), 8)
        np.testing.assert_allclose(seen, formula, rtol=ROUNDING, atol=0)
        assert (seen[0], seen[-1]) == (0.1, 0.02)


@pytest.mark.parametrize("schedule", [Linear(0.1, 0.05, 3), Cosine(0.1, 0.05, 3)])
def test_a_step_past_the_end_is_an_error(schedule: Schedule) -> None:
    values(schedule, 3)
    with pytest.raises(InvalidValueError, match=r"all 3 steps are taken.*more steps"):
        schedule.step()
    assert schedule.value == 0.05


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_a_schedule_that_holds_keeps_its_last_number(kind: type[Linear | Cosine]) -> None:
    schedule = kind(0.1, 0.05, 3, hold=True)
    assert values(schedule, 5)[3:] == [0.05] * 3
    assert schedule.state_dict() == {"taken": 3}
    with pytest.raises(InvalidTypeError, match="hold must be a bool, got int"):
        kind(0.1, 0.05, 3, hold=1)  # type: ignore[arg-type]


def test_entropy_targeted_follows_the_shortfall_and_stays_in_range() -> None:
    def make() -> EntropyTargeted:
        return EntropyTargeted(0.05, target=2.0, rate=0.1, min_value=0.04, max_value=0.06)

    # A shortfall of a quarter, none, an excess of a half, and more than the limit of one.
    for entropy, factor in [(1.5, 0.25), (2.0, 0.0), (3.0, -0.5), (1e9, -1.0), (0.0, 1.0)]:
        schedule = make()
        schedule.step(entropy)
        expected = 0.05 * math.exp(0.1 * factor)
        assert schedule.value == pytest.approx(expected, rel=ROUNDING, abs=0)
    assert values(make(), 50, 0.0)[-1] == 0.06
    assert values(make(), 50, 10.0)[-1] == 0.04


SCHEDULES = [
    Constant(0.05),
    Linear(0.1, 0.05, 10),
    Cosine(0.1, 0.05, 10),
    EntropyTargeted(0.05, target=2.0, rate=0.1, min_value=0.01, max_value=1.0),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_a_schedule_resumes_from_its_state(schedule: Schedule) -> None:
    fresh = copy.deepcopy(schedule)
    values(schedule, 4, 1.0)
    state = json.loads(json.dumps(schedule.state_dict()))
    fresh.load_state_dict(state)
    assert values(fresh, 3, 1.3) == values(schedule, 3, 1.3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant(0.0), InvalidValueError, "value must be finite and above 0, got 0.0"),
        (lambda: Constant("0.1"), InvalidTypeError, "value must be a real number, got str"),  # type: ignore[arg-type]
        (lambda: Linear(0.1, math.nan, 5), InvalidValueError, "end must be finite .* got nan"),
        (lambda: Linear(0.1, 0.1, 0), InvalidValueError, "steps must be at least 1, got 0"),
        (lambda: Linear(0.1, 0.1, 5.0), InvalidTypeError, "steps must be an int, got float"),  # type: ignore[arg-type]
        (lambda: Linear(0.1, 0.1, True), InvalidTypeError, "steps must be an int, got bool"),
        (lambda: Cosine(-1.0, 0.1, 5), InvalidValueError, "start must be finite and above 0"),
        (
            lambda: EntropyTargeted(0.5, target=1, rate=1, min_value=0.1, max_value=0.2),
            InvalidValueError,
            "start must be from min_value = 0.1 to max_value = 0.2, got 0.5",
        ),
        (
            lambda: EntropyTargeted(0.5, target=1, rate=1, min_value=0.3, max_value=0.2),
            InvalidValueError,
            "min_value must be at most max_value = 0.2, got 0.3",
        ),
        (lambda: SCHEDULES[3].step(), InvalidTypeError, "entropy must be a real number"),
        (lambda: SCHEDULES[3].step(math.nan), InvalidValueError, "entropy .* got nan"),
        (lambda: SCHEDULES[3].step(-0.1), InvalidValueError, "entropy .* at least 0, got -0.1"),
        (lambda: SCHEDULES[1].load_state_dict({}), InvalidValueError, r"entries \['taken'\]"),
        (lambda: SCHEDULES[1].load_state_dict({"taken": 11}), InvalidValueError, "0 to .* 10"),
        (lambda: SCHEDULES[1].load_state_dict({"taken": 1.5}), InvalidValueError, "whole number"),
        *(
            (
                lambda taken=taken: SCHEDULES[1].load_state_dict({"taken": taken}),
                InvalidValueError,
                "taken must be finite, got",
            )
            for taken in (math.nan, math.inf)
        ),
        (lambda: SCHEDULES[1].load_state_dict({"taken": "1"}), InvalidTypeError, "taken must be"),
        (lambda: SCHEDULES[1].load_state_dict([1]), InvalidTypeError, "state must be a mapping"),  # type: ignore[arg-type]
        (lambda: SCHEDULES[0].load_state_dict({"x": 1}), InvalidValueError, "got .'x'"),
        (lambda: SCHEDULES[3].load_state_dict({"value": 2.0}), InvalidValueError, "got 2.0"),
        (lambda: ScheduledBand("kl", 0.1), InvalidTypeError, "schedule must be .* got float"),  # type: ignore[arg-type]
        (lambda: ScheduledBand("kll", Constant(1)), InvalidValueError, "is not known"),
        (
            lambda: ScheduledBand("kl", Constant(1), within=lambda band: None),  # type: ignore[arg-type, return-value]
            InvalidTypeError,
            "within must return a Region, got NoneType",
        ),
        (
            lambda: ScheduledBand("kl", Constant(1), within=Clip(0.2)),  # type: ignore[arg-type]
            InvalidTypeError,
            "within must be a function from a Band to a Region, got Clip",
        ),
        (lambda: Bapo((0.9, 0.6)), InvalidValueError, "lower must be a pair that rises"),
        (lambda: Bapo((0.6, 1.1)), InvalidValueError, r"lies in \[0.0, 1.0\], got \(0.6, 1.1\)"),
        (lambda: Bapo(0.6), InvalidTypeError, "lower must be a pair"),  # type: ignore[arg-type]
        (lambda: Bapo(upper=(0.9, 2)), InvalidValueError, "upper must be a pair"),
        (lambda: Bapo(upper=(1.2, math.inf)), InvalidValueError, "upper must be a pair"),
        (lambda: Bapo(target=1.5), InvalidValueError, r"target must be in \[0, 1\], got 1.5"),
        (lambda: Bapo(lower_step=0), InvalidValueError, "lower_step must be finite and above 0"),
        (lambda: Bapo().step([1.0], [0.0, 1.0], [-1.0]), InvalidValueError, "log_ratio must have"),
        (lambda: Bapo().step([1.0], [math.nan], [-1.0]), InvalidValueError, "log_ratio .* nan"),
        (lambda: Bapo().step([math.inf], [0.0], [-1.0]), InvalidValueError, "advantages .* inf"),
        (lambda: Bapo().step([1.0], [0.0], [math.nan]), InvalidValueError, "old_log_prob .* nan"),
        (lambda: Bapo().step(["a"], [0.0], [-1.0]), InvalidTypeError, "advantages must hold"),
        (
            lambda: Bapo().load_state_dict({"lower": 0.5, "upper": 1.2}),
            InvalidValueError,
            "lower must be from 0.6 to 0.9, got 0.5",
        ),
    ],
)
def test_bad_input_is_refused_with_the_argument(
    make: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_scheduled_band_has_the_delta_of_its_schedule() -> None:
    source = ScheduledBand("kl", Linear(0.1, 0.05, 2))
    assert source.region == Band("kl", 0.1)
    source.step()
    assert source.region == Band("kl", 0.5 * 0.1 + 0.5 * 0.05)
    source.step()
    assert source.region == Band("kl", 0.05)
    with pytest.raises(InvalidValueError, match="all 2 steps are taken"):
        source.step()
    assert source.region == Band("kl", 0.05)
    capped = ScheduledBand("tv", Constant(0.1), within=lambda band: band.cap(10).at_least(0.2))
    assert capped.region == Band("tv", 0.1).cap(10).at_least(0.2)


def test_a_scheduled_band_takes_the_entropy_by_name_or_by_position() -> None:
    by_name, by_position = (ScheduledBand("kl", copy.deepcopy(SCHEDULES[3])) for _ in range(2))
    by_name.step(entropy=1)
    by_position.step(1.0)
    assert by_name.region == by_position.region != Band("kl", 0.05)
    with pytest.raises(InvalidValueError, match=r"entropy must be given once, got 1\.0 and 2\.0"):
        by_name.step(1.0, entropy=2.0)


@pytest.mark.parametrize("number", [0, 3, np.int64(3)])
def test_a_scheduled_band_refuses_the_number_of_a_step(number: int) -> None:
    source = ScheduledBand("kl", Linear(0.1, 0.05, 4))
    with pytest.raises(InvalidTypeError, match=rf"not the number of a step, got {number}; call"):
        source.step(number)
    assert source.region == Band("kl", 0.1)


def test_the_region_is_one_object_with_one_table_until_it_changes() -> None:
    source = ScheduledBand("kl", Constant(0.05))
    region = source.region
    table = region.table()
    source.step()
    assert source.region is region
    assert source.region.table() is table
    # The same delta again, in another schedule, finds the table as well.
    assert ScheduledBand("kl", Linear(0.05, 0.1, 5)).region.table() is table


class Subscriber:
    def __init__(self) -> None:
        self.regions: list[Region] = []

    def record(self, region: Region) -> None:
        self.regions.append(region)


def test_subscribers_are_called_on_changes_only() -> None:
    source = ScheduledBand("kl", Linear(0.1, 0.05, 4))
    subscriber = Subscriber()
    source.subscribe(subscriber.record)
    source.subscribe(subscriber.record)
    source.step()
    assert subscriber.regions == [source.region]
    assert subscriber.regions[0] is source.region
    source.load_state_dict({"taken": 1})
    assert len(subscriber.regions) == 1, "nothing changed"
    source.load_state_dict({"taken": 4})
    assert subscriber.regions[1:] == [Band("kl", 0.05)]

    def record(region: Region) -> None:
        subscriber.record(region)

    constant = ScheduledBand("kl", Constant(0.1))
    constant.subscribe(record)
    constant.step()
    assert len(subscriber.regions) == 2


def test_subscribers_are_held_weakly_and_not_copied() -> None:
    source = ScheduledBand("kl", Linear(0.1, 0.05, 4))
    kept, dropped = Subscriber(), Subscriber()
    source.subscribe(kept.record)
    source.subscribe(dropped.record)
    of_dropped = dropped.regions
    del dropped
    gc.collect()
    source.step()
    assert (len(kept.regions), len(of_dropped)) == (1, 0)
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):  # noqa: S301
        assert twin.region == source.region
        twin.step()
        assert twin.region != source.region
    assert len(kept.regions) == 1


@pytest.mark.parametrize("kind", ["scheduled", "bapo"])
def test_a_source_resumes_from_its_state(kind: str) -> None:
    def make() -> RegionSource:
        return ScheduledBand("kl", SCHEDULES[1]) if kind == "scheduled" else Bapo()

    source = copy.deepcopy(make())
    if isinstance(source, Bapo):
        source.step(*rollout(3, -0.4))
    elif isinstance(source, ScheduledBand):
        source.step()
    fresh = copy.deepcopy(make())
    subscriber = Subscriber()
    fresh.subscribe(subscriber.record)
    fresh.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert fresh.region == source.region
    assert subscriber.regions == [source.region]


class Rollout(NamedTuple):
    """Arguments of `Bapo.update`."""

    advantages: Float64Array
    log_ratio: Float64Array
    old_log_prob: Float64Array


def rollout(seed: int, mean: float) -> Rollout:
    """Tokens with advantages around a mean, many of them 0."""
    tokens = wide_tokens(3000, seed, logits=(-5, 5), step=0.7, factors=(1.0,))
    advantages = (mean + tokens.advantages) * tokens.mask
    return Rollout(advantages, tokens.log_prob - tokens.old_log_prob, tokens.old_log_prob)


def share(tokens: Rollout, lower: float, upper: float) -> float:
    """The left side of Eq. 8 of arXiv 2510.18927, sums of sizes above and below the bar."""
    advantages, log_ratio, logp = tokens
    p, r = np.exp(logp), np.exp(log_ratio)
    surrogate = p * np.minimum(r * advantages, np.clip(r, lower, upper) * advantages)
    return float(surrogate[advantages > 0].sum() / np.abs(surrogate).sum())


def published_bapo(tokens: Rollout, target: float) -> tuple[int, int, list[float]]:
    """Algorithm 1 with the numbers of section 5.1: steps of the lower and of the upper bound, and
    the shares that were compared with the target. Counted, as 1.2 + 36 * 0.05 is above 3.
    """
    low = high = 0
    shares = [share(tokens, 0.6, 1.2)]
    while shares[-1] < target and 0.6 + (low + 1) * 0.02 <= 0.9 + 1e-9:
        if 1.2 + (high + 1) * 0.05 <= 3.0 + 1e-9:
            high += 1
        else:
            low += 1
        shares.append(share(tokens, 0.6 + low * 0.02, 1.2 + high * 0.05))
    return low, high, shares


@pytest.mark.parametrize("target", [0.2, 0.4, 0.5])
def test_bapo_equals_the_published_algorithm(target: float) -> None:
    moved = set()
    for seed in range(60):
        tokens = rollout(seed, mean=-1.8 + 0.04 * seed)
        low, high, shares = published_bapo(tokens, target)
        if min(abs(np.array(shares) / target - 1)) < SUM:
            continue
        source = Bapo(target=target)
        source.step(*tokens)
        bounds = source.state_dict()
        assert bounds["lower"] == pytest.approx(0.6 + low * 0.02, rel=ROUNDING, abs=0)
        assert bounds["upper"] == pytest.approx(1.2 + high * 0.05, rel=ROUNDING, abs=0)
        region = source.region
        assert isinstance(region, Clip)
        lower, upper = region.bounds(-1.0)
        assert (lower, upper) == pytest.approx(tuple(bounds.values()), rel=ROUNDING, abs=0)
        moved.add((low > 0, high > 0))
    assert moved == {(False, False), (False, True), (True, True)}, "all that can happen"


def test_bapo_restarts_from_the_low_ends_at_every_batch() -> None:
    source = Bapo()
    assert source.region == Clip(0.4, 0.2)
    source.step(*rollout(1, -1.0))
    assert source.region != Clip(0.4, 0.2)
    source.step(*rollout(1, 2.0))
    assert source.region == Clip(0.4, 0.2)


@pytest.mark.parametrize(
    ("tokens", "bounds"),
    [
        (([], [], []), (0.6, 1.2)),
        (([0.0, 0.0], [0.1, 0.2], [-1.0, -2.0]), (0.6, 1.2)),
        (([-1.0, -1.0], [0.1, 0.2], [-1.0, -2.0]), (0.9, 3.0)),
        (([1.0], [900.0], [-1.0]), (0.6, 1.2)),
        (([1.0, -1.0], [0.0, -900.0], [-1.0, -math.inf]), (0.6, 1.2)),
    ],
)
def test_bapo_handles_empty_and_one_sided_batches(tokens: Any, bounds: tuple[float, float]) -> None:
    source = Bapo()
    source.step(*tokens)
    found = tuple(source.state_dict().values())
    assert found == pytest.approx(bounds, rel=ROUNDING, abs=0)


def test_bapo_has_the_same_bounds_on_every_rank() -> None:
    advantages, log_ratio, logp = rollout(7, -0.5)
    whole = Bapo()
    whole.step(advantages, log_ratio, logp)
    collected: list[Float64Array] = []

    def collect(sums: Float64Array) -> Float64Array:
        collected.append(sums)
        return sums

    parts = [slice(0, 1000), slice(1000, 1100), slice(1100, None)]
    for part in parts:
        Bapo().step(advantages[part], log_ratio[part], logp[part], all_reduce=collect)
    assert len(collected) == len(parts), "one reduction a step"
    total = np.sum(collected, axis=0)
    for part in parts:
        rank = Bapo()
        rank.step(advantages[part], log_ratio[part], logp[part], all_reduce=lambda _: total)
        assert rank.region == whole.region


def test_a_scheduled_band_has_a_cap_and_a_min_width_that_pickle() -> None:
    source = ScheduledBand("kl", Linear(0.5, 0.25, 4), cap=10, at_least=(0.1, 0.2))
    assert source.region == Band("kl", 0.5).at_least(0.1, 0.2).cap(10)
    source.step()
    again = pickle.loads(pickle.dumps(source))  # noqa: S301
    again.step()
    source.step()
    assert again.region == source.region == Band("kl", 0.375).at_least(0.1, 0.2).cap(10)
    one_width = ScheduledBand("kl", Constant(0.01), at_least=0.3)
    assert one_width.region == Band("kl", 0.01).at_least(0.3)
    with pytest.raises(InvalidValueError, match=r"upper must be at least 1, got 0\.5"):
        ScheduledBand("kl", Constant(0.1), cap=0.5)


def test_bapo_updates_by_either_name() -> None:
    arrays = (np.array([1.0, -1.0]), np.array([0.5, -0.2]), np.array([-1.0, -0.3]))
    first, second = Bapo(), Bapo()
    first.update(*arrays)
    second.step(*arrays)
    assert first.region == second.region


@pytest.mark.parametrize(
    "spec",
    ["kl@{}", "(kl@{}).cap(10)", "clip@0.2|tv@{}&clip@0.5", "sides(clip@0.2, (kl@{}).cap(3))"],
)
def test_the_one_band_of_a_region_follows_a_schedule(spec: str) -> None:
    source = ScheduledBand.of(region_from_spec(spec.format(0.3)), Linear(0.5, 0.25, 2))
    for source_now in (source, copy.deepcopy(source), pickle.loads(pickle.dumps(source))):  # noqa: S301
        for delta in (0.5, 0.375, 0.25):
            assert source_now.region == region_from_spec(spec.format(delta))
            if delta > 0.25:
                source_now.step()


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Clip(0.2), "region must have one band.*got 0 in Clip"),
        (Band("kl", 0.1) | Band("kl", 0.1), "region must have one band.*got 2 in"),
        (Band("kl", (0.1, 0.2)), "region must have a band of one delta"),
        (Band("kl", np.array([0.1, 0.1])).cap(10), "region must have a band of one delta"),
        (Band("kl", 0.1).table(), "region must have one band.*got 0 in"),
    ],
)
def test_a_region_without_one_band_of_one_delta_has_no_schedule(
    region: Region, message: str
) -> None:
    with pytest.raises(InvalidValueError, match=message):
        ScheduledBand.of(region, Constant(0.1))


def test_a_schedule_of_a_region_takes_a_region_and_a_schedule() -> None:
    with pytest.raises(InvalidTypeError, match="region must be a Region, got str"):
        ScheduledBand.of("kl@0.1", Constant(0.1))  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="schedule must be"):
        ScheduledBand.of(Band("kl", 0.1), 0.1)  # type: ignore[arg-type]
