"""`Bapo`: a controller of constant bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bandpo.check import Float64Array, float64_array, positive_number, real_number
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.parts import slices
from bandpo.ranks import of_all_ranks
from bandpo.region import Clip
from bandpo.schedule.source import RegionSource
from bandpo.schedule.state import entries
from bandpo.surrogate import LOG_RATIO_LIMIT

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Bapo(RegionSource):
    """The constant bounds of BAPO, moved until positive advantages have their share of a batch.

    BAPO (arXiv 2510.18927, Eq. 8 and Algorithm 1). Every step starts from the low ends of both
    ranges. While the share of the tokens with positive advantages is below the target, it raises
    the upper bound by its step as long as that stays in range, and then the lower bound. The share
    is the sum of ``p min(r A, clip(r, lower, upper) A)`` over ``A > 0``, divided by the sum of its
    absolute values over all tokens, p being the old probability.

    The numbers are those of section 5.1. The code released with the paper (WooooDyy/BAPO) differs:
    it raises the lower bound first, leaves p out, and has 0.5 as the target.

    Args:
        lower: Min and max of the lower bound of the ratio, in [0, 1].
        upper: Min and max of the upper bound of the ratio, finite and at least 1.
        lower_step: Step of the lower bound, finite and above 0.
        upper_step: Step of the upper bound, likewise.
        target: The share to reach, in [0, 1].

    Raises:
        InvalidTypeError: If an argument has the wrong type.
        InvalidValueError: If it is out of range.
    """

    def __init__(
        self,
        lower: tuple[float, float] = (0.6, 0.9),
        upper: tuple[float, float] = (1.2, 3.0),
        *,
        lower_step: float = 0.02,
        upper_step: float = 0.05,
        target: float = 0.4,
    ) -> None:
        self.lower = _range("lower", lower, 0.0, 1.0)
        self.upper = _range("upper", upper, 1.0, math.inf)
        self.lower_step = positive_number("lower_step", lower_step)
        self.upper_step = positive_number("upper_step", upper_step)
        self.target = real_number("target", target)
        if not 0.0 <= self.target <= 1.0:
            raise InvalidValueError(f"target must be in [0, 1], got {target}")
        self._bounds = (self.lower[0], self.upper[0])
        super().__init__(_interval(*self._bounds))

    def update(
        self,
        advantages: ArrayLike,
        log_ratio: ArrayLike,
        old_log_prob: ArrayLike,
        *,
        group: ProcessGroup | None = None,
        all_reduce: Callable[[Float64Array], Float64Array] | None = None,
    ) -> None:
        """Moves the bounds to those of a batch, before its loss.

        An advantage of 0 has no weight; if all are 0, the bounds are the low ends. The controller
        runs on the CPU, so that tokens on a GPU cost a copy and a synchronisation. With a group,
        each rank passes its own tokens, perhaps none, and all get the bounds of the whole batch.
        Without one, bounds are those of the tokens that are passed.

        Args:
            advantages: Advantages of the tokens that count: real and finite, any shape.
            log_ratio: Their log-ratios ``ln(new/old)``, the same shape.
            old_log_prob: Their old log-probabilities (natural), the same shape.
            group: Process group of the ranks that share the batch, such as
                ``torch.distributed.group.WORLD``. All of them must call.
            all_reduce: In place of a group, for ranks of another library: maps sums over this
                rank's tokens, float64 [n], to the sums over all ranks. It is called once.

        Raises:
            InvalidTypeError: If an array does not hold real numbers.
            InvalidValueError: If the shapes differ or a value is NaN or infinite (an old
                log-probability may be -inf), on any rank of the group; or if both a group and
                ``all_reduce`` are given.
        """
        if group is not None and all_reduce is not None:
            raise InvalidValueError("all_reduce must be left out with a group, which replaces it")
        # Each bound acts on one sign, so that a sum for every value of each covers all pairs.
        uppers = _values(self.upper, self.upper_step)
        lowers = _values(self.lower, self.lower_step)

        def of_this_rank() -> Float64Array:
            return _sums(uppers, lowers, advantages, log_ratio, old_log_prob)

        sums = np.sum(of_all_ranks(of_this_rank, group), axis=0)
        if all_reduce is not None:
            sums = all_reduce(sums)
        gain, loss = sums[: len(uppers)], sums[len(uppers) :]
        # The upper bound moves first, over all of its range, and then the lower one.
        gains = np.concatenate([gain, np.full(len(lowers) - 1, gain[-1])])
        losses = np.concatenate([np.full(len(uppers) - 1, loss[0]), loss])
        enough = gains >= self.target * (gains + losses)
        moves = int(np.argmax(enough)) if enough.any() else len(enough) - 1
        self._move(lowers[max(moves - (len(uppers) - 1), 0)], uppers[min(moves, len(uppers) - 1)])

    step = update
    """Alias of `update`."""

    def _move(self, lower: float, upper: float) -> None:
        self._bounds = (lower, upper)
        self._change(_interval(lower, upper))

    def state_dict(self) -> dict[str, Any]:
        """Returns the two bounds of the ratio."""
        return dict(zip(("lower", "upper"), self._bounds, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the two bounds; see `Schedule.load_state_dict`."""
        bounds = entries(state, "lower", "upper")
        for name, (low, high) in (("lower", self.lower), ("upper", self.upper)):
            if not low <= bounds[name] <= high:
                raise InvalidValueError(f"{name} must be from {low} to {high}, got {bounds[name]}")
        self._move(bounds["lower"], bounds["upper"])

    def __repr__(self) -> str:
        return f"Bapo({self.lower}, {self.upper}, target={self.target})"


