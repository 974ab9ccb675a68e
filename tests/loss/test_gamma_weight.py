"""The gamma weight (VESPO, arXiv 2602.10693) at every level, and what its metrics are of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
from bandpo.check import Float64Array
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.surrogate import GammaWeight, Mask
from support.batches import Batch, assert_close, random_batch

EXACT = 1e-12
"""Relative: both sides are in float64; an exponential of a sum of up to 20 log-ratios."""

FREE = bandpo.Clip(1.0, math.inf)
LEVELS = ["token", "sequence", "sequence-product"]


def log_ratio_at(level: str, log_ratio: Float64Array, valid: Any) -> Float64Array:
    """The token's own, or the mean or the sum of its row, clamped."""
    found = np.where(valid, log_ratio, 0.0)
    if level != "token":
        total = found.sum(-1, keepdims=True)
        if level == "sequence":
            total = total / np.maximum(valid.sum(-1, keepdims=True), 1)
        found = np.broadcast_to(total, found.shape)
    return np.clip(found, -20.0, 20.0)


def phi(log_ratio: Float64Array, advantages: Float64Array, numbers: Any) -> Float64Array:
    """e^lambda W^k e^(-lambda W)."""
    k, lam = (np.where(advantages < 0.0, low, high) for high, low in numbers)
    return np.asarray(np.exp(lam + k * log_ratio - lam * np.exp(log_ratio)))


@pytest.mark.parametrize("numbers", [((2.0, 3.0), (3.0, 2.0)), ((0.5, 0.0), (1.5, 4.0))])
@pytest.mark.parametrize("clip", [FREE, bandpo.Clip(0.1, 0.15)], ids=str)
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_loss_and_gradient_are_the_formula_at_every_level(
    level: str, anchored: bool, clip: bandpo.Clip, numbers: Any, backend: str
) -> None:
    batch = random_batch((12, 20), dtype=torch.float64)
    batch.advantages[3] = 0.0
    old, new, advantages, valid = (tensor.numpy() for tensor in batch)
    options: dict[str, Any] = {"region": clip, "ratio_level": level, "backend": backend}
    (k, k_negative), (lam, lam_negative) = numbers
    options["surrogate"] = GammaWeight(k, lam, k_negative, lam_negative)
    x = log_ratio_at(level, new - old, valid)
    lower, upper = np.full_like(old, clip.log_lower), np.full_like(old, clip.log_upper)
    if anchored:
        anchor = old + np.random.default_rng(1).normal(0.0, 0.1, old.shape)
        options["anchor_log_prob"] = torch.from_numpy(anchor)
        shift = log_ratio_at(level, anchor - old, valid)
        lower, upper = lower + shift, upper + shift
    weight = phi(np.clip(x, lower, upper), advantages, numbers)
    gradient = np.where(valid, -advantages * weight, 0.0)
    found = batch.gradient(**options, loss_agg_mode="token-sum")
    assert_close(found, gradient, EXACT)
    result = batch.loss(**options, loss_agg_mode="none")
    assert_close(result.loss, gradient * new, EXACT)

    # Metrics are of the ratio, never of the weight.
    seen = x[valid]
    metrics = result.metrics
    assert_close(metrics["ratio_min"], np.exp(seen.min()), EXACT)
    assert_close(metrics["ratio_max"], np.exp(seen.max()), EXACT)
    assert_close(metrics["approx_kl"], -seen.mean(), 1e-10)
    assert_close(metrics["approx_kl_k3"], (np.expm1(seen) - seen).mean(), 1e-10)
    assert_close(metrics["entropy"], -old[valid].mean(), EXACT)
    outside = {"low": x < lower, "high": x > upper}
    for side, flag in outside.items():
        assert_close(metrics[f"clip_fraction_{side}"], flag[valid].mean(), EXACT)
    size = np.abs(advantages)[valid]
    removed = (size * np.abs(np.exp(x) - weight)[valid]).sum() / (size * np.exp(seen)).sum()
    assert_close(metrics["gradient_removed"], removed, EXACT)
    assert not metrics["all_ratios_one"]
    assert metrics["nonfinite_tokens"] == 0
    by_bin = batch.loss(**options, metrics_by_probability=True).metrics
    tokens = by_bin["tokens_by_probability"]
    assert int(tokens.sum()) == valid.sum()
    for side, flag in outside.items():
        share = (by_bin[f"clip_fraction_{side}_by_probability"] * tokens).sum()
        assert_close(share, flag[valid].sum(), EXACT)


def test_a_band_bounds_it_at_the_level_of_tokens(backend: str) -> None:
    batch = random_batch((12, 20), dtype=torch.float64)
    region = bandpo.Band("kl", 0.05)
    old, new, advantages, valid = (tensor.numpy() for tensor in batch)
    lower, upper = region.log_bounds(old)
    weight = phi(np.clip(new - old, lower, upper), advantages, ((2.0, 3.0), (3.0, 2.0)))
    options: dict[str, Any] = {"region": region, "surrogate": "gamma-weight", "exact": True}
    found = batch.gradient(**options, backend=backend, loss_agg_mode="token-sum")
    assert_close(found, np.where(valid, -advantages * weight, 0.0), EXACT)


