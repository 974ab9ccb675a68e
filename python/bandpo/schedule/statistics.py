"""`SecondMoment` and `Quantile`: constant bounds from the log-ratios of a batch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bandpo.check import Float64Array, float64_array, positive_number, real_number
from bandpo.error import InvalidValueError
from bandpo.order import Int64Array, neighbourhood, of_rank
from bandpo.parts import slices
from bandpo.ranks import of_all_ranks
from bandpo.region import Clip
from bandpo.schedule.source import RegionSource
from bandpo.schedule.state import entries

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _WidthOfBatch(RegionSource):
    """A clip of equal width in the log-ratio on both sides, learnt from each batch."""

    def __init__(self) -> None:
        self.width = math.inf
        super().__init__(Clip.from_log_ratio(self.width))

    def update(
        self,
        advantages: ArrayLike,
        log_ratio: ArrayLike,
        old_log_prob: ArrayLike | None = None,
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        """Moves the bounds to those of a batch, before its loss.

        It runs on the CPU, so that tokens on a GPU cost a copy and a synchronisation. With a group,
        each rank passes its own tokens, perhaps none, and all get the bounds of the whole batch.
        Without one, bounds are those of the tokens that are passed.

        Args:
            advantages: Advantages of the tokens that count: real and finite, any shape.
            log_ratio: Their log-ratios ``ln(new/old)``, finite, the same shape.
            old_log_prob: Not used; here so that every source has one call.
            group: Process group of the ranks that share the batch, such as
                ``torch.distributed.group.WORLD``. All of them must call; at most 8 bytes a token
                of the batch come to each.

        Raises:
            InvalidTypeError: If an array does not hold real numbers.
            InvalidValueError: If the shapes differ, or a value is NaN or infinite, on any rank.
        """
        values = of_all_ranks(lambda: self._checked_values(advantages, log_ratio), group)
        self._move(self._width_of(values[0] if len(values) == 1 else np.concatenate(values)))

    step = update
    """Alias of `update`."""

    def _checked_values(self, advantages: ArrayLike, log_ratio: ArrayLike) -> Float64Array:
        gain, moved = float64_array("advantages", advantages), float64_array("log_ratio", log_ratio)
        if moved.shape != gain.shape:
            raise InvalidValueError(f"log_ratio must have shape {gain.shape}, got {moved.shape}")
        for name, values in (("advantages", gain), ("log_ratio", moved)):
            finite = np.isfinite(values)
            if not finite.all():
                raise InvalidValueError(f"{name} must be finite, got {values[~finite].flat[0]}")
        return self._values_of(gain.reshape(-1), moved.reshape(-1))

    @abstractmethod
    def _values_of(self, advantages: Float64Array, log_ratio: Float64Array) -> Float64Array:
        """The values on which the width depends, one for some or all of the tokens."""

    @abstractmethod
    def _width_of(self, values: Float64Array) -> float:
        """The width of a batch with these values in any order, infinite for no bound."""

    def _move(self, width: float) -> None:
        self.width = width
        self._change(Clip.from_log_ratio(width))

    def state_dict(self) -> dict[str, Any]:
        """Returns the width in the log-ratio, or -1 for no bound, because JSON has no infinity."""
        return {"width": -1.0 if self.width == math.inf else self.width}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the width; see `Schedule.load_state_dict`."""
        width = entries(state, "width")["width"]
        if width < 0.0 and width != -1.0:
            raise InvalidValueError(f"width must be at least 0, or -1 for none, got {width}")
        self._move(math.inf if width == -1.0 else width)


class SecondMoment(_WidthOfBatch):
    """The clip that keeps the second moment of the harmful log-ratios at a budget (M2PO).

    A token is harmful if its ratio has moved with its advantage: ``A > 0`` and ``r > 1``, or
    ``A < 0`` and ``r < 1``. The bounds are ``exp(-T)`` and ``exp(T)``, where T is the largest width
    for which the mean over the harmful tokens of ``min((ln r)^2, T^2)`` is at most the budget; if
    no width is needed, nothing is clipped (M2PO, arXiv 2510.01161). T is exact; the code released
    with the paper stops at the next smaller ``abs(ln r)`` of a token.

    Args:
        budget: Max second moment tau, finite and above 0; 0.04 in the paper's scripts.

    Raises:
        InvalidTypeError: If it is not a real number.
        InvalidValueError: If it is out of range.
    """

    def __init__(self, budget: float = 0.04) -> None:
        self.budget = positive_number("budget", budget)
        super().__init__()

    def _values_of(self, advantages: Float64Array, log_ratio: Float64Array) -> Float64Array:
        parts = slices(len(log_ratio))
        return np.concatenate(
            [_harmful(advantages[part], log_ratio[part]) for part in parts] or [log_ratio]
        )

    def _width_of(self, values: Float64Array) -> float:
        count = len(values)
        allowed = self.budget * count
        if values.sum() <= allowed:
            return math.inf

        def last_below(numbers: Int64Array, sums: Float64Array, starts: Float64Array) -> int:
            fewer = sums + (count - numbers) * starts < allowed
            return max(int(fewer.sum()) - 1, 0)

        # With the k smallest below T, the sum is theirs and (count - k) T^2.
        fewer, sum_of_fewer, squares = neighbourhood(values, last_below)
        below = sum_of_fewer + np.concatenate([[0.0], np.cumsum(squares)])
        left = count - fewer - np.arange(len(squares) + 1)
        if left[-1] == 0:
            below, left = below[:-1], left[:-1]
        width = (allowed - below) / left
        reached = width[: len(squares)] <= squares
        k = int(np.argmax(reached)) if reached.any() else len(squares)
        if k == len(width):  # the sum exceeds what is allowed by its rounding
            return math.inf
        return math.sqrt(max(float(width[k]), 0.0))

    def __repr__(self) -> str:
        return f"SecondMoment({self.budget})"


class Quantile(_WidthOfBatch):
    """The clip at a quantile of ``abs(ln r)`` over a batch.

    It is the threshold of SAT (arXiv 2607.18722), beyond which that rule shrinks its bounds by a
    kernel that no source states.

    Args:
        level: Share of the tokens inside, in (0, 1]; SAT takes 0.9.

    Raises:
        InvalidTypeError: If it is not a real number.
        InvalidValueError: If it is out of range.
    """

    def __init__(self, level: float = 0.9) -> None:
        self.level = real_number("level", level)
        if not 0.0 < self.level <= 1.0:
            raise InvalidValueError(f"level must be above 0 and at most 1, got {level}")
        super().__init__()

    def _values_of(self, advantages: Float64Array, log_ratio: Float64Array) -> Float64Array:
        return np.abs(log_ratio)

    def _width_of(self, values: Float64Array) -> float:
        if len(values) == 0:
            raise InvalidValueError(
                "log_ratio must hold a token that counts, got none: there is no quantile of nothing"
            )
        place = (len(values) - 1) * self.level
        first = math.floor(place)
        ends = [of_rank(values, min(rank, len(values) - 1)) for rank in (first, first + 1)]
        return float(np.quantile(ends, place - first))

    def __repr__(self) -> str:
        return f"Quantile({self.level})"


def _harmful(advantages: Float64Array, log_ratio: Float64Array) -> Float64Array:
    squares: Float64Array = log_ratio[advantages * log_ratio > 0.0] ** 2
    return squares
