"""A region that stands at a third policy, while the ratio is that to the old one."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
from bandpo.correction import warning
from bandpo.error import InvalidTypeError, InvalidValueError, MismatchWarning
from bandpo.loss import PolicyLoss
from bandpo.surrogate import BY_NAME, Mask, SoftGate
from support.batches import Batch, assert_close, random_batch
from support.formulas import FORMULAS, SMOOTH, BoundedTokens

KL = bandpo.Band("kl", 0.05)
REGIONS: tuple[bandpo.Region, ...] = (
    KL,
    bandpo.Clip(0.2, 0.28),
    bandpo.Band("kl", np.full((12, 20), 0.05)),
    (bandpo.Band("tv", 0.1) | bandpo.Clip(0.1)).cap(10),
    bandpo.sides(lower=bandpo.Clip(0.2), upper=KL),
)
EXACT = 1e-12
"""Relative: both sides are in float64 with bounds of the solver."""


def anchored(shape: tuple[int, ...], seed: int = 0) -> tuple[Batch, torch.Tensor]:
    """A batch, and log-probs of a third policy that is as far from the old one as the new one."""
    batch = random_batch(shape, seed, torch.float64)
    noise = torch.from_numpy(np.random.default_rng(seed + 1).normal(0.0, 0.2, shape))
    return batch, (batch.old_log_prob + noise).clamp(max=0.0)


def shifted(batch: Batch, anchor: torch.Tensor, region: bandpo.Region) -> BoundedTokens:
    """The tokens with the bounds at the anchor, multiplied by anchor/old."""
    tokens = BoundedTokens.of(batch, region)
    shift = (anchor - batch.old_log_prob).numpy()
    lower, upper = region.log_bounds(anchor.numpy())
    return tokens._replace(log_lower=lower + shift, log_upper=upper + shift)


@pytest.mark.parametrize("region", REGIONS, ids=str)
@pytest.mark.parametrize("name", [name for name in FORMULAS if name not in SMOOTH])
def test_the_bounds_are_those_at_the_anchor_times_anchor_over_old(
    name: str, region: bandpo.Region, backend: str
) -> None:
    surrogate, formula = FORMULAS[name]
    batch, anchor = anchored((12, 20))
    tokens = shifted(batch, anchor, region)
    options: dict[str, Any] = {"region": region, "surrogate": surrogate, "backend": backend}
    options |= {"anchor_log_prob": anchor, "exact": True, "loss_agg_mode": "token-sum"}
    valid = batch.response_mask.numpy()
    found = batch.loss(**options).per_token, batch.gradient(**options)
    for actual, wanted in zip(found, formula(tokens), strict=True):
        assert_close(actual, np.where(valid, wanted, 0.0), EXACT)
    assert (tokens.beyond & valid).sum() > 5


@pytest.mark.parametrize("region", REGIONS, ids=str)
@pytest.mark.parametrize("surrogate", ["quadratic", SoftGate(2.0, 3.0)], ids=str)
def test_a_smooth_rule_fades_with_the_ratio_to_the_anchor(
    surrogate: Any, region: bandpo.Region, backend: str
) -> None:
    """Its gradient is -A r times the factor that it has where the anchor is the old policy."""
    batch, anchor = anchored((12, 20))
    options: dict[str, Any] = {"region": region, "surrogate": surrogate, "backend": backend}
    options |= {"exact": True, "loss_agg_mode": "token-sum"}
    at_anchor = batch._replace(old_log_prob=anchor)
    shift = (anchor - batch.old_log_prob).exp()  # r / v
    size = (batch.advantages * (batch.log_prob - batch.old_log_prob).exp()).abs().numpy()
    for actual, wanted in (
        (batch.gradient(**options, anchor_log_prob=anchor), at_anchor.gradient(**options)),
        (
            batch.loss(**options, anchor_log_prob=anchor).per_token,
            at_anchor.loss(**options).per_token,
        ),
    ):
        error = (actual - wanted * shift).abs().detach().numpy()
        assert (error <= EXACT * (np.abs(actual.detach().numpy()) + size)).all()


@pytest.mark.parametrize("surrogate", [*BY_NAME, Mask(symmetric=True)], ids=str)
def test_an_anchor_at_the_old_policy_changes_no_bit(surrogate: Any, backend: str) -> None:
    batch = random_batch((30, 40), seed=2)
    options: dict[str, Any] = {"region": KL, "surrogate": surrogate, "backend": backend}
    plain = batch.loss(**options)
    found = batch.loss(**options, anchor_log_prob=batch.old_log_prob)
    assert torch.equal(found.per_token, plain.per_token)
    assert torch.equal(found.loss, plain.loss)
    assert {name: value.item() for name, value in found.metrics.items()} == {
        name: value.item() for name, value in plain.metrics.items()
    }
    anchored_gradient = batch.gradient(**options, anchor_log_prob=batch.old_log_prob)
    assert torch.equal(anchored_gradient, batch.gradient(**options))


def test_a_token_is_dropped_exactly_where_new_leaves_the_region_at_the_anchor(
    backend: str,
) -> None:
    batch, anchor = anchored((100, 1000), seed=4)
    moved = (batch.log_prob - anchor).numpy()
    inside = KL.contains(anchor.numpy(), moved)
    options: dict[str, Any] = {"surrogate": Mask(truncation=None, symmetric=True)}
    options |= {"region": KL, "backend": backend, "anchor_log_prob": anchor}
    gradient = batch.gradient(**options, exact=True, loss_agg_mode="token-sum").numpy()
    kept = batch.response_mask.numpy() & (batch.advantages.numpy() != 0.0)
    assert np.array_equal((gradient != 0.0)[kept], inside[kept])
    assert 0.05 < inside[kept].mean() < 0.95


@pytest.mark.parametrize("level", ["sequence", "sequence-product", "geometric-mean"])
def test_a_ratio_of_a_sequence_is_limited_by_its_ratio_to_the_anchor(
    level: Any, backend: str
) -> None:
    """With one token a sequence, the levels are the token's own."""
    batch, anchor = anchored((200, 1))
    clip = bandpo.Clip(0.1, 0.15)
    options: dict[str, Any] = {"region": clip, "backend": backend, "anchor_log_prob": anchor}
    options["loss_agg_mode"] = "token-sum"
    own = batch.gradient(**options)
    assert_close(batch.gradient(**options, ratio_level=level), own.numpy(), EXACT)
    assert (own == 0.0).sum() > 20


