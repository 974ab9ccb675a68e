"""Tokens whose log-ratio is beyond the clamp: ratios end there, decisions do not."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from bandpo import Band, GammaWeight, GradientPreserving, Mask
from bandpo.loss import LOG_RATIO_LIMIT
from bandpo.presets import preset
from bandpo.region import PrefixBudget, TensorBand
from bandpo.rule import RuleRegion
from support.batches import Batch

RATIO = math.exp(LOG_RATIO_LIMIT)
OLD = -32.0
INSIDE, OUTSIDE = -9.0, -0.5
"""New log-probs, 23 and 31.5 above the old one: probabilities of 1e-4 and 0.6."""

REGIONS: dict[str, RuleRegion] = {
    "ipo": Band("tv", 0.1),
    "kpop": Band("kl", 0.05) & Band("reverse-kl", 0.05),
    "capped": Band("kl", 0.05).cap(1e12),
    "budget": PrefixBudget(),
    "tensor": TensorBand("tv", torch.tensor(0.1)),
}


def tokens(dtype: torch.dtype, sign: float = 1.0) -> Batch:
    """Two tokens, each a sequence: one stays inside the regions above, one leaves them."""
    new = torch.tensor([[INSIDE], [OUTSIDE]], dtype=dtype)
    return Batch(torch.full_like(new, OLD), new, torch.full_like(new, sign), torch.ones(2, 1))


def gain_and_slope(batch: Batch, **options: Any) -> tuple[list[float], list[float], float]:
    """Losses and gradients of the first column with the sign of a gain, and the clipped share."""
    options["loss_agg_mode"] = "token-sum"
    found = batch.loss(**options)
    slope = -batch.gradient(**options)
    metrics = found.metrics
    share = metrics["clip_fraction_high"] + metrics["clip_fraction_low"]
    return (-found.per_token.reshape(-1)).tolist(), slope.reshape(-1).tolist(), share.item()


def test_the_two_tokens_are_inside_and_outside() -> None:
    p = math.exp(OLD)
    for new, inside in ((INSIDE, True), (OUTSIDE, False)):
        q = math.exp(new)
        tv = abs(p - q)
        kl = p * (OLD - new) + (1 - p) * math.log((1 - p) / (1 - q))
        reverse = q * (new - OLD) + (1 - q) * math.log((1 - q) / (1 - p))
        assert [tv <= 0.1, kl <= 0.05, reverse <= 0.05] == [inside] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", REGIONS)
def test_a_mask_drops_the_token_outside_alone(
    name: str, exact: bool, backend: str, dtype: torch.dtype
) -> None:
    rule = {"region": REGIONS[name], "surrogate": Mask(truncation=None)}
    _, slope, share = gain_and_slope(tokens(dtype), **rule, exact=exact, backend=backend)
    assert slope == [pytest.approx(RATIO, rel=1e-6), 0.0]
    assert share == 0.5


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_symmetric_mask_drops_it_whatever_the_advantage(
    sign: float, anchored: bool, backend: str
) -> None:
    batch = tokens(torch.float32, sign)
    rule = preset("ipo").arguments(log_ratio_penalty=0.0)
    if anchored:
        rule["anchor_log_prob"] = batch.old_log_prob
        batch = batch._replace(old_log_prob=batch.old_log_prob + 0.25)
    _, slope, share = gain_and_slope(batch, **rule, backend=backend)
    assert slope == [pytest.approx(sign * RATIO, rel=1e-6), 0.0]
    assert share == 0.5


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_ratio_below_a_bound_that_is_below_the_clamp_is_clipped(
    exact: bool, backend: str
) -> None:
    """The lower bound of kl 0.05 at p = e^-7 is e^-55."""
    region = Band("kl", 0.05)
    assert -56.0 < region.log_bounds([-7.0])[0][0] < -54.0
    old = torch.full((1, 3), -7.0)
    new = torch.tensor([[-40.0, -61.0, -63.0]])
    batch = Batch(old, new, -torch.ones(1, 3), torch.ones(1, 3))
    rule = {"region": region, "surrogate": Mask(truncation=None)}
    _, slope, _ = gain_and_slope(batch, **rule, exact=exact, backend=backend)
    kept = pytest.approx(-1.0 / RATIO, rel=1e-6)
    assert slope == [kept, kept, 0.0]


GAINS: dict[str, tuple[object, list[float], list[float]]] = {
    "min-clip": ("min-clip", [RATIO, RATIO], [0.0, 0.0]),
    "weight": ("weight", [RATIO * INSIDE, RATIO * OUTSIDE], [RATIO, RATIO]),
    "preserving": (GradientPreserving(1.0, 0.5), [RATIO, 0.5 * RATIO], [0.0, 0.5 * RATIO]),
    "gamma": (GammaWeight(0.0, 0.0, 0.0, 0.0), [INSIDE, OUTSIDE], [1.0, 1.0]),
}
"""Surrogates with the gain of both tokens and its derivative."""


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", GAINS)
def test_clipped_ratios_end_at_the_clamp(name: str, exact: bool, backend: str) -> None:
    surrogate, gains, slopes = GAINS[name]
    rule = {"region": Band("kl", 0.05), "surrogate": surrogate}
    gain, slope, share = gain_and_slope(tokens(torch.float32), **rule, exact=exact, backend=backend)
    assert gain == pytest.approx(gains, rel=1e-6)
    assert slope == pytest.approx(slopes, rel=1e-6)
    assert share == 0.5


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_geometric_mean_moves_the_token_outside_to_its_bound(backend: str) -> None:
    """The mean takes log-ratios that end at the clamp; a clipped token has no gradient."""
    rule = {"region": Band("kl", 0.05), "ratio_level": "geometric-mean"}
    gain, slope, share = gain_and_slope(tokens(torch.float32), **rule, backend=backend)
    assert gain == pytest.approx([RATIO, RATIO], rel=1e-6)
    assert slope == [pytest.approx(RATIO, rel=1e-6), 0.0]
    assert share == 0.5
