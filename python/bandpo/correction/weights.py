"""Weights of a batch by a `Correction`, in plain torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

# First, because it reports a torch that is missing or broken.
from bandpo.tensors.check import check_float, check_tensor, compute_dtype

# isort: split
import torch

from bandpo.backends.contract import PROBABILITY_BINS
from bandpo.backends.internals import needs_no_dispatcher
from bandpo.backends.plain import probability_bin
from bandpo.backends.sides import sides_from
from bandpo.correction.rule import MISMATCH_LIMIT, Correction, RolloutCorrection
from bandpo.error import InvalidTypeError, InvalidValueError, MismatchWarning
from bandpo.loss.check import check_cu_seqlens
from bandpo.loss.result import Metrics
from bandpo.loss.tokens import Sequences, shaped, shaped_by_row
from bandpo.surrogate import LOG_RATIO_LIMIT
from bandpo.tensors.bounds import bounds_of, membership_of
from bandpo.tensors.divergence import bernoulli_divergence, k3


def apply(
    rule: Correction,
    old_log_prob: torch.Tensor,
    rollout_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    advantages: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> RolloutCorrection:
    """Returns the weights; `bandpo.correction.rollout_correction` describes the arguments."""
    shape = _check_batch(rule, old_log_prob, rollout_log_prob, response_mask, advantages)
    _check_sequences(rule, old_log_prob, cu_seqlens)
    dtype = compute_dtype(old_log_prob, rollout_log_prob)
    valid = shaped(response_mask, shape) != 0  # a copy, because metrics are computed later
    old, rollout = (
        torch.where(valid, shaped(tensor.detach().to(dtype), shape), 0.0)
        for tensor in (old_log_prob, rollout_log_prob)
    )
    batch = _Batch(old, rollout, old - rollout, valid, cu_seqlens, old_log_prob.shape)
    found = _of_tokens(rule, batch) if rule.level == "token" else _of_sequences(rule, batch)

    unknown = found.value.isnan()
    # A region has no NaN in it, but a NaN must be seen, not dropped.
    outside = valid & ~found.inside & ~unknown
    dropped = torch.zeros_like(outside) if rule.action == "truncate" else outside
    if rule.drops != "all":
        assert advantages is not None  # noqa: S101 -- for type checkers
        signed = shaped_by_row(advantages.detach().to(dtype), shape)
        eligible, unclear = _eligible(rule, batch, signed)
        dropped, unknown = dropped & eligible, unknown | unclear
    dropped = dropped & ~unknown
    weight = found.log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    weight = torch.where(unknown, math.nan, weight)
    kept = valid & ~dropped
    weight = torch.where(kept, weight, 0.0)

    _warn_of_mismatch(batch)

    def metrics() -> dict[str, torch.Tensor]:
        return _metrics(batch, weight, kept, outside)

    # A compiler computes them in one kernel; otherwise most callers read few of them.
    found_metrics = metrics() if torch.compiler.is_compiling() else Metrics(metrics)
    given = old_log_prob.shape
    return RolloutCorrection(shaped(weight, given), shaped(kept, given), found_metrics)


class _Batch(NamedTuple):
    """The tokens; masked ones have log-prob 0 under both policies."""

    old: torch.Tensor  # [B, T], packed tokens as one row
    rollout: torch.Tensor
    log_ratio: torch.Tensor  # ln B, unclamped
    valid: torch.Tensor  # bool
    cu_seqlens: torch.Tensor | None
    given: torch.Size  # the shape of the user's tensors

    def sequences(self) -> Sequences:
        return Sequences.of(self.valid, self.cu_seqlens)


class _Found(NamedTuple):
    """The decision of a rule, each [B, T] or broadcasting with it."""

    value: torch.Tensor  # the ratio's logarithm or the statistic; NaN where it is unknown
    inside: torch.Tensor
    log_weight: torch.Tensor


def _of_tokens(rule: Correction, batch: _Batch) -> _Found:
    x = batch.log_ratio
    own = torch.zeros_like(x) if rule.action == "mask-only" else x
    if rule.region is None:
        value = _statistic(rule, batch)
        return _Found(value, _at_most(value, rule), own)
    # An array of deltas has to match the user's shape.
    rollout, valid = batch.rollout.reshape(batch.given), batch.valid.reshape(batch.given)
    if rule.action == "truncate":
        bounds = bounds_of(rule.region, rollout, valid=valid)
    else:
        bounds = membership_of(rule.region, rollout, lambda: x.reshape(batch.given), valid)
    lower, upper = (side.reshape(x.shape) for side in sides_from(bounds, rollout))
    if rule.action == "truncate":
        own = torch.minimum(torch.maximum(own, lower), upper)
    return _Found(x, (lower <= x) & (x <= upper), own)


def _of_sequences(rule: Correction, batch: _Batch) -> _Found:
    x, sequences = batch.log_ratio, batch.sequences()
    lengths = sequences.lengths.clamp(min=1)
    own = torch.zeros_like(x) if rule.action == "mask-only" else x
    if rule.region is None:
        tokens = torch.where(batch.valid, _statistic(rule, batch), 0.0)
        if rule.level == "sequence-max":
            value = _max_of(tokens, batch, sequences)
        else:
            value = sequences.sum(tokens)
            value = value / lengths if rule.level == "sequence-mean" else value
        value = sequences.spread(value)
        return _Found(value, _at_most(value, rule), own)
    value = sequences.sum(x)
    if rule.level == "geometric-mean":
        value = value / lengths
    value = sequences.spread(value)
    lower, upper = bounds_of(rule.region, batch.rollout).unbind()  # of a Clip: two constants
    inside = (lower <= value) & (value <= upper)
    if rule.action == "truncate":
        own = torch.minimum(torch.maximum(value, lower), upper).expand(x.shape)
    elif rule.action == "mask" and rule.level == "sequence-product":
        own = value.expand(x.shape)
    return _Found(value, inside, own)


def _statistic(rule: Correction, batch: _Batch) -> torch.Tensor:
    """The statistic of each token, [B, T]."""
    name, x = rule.statistic, batch.log_ratio
    if name == "k1":
        return -x
    if name == "k2":
        return x.square() / 2.0
    if name == "k3":
        return k3(x)
    if name == "ratio-distance":
        return x.expm1().abs()
    divergence = str(name).removeprefix("bernoulli-")
    value = bernoulli_divergence(divergence, batch.rollout, batch.old)
    # Both may be -inf, for which a divergence has a limit but a ratio has none.
    return torch.where(x.isnan(), x, value)


def _at_most(value: torch.Tensor, rule: Correction) -> torch.Tensor:
    assert rule.threshold is not None  # noqa: S101 -- for type checkers
    return value <= rule.threshold


def _max_of(tokens: torch.Tensor, batch: _Batch, sequences: Sequences) -> torch.Tensor:
    """The max of each sequence, [S]; that of a sequence without tokens is -inf."""
    tokens = torch.where(batch.valid, tokens, -math.inf)
    if sequences.of_token is None:
        if tokens.shape[-1] == 0:
            return tokens.new_full(tokens.shape[:1], -math.inf)
        return tokens.amax(-1)
    start = tokens.new_full(sequences.lengths.shape, -math.inf)
    found = start.scatter_reduce(0, sequences.of_token, tokens[0], "amax")
    # Devices differ in what the max of a NaN is.
    unknown = sequences.sum(tokens.isnan().to(tokens.dtype)) > 0
    return torch.where(unknown, math.nan, found)


def _eligible(
    rule: Correction, batch: _Batch, advantages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that may be dropped, and those of which it is not known."""
    x = batch.log_ratio
    advantages = torch.where(batch.valid, advantages.expand(x.shape), 0.0)
    sequences = None if rule.level == "token" else batch.sequences()
    unclear = advantages.isnan()
    if rule.drops == "outward":
        if sequences is not None:
            unclear = sequences.spread(sequences.sum(unclear.to(torch.int64))) > 0
        return (x * advantages.sign()) > 0.0, unclear
    if sequences is not None:
        # A mean has the sign of its sum.
        advantages = sequences.spread(sequences.sum(advantages))
        unclear = advantages.isnan()
    return advantages < 0.0, unclear