@pytest.mark.parametrize("level", ["sequence", "sequence-product"])
def test_a_whole_sequence_leaves_the_region_by_its_own_ratio_to_the_anchor(
    level: str, backend: str
) -> None:
    """Its log-ratio is the mean or the sum of log_prob - anchor over its tokens."""
    batch, anchor = anchored((200, 6))
    valid = batch.response_mask.numpy()
    log_ratio = np.where(valid, (batch.log_prob - anchor).numpy(), 0.0).sum(axis=1)
    if level == "sequence":
        log_ratio /= np.maximum(valid.sum(axis=1), 1)
    inside = (log_ratio >= math.log(0.7)) & (log_ratio <= math.log(1.5))
    options: dict[str, Any] = {"region": bandpo.Clip(0.3, 0.5), "anchor_log_prob": anchor}
    options |= {"surrogate": Mask(truncation=None, whole_sequence=True), "ratio_level": level}
    gradient = batch.gradient(**options, backend=backend, loss_agg_mode="token-sum").numpy()
    kept = valid & (batch.advantages.numpy() != 0.0)
    wanted = np.broadcast_to(inside[:, None], kept.shape)
    assert np.array_equal((gradient != 0.0)[kept], wanted[kept])
    assert 20 < inside.sum() < 180


def test_a_sequence_leaves_the_region_with_any_of_its_tokens(backend: str) -> None:
    batch, anchor = anchored((40, 6))
    outside = ~KL.contains(anchor.numpy(), (batch.log_prob - anchor).numpy())
    outside &= batch.response_mask.numpy()
    options: dict[str, Any] = {"region": KL, "exact": True, "backend": backend}
    options |= {"surrogate": Mask(truncation=None, whole_sequence=True)}
    gradient = batch.gradient(**options, anchor_log_prob=anchor, loss_agg_mode="token-sum")
    dropped = outside.any(-1, keepdims=True)
    kept = batch.response_mask.numpy() & (batch.advantages.numpy() != 0.0)
    assert np.array_equal(
        (gradient.numpy() != 0.0)[kept], np.broadcast_to(~dropped, kept.shape)[kept]
    )
    assert 0 < dropped.sum() < 40


@pytest.mark.parametrize("level", ["token", "sequence", "geometric-mean"])
@pytest.mark.parametrize("surrogate", ["min-clip", "mask", "weight", "soft-gate"])
def test_a_nan_of_the_anchor_is_seen_where_it_counts_alone(
    level: Any, surrogate: Any, backend: str
) -> None:
    if level == "geometric-mean" and surrogate != "min-clip":
        pytest.skip("goes with min-clip alone")
    batch, anchor = anchored((4, 5))
    batch.response_mask[:] = True
    batch.response_mask[0, 0] = False
    anchor[0, 0] = anchor[1, 1] = math.nan
    options: dict[str, Any] = {"region": bandpo.Clip(0.2), "surrogate": surrogate}
    options |= {"ratio_level": level, "backend": backend, "anchor_log_prob": anchor}
    per_token = batch.loss(**options).per_token
    assert not per_token[0].isnan().any()
    assert bool(per_token[1, 1].isnan())
    rows = per_token[1].isnan()
    assert int(rows.sum()) == (1 if level == "token" else 5)


