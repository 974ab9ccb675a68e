"""The best mask of a budget, against every mask of a small log and against an exact knapsack."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo.check import Float64Array
from bandpo.replay import compare
from bandpo.replay.frontier import Frontier
from support.logs import random_log

BIN = 2.0**-11
"""Relative width of a bin of the price."""

numbers = st.floats(1e-6, 1e3)


def frontier_of(divergence: Float64Array, gradient: Float64Array) -> Frontier:
    frontier = Frontier()
    frontier.add(divergence, gradient)
    return frontier


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=10))
def test_no_mask_keeps_more_for_its_divergence(tokens: list[tuple[float, float]]) -> None:
    divergence, gradient = np.array(tokens).T
    frontier = frontier_of(divergence, gradient)
    masks = np.array(list(product((0.0, 1.0), repeat=len(tokens))))
    spent, kept = masks @ divergence, masks @ gradient / gradient.sum()
    best = np.array([frontier.share_at(each) for each in spent])
    assert (kept <= best * (1.0 + BIN) + 1e-12).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=60), st.floats(0.0, 1.0))
def test_it_is_the_fractional_knapsack(tokens: list[tuple[float, float]], share: float) -> None:
    divergence, gradient = np.array(tokens).T
    budget = share * divergence.sum()
    kept, left = 0.0, budget
    for place in np.argsort(divergence / gradient):
        part = min(1.0, left / divergence[place])
        kept, left = kept + part * gradient[place], left - part * divergence[place]
    found = frontier_of(divergence, gradient).share_at(budget)
    assert found == pytest.approx(kept / gradient.sum(), rel=2 * BIN, abs=1e-12)


def test_tokens_without_divergence_are_free_and_infinite_ones_are_never_kept() -> None:
    frontier = frontier_of(np.array([0.0, 1.0, np.inf]), np.array([1.0, 2.0, 5.0]))
    assert frontier.share_at(0.0) == 1.0 / 8.0
    assert frontier.share_at(0.5) == 2.0 / 8.0
    assert frontier.share_at(1e9) == 3.0 / 8.0


def test_without_a_gradient_everything_is_kept() -> None:
    assert frontier_of(np.array([1.0]), np.array([0.0])).share_at(0.0) == 1.0


def test_every_rule_that_only_removes_is_below_it() -> None:
    rules = ["ppo", "kl@0.01", "mask:tv@0.05", "reverse-kl@0.02", "ipo", "trgppo", "sapo"]
    found = compare([random_log(20_000, 1, step=0.8)], rules)
    for rule in found.rules:
        assert found.kept(rule) <= found.optimum(rule) * (1.0 + BIN), rule.rule.name


def test_a_mask_by_the_price_reaches_it() -> None:
    """Theorem 2 of docs/replay.md: to keep the cheapest tokens is optimal."""
    log = random_log(5000, 2, step=0.8)
    found = compare([log], ["ppo"])
    p, q = np.exp(log.old_log_prob), np.exp(log.log_prob)
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    gradient = np.abs(log.advantages) * q / p
    cheap = kl / gradient <= np.quantile(kl / gradient, 0.7)
    best = found.frontier.share_at(kl[cheap].sum())
    assert best == pytest.approx(gradient[cheap].sum() / gradient.sum(), rel=2e-3)
