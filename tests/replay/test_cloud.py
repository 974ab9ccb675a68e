"""The random part of a log that is drawn: its size, its tokens and their probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch")

from bandpo.record import LoggedTokens
from bandpo.record.layout import select
from bandpo.replay import cloud
from support.logs import random_log


def rows(found: cloud.Cloud) -> set[tuple[float, ...]]:
    return set(zip(*(column.tolist() for column in found.columns), strict=True))


def rows_of_log(log: LoggedTokens) -> list[tuple[float, ...]]:
    columns = (log.old_log_prob, log.log_prob - log.old_log_prob, log.advantages)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_a_short_log_is_whole_and_unknown_ratios_are_left_out() -> None:
    log = random_log(100, 3)
    expected = rows_of_log(log)
    log.log_prob[7] = log.old_log_prob[7] = -math.inf  # no ratio
    log.advantages[8] = math.nan
    assert rows(cloud.cloud_of([log])) == set(expected[:7] + expected[9:])


def test_a_long_log_gives_distinct_tokens_of_every_part() -> None:
    log = random_log(3 * cloud.SIZE, 4)
    parts = [select(log, slice(start, start + 5000)) for start in range(0, 3 * cloud.SIZE, 5000)]
    found = cloud.cloud_of(parts)
    assert len(found.columns[0]) == cloud.SIZE == len(rows(found))
    assert rows(found) < set(rows_of_log(log))
    for part in parts:  # each of 5000, of which a third stays; six standard deviations
        size = len(part.weight)
        kept = len(rows(found) & set(rows_of_log(part)))
        assert abs(kept - size / 3) < 6 * math.sqrt(size * 2 / 9)


def test_the_last_token_left_is_one_with_a_probability_of_its_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Algorithm A-ES with one place draws token i with w_i / sum(w)."""
    monkeypatch.setattr(cloud, "SIZE", 1)
    weight = np.array([1.0, 3.0, 6.0])
    log = select(random_log(3, 5), slice(0, 3))._replace(weight=weight)
    draws, counts = 2000, dict.fromkeys(rows_of_log(log), 0)
    for seed in range(draws):
        found = cloud.Cloud()
        found._random = np.random.default_rng(seed)
        found.add(log)
        [row] = rows(found)
        counts[row] += 1
    share = weight / weight.sum()
    deviation = np.sqrt(draws * share * (1 - share))
    assert np.all(np.abs(np.array(list(counts.values())) - draws * share) < 5 * deviation)