def test_tables_serve_anchors_in_every_float_and_shape(backend: str) -> None:
    batch, anchor = anchored((16, 24))
    options: dict[str, Any] = {"region": KL, "backend": backend}
    wanted = batch.gradient(**options, anchor_log_prob=anchor, exact=True)
    old, new, advantages = (tensor.float() for tensor in batch[:3])
    single = Batch(old, new, advantages, batch.response_mask)
    found = single.gradient(**options, anchor_log_prob=anchor.float())
    apart = (found - wanted).abs() > 1e-5 * wanted.abs()
    assert apart.sum() <= 2  # tokens next to a bound
    flat = Batch(*(tensor.reshape(-1) for tensor in single))
    packed = flat.gradient(**options, anchor_log_prob=anchor.float().reshape(-1))
    assert_close(packed.reshape(16, 24), found.numpy(), 1e-6)
    third = Batch(old[..., None], new[..., None], advantages, batch.response_mask)
    with_1 = third.gradient(**options, anchor_log_prob=anchor.float()[..., None])
    assert torch.equal(with_1[..., 0], found)


def test_an_anchor_far_from_the_old_policy_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warning, "_COMPARED", set())
    monkeypatch.setattr(warning, "_WARNED", set())
    batch, _ = anchored((4, 6))
    far = batch.old_log_prob - 0.7
    module = PolicyLoss(KL)
    with pytest.warns(MismatchWarning, match=r"anchor_log_prob differ by 0\.70 on av") as caught:
        module(*batch, anchor_log_prob=far)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch.loss(region=KL, anchor_log_prob=far)


def test_no_anchor_but_the_first_is_compared_with_the_old_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warning, "_COMPARED", set())
    monkeypatch.setattr(warning, "_WARNED", set())
    batch, near = anchored((4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch.loss(region=KL, anchor_log_prob=near)
        batch.loss(region=KL, anchor_log_prob=batch.old_log_prob - 0.7)


def test_a_nan_of_the_old_policy_is_seen_where_the_anchor_drops_its_token(backend: str) -> None:
    old, new, anchor = (
        torch.tensor([row]) for row in ([math.nan, -1.0], [-1.2, -1.1], [-0.1, -1.0])
    )
    batch = Batch(old, new, -torch.ones(1, 2), torch.ones(1, 2))
    for surrogate in (Mask(truncation=None), Mask(symmetric=True), "min-clip", "soft-gate"):
        options: dict[str, Any] = {"region": bandpo.Clip(0.2), "surrogate": surrogate}
        found = batch.loss(**options, anchor_log_prob=anchor, backend=backend)
        assert bool(found.loss.isnan()), surrogate


def test_an_anchor_may_lack_the_last_dimension_of_the_old_policy(backend: str) -> None:
    batch, anchor = anchored((4, 6))
    third = batch._replace(old_log_prob=batch.old_log_prob[..., None])
    for level in ("token", "sequence", "geometric-mean"):
        options: dict[str, Any] = {"region": bandpo.Clip(0.1), "ratio_level": level}
        found = third.loss(**options, anchor_log_prob=anchor, backend=backend).loss
        wanted = batch.loss(**options, anchor_log_prob=anchor, backend=backend).loss
        assert torch.equal(found, wanted)


def test_a_module_takes_an_anchor() -> None:
    batch, anchor = anchored((4, 6))
    module = PolicyLoss("kl@0.05")
    found = module(*batch, anchor_log_prob=anchor).loss
    assert torch.equal(found, batch.loss(region="kl@0.05", anchor_log_prob=anchor).loss)


@pytest.mark.parametrize(
    ("anchor", "error", "message"),
    [
        (torch.zeros(4, 7), InvalidValueError, r"anchor_log_prob must have shape \(4, 6\)"),
        ([0.0], InvalidTypeError, "anchor_log_prob must be a torch.Tensor, got list"),
        (torch.zeros(4, 6).int(), InvalidTypeError, "anchor_log_prob must be float32"),
    ],
)
def test_a_bad_anchor_is_refused(anchor: Any, error: type[Exception], message: str) -> None:
    batch, _ = anchored((4, 6))
    with pytest.raises(error, match=message):
        batch.loss(region=KL, anchor_log_prob=anchor)
