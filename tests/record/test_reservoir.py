"""The sample of a step: uniform in its strata, unbiased by its weights, and of bounded size."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2

from bandpo.record.reservoir import STRATA, Reservoir, shares, stratum_of
from bandpo.surrogate import PROBABILITY_EDGES

SEED = 20261127
REPEATS = 3000

SMALLEST_P = 1e-3
"""A correct sampler has a smaller p-value at one seed in a thousand; the seeds are fixed."""
BIASED_P = 1e-4
"""A biased one has a smaller p-value; that of a mistake of one was at most 1.4e-5 at four seeds."""

COUNTS = np.array([12, 40, 40, 160, 248])
"""Tokens of a step in each stratum."""
SIZE = 60
TOKENS = int(COUNTS.sum())

STRATUM = np.repeat(np.arange(STRATA), COUNTS)
OLD_LOG_PROB = np.log(
    (np.array(PROBABILITY_EDGES)[STRATUM] + np.array(PROBABILITY_EDGES)[STRATUM + 1]) / 2
)
ORDER = np.random.default_rng(SEED).permutation(TOKENS)

Indices = NDArray[np.int64]
Sampler = Callable[[np.random.Generator, list[Indices]], Indices]


def micro_batches() -> list[Indices]:
    """The tokens of the step in the order of a run, in batches of unlike sizes."""
    return np.split(ORDER, [7, 8, 50, 51, 200, 420])


def ours(rng: np.random.Generator, batches: list[Indices]) -> Indices:
    reservoir = Reservoir(SIZE, rng)
    for batch in batches:
        reservoir.add({"old_log_prob": OLD_LOG_PROB[batch], "index": batch})
    return reservoir.sample()["index"]


def batches_as_equals(rng: np.random.Generator, batches: list[Indices]) -> Indices:
    """A mistake: each batch takes half of the sample, whatever was there before it."""
    room = shares(COUNTS, SIZE)
    found = []
    for stratum in range(STRATA):
        kept = np.empty(0, np.int64)
        for batch in batches:
            new = batch[STRATUM[batch] == stratum]
            most = max(room[stratum] - len(kept), room[stratum] // 2)
            new = rng.permutation(new)[:most]
            kept = np.concatenate([rng.permutation(kept)[: room[stratum] - len(new)], new])
        found.append(kept)
    return np.concatenate(found)


def one_too_many(rng: np.random.Generator, batches: list[Indices]) -> Indices:
    """A mistake of one in algorithm R: the k-th token enters with probability n / (k - 1)."""
    room = shares(COUNTS, SIZE)
    kept: list[list[int]] = [[] for _ in range(STRATA)]
    seen = [0] * STRATA
    for token in np.concatenate(batches).tolist():
        stratum = int(STRATUM[token])
        if len(kept[stratum]) < room[stratum]:
            kept[stratum].append(token)
        elif (place := int(rng.integers(0, seen[stratum]))) < room[stratum]:
            kept[stratum][place] = token
        seen[stratum] += 1
    return np.concatenate([np.array(part, np.int64) for part in kept])


def p_value(sampler: Sampler, seed: int) -> float:
    """That of the inclusions of each token being alike in its stratum.

    A sample of n of N tokens without replacement includes each with probability n / N. The sum of
    the squared deviations, over the variance of a count times N / (N - 1), is chi-square with N - 1
    degrees of freedom for many repetitions, and the strata are independent.
    """
    rng = np.random.default_rng(seed)
    included = np.zeros(TOKENS)
    for _ in range(REPEATS):
        included[sampler(rng, micro_batches())] += 1
    share = shares(COUNTS, SIZE) / COUNTS
    statistic = degrees = 0.0
    for stratum in np.flatnonzero(share < 1):
        of_stratum = included[stratum == STRATUM]
        assert of_stratum.sum() == REPEATS * shares(COUNTS, SIZE)[stratum]
        size, p = COUNTS[stratum], share[stratum]
        variance = REPEATS * p * (1 - p) * size / (size - 1)
        statistic += float(((of_stratum - REPEATS * p) ** 2).sum() / variance)
        degrees += size - 1
    return float(chi2.sf(statistic, degrees))


@pytest.mark.parametrize("seed", [SEED, SEED + 1, SEED + 2])
def test_each_token_of_a_stratum_is_kept_equally_often(seed: int) -> None:
    assert SMALLEST_P < p_value(ours, seed) < 1 - SMALLEST_P


@pytest.mark.parametrize("sampler", [batches_as_equals, one_too_many])
def test_the_same_check_finds_a_biased_sampler(sampler: Sampler) -> None:
    assert p_value(sampler, SEED) < BIASED_P


def test_pairs_of_tokens_are_kept_as_often_as_of_a_uniform_sample() -> None:
    """Tokens of one batch and of two are together with probability n (n - 1) / (N (N - 1))."""
    rng = np.random.default_rng(SEED)
    stratum = STRATA - 1
    size, room = int(COUNTS[stratum]), int(shares(COUNTS, SIZE)[stratum])
    of_stratum = np.concatenate(micro_batches())
    first = of_stratum[STRATUM[of_stratum] == stratum][: size // 2]
    pairs = np.zeros(2)
    for _ in range(REPEATS):
        kept = ours(rng, micro_batches())
        kept = kept[STRATUM[kept] == stratum]
        early = int(np.isin(kept, first).sum())
        pairs += early * (early - 1) / 2, early * (room - early)
    expected = room * (room - 1) / (size * (size - 1)) * REPEATS
    half = len(first)
    possible = np.array([half * (half - 1) / 2, half * (size - half)])
    # early is hypergeometric; its variance gives that of the pairs, to first order.
    variance = room * 0.25 * (size - room) / (size - 1)
    scale = np.array([room / 2 * math.sqrt(variance), 2 * variance]) * math.sqrt(REPEATS)
    assert (np.abs(pairs - expected * possible) < 4 * scale).all()


def test_weighted_sums_are_unbiased_and_plain_ones_are_not() -> None:
    rng = np.random.default_rng(SEED)
    values = np.exp(-OLD_LOG_PROB / 3) * (1 + rng.random(TOKENS))
    estimates, plain = [], []
    for _ in range(REPEATS):
        reservoir = Reservoir(SIZE, rng)
        for batch in micro_batches():
            reservoir.add({"old_log_prob": OLD_LOG_PROB[batch], "value": values[batch]})
        sample = reservoir.sample()
        estimates.append(float((sample["weight"] * sample["value"]).sum()))
        plain.append(float(sample["value"].mean() * TOKENS))
    for found, is_biased in ((estimates, False), (plain, True)):
        error = np.std(found) / math.sqrt(REPEATS)
        assert bool(abs(np.mean(found) - values.sum()) > 4 * error) is is_biased


def test_every_stratum_is_there_and_its_weights_add_up_to_its_tokens() -> None:
    rng = np.random.default_rng(SEED)
    reservoir = Reservoir(SIZE, rng)
    for batch in micro_batches():
        reservoir.add({"old_log_prob": OLD_LOG_PROB[batch]})
    sample = reservoir.sample()
    strata = stratum_of(sample["old_log_prob"])
    np.testing.assert_array_equal(np.bincount(strata, minlength=STRATA), [12, 12, 12, 12, 12])
    sums = np.bincount(strata, sample["weight"], STRATA)
    np.testing.assert_allclose(sums, COUNTS, rtol=SIZE * np.finfo(float).eps)


def test_a_sample_with_room_for_all_tokens_has_them_in_order_with_weight_1() -> None:
    reservoir = Reservoir(TOKENS, np.random.default_rng(SEED))
    for batch in micro_batches():
        reservoir.add({"old_log_prob": OLD_LOG_PROB[batch], "index": batch})
    sample = reservoir.sample()
    assert (sample["weight"] == 1.0).all()
    np.testing.assert_array_equal(sample["index"], ORDER)


def test_a_sample_is_in_the_order_in_which_its_tokens_came() -> None:
    reservoir = Reservoir(SIZE, np.random.default_rng(SEED))
    for batch in micro_batches():
        reservoir.add({"old_log_prob": OLD_LOG_PROB[batch], "index": batch})
    places = np.argsort(ORDER)[reservoir.sample()["index"]]
    assert (np.diff(places) > 0).all()


def test_no_tokens_give_no_sample() -> None:
    reservoir = Reservoir(SIZE, np.random.default_rng(SEED))
    assert reservoir.sample() == {}
    reservoir.add({"old_log_prob": np.empty(0)})
    assert reservoir.sample() == {}


@given(
    counts=st.lists(st.integers(0, 10**6), min_size=STRATA, max_size=STRATA),
    size=st.integers(STRATA, 10**5),
)
def test_room_is_used_as_far_as_there_are_tokens_and_shared_equally(
    counts: list[int], size: int
) -> None:
    given_counts = np.array(counts)
    room = shares(given_counts, size)
    assert room.sum() == min(size, sum(counts))
    assert (room <= given_counts).all()
    assert ((room > 0) == (given_counts > 0)).all()
    short = room < given_counts
    if short.any():  # strata that leave tokens out have the same room but for one, and the most
        assert np.ptp(room[short]) <= 1
        assert room[~short].max(initial=0) <= room[short].max()


def test_strata_are_the_bins_of_the_metrics() -> None:
    torch = pytest.importorskip("torch")
    from bandpo.backends.plain import probability_bin

    edges = np.log(PROBABILITY_EDGES[1:])
    old = np.concatenate(
        [edges, np.nextafter(edges, -9), np.nextafter(edges, 9), [-np.inf, np.nan]]
    )
    expected = probability_bin(torch.tensor(old)).numpy()
    np.testing.assert_array_equal(stratum_of(old), expected)


def test_memory_is_that_of_five_samples_however_many_tokens_there_are() -> None:
    import tracemalloc

    rng = np.random.default_rng(SEED)
    reservoir = Reservoir(1000, rng)
    old = -rng.exponential(3.0, 20_000)

    def held() -> int:
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    for _ in range(20):
        reservoir.add({"old_log_prob": old})
    before = held()
    for _ in range(60):
        reservoir.add({"old_log_prob": old})
    grown = held() - before
    tracemalloc.stop()
    assert grown < 8 * 1000
