"""The penalty on the squared log-ratio: its value and gradient beside those of the surrogate."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
from bandpo.check import BoolArray, Float64Array
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.loss import GlobalBatch, PolicyLoss, policy_loss
from bandpo.rule import AggregationMode
from bandpo.surrogate import BY_NAME, Mask
from support.batches import Batch, assert_close, assert_compiled_gradient_is_eager, random_batch

CLIP = bandpo.Clip(0.2)
MODES: tuple[AggregationMode, ...] = get_args(AggregationMode)

EXACT = 1e-12
"""Relative: sums of some hundred tokens in float64."""

SUMMED = 1e-14
"""Absolute, beside a loss of about 1, of which the penalty is what is left."""


def penalties(batch: Batch, coefficient: float) -> tuple[Float64Array, Float64Array]:
    """``c (ln r)^2`` and ``2 c ln r`` of the tokens that count; beyond the clamp it is constant."""
    old, new, _, valid = (tensor.double().numpy() for tensor in batch)
    log_ratio = np.where(valid != 0, new - old, 0.0)
    clamped = np.clip(log_ratio, -20.0, 20.0)
    slope = np.where(np.abs(log_ratio) > 20.0, 0.0, 2.0 * coefficient * log_ratio)
    return coefficient * clamped**2, slope


def aggregated(values: Float64Array, valid: BoolArray, mode: str, scale: float) -> Float64Array:
    """What each token adds to the loss."""
    lengths = valid.sum(-1, keepdims=True)
    sequences = (lengths > 0).sum()
    divisor = {
        "token-mean": valid.sum(),
        "token-sum": 1.0,
        "seq-mean-token-sum": sequences,
        "seq-mean-token-mean": sequences * np.maximum(lengths, 1),
        "seq-mean-token-sum-norm": sequences * scale,
        "none": 1.0,
    }[mode]
    return np.asarray(values / divisor)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("surrogate", [*BY_NAME, Mask(symmetric=True), Mask(whole_sequence=True)])
def test_it_adds_to_value_and_gradient_in_every_mode(
    mode: Any, surrogate: Any, backend: str
) -> None:
    batch = random_batch((7, 9), dtype=torch.float64)
    batch.response_mask[2] = False
    options: dict[str, Any] = {"region": CLIP, "surrogate": surrogate, "backend": backend}
    options["loss_agg_mode"] = mode
    valid = batch.response_mask.numpy()
    value, slope = (aggregated(part, valid, mode, 9.0) for part in penalties(batch, 0.7))
    plain = batch.loss(**options)
    found = batch.loss(**options, log_ratio_penalty=0.7)
    if mode == "none":
        wanted = plain.loss.detach().numpy() + value
        assert_close(found.loss, wanted, EXACT, SUMMED)
        return
    assert_close(found.loss, plain.loss.item() + value.sum(), EXACT, SUMMED)
    with_penalty = batch.gradient(**options, log_ratio_penalty=0.7)
    assert_close(with_penalty, batch.gradient(**options).numpy() + slope, EXACT, SUMMED)
    of_tokens, _ = penalties(batch, 0.7)
    assert_close(found.per_token, plain.per_token.detach().numpy() + of_tokens, EXACT, SUMMED)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence-product", "geometric-mean"])
def test_it_is_of_each_tokens_own_ratio_at_every_level(mode: Any, level: Any, backend: str) -> None:
    """Also packed, of which the padded batch has the same sequences."""
    batch = random_batch((5, 6), dtype=torch.float64)
    lengths = torch.tensor([6, 0, 2, 5, 6])
    inside = torch.arange(6) < lengths[:, None]
    batch.response_mask[~inside] = False
    options: dict[str, Any] = {"region": CLIP, "ratio_level": level, "backend": backend}
    options |= {"loss_agg_mode": mode, "loss_scale_factor": 3.0}
    _, slope = penalties(batch, 0.3)
    slope = aggregated(slope, batch.response_mask.numpy(), mode, 3.0)
    found = batch.gradient(**options, log_ratio_penalty=0.3)
    assert_close(found, batch.gradient(**options).numpy() + slope, EXACT, SUMMED)
    flat = Batch(*(tensor[inside] for tensor in batch))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    packed = flat.gradient(**options, log_ratio_penalty=0.3, cu_seqlens=offsets)
    assert_close(packed, found[inside].numpy(), EXACT, SUMMED)


def test_dropped_tokens_have_it_and_weights_and_advantages_leave_it_alone(backend: str) -> None:
    """prime-rl: on all trainable tokens, and not part of what the weights multiply."""
    batch = random_batch((6, 20), dtype=torch.float64)
    old, new = batch.old_log_prob, batch.log_prob
    region = bandpo.Band("tv", 1e-9)  # which drops every token that has moved
    options: dict[str, Any] = {"region": region, "surrogate": Mask(symmetric=True), "exact": True}
    options |= {"backend": backend, "loss_agg_mode": "token-sum", "log_ratio_penalty": 1e-3}
    _, slope = penalties(batch, 1e-3)
    assert_close(batch.gradient(**options), slope, EXACT)
    weights = torch.full_like(old, 0.5)
    weights[0] = 0.0
    assert_close(batch.gradient(**options, rollout_is_weights=weights), slope, EXACT)
    unpaid = batch._replace(advantages=torch.zeros_like(old))
    options["region"] = CLIP
    assert_close(unpaid.gradient(**options), slope, EXACT)
    assert np.count_nonzero(slope) == int((batch.response_mask & (old != new)).sum())


def test_an_anchor_leaves_it_at_the_old_policy(backend: str) -> None:
    batch = random_batch((6, 20), dtype=torch.float64)
    unpaid = batch._replace(advantages=torch.zeros_like(batch.advantages))
    options: dict[str, Any] = {"region": CLIP, "log_ratio_penalty": 1.0, "backend": backend}
    options |= {"loss_agg_mode": "token-sum", "anchor_log_prob": batch.old_log_prob - 0.4}
    assert_close(unpaid.gradient(**options), penalties(batch, 1.0)[1], EXACT)


def test_beyond_the_clamp_it_is_constant(backend: str) -> None:
    old = torch.tensor([[-50.0, -1.0, -30.0, -1.0]], dtype=torch.float64)
    new = torch.tensor([[-1.0, -50.0, -1e-300, -math.inf]], dtype=torch.float64)
    batch = Batch(old, new, torch.zeros(1, 1), torch.ones(1, 4))
    options: dict[str, Any] = {"region": CLIP, "log_ratio_penalty": 0.1, "backend": backend}
    options["surrogate"] = "min-clip"
    found = batch.loss(**options, loss_agg_mode="none").loss
    assert_close(found, np.full((1, 4), 40.0), EXACT)
    assert not batch.gradient(**options, loss_agg_mode="token-sum").any()
    at_limit = torch.tensor([[-1.0, -21.0]], dtype=torch.float64)  # which is not beyond it
    batch = Batch(at_limit, at_limit.flip(-1), torch.zeros(1, 1), torch.ones(1, 2))
    gradient = batch.gradient(**options, loss_agg_mode="token-sum")
    assert_close(gradient, [[-4.0, 4.0]], EXACT)


def test_masked_tokens_have_none_even_with_nan_and_a_nan_that_counts_stays(backend: str) -> None:
    batch = random_batch((4, 6), dtype=torch.float64)
    batch.response_mask[:] = True
    for place, value in ((0, math.nan), (1, math.inf), (2, -math.inf)):
        batch.response_mask[0, place] = False
        batch.log_prob[0, place] = batch.old_log_prob[0, place] = value
    options: dict[str, Any] = {"region": CLIP, "log_ratio_penalty": 0.1, "backend": backend}
    result, gradient = batch.loss(**options), batch.gradient(**options)
    assert bool(torch.isfinite(result.loss))
    assert not result.per_token[0, :3].any()
    assert not gradient[0, :3].any()
    assert torch.isfinite(gradient).all()
    assert bool(torch.isfinite(result.metrics["log_ratio_penalty"]))
    batch.log_prob[2, 2] = math.nan
    result = batch.loss(**options)
    assert result.per_token.isnan().nonzero().tolist() == [[2, 2]]
    assert bool(result.loss.isnan())


def test_its_metric_is_the_mean_over_the_tokens(backend: str) -> None:
    batch = random_batch((7, 9))
    value, _ = penalties(batch, 0.2)
    count = int(batch.response_mask.sum())
    for mode in MODES:
        metrics = batch.loss(
            region=CLIP, log_ratio_penalty=0.2, backend=backend, loss_agg_mode=mode
        ).metrics
        metric = metrics["log_ratio_penalty"]
        assert_close(metric, value.sum() / count, 1e-5)
        assert metric.dtype == torch.float32
        assert not metric.requires_grad
    assert "log_ratio_penalty" not in batch.loss(region=CLIP, backend=backend).metrics


def test_no_tokens_have_no_penalty(backend: str) -> None:
    for batch in (
        random_batch((0, 3)),
        random_batch((2, 3))._replace(response_mask=torch.zeros(2, 3)),
    ):
        result = batch.loss(region=CLIP, log_ratio_penalty=0.2, backend=backend)
        assert result.loss.item() == 0.0
        assert result.metrics["log_ratio_penalty"].item() == 0.0
        assert not batch.gradient(region=CLIP, log_ratio_penalty=0.2, backend=backend).any()


def test_micro_batches_and_ranks_add_up(backend: str) -> None:
    batch = random_batch((8, 5), dtype=torch.float64)
    options: dict[str, Any] = {"region": CLIP, "log_ratio_penalty": 0.4, "backend": backend}
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        whole = batch.loss(**options, loss_agg_mode=mode).loss.item()
        counted = GlobalBatch(
            tokens=int(batch.response_mask.sum()),
            sequences=int(batch.response_mask.any(-1).sum()),
            dp_size=2,
        )
        parts = [Batch(*(tensor[rows] for tensor in batch)) for rows in (slice(0, 3), slice(3, 8))]
        losses = [
            part.loss(**options, loss_agg_mode=mode, global_batch=counted).loss.item()
            for part in parts
        ]
        assert math.isclose(sum(losses) / 2.0, whole, rel_tol=EXACT, abs_tol=SUMMED)


def test_half_precision_is_computed_in_float32(backend: str) -> None:
    batch = random_batch((7, 9))
    for dtype in (torch.bfloat16, torch.float16):
        narrow = batch._replace(
            old_log_prob=batch.old_log_prob.to(dtype), log_prob=batch.log_prob.to(dtype)
        )
        value, _ = penalties(narrow, 0.2)
        options: dict[str, Any] = {"region": CLIP, "backend": backend, "loss_agg_mode": "token-sum"}
        unpaid = narrow._replace(advantages=torch.zeros(7, 1))
        assert_close(unpaid.loss(**options, log_ratio_penalty=0.2).loss, value.sum(), 1e-5)


def test_a_module_adds_the_same_and_shows_it() -> None:
    batch = random_batch((3, 4))
    module = PolicyLoss(CLIP, log_ratio_penalty=0.25)
    wanted = batch.loss(region=CLIP, log_ratio_penalty=0.25).loss
    assert torch.equal(module(*batch).loss, wanted)
    assert "log_ratio_penalty=0.25" in repr(module)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_it_compiles_without_a_graph_break(backend: Any) -> None:
    batch = random_batch((4, 8))

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        return policy_loss(
            batch.old_log_prob, log_prob, *batch[2:], region=CLIP, log_ratio_penalty=0.1,
            backend=backend,
        ).loss  # fmt: skip

    assert_compiled_gradient_is_eager(loss, batch.log_prob)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1e-3, InvalidValueError, "log_ratio_penalty must be finite and at least 0, got -0.001"),
        (math.inf, InvalidValueError, "log_ratio_penalty must be finite and at least 0, got inf"),
        (math.nan, InvalidValueError, "log_ratio_penalty must be finite and at least 0, got nan"),
        (True, InvalidTypeError, "log_ratio_penalty must be a real number, got bool"),
        ("0.1", InvalidTypeError, "log_ratio_penalty must be a real number, got str"),
    ],
)
def test_a_bad_coefficient_is_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        random_batch((2, 3)).loss(region=CLIP, log_ratio_penalty=value)
    with pytest.raises(error, match=message):
        PolicyLoss(CLIP, log_ratio_penalty=value)
