"""Aggregation of the losses of the tokens, over micro-batches and ranks alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bandpo.backends.contract import Count, TokenLosses, Weight
from bandpo.batch.tokens import Tokens
from bandpo.check import check_name, nonnegative_number, positive_number, real_number
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.rule import AGGREGATION_MODES, AggregationMode
from bandpo.tensors.internals import needs_no_dispatcher


@dataclass(frozen=True)
class GlobalBatch:
    """Counts of the whole batch, of which a call has one micro-batch on one rank.

    It replaces the four arguments ``batch_num_tokens``, ``global_batch_size``, ``dp_size`` and
    ``loss_scale_factor`` of `policy_loss`.

    Args:
        tokens: Tokens that count, a number or a 0-dim tensor, for token-mean; by default those of
            the call.
        sequences: Sequences with such a token, likewise, for the seq-mean modes.
        dp_size: Number of data-parallel ranks whose gradients are averaged.
        loss_scale_factor: Divisor of seq-mean-token-sum-norm; T by default, needed if packed, and
            with a dp_size or a count of sequences.

    Raises:
        InvalidTypeError: If an argument is not a number.
        InvalidValueError: If it is out of range.
    """

    tokens: Count | None = None
    sequences: Count | None = None
    dp_size: int = 1
    loss_scale_factor: float | None = None

    def __post_init__(self) -> None:
        _check_counts(
            self.dp_size, self.loss_scale_factor, tokens=self.tokens, sequences=self.sequences
        )


class Reduction(NamedTuple):
    """A checked loss_agg_mode with the counts of the global batch; made by `Reduction.of`."""

    mode: AggregationMode
    dp_size: int
    tokens: Count | None
    sequences: Count | None
    loss_scale_factor: float | None

    @classmethod
    def of(
        cls,
        mode: AggregationMode,
        global_batch: GlobalBatch | None,
        dp_size: int,
        batch_num_tokens: Count | None,
        global_batch_size: Count | None,
        loss_scale_factor: float | None,
    ) -> Reduction:
        """Returns the reduction of arguments that a user gave.

        Raises:
            InvalidTypeError: If an argument has the wrong type.
            InvalidValueError: If it is out of range or unknown, or a count is given twice.
        """
        check_name("loss_agg_mode", mode, AGGREGATION_MODES)
        _check_counts(
            dp_size,
            loss_scale_factor,
            batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size,
        )
        found = cls(mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
        if global_batch is not None:
            if not isinstance(global_batch, GlobalBatch):
                raise InvalidTypeError(
                    f"global_batch must be a bandpo.loss.GlobalBatch, "
                    f"got {type(global_batch).__name__}"
                )
            counts = batch_num_tokens, global_batch_size, loss_scale_factor
            if dp_size != 1 or any(count is not None for count in counts):
                raise InvalidValueError(
                    "global_batch must be left out where dp_size, batch_num_tokens, "
                    "global_batch_size or loss_scale_factor is given"
                )
            found = cls(
                mode,
                global_batch.dp_size,
                global_batch.tokens,
                global_batch.sequences,
                global_batch.loss_scale_factor,
            )
        if mode == "none" and found.dp_size != 1:
            raise InvalidValueError(
                f"dp_size must be 1 with loss_agg_mode 'none', which averages nothing, "
                f"got {found.dp_size}"
            )
        return found

    def is_one_weight(self) -> bool:
        """True if every token of the batch has the same weight."""
        return self.mode not in ("none", "seq-mean-token-mean")

    def check_given(self, packed: bool, cu_seqlens: torch.Tensor | None) -> None:
        """Raises InvalidValueError if the mode needs an argument that is missing."""
        mode = self.mode
        if mode in ("none", "token-sum"):
            return
        argument, count = (
            ("batch_num_tokens", self.tokens)
            if mode == "token-mean"
            else ("global_batch_size", self.sequences)
        )
        if self.dp_size > 1 and count is None:
            raise InvalidValueError(
                f"{argument} must be given for loss_agg_mode {mode!r} with dp_size {self.dp_size}"
            )
        if packed and mode != "token-mean" and cu_seqlens is None:
            raise InvalidValueError(
                f"cu_seqlens must be given for loss_agg_mode {mode!r} with packed tensors: "
                f"offsets of the sequences, int32 or int64 [S + 1]"
            )
        if mode != "seq-mean-token-sum-norm" or self.loss_scale_factor is not None:
            return
        for without_one_width, what in (
            (packed, "packed tensors, which have no width"),
            (self.dp_size > 1, f"dp_size {self.dp_size}, because widths of ranks may differ"),
            (count is not None, f"{argument}, because widths of micro-batches may differ"),
        ):
            if without_one_width:
                raise InvalidValueError(
                    f"loss_scale_factor must be given for loss_agg_mode {mode!r} with {what}"
                )

    def weight(self, valid_tokens: Callable[[], Count], batch: Tokens) -> Weight:
        """Returns the weight of a sum over the batch, for one rank.

        Args:
            valid_tokens: Returns how many tokens of the batch count; called only if needed.
            batch: The tokens.

        Raises:
            InvalidValueError: If a count has no number, and the tokens have.
        """
        for argument, count in (
            ("batch_num_tokens", self.tokens),
            ("global_batch_size", self.sequences),
        ):
            if isinstance(count, torch.Tensor) and count.is_meta and not batch.log_prob.is_meta:
                raise InvalidValueError(f"{argument} must hold a number, got one on device meta")
        if self.mode == "token-sum":
            return Weight(self.dp_size, 1)
        if self.mode == "token-mean":
            return Weight(self.dp_size, valid_tokens() if self.tokens is None else self.tokens)
        sequences = self.sequences
        if sequences is None:
            sequences = (batch.sequences().lengths > 0).sum()
        if self.mode != "seq-mean-token-sum-norm":
            return Weight(self.dp_size, sequences)
        scale = self.loss_scale_factor
        scale = max(batch.valid.shape[1], 1) if scale is None else scale
        return Weight(self.dp_size / scale, sequences)

    def aggregate(self, losses: TokenLosses, batch: Tokens) -> torch.Tensor:
        """Returns the loss, 0-dim, unless the mode is "none"."""
        total = losses.total
        if self.mode == "seq-mean-token-mean":
            sequences = batch.sequences()
            lengths = sequences.spread(sequences.lengths).clamp(min=1)
            total = (losses.per_token / lengths).sum()
        loss = self.weight(lambda: losses.totals().valid, batch).times(total)
        return loss.to(total.dtype)  # not that of a count in float64


def _check_counts(dp_size: int, scale: float | None, **counts: Count | None) -> None:
    real_number("dp_size", dp_size)
    if not 1 <= dp_size < math.inf or dp_size != int(dp_size):
        raise InvalidValueError(f"dp_size must be a whole number above 0, got {dp_size}")
    if scale is not None:
        positive_number("loss_scale_factor", scale)
    for argument, count in counts.items():
        if isinstance(count, torch.Tensor):
            if count.ndim > 0:
                raise InvalidValueError(
                    f"{argument} must be a number or a 0-dim tensor, got shape {tuple(count.shape)}"
                )
            # On another device, reading the value would make the host wait.
            if needs_no_dispatcher(count):
                nonnegative_number(argument, count.item())
        elif count is not None:
            nonnegative_number(argument, count)