def test_an_unmoved_policy_has_the_gradient_of_reinforce(backend: str) -> None:
    batch = random_batch((12, 20), dtype=torch.float64)
    batch = batch._replace(log_prob=batch.old_log_prob.clone())
    options: dict[str, Any] = {"region": FREE, "surrogate": "gamma-weight", "backend": backend}
    for level in LEVELS:
        found = batch.gradient(**options, ratio_level=level, loss_agg_mode="token-sum")
        assert torch.equal(found, torch.where(batch.response_mask, -batch.advantages, 0.0))
        assert batch.loss(**options, ratio_level=level).metrics["all_ratios_one"]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_products_far_beyond_the_clamp_stay_finite(sign: float, backend: str) -> None:
    """A sum of 1000 or -1000 has the weight of 20 or -20."""
    old = torch.full((1, 100), -20.0, dtype=torch.float64)
    batch = Batch(old, old + sign * 10.0, torch.ones(1, 1), torch.ones(1, 100))
    options: dict[str, Any] = {"region": FREE, "surrogate": "gamma-weight", "backend": backend}
    options["ratio_level"] = "sequence-product"
    found = batch.gradient(**options, loss_agg_mode="token-sum")
    x = np.float64(20.0 * sign)
    assert_close(found, np.full((1, 100), -np.exp(2.0 * x - 3.0 * np.expm1(x))), EXACT)
    metrics = batch.loss(**options).metrics
    assert_close(metrics["ratio_max"], np.exp(x), EXACT)


def test_packed_is_padded_and_weights_multiply(backend: str) -> None:
    batch = random_batch((6, 8), dtype=torch.float64)
    lengths = torch.tensor([8, 3, 0, 5, 1, 8])
    inside = torch.arange(8) < lengths[:, None]
    batch.response_mask[~inside] = False
    weights = torch.rand(6, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    options: dict[str, Any] = {"region": FREE, "surrogate": "gamma-weight", "backend": backend}
    for level in LEVELS:
        options |= {"ratio_level": level, "loss_agg_mode": "token-sum"}
        padded = batch.gradient(**options)
        weighted = batch.gradient(**options, rollout_is_weights=weights)
        torch.testing.assert_close(weighted, padded * weights, rtol=EXACT, atol=0.0)
        flat = Batch(*(tensor[inside] for tensor in batch))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        packed = flat.gradient(**options, cu_seqlens=offsets)
        torch.testing.assert_close(packed, padded[inside], rtol=EXACT, atol=0.0)


@pytest.mark.parametrize("level", LEVELS)
def test_a_nan_that_counts_is_seen_and_a_masked_one_is_not(level: Any, backend: str) -> None:
    batch = random_batch((3, 4), dtype=torch.float64)
    batch.response_mask[:] = True
    batch.response_mask[0, 0] = False
    anchor = batch.old_log_prob.clone()
    for column in (*batch[:3], anchor):
        column[0, 0] = math.nan
    options: dict[str, Any] = {"region": FREE, "surrogate": "gamma-weight", "backend": backend}
    options |= {"ratio_level": level, "anchor_log_prob": anchor}
    assert not batch.loss(**options).per_token.isnan().any()
    for column in (batch.log_prob, anchor):
        kept = column[1, 1].clone()
        column[1, 1] = math.nan
        result = batch.loss(**options)
        rows = result.per_token.isnan().sum(-1).tolist()
        assert rows == [0, 1 if level == "token" else 4, 0]
        assert int(result.metrics["nonfinite_tokens"]) == rows[1]
        column[1, 1] = kept


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GammaWeight(-1.0), InvalidValueError, "k_positive must be finite and at least 0"),
        (lambda: GammaWeight(1.0, math.inf), InvalidValueError, "lambda_positive must be finite"),
        (lambda: GammaWeight(k_negative=math.nan), InvalidValueError, "k_negative must be finite"),
        (
            lambda: GammaWeight(lambda_negative=True),
            InvalidTypeError,
            "lambda_negative must be a real number, got bool",
        ),
        (lambda: Mask(symmetric=True, whole_sequence=True), InvalidValueError, "symmetric must be"),
        (lambda: Mask(symmetric=1), InvalidTypeError, "symmetric must be a bool"),  # type: ignore[arg-type]
    ],
)
def test_numbers_out_of_range_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("options", [{"ratio_level": "geometric-mean"}, {"dual_clip": 3.0}])
def test_it_goes_with_neither_gmpo_nor_a_dual_clip(options: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"must be (left out|'min-clip')"):
        random_batch((2, 3)).loss(region=FREE, surrogate="gamma-weight", **options)