def _range(
    argument: str, ends: tuple[float, float], min_end: float, max_end: float
) -> tuple[float, float]:
    if not isinstance(ends, tuple) or len(ends) != 2:
        raise InvalidTypeError(f"{argument} must be a pair (min, max), got {ends!r}")
    low, high = (real_number(argument, end) for end in ends)
    if not (min_end <= low <= high <= max_end and high < math.inf):
        raise InvalidValueError(
            f"{argument} must be a pair that rises and lies in [{min_end}, {max_end}], got {ends}"
        )
    return low, high


def _values(ends: tuple[float, float], step: float) -> list[float]:
    """Returns the values from the low end by steps, as far as they stay in range."""
    low, high = ends
    # 36 steps of 0.05 lead from 1.2 to 3, but their rounded sum exceeds it.
    steps = int((high - low) / step * (1.0 + 1e-12))
    return [min(low + k * step, high) for k in range(steps + 1)]


def _sums(
    uppers: list[float],
    lowers: list[float],
    advantages: ArrayLike,
    log_ratio: ArrayLike,
    old_log_prob: ArrayLike,
) -> Float64Array:
    """The weight of positive advantages at each upper bound, then of negative at each lower."""
    arrays = {"advantages": advantages, "log_ratio": log_ratio, "old_log_prob": old_log_prob}
    given = {name: float64_array(name, values) for name, values in arrays.items()}
    shape = given["advantages"].shape
    for name, values in given.items():
        if values.shape != shape:
            raise InvalidValueError(f"{name} must have shape {shape}, got {values.shape}")
        finite = np.isfinite(values)
        if name == "old_log_prob":
            finite |= values == -np.inf
        if not finite.all():
            raise InvalidValueError(f"{name} must be finite, got {values[~finite].flat[0]}")
    flat = [values.reshape(-1) for values in given.values()]
    sums = np.zeros(len(uppers) + len(lowers))
    for part in slices(len(flat[0])):
        sums += _sums_of_part(uppers, lowers, *(values[part] for values in flat))
    return sums


def _sums_of_part(
    uppers: list[float],
    lowers: list[float],
    advantages: Float64Array,
    log_ratio: Float64Array,
    old_log_prob: Float64Array,
) -> Float64Array:
    ratio = np.exp(np.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    weight = np.exp(np.minimum(old_log_prob, 0.0)) * np.abs(advantages)
    positive, negative = advantages > 0.0, advantages < 0.0
    gain, rise = weight[positive], ratio[positive]
    loss, fall = weight[negative], ratio[negative]
    rising = [gain @ np.minimum(rise, upper) for upper in uppers]
    falling = [loss @ np.maximum(fall, lower) for lower in lowers]
    return np.array(rising + falling)


def _interval(lower: float, upper: float) -> Clip:
    return Clip.between(lower, max(upper, 1.0))
