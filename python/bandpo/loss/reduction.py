"""How the losses of tokens become one number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

from bandpo.backends.contract import (
    TokenLosses,
)
from bandpo.check import check_name, real_number
from bandpo.error import InvalidValueError
from bandpo.loss.tokens import Tokens, check_cu_seqlens
from bandpo.rule import (
    AGGREGATION_MODES,
    AggregationMode,
    Rule,
)

Count: TypeAlias = "float | torch.Tensor"


class Reduction(NamedTuple):
    """A mode, and the counts of the global batch where they are given."""

    mode: AggregationMode
    dp_size: int
    batch_num_tokens: Count | None
    global_batch_size: Count | None
    loss_scale_factor: float | None


def aggregate(losses: TokenLosses, batch: Tokens, reduction: Reduction) -> torch.Tensor:
    """Every mode is a sum over tokens, 0 where masked, with one weight for each sequence."""
    per_token, total, totals = losses
    if reduction.mode == "seq-mean-token-mean":
        of_batch = batch.sequences()
        total = (per_token / of_batch.spread(of_batch.lengths).clamp(min=1)).sum()
    total = total if reduction.dp_size == 1 else total * reduction.dp_size
    loss = total / divisor_of(lambda: totals().valid, batch, reduction)
    return loss.to(total.dtype)  # a count in float64 has no say in it


def divisor_of(valid_tokens: Callable[[], Count], batch: Tokens, reduction: Reduction) -> Count:
    """What the sum is divided by, before ranks are taken into account."""
    mode, _, tokens, sequences, scale = reduction
    if mode == "token-sum":
        return 1
    if mode == "token-mean":
        return _at_least_one(valid_tokens() if tokens is None else tokens)
    if sequences is None:
        sequences = (batch.sequences().lengths > 0).sum()
    divisor = _at_least_one(sequences)
    if mode == "seq-mean-token-sum-norm":
        divisor = divisor * (max(batch.valid.shape[1], 1) if scale is None else scale)
    return divisor


def _at_least_one(count: Count) -> Count:
    """A batch without any token has a loss of 0, not 0/0."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


def check_reduction(reduction: Reduction) -> None:
    """Raises InvalidTypeError or InvalidValueError unless each field is what it may be."""
    mode, dp_size, tokens, sequences, scale = reduction
    check_name("loss_agg_mode", mode, AGGREGATION_MODES)
    real_number("dp_size", dp_size)
    if not 1 <= dp_size < math.inf or dp_size != int(dp_size):
        raise InvalidValueError(f"dp_size must be a whole number above 0, got {dp_size}")
    if scale is not None:
        real_number("loss_scale_factor", scale)
        if not 0.0 < scale < math.inf:
            raise InvalidValueError(f"loss_scale_factor must be finite and above 0, got {scale}")
    for argument, count in (("batch_num_tokens", tokens), ("global_batch_size", sequences)):
        if isinstance(count, torch.Tensor):
            if count.ndim > 0:
                raise InvalidValueError(
                    f"{argument} must be a number or a 0-dim tensor, got shape {tuple(count.shape)}"
                )
        elif count is not None:
            real_number(argument, count)
            if not 0 <= count < math.inf:
                raise InvalidValueError(f"{argument} must be finite and at least 0, got {count}")


def check_sequences(
    rule: Rule,
    reduction: Reduction,
    cu_seqlens: torch.Tensor | None,
    log_prob: torch.Tensor,
) -> None:
    """What the mode needs to know of sequences and of the global batch must be there."""
    mode, dp_size, tokens, sequences, scale = reduction
    packed = log_prob.ndim == 1
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, log_prob)
    if packed and cu_seqlens is None:
        for needs, what in (
            (rule.ratio_level != "token", f"ratio_level {rule.ratio_level!r}"),
            (rule.surrogate.whole_sequence, "a mask of whole sequences"),
        ):
            if needs:
                raise InvalidValueError(
                    f"cu_seqlens must be given for {what} with packed tensors: "
                    f"offsets of the sequences, int32 or int64 [S + 1]"
                )
    if mode == "token-sum":
        return
    argument, count = (
        ("batch_num_tokens", tokens) if mode == "token-mean" else ("global_batch_size", sequences)
    )
    if dp_size > 1 and count is None:
        raise InvalidValueError(
            f"{argument} must be given for loss_agg_mode {mode!r} with dp_size {dp_size}"
        )
    if packed and mode != "token-mean" and cu_seqlens is None:
        raise InvalidValueError(
            f"cu_seqlens must be given for loss_agg_mode {mode!r} with packed tensors: "
            f"offsets of the sequences, int32 or int64 [S + 1]"
        )
    if packed and mode == "seq-mean-token-sum-norm" and scale is None:
        raise InvalidValueError(
            f"loss_scale_factor must be given for loss_agg_mode {mode!r} with packed tensors, "
            f"which have no width"
        )
