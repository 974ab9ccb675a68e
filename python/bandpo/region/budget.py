"""`PrefixBudget` and `TensorBand`: which tokens are inside, by a divergence without a root."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bandpo.check import check_name, positive_number, real_number
from bandpo.error import InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    import torch

DIVERGENCES = (
    "tv",
    "kl",
    "reverse-kl",
    "hellinger",
    "pearson-chi2",
    "neyman-chi2",
    "jensen-shannon",
)
"""Divergences that `bandpo.tensors.divergence` computes on tensors."""


class PrefixBudget:
    """A divergence budget along each sequence (CPPO, arXiv 2606.10968); for surrogate "mask".

    A token that moves with its advantage is kept while ``w D <= min(delta, delta + b W - S)``. D is
    its divergence between {this token, everything else}. Its weight w falls linearly from 1 at the
    first token that counts to ``weight_min`` at the last one. S and W are the sums of ``w D`` and w
    over the tokens before it, dropped ones included. So a token may take what those before it have
    left over, at b a token.

    The rule is read from the code of its authors (UniRL; verl #6731): linear weights over the own
    length of a sequence, as in the first, and masked tokens left out of the sums, as in the second.

    Args:
        delta: Max divergence of a token, finite and above 0: 0.15, and 0.2 for a mixture of
            experts.
        weight_min: Weight of the last token, in (0, 1].
        allowance: b, or its min and max; then b of a sequence is the 0.9 quantile of its D, moved
            to the nearer of the two.
        divergence: One of `DIVERGENCES`.

    Raises:
        InvalidTypeError: If an argument has the wrong type.
        InvalidValueError: If it is out of range or unknown.
    """

    def __init__(
        self,
        delta: float = 0.15,
        weight_min: float = 0.8,
        allowance: float | tuple[float, float] = (0.02, 0.04),
        divergence: str = "tv",
    ) -> None:
        self.delta = positive_number("delta", delta)
        self.weight_min = real_number("weight_min", weight_min)
        if not 0.0 < self.weight_min <= 1.0:
            raise InvalidValueError(f"weight_min must be in (0, 1], got {weight_min}")
        pair = allowance if isinstance(allowance, (tuple, list)) else (allowance, allowance)
        if len(pair) != 2:
            raise InvalidTypeError(f"allowance must be a number or a pair, got {allowance!r}")
        low, high = (real_number("allowance", end) for end in pair)
        if not 0.0 <= low <= high:
            raise InvalidValueError(
                f"allowance must be at least 0, or a pair that rises, got {allowance}"
            )
        self.allowance = low, high
        check_name("divergence", divergence, DIVERGENCES)
        self.divergence = divergence

    def _numbers(self) -> tuple[float, float, tuple[float, float], str]:
        return self.delta, self.weight_min, self.allowance, self.divergence

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrefixBudget):
            return NotImplemented
        return self._numbers() == other._numbers()

    def __hash__(self) -> int:
        return hash((PrefixBudget, self._numbers()))

    def __repr__(self) -> str:
        return (
            f"PrefixBudget(delta={self.delta}, weight_min={self.weight_min}, "
            f"allowance={self.allowance}, divergence={self.divergence!r})"
        )


class TensorBand:
    """A band whose delta is a tensor on the device of the loss; for surrogate "mask".

    A token is inside if the divergence between {this token, everything else} is at most its delta.
    That needs no root and no copy to the CPU, unlike a `Band` with an array of deltas. A log-prob
    above 0, which rounding makes, counts as 0, where a `Band` has it outside.

    Args:
        divergence: One of `DIVERGENCES`.
        delta: Max divergence of each token, at least 0, which broadcasts to the shape of
            ``old_log_prob``; read at each loss, without gradient. Its values are checked here on a
            CPU only. Elsewhere a NaN drops its token as a negative delta does.

    Raises:
        InvalidTypeError: If ``delta`` is not a tensor of floats.
        InvalidValueError: If the divergence is not one of these, or a delta is below 0 or NaN.
    """

    def __init__(self, divergence: str, delta: torch.Tensor) -> None:
        check_name("divergence", divergence, DIVERGENCES)
        if not hasattr(delta, "is_floating_point") or not delta.is_floating_point():
            kind = getattr(delta, "dtype", type(delta).__name__)
            raise InvalidTypeError(
                f"delta must be a tensor of floats, got {kind}; a number or an array is for a Band"
            )
        if delta.device.type == "cpu" and not bool((delta >= 0.0).all()):
            wrong = delta[~(delta >= 0.0)].reshape(-1)[0].item()
            raise InvalidValueError(f"delta must be at least 0, got {wrong}")
        self.divergence = divergence
        self.delta = delta

    def __repr__(self) -> str:
        return f"TensorBand({self.divergence!r}, delta of shape {tuple(self.delta.shape)})"