def _metrics(
    batch: _Batch, weight: torch.Tensor, kept: torch.Tensor, outside: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The metrics by name, 0-dim or [bins]; `rollout_correction` defines them."""
    valid = batch.valid
    count = valid.sum()
    some, dtype = count.clamp(min=1), weight.dtype
    total, squares = weight.sum(), weight.square().sum()
    share = torch.where(squares == 0.0, 0.0, total.square() / (some * squares))

    def unless_empty(value: torch.Tensor) -> torch.Tensor:
        return torch.where(count > 0, value, 1.0).to(dtype)

    index = probability_bin(batch.rollout)
    bins = [valid & (index == k) for k in range(PROBABILITY_BINS)]
    by_bin = torch.stack([one.sum() for one in bins])
    kept_by_bin = torch.stack([(kept & one).sum() for one in bins])
    clamped = batch.log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    quantile = _quantiles(weight, valid, some)
    return {
        "kept_fraction": unless_empty(kept.sum().to(dtype) / some),
        "outside_fraction": outside.sum().to(dtype) / some,
        "effective_sample_size": unless_empty(share),
        "weight_mean": unless_empty(total / some),
        "weight_max": unless_empty(quantile(100)),
        "weight_p01": unless_empty(quantile(1)),
        "weight_p50": unless_empty(quantile(50)),
        "weight_p99": unless_empty(quantile(99)),
        "log_ratio_abs": clamped.abs().sum() / some,
        "valid_tokens": count,
        "tokens_by_probability": by_bin,
        "kept_fraction_by_probability": torch.where(
            by_bin > 0, kept_by_bin.to(dtype) / by_bin.clamp(min=1), 1.0
        ).to(dtype),
    }


def _quantiles(
    weight: torch.Tensor, valid: torch.Tensor, count: torch.Tensor
) -> Callable[[int], torch.Tensor]:
    """A function from a percentage to the quantile of the weights of the tokens that count.

    A selection of them would have a length that the host has to wait for; so the others are sorted
    to the end. A NaN makes every quantile NaN.
    """
    if weight.numel() == 0:
        return lambda percent: weight.sum()
    unknown = torch.where(valid, weight, 0.0).isnan().any()
    ordered = torch.where(valid, weight, math.inf).reshape(-1).sort().values

    def quantile(percent: int) -> torch.Tensor:
        # In whole numbers, because not every device has float64 for a large count.
        hundredths = (count - 1) * percent
        low = hundredths // 100
        high = torch.minimum(low + 1, count - 1)
        # Not by indexing, because the host would read the index.
        below, above = ordered.index_select(0, torch.stack([low, high])).unbind()
        found = below + (hundredths % 100).to(weight.dtype) / 100.0 * (above - below)
        return torch.where(unknown, math.nan, found)

    return quantile


def _warn_of_mismatch(batch: _Batch) -> None:
    x = batch.log_ratio
    if not needs_no_dispatcher(x) or x.numel() == 0:
        return
    count = int(batch.valid.sum())
    mean = float(x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).abs().sum()) / max(count, 1)
    if mean > MISMATCH_LIMIT:
        _warn_once(round(mean, 2))


_WARNED: list[float] = []


def _warn_once(mean: float) -> None:
    if _WARNED:
        return
    _WARNED.append(mean)
    warnings.warn(
        f"old_log_prob and rollout_log_prob differ by {mean} on average, above {MISMATCH_LIMIT}: "
        f"check that both are of the same tokens, shifted alike, and of the same temperature",
        MismatchWarning,
        stacklevel=5,
    )


def _check_batch(
    rule: Correction,
    old_log_prob: torch.Tensor,
    rollout_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    advantages: torch.Tensor | None,
) -> tuple[int, int]:
    """Returns the shape of the tokens, [B, T]; packed tokens are one row."""
    if rollout_log_prob is None:
        raise InvalidTypeError(
            "rollout_log_prob must be a torch.Tensor, got None: the log-probabilities that the "
            "rollout engine returned with the tokens (vLLM and SGLang: an option of the request)"
        )
    check_float("old_log_prob", old_log_prob)
    check_float("rollout_log_prob", rollout_log_prob)
    check_tensor("response_mask", response_mask)
    if response_mask.is_complex():
        raise InvalidTypeError(
            f"response_mask must be bool, int or float, got {response_mask.dtype}"
        )
    shape = _without_last_1(old_log_prob)
    if not 1 <= len(shape) <= 2:
        raise InvalidValueError(
            f"old_log_prob must have shape [B, T], [B, T, 1] or, packed, [N], "
            f"got {tuple(old_log_prob.shape)}"
        )
    if advantages is None and rule.drops != "all":
        raise InvalidValueError(
            f"advantages must be given with drops {rule.drops!r}, one a token or one a sequence"
        )
    others = [
        ("rollout_log_prob", rollout_log_prob, [shape]),
        ("response_mask", response_mask, [shape]),
    ]
    if advantages is not None:
        check_float("advantages", advantages)
        per_row = [(shape[0], 1), shape[:1]] if len(shape) == 2 else []
        others.append(("advantages", advantages, [shape, *per_row]))
    for argument, tensor, shapes in others:
        if _without_last_1(tensor) not in shapes:
            raise InvalidValueError(
                f"{argument} must have shape {' or '.join(map(str, shapes))} "
                f"like old_log_prob's {tuple(old_log_prob.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != old_log_prob.device:
            raise InvalidValueError(
                f"{argument} must be on old_log_prob's device {old_log_prob.device}, "
                f"got {tensor.device}"
            )
    rows, width = shape if len(shape) == 2 else (1, shape[0])
    return rows, width


def _check_sequences(
    rule: Correction, old_log_prob: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> None:
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, old_log_prob)
    elif old_log_prob.ndim == 1 and rule.level != "token":
        raise InvalidValueError(
            f"cu_seqlens must be given for level {rule.level!r} with packed tensors: "
            f"offsets of the sequences, int32 or int64 [S + 1]"
        )


def _without_last_1(tensor: torch.Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape
