"""One region for each sign of the advantage, as data and in the loss."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
from bandpo import Band, Clip, by_sign, sides
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.loss import PolicyLoss
from bandpo.region import BySign, PrefixBudget
from bandpo.schedule import Bapo
from bandpo.surrogate import BY_NAME, Mask, Surrogate
from support.batches import Batch, assert_close, random_batch
from support.formulas import FORMULAS, BoundedTokens, rounded_size

EXACT = 1e-12
"""Relative: both sides are in float64 with bounds of the solver, each off by some 1e-15."""

KL, TV, CLIP = Band("kl", 0.05), Band("tv", 0.1), Clip(0.2, 0.28)
PER_TOKEN = Band("kl", np.linspace(0.01, 0.1, 240).reshape(12, 20))
PAIRS = [(CLIP, Clip(0.4, 0.1)), (KL, TV), (KL, CLIP), (CLIP, PER_TOKEN), (PER_TOKEN, KL.cap(2.0))]


def bounded(batch: Batch, positive: bandpo.Region, negative: bandpo.Region) -> BoundedTokens:
    """The tokens with the bounds of either region, by the sign of the advantage."""
    one, other = BoundedTokens.of(batch, positive), BoundedTokens.of(batch, negative)
    falls = ~(one.advantage > 0.0)
    return one._replace(
        **{
            name: np.where(falls, getattr(other, name), getattr(one, name))
            for name in ("log_lower", "log_upper")
        }
    )


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_each_sign_has_the_bounds_of_its_region(name: str, pair: Any, backend: str) -> None:
    surrogate, formula = FORMULAS[name]
    batch = random_batch((12, 20), dtype=torch.float64)
    batch.advantages[:, ::7] = 0.0
    tokens = bounded(batch, *pair)
    options: dict[str, Any] = {"surrogate": surrogate, "backend": backend, "exact": True}
    options |= {"region": by_sign(positive=pair[0], negative=pair[1])}
    options["loss_agg_mode"] = "token-sum"
    size = EXACT * rounded_size(name, tokens)
    found = batch.loss(**options).per_token, batch.gradient(**options)
    for actual, wanted in zip(found, formula(tokens), strict=True):
        wanted = np.where(tokens.valid, wanted, 0.0)
        error = np.abs(actual.detach().numpy() - wanted)
        assert (error <= EXACT * np.abs(wanted) + size).all()


def test_a_weight_of_the_sign_is_topr(backend: str) -> None:
    """arXiv 2503.14286: 1 for A > 0, the ratio up to 1 for the others, whatever the token."""
    batch = random_batch((12, 20), dtype=torch.float64)
    batch.advantages[0] = 0.0
    ratio = (batch.log_prob - batch.old_log_prob).exp()
    weight = torch.where(batch.advantages > 0.0, 1.0, ratio.clamp(max=1.0))
    region = by_sign(positive=Clip(0.0), negative=Clip(1.0, 0.0))
    options: dict[str, Any] = {"region": region, "surrogate": "weight", "backend": backend}
    wanted = torch.where(batch.response_mask, -batch.advantages * weight, 0.0)
    assert_close(batch.gradient(**options, loss_agg_mode="token-sum"), wanted, EXACT)
    metrics = batch.loss(**options).metrics
    valid = batch.response_mask
    high = (ratio > 1.0) & valid
    low = (ratio < 1.0) & (batch.advantages > 0.0) & valid
    assert_close(metrics["clip_fraction_high"], (high.sum() / valid.sum()).item(), 1e-6)
    assert_close(metrics["clip_fraction_low"], (low.sum() / valid.sum()).item(), 1e-6)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize(
    "surrogate", ["min-clip", "mask", "gradient-preserving", Mask(truncation=None)], ids=str
)
def test_sides_say_the_same_where_a_sign_has_one_bound(
    surrogate: Surrogate, pair: Any, backend: str
) -> None:
    batch = random_batch((12, 20), dtype=torch.float64)
    options: dict[str, Any] = {"surrogate": surrogate, "backend": backend, "exact": True}
    signed = by_sign(positive=pair[0], negative=pair[1])
    of_sides = sides(lower=pair[1], upper=pair[0])
    one, other = (batch.loss(region=region, **options) for region in (signed, of_sides))
    torch.testing.assert_close(one.per_token, other.per_token, rtol=EXACT, atol=0.0)
    gradients = (batch.gradient(region=region, **options) for region in (signed, of_sides))
    torch.testing.assert_close(*gradients, rtol=EXACT, atol=0.0)
    assert one.metrics.keys() == other.metrics.keys()
    for metric, value in one.metrics.items():
        np.testing.assert_allclose(value, other.metrics[metric], rtol=1e-9, err_msg=metric)
    assert one.metrics["clip_fraction_low"] > 0.0
    assert one.metrics["clip_fraction_high"] > 0.0


@pytest.mark.parametrize("surrogate", [*BY_NAME, Mask(symmetric=True), Mask(whole_sequence=True)])
@pytest.mark.parametrize("region", [KL, CLIP, PER_TOKEN], ids=str)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
def test_the_same_region_twice_is_that_region(
    surrogate: Any, region: bandpo.Region, exact: bool, anchored: bool, backend: str
) -> None:
    """By tables, constants and the solver alike; a table gives either the same bits."""
    batch = random_batch((12, 20), seed=1)
    options: dict[str, Any] = {"surrogate": surrogate, "backend": backend, "exact": exact}
    if anchored:
        options["anchor_log_prob"] = (batch.old_log_prob + 0.1).clamp(max=0.0)
    signed = by_sign(positive=region, negative=region)
    one = batch.loss(region=region, **options)
    twice = batch.loss(region=signed, **options)
    # A log bound is the logarithm of a table's ratio, and in float32 its exponential is rounded.
    torch.testing.assert_close(twice.per_token, one.per_token, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        batch.gradient(region=signed, **options),
        batch.gradient(region=region, **options),
        rtol=1e-6,
        atol=1e-8,
    )


@pytest.mark.parametrize("level", ["sequence", "sequence-product", "geometric-mean"])
def test_a_sequence_has_the_bounds_of_its_sign(level: Any, backend: str) -> None:
    batch = random_batch((40, 6), dtype=torch.float64)
    batch = batch._replace(advantages=batch.advantages[:, :1])
    regions = Clip(0.02, 0.05), Clip(0.1, 0.01)
    options: dict[str, Any] = {"ratio_level": level, "backend": backend}
    options["loss_agg_mode"] = "token-sum"
    signed = by_sign(positive=regions[0], negative=regions[1])
    found = batch.gradient(region=signed, **options)
    positive, negative = (batch.gradient(region=region, **options) for region in regions)
    wanted = torch.where(batch.advantages > 0.0, positive, negative)
    torch.testing.assert_close(found, wanted, rtol=EXACT, atol=0.0)
    assert not torch.equal(found, positive)
    assert not torch.equal(found, negative)


def test_advantages_of_a_sequence_and_shapes_give_the_same_loss(backend: str) -> None:
    batch = random_batch((12, 20), dtype=torch.float64)
    rows = batch._replace(advantages=batch.advantages[:, 0])
    each = batch._replace(advantages=batch.advantages[:, :1].expand(12, 20).contiguous())
    region = by_sign(positive=KL, negative=CLIP)
    for surrogate in ("weight", "mask"):
        options: dict[str, Any] = {"region": region, "surrogate": surrogate, "backend": backend}
        wanted = each.gradient(**options)
        assert torch.equal(rows.gradient(**options), wanted)
        flat = Batch(*(tensor.reshape(-1) for tensor in each))
        assert torch.equal(flat.gradient(**options).reshape(12, 20), wanted)
        old, new = each.old_log_prob[..., None], each.log_prob[..., None]
        third = each._replace(old_log_prob=old, log_prob=new)
        assert torch.equal(third.gradient(**options)[..., 0], wanted)


def test_masked_nan_has_no_effect_and_another_stays(backend: str) -> None:
    batch = random_batch((4, 5), dtype=torch.float64)
    batch.response_mask[0, 0], batch.response_mask[1, 1] = False, True
    for column in batch[:3]:
        column[0, 0] = math.nan
    batch.log_prob[1, 1] = math.nan
    region = by_sign(positive=KL, negative=CLIP)
    for surrogate in BY_NAME:
        per_token = batch.loss(region=region, surrogate=surrogate, backend=backend).per_token
        assert per_token.isnan().nonzero().tolist() == [[1, 1]]


def test_a_preset_and_a_module_hold_one() -> None:
    region = by_sign(positive=CLIP, negative=KL)
    assert isinstance(region, BySign)
    assert region == by_sign(positive=CLIP, negative=KL)
    assert pickle.loads(pickle.dumps(region)) == region  # noqa: S301
    module = PolicyLoss(region, surrogate="weight")
    batch = random_batch((3, 4))
    wanted = batch.loss(region=region, surrogate="weight").loss
    assert torch.equal(module(*batch).loss, wanted)
    assert "BySign(positive=Clip(0.2, 0.28), negative=Band('kl', 0.05))" in repr(module)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_region_for_each_sign_compiles_without_a_graph_break(backend: Any) -> None:
    batch = random_batch((4, 8))
    region = by_sign(positive=CLIP, negative=KL)

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"region": region, "surrogate": "weight", "backend": backend}
        return batch._replace(log_prob=log_prob).loss(**options).loss

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = batch.log_prob.requires_grad_()
    wanted, found = (torch.autograd.grad(f(leaf), leaf)[0] for f in (loss, compiled))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("other", [0.2, "ppo", None, Bapo(), PrefixBudget()], ids=str)
def test_what_is_no_region_is_refused(other: Any) -> None:
    with pytest.raises(InvalidTypeError, match="negative must be a Region, got"):
        by_sign(positive=CLIP, negative=other)
    with pytest.raises(InvalidTypeError, match="positive must be a Region, got"):
        by_sign(positive=other, negative=CLIP)
    nested: Any = by_sign(positive=CLIP, negative=CLIP)
    with pytest.raises(InvalidTypeError, match="positive must be a Region, got BySign"):
        by_sign(positive=nested, negative=CLIP)
    with pytest.raises(TypeError):
        by_sign(CLIP, CLIP)  # type: ignore[call-arg]


def test_a_band_for_one_sign_has_no_ratio_of_a_sequence() -> None:
    signed = by_sign(positive=CLIP, negative=KL)
    with pytest.raises(InvalidValueError, match="region must be a Clip with ratio_level 'seq"):
        random_batch((2, 3)).loss(region=signed, ratio_level="sequence")


def test_a_pair_is_no_region_for_each_sign() -> None:
    pair: Any = (CLIP, CLIP)
    with pytest.raises(InvalidTypeError, match=r"region must be .*, got tuple"):
        random_batch((2, 3)).loss(region=pair)
