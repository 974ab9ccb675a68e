"""The tokens of a batch: their shapes, and the sequences that they form."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.surrogate import LOG_RATIO_LIMIT
from bandpo.tensors.check import check_float, check_tensor


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

    def sequences(self) -> Sequences:
        """Returns the sequences, computed at every call."""
        return Sequences.of(self.valid, self.cu_seqlens)

    def log_ratio(self) -> torch.Tensor:
        """Returns the clamped log-ratios without gradient, [B, T], 0 where masked; NaN stays."""
        log_prob = self.log_prob.detach()
        log_ratio = log_prob - self.old_log_prob.reshape(log_prob.shape)
        return torch.where(self.valid, log_ratio, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def shaped(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the tensor in a shape: itself, not a view, if it has that shape."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def check_tokens(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    rollout_is_weights: torch.Tensor | None,
) -> tuple[int, int]:
    """Returns the shape of the tokens as backends take them, [B, T]; packed tokens are one row.

    Raises:
        InvalidTypeError: If a tensor is none, or has a dtype that is not accepted.
        InvalidValueError: If shapes or devices do not match.
    """
    check_float("old_log_prob", old_log_prob)
    check_float("log_prob", log_prob)
    check_float("advantages", advantages)
    check_tensor("response_mask", response_mask)
    weights = []
    if rollout_is_weights is not None:
        check_float("rollout_is_weights", rollout_is_weights)
        weights = [("rollout_is_weights", rollout_is_weights)]
    if response_mask.is_complex():
        raise InvalidTypeError(
            f"response_mask must be bool, int or float, got {response_mask.dtype}"
        )
    shape = _without_last_1(log_prob)
    if not 1 <= len(shape) <= 2:
        raise InvalidValueError(
            f"log_prob must have shape [B, T], [B, T, 1] or, packed, [N], "
            f"got {tuple(log_prob.shape)}"
        )
    per_row = ((shape[0], 1), shape[:1]) if len(shape) == 2 else ()
    for argument, tensor, shapes in (
        ("old_log_prob", old_log_prob, (shape,)),
        ("response_mask", response_mask, (shape,)),
        *(
            (argument, of, (shape, *per_row))
            for argument, of in [("advantages", advantages), *weights]
        ),
    ):
        if _without_last_1(tensor) not in shapes:
            raise InvalidValueError(
                f"{argument} must have shape {' or '.join(map(str, shapes))} "
                f"like log_prob's {tuple(log_prob.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != log_prob.device:
            raise InvalidValueError(
                f"{argument} must be on log_prob's device {log_prob.device}, got {tensor.device}"
            )
    rows, width = shape if len(shape) == 2 else (1, shape[0])
    return rows, width


def shaped_by_row(tensor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Returns advantages or weights as [B, T], or as [B, 1] if there is one a sequence."""
    whole = tensor.numel() == math.prod(shape)
    return shaped(tensor, shape if whole else (shape[0], 1))


def _without_last_1(tensor: torch.Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape


def check_cu_seqlens(cu_seqlens: torch.Tensor, log_prob: torch.Tensor) -> None:
    """Raises unless ``cu_seqlens`` are offsets, [S + 1], of the sequences of packed tensors."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InvalidTypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if log_prob.ndim != 1:
        raise InvalidValueError(
            f"cu_seqlens must be left out unless tensors are packed, [N]: "
            f"log_prob has shape {tuple(log_prob.shape)}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise InvalidValueError(
            f"cu_seqlens must have shape [S + 1], got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != log_prob.device:
        raise InvalidValueError(
            f"cu_seqlens must be on log_prob's device {log_prob.device}, got {cu_seqlens.device}"
        )
    # On another device, reading the values would make the host wait.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets, tokens = cu_seqlens.numpy(), log_prob.shape[0]
        if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
            raise InvalidValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, "
                f"got {np.array2string(offsets, threshold=8)}"
            )
