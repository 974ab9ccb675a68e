"""Tokens whose log-ratio is beyond the clamp: ratios end there, decisions do not."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")

import torch

from bandpo import Band, GammaWeight, GradientPreserving, Mask, Region, policy_loss
from bandpo.loss import LOG_RATIO_LIMIT
from bandpo.presets import preset
from bandpo.region import PrefixBudget, TensorBand
from bandpo.rule import RuleRegion

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


def tokens(dtype: torch.dtype, sign: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Two tokens, each a sequence: one stays inside the regions above, one leaves them."""
    new = torch.tensor([[INSIDE], [OUTSIDE]], dtype=dtype).requires_grad_()
    return torch.full_like(new, OLD), new, torch.full_like(new, sign), torch.ones(2, 1)


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
    old, new, advantages, mask = tokens(dtype)
    found = policy_loss(
        old,
        new,
        advantages,
        mask,
        region=REGIONS[name],
        surrogate=Mask(truncation=None),
        loss_agg_mode="token-sum",
        backend=backend,  # type: ignore[arg-type]
        exact=exact,
    )
    found.loss.backward()
    assert new.grad is not None
    assert new.grad[:, 0].tolist() == [pytest.approx(-RATIO, rel=1e-6), 0.0]
    assert found.metrics["clip_fraction_high"].item() == 0.5


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_symmetric_mask_drops_it_whatever_the_advantage(
    sign: float, anchored: bool, backend: str
) -> None:
    old, new, advantages, mask = tokens(torch.float32, sign)
    options = {"anchor_log_prob": old} if anchored else {}
    rule = preset("ipo").arguments(loss_agg_mode="token-sum", log_ratio_penalty=0.0)
    found = policy_loss(
        old + 0.25 if anchored else old, new, advantages, mask, backend=backend, **rule, **options
    )  # type: ignore[arg-type]
    found.loss.backward()
    assert new.grad is not None
    assert new.grad[:, 0].tolist() == [pytest.approx(-sign * RATIO, rel=1e-6), 0.0]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_ratio_below_a_bound_that_is_below_the_clamp_is_clipped(
    exact: bool, backend: str
) -> None:
    """The lower bound of kl 0.05 at p = e^-7 is e^-55."""
    region = Band("kl", 0.05)
    old = torch.full((1, 3), -7.0)
    new = torch.tensor([[-40.0, -61.0, -63.0]], requires_grad=True)
    low = region.log_bounds([-7.0])[0][0]
    assert -56.0 < low < -54.0
    found = policy_loss(
        old,
        new,
        -torch.ones(1, 3),
        torch.ones(1, 3),
        region=region,
        surrogate=Mask(truncation=None),
        loss_agg_mode="token-sum",
        backend=backend,  # type: ignore[arg-type]
        exact=exact,
    )
    found.loss.backward()
    assert new.grad is not None
    kept = pytest.approx(1.0 / RATIO, rel=1e-6)
    assert new.grad[0].tolist() == [kept, kept, 0.0]


LOSSES: dict[str, tuple[object, list[float], list[float]]] = {
    "min-clip": ("min-clip", [RATIO, RATIO], [0.0, 0.0]),
    "weight": ("weight", [RATIO * INSIDE, RATIO * OUTSIDE], [RATIO, RATIO]),
    "preserving": (GradientPreserving(1.0, 0.5), [RATIO, 0.5 * RATIO], [0.0, 0.5 * RATIO]),
    "gamma": (GammaWeight(0.0, 0.0, 0.0, 0.0), [INSIDE, OUTSIDE], [1.0, 1.0]),
}
"""Surrogates with the value and the derivative of the gain of both tokens."""


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_clipped_ratios_end_at_the_clamp(name: str, exact: bool, backend: str) -> None:
    surrogate, values, slopes = LOSSES[name]
    region: Region = Band("kl", 0.05)
    old, new, advantages, mask = tokens(torch.float32)
    found = policy_loss(
        old,
        new,
        advantages,
        mask,
        region=region,
        surrogate=surrogate,  # type: ignore[arg-type]
        loss_agg_mode="token-sum",
        backend=backend,  # type: ignore[arg-type]
        exact=exact,
    )
    found.loss.backward()
    assert new.grad is not None
    assert (-found.per_token[:, 0]).tolist() == pytest.approx(values, rel=1e-6)
    assert (-new.grad[:, 0]).tolist() == pytest.approx(slopes, rel=1e-6)
    assert found.metrics["clip_fraction_high"].item() == 0.5


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_geometric_mean_moves_the_token_outside_to_its_bound(backend: str) -> None:
    """The mean takes log-ratios that end at the clamp."""
    old, new, advantages, mask = tokens(torch.float32)
    found = policy_loss(
        old,
        new,
        advantages,
        mask,
        region=Band("kl", 0.05),
        ratio_level="geometric-mean",
        loss_agg_mode="token-sum",
        backend=backend,  # type: ignore[arg-type]
    )
    assert (-found.per_token[:, 0]).tolist() == pytest.approx([RATIO, RATIO], rel=1e-6)
    assert found.metrics["clip_fraction_high"].item() == 0.5
