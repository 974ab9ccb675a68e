"""The tokens of a batch: their shapes, and the sequences that they form; `check` checks them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from bandpo.surrogate import LOG_RATIO_LIMIT


class Sequences(NamedTuple):
    """The sequences of a batch: rows of [B, T], or parts of [1, N] where tokens are packed."""

    lengths: torch.Tensor  # tokens that count, int64 [S]
    of_token: torch.Tensor | None  # index of the sequence of each packed token, int64 [N]

    @classmethod
    def of(cls, valid: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Sequences:
        """Returns the rows of ``valid``, or its parts between offsets, [S + 1], if it is packed."""
        if cu_seqlens is None:
            return cls(valid.sum(-1), None)
        offsets = cu_seqlens.to(torch.int64)
        lengths = torch.nn.functional.pad(valid[0].cumsum(0), (1, 0))[offsets].diff()
        position = torch.arange(valid.shape[1], device=valid.device)
        return cls(lengths, torch.searchsorted(offsets[1:], position, right=True))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the tokens of each sequence, [S]."""
        if self.of_token is None:
            return values.sum(-1)
        return values.new_zeros(self.lengths.shape).index_add(0, self.of_token, values[0])

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the value of each sequence at its tokens: [B, 1] or [1, N]."""
        return values[:, None] if self.of_token is None else values[self.of_token][None]


class Tokens(NamedTuple):
    """A batch in the shape that backends take, packed tokens being one row."""

    old_log_prob: torch.Tensor  # in the user's shape, without gradient
    log_prob: torch.Tensor  # [B, T], same dtype, with its gradient
    advantages: torch.Tensor  # [B, T] or [B, 1]
    valid: torch.Tensor  # bool [B, T]
    cu_seqlens: torch.Tensor | None
    anchor_log_prob: torch.Tensor | None = None  # like old_log_prob

    def log_prob_of_bounds(self) -> torch.Tensor:
        """The log-probs at which the bounds stand, in the user's shape."""
        return self.old_log_prob if self.anchor_log_prob is None else self.anchor_log_prob

    def limited_log_ratio(self) -> torch.Tensor:
        """Returns the log-ratios that the bounds limit; see `log_ratio`."""
        return self._log_ratio_to(self.log_prob_of_bounds())

    def shift(self) -> torch.Tensor | None:
        """Returns how much further bounds of new/old are than those of new/anchor, [B, T]."""
        if self.anchor_log_prob is None:
            return None
        shape = self.log_prob.shape
        shift = (self.anchor_log_prob - self.old_log_prob).reshape(shape)
        return torch.where(self.valid, shift, 0.0)

    def sequences(self) -> Sequences:
        """Returns the sequences, computed at every call."""
        return Sequences.of(self.valid, self.cu_seqlens)

    def log_ratio(self) -> torch.Tensor:
        """Returns the log-ratios without gradient, [B, T], 0 where masked; NaN stays.

        Decisions take them as they are. What is exponentiated or added up is `clamped`.
        """
        return self._log_ratio_to(self.old_log_prob)

    def _log_ratio_to(self, denominator: torch.Tensor) -> torch.Tensor:
        log_prob = self.log_prob.detach()
        log_ratio = log_prob - denominator.reshape(log_prob.shape)
        return torch.where(self.valid, log_ratio, 0.0)


def clamped(log_ratio: torch.Tensor) -> torch.Tensor:
    """Returns log-ratios as ratios are made of them; NaN stays."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def shaped(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the tensor in a shape: itself, not a view, if it has that shape."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def shaped_by_row(tensor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Returns advantages or weights as [B, T], or as [B, 1] if there is one a sequence."""
    whole = tensor.numel() == math.prod(shape)
    return shaped(tensor, shape if whole else (shape[0], 1))
