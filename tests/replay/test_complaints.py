"""Each complaint has a log that causes it, and a near miss that does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("torch")

from bandpo.record import LoggedTokens
from bandpo.record.layout import select
from bandpo.replay import complaints_of
from support.logs import random_log

Change = Callable[[LoggedTokens], LoggedTokens]

COUNT = 20_000


def sampled(seed: int = 0, step: float = 0.3) -> LoggedTokens:
    """Tokens that the old policy drew: one of two outcomes, by its probability."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0.0, 1.5, COUNT)
    other = logit + rng.normal(0.0, step, COUNT)
    drawn = np.where(rng.random(COUNT) < 1.0 / (1.0 + np.exp(-logit)), 1.0, -1.0)
    return random_log(COUNT, seed)._replace(
        old_log_prob=-np.logaddexp(0.0, -drawn * logit),
        log_prob=-np.logaddexp(0.0, -drawn * other),
        rollout_log_prob=None,
    )


def first(log: LoggedTokens, count: int, **values: float) -> LoggedTokens:
    """Other numbers in the first tokens."""
    chosen = np.arange(COUNT) < count
    return log._replace(
        **{name: np.where(chosen, value, getattr(log, name)) for name, value in values.items()}
    )


def bfloat16(log: LoggedTokens) -> LoggedTokens:
    def rounded(values: np.ndarray) -> np.ndarray:
        bits = values.astype(np.float32).view(np.uint32) + np.uint32(0x8000)
        return np.asarray((bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64))

    return log._replace(old_log_prob=rounded(log.old_log_prob), log_prob=rounded(log.log_prob))


def heated(log: LoggedTokens, temperature: float) -> LoggedTokens:
    """Old and new log-probs of two outcomes at another temperature than that of sampling."""

    def of(column: np.ndarray) -> np.ndarray:
        logit = (column - np.log(-np.expm1(column))) / temperature
        return np.asarray(-np.logaddexp(0.0, -logit))

    return log._replace(
        rollout_log_prob=log.old_log_prob,
        old_log_prob=of(log.old_log_prob),
        log_prob=of(log.log_prob),
    )


def noisy_rollout(log: LoggedTokens, share: float, size: float) -> LoggedTokens:
    """An engine whose log-probs are off by the size, either way, for a share of the tokens."""
    rng = np.random.default_rng(3)
    off = (rng.random(COUNT) < share) * rng.choice([-size, size], COUNT)
    return log._replace(rollout_log_prob=log.old_log_prob + off)


CASES: dict[str, tuple[Change, Change]] = {
    "nan": (lambda log: first(log, 1, log_prob=math.nan), lambda log: first(log, 1, log_prob=-700)),
    "infinite": (
        lambda log: first(log, 1, log_prob=-math.inf),
        lambda log: first(log, 1, log_prob=-1e30),
    ),
    "probabilities": (
        lambda log: log._replace(
            old_log_prob=np.exp(log.old_log_prob), log_prob=np.exp(log.log_prob)
        ),
        lambda log: first(log, 1, old_log_prob=0.5, log_prob=0.5),
    ),
    "above-zero": (
        lambda log: first(log, 30, old_log_prob=0.06, log_prob=0.06),
        lambda log: first(log, 30, old_log_prob=0.04, log_prob=0.04),
    ),
    "padding": (
        lambda log: first(log, 500, old_log_prob=0.0, log_prob=0.0),
        lambda log: first(log, 300, old_log_prob=0.0, log_prob=0.0),
    ),
    "ratios-are-1": (
        lambda log: log._replace(log_prob=log.old_log_prob),
        lambda log: first(log._replace(log_prob=log.old_log_prob), 1, log_prob=-1.0),
    ),
    "no-advantage": (
        lambda log: first(log, COUNT, advantages=0.0),
        lambda log: first(log, COUNT - 1, advantages=0.0),
    ),
    "bfloat16": (bfloat16, lambda log: first(bfloat16(log), 1, log_prob=-1.2345678)),
    "swapped": (
        lambda log: log._replace(old_log_prob=log.log_prob, log_prob=log.old_log_prob),
        lambda log: log,
    ),
    "temperature": (lambda log: heated(log, 0.7), lambda log: heated(log, 1.01)),
    "mismatch": (
        lambda log: noisy_rollout(log, 0.02, 0.6),
        lambda log: noisy_rollout(log, 0.02, 0.4),
    ),
}


def names(log: LoggedTokens) -> list[str]:
    return [found.name for found in complaints_of([log])]


@pytest.mark.parametrize("name", CASES)
def test_a_log_causes_its_complaint_and_a_near_miss_does_not(name: str) -> None:
    wrong, near = CASES[name]
    assert name in names(wrong(sampled()))
    assert name not in names(near(sampled()))


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("column", ["old_log_prob", "log_prob"])
def test_0_and_1_are_probabilities_too(column: str, end: float) -> None:
    log = CASES["probabilities"][0](sampled())
    assert "probabilities" in names(first(log, 3, **{column: end}))
    beyond = np.nextafter(end, 10.0 * end - 5.0)
    assert "probabilities" not in names(first(log, 3, **{column: beyond}))


@pytest.mark.parametrize("seed", range(20))
def test_a_sound_log_has_none(seed: int) -> None:
    assert names(sampled(seed)) == []
    assert names(noisy_rollout(sampled(seed), 1.0, 0.01)) == []


def test_training_on_the_tokens_causes_none() -> None:
    """The policy moves towards tokens of positive advantage, by 0.1 nats on average."""
    log = sampled(1, step=0.1)
    moved = log.old_log_prob + 0.1 * np.sign(log.advantages) * -np.expm1(log.old_log_prob)
    assert names(log._replace(log_prob=moved)) == []


def test_sums_do_not_depend_on_the_parts() -> None:
    log = heated(sampled(), 0.8)
    parts = [select(log, slice(start, None, 2)) for start in (0, 1)]
    assert [found.name for found in complaints_of(parts)] == names(log)


def test_an_empty_log_says_so() -> None:
    assert [found.name for found in complaints_of([])] == ["empty"]


def test_sentences_have_numbers_and_what_to_change() -> None:
    [found] = complaints_of([sampled()._replace(log_prob=sampled().old_log_prob)])
    assert found.text.startswith("All ratios are 1, so no rule can act.")
    assert "num_iterations" in found.text
    [found] = complaints_of([CASES["padding"][0](sampled())])
    assert found.text.startswith("2.5% of the tokens have both log-probs exactly 0.")
