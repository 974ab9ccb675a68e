"""What changes a region between optimiser steps: schedules of delta, and BAPO's controller.

A `Schedule` is a number that changes. A `RegionSource` is a region that does: `ScheduledBand`
follows a schedule, `Bapo` the batch. Call ``step`` once after each optimiser step (`Bapo`: before
the batch's loss), and keep ``state_dict()`` in the checkpoint.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from bandpo.check import Float64Array, float64_array, positive_number, real_number
from bandpo.divergence import Divergence
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.region import Band, Clip, Region
from bandpo.surrogate import LOG_RATIO_LIMIT


class Schedule(ABC):
    """A number that changes from step to step, such as a delta."""

    @property
    @abstractmethod
    def value(self) -> float:
        """The number now."""

    @abstractmethod
    def step(self, entropy: float | None = None) -> None:
        """Goes on by one optimiser step.

        Args:
            entropy: Mean entropy of the policy over the tokens of the batch, finite and at least 0.
                `EntropyTargeted` needs it, the others pay no regard to it.

        Raises:
            InvalidTypeError: If the entropy is needed and is not a real number.
            InvalidValueError: If it is out of range, or the schedule is past its end.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns what changes with the steps, as plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where ``state_dict`` was made.

        Raises:
            InvalidTypeError: If the state is not a mapping, or an entry not a number.
            InvalidValueError: If an entry is missing, unknown or out of range.
        """


class Constant(Schedule):
    """A number that does not change.

    Args:
        value: The number, finite and above 0.

    Raises:
        InvalidTypeError: If it is not a real number.
        InvalidValueError: If it is out of range.
    """

    def __init__(self, value: float) -> None:
        self._value = positive_number("value", value)

    @property
    def value(self) -> float:
        """The number."""
        return self._value

    def step(self, entropy: float | None = None) -> None:
        """Changes nothing; see `Schedule.step`."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes an empty state; see `Schedule.load_state_dict`."""
        _entries(state)

    def __repr__(self) -> str:
        return f"Constant({self._value})"


class _Ramp(Schedule):
    """From ``start`` to ``end`` in a number of steps."""

    def __init__(self, start: float, end: float, steps: int) -> None:
        self.start = positive_number("start", start)
        self.end = positive_number("end", end)
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise InvalidTypeError(f"steps must be an int, got {type(steps).__name__}")
        if steps < 1:
            raise InvalidValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps
        self._taken = 0

    @abstractmethod
    def _share(self, progress: float) -> float:
        """How much of the way is done, when this share of the steps is taken."""

    @property
    def value(self) -> float:
        """The number after the steps taken so far; ``start`` before the first."""
        share = self._share(self._taken / self.steps)
        return (1.0 - share) * self.start + share * self.end

    def step(self, entropy: float | None = None) -> None:
        """Takes one of the steps; see `Schedule.step`."""
        if self._taken >= self.steps:
            raise InvalidValueError(
                f"all {self.steps} steps are taken and the value is {self.end}; "
                f"give the schedule more steps, or stop calling step"
            )
        self._taken += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps taken."""
        return {"taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the number of steps taken; see `Schedule.load_state_dict`."""
        taken = _entries(state, "taken")["taken"]
        if taken != int(taken) or not 0 <= taken <= self.steps:
            raise InvalidValueError(
                f"taken must be a whole number from 0 to steps = {self.steps}, got {taken}"
            )
        self._taken = int(taken)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.start}, {self.end}, {self.steps})"


class Linear(_Ramp):
    """From ``start`` to ``end`` along a line.

    Args:
        start: The number before the first step, finite and above 0.
        end: The number after the last step, likewise.
        steps: How many steps there are, at least 1.

    Raises:
        InvalidTypeError: If an argument has the wrong type.
        InvalidValueError: If it is out of range.
    """

    def _share(self, progress: float) -> float:
        return progress


class Cosine(_Ramp):
    """From ``start`` to ``end`` along half a cosine wave, slow at both ends (arXiv 1608.03983).

    Args:
        start: The number before the first step, finite and above 0.
        end: The number after the last step, likewise.
        steps: How many steps there are, at least 1.

    Raises:
        InvalidTypeError: If an argument has the wrong type.
        InvalidValueError: If it is out of range.
    """

    def _share(self, progress: float) -> float:
        return 0.5 - 0.5 * math.cos(math.pi * progress)


class EntropyTargeted(Schedule):
    """A number that grows while the policy's entropy is below a target, and shrinks above it.

    Each step multiplies it by ``exp(rate * x)``, where x is the relative shortfall
    ``(target - entropy) / target``, limited to [-1, 1], and keeps it in [least, greatest]. So no
    step changes it by more than a factor of ``e^rate``. This rule is this package's own; whether a
    wider band raises the entropy of a policy has to be seen in the run.

    Args:
        start: The number before the first step.
        target: The entropy to reach, above 0, in the unit of what `step` is given.
        rate: The greatest change of the logarithm of the number in a step, finite and above 0.
        least: The number does not fall below this, finite and above 0.
        greatest: It does not rise above this, finite and at least ``least``.

    Raises:
        InvalidTypeError: If an argument is not a real number.
        InvalidValueError: If it is out of range.
    """

    def __init__(
        self, start: float, *, target: float, rate: float, least: float, greatest: float
    ) -> None:
        self.target = positive_number("target", target)
        self.rate = positive_number("rate", rate)
        self.least = positive_number("least", least)
        self.greatest = positive_number("greatest", greatest)
        if self.least > self.greatest:
            raise InvalidValueError(f"least must be at most greatest = {greatest}, got {least}")
        self._value = self._in_range("start", start)

    @property
    def value(self) -> float:
        """The number after the steps taken so far."""
        return self._value

    def step(self, entropy: float | None = None) -> None:
        """Takes a step towards the target; see `Schedule.step`."""
        measured = real_number("entropy", entropy)
        if not 0.0 <= measured < math.inf:
            raise InvalidValueError(f"entropy must be finite and at least 0, got {entropy}")
        shortfall = max((self.target - measured) / self.target, -1.0)
        changed = self._value * math.exp(self.rate * shortfall)
        self._value = min(max(changed, self.least), self.greatest)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number."""
        return {"value": self._value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the number; see `Schedule.load_state_dict`."""
        self._value = self._in_range("value", _entries(state, "value")["value"])

    def __repr__(self) -> str:
        return f"EntropyTargeted({self._value}, target={self.target}, rate={self.rate})"

    def _in_range(self, argument: str, value: float) -> float:
        number = real_number(argument, value)
        if not self.least <= number <= self.greatest:
            raise InvalidValueError(
                f"{argument} must be from least = {self.least} to greatest = {self.greatest}, "
                f"got {value}"
            )
        return number


class RegionSource(ABC):
    """A region that changes between steps; the loss reads it once an optimiser step.

    What it returns as ``region`` stays the same object until it changes, and those that
    subscribed are then called with the new one, so that they can fill their tensors in place.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._subscribers: list[weakref.ref[Callable[[Region], object]]] = []

    @property
    def region(self) -> Region:
        """The region now."""
        return self._region

    def subscribe(self, callback: Callable[[Region], object]) -> None:
        """Has ``callback(region)`` called after each change.

        The callback is held weakly (a bound method as long as its object lives), so a lambda that
        nobody else holds is gone at once. A copy, or what is unpickled, begins without subscribers.
        """
        kind = weakref.WeakMethod if hasattr(callback, "__self__") else weakref.ref
        reference = kind(callback)
        if reference not in self._subscribers:
            self._subscribers.append(reference)

    def __or__(self, other: object) -> NoReturn:
        """Refused, as ``&`` is: regions are combined, what changes them is not."""
        raise InvalidTypeError(
            f"{type(self).__name__} is no Region and combines with none; combine within it: "
            f"ScheduledBand(..., within=lambda band: band | ...)"
        )

    __ror__ = __and__ = __rand__ = __or__

    def _change(self, region: Region) -> None:
        if region == self._region:
            return
        self._region = region
        self._subscribers = [held for held in self._subscribers if held() is not None]
        for held in list(self._subscribers):
            callback = held()
            if callback is not None:
                callback(region)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns what changes with the steps, as plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where ``state_dict`` was made, and tells subscribers; see `Schedule`."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_subscribers": []}


class ScheduledBand(RegionSource):
    """The band of a divergence with a delta that follows a schedule.

    The table of each delta is built when it is first needed, in a millisecond or two for a band and
    some milliseconds for a set of regions, and the last 64 are kept.

    >>> source = ScheduledBand("kl", Linear(0.1, 0.05, 100), within=lambda band: band.cap(10))
    >>> source.step()
    >>> source.region
    (Band('kl', 0.0995) & Clip(1.0, 9.0))

    Args:
        divergence: A `bandpo.Divergence` or the name of one.
        schedule: The delta. It belongs to this object: step the object, not the schedule.
        within: From the band to the region that is used; the band itself if left out. To pickle
            the object, it must be a function of a module.

    Raises:
        InvalidTypeError: If an argument has the wrong type, or ``within`` returns no region.
        InvalidValueError: If the divergence is not known.
    """

    def __init__(
        self,
        divergence: Divergence | str,
        schedule: Schedule,
        *,
        within: Callable[[Band], Region] | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise InvalidTypeError(
                f"schedule must be a Constant, Linear, Cosine or EntropyTargeted, "
                f"got {type(schedule).__name__}"
            )
        if within is not None and not callable(within):
            raise InvalidTypeError(
                f"within must be a function from a Band to a Region, got {type(within).__name__}"
            )
        self.divergence = (
            divergence if isinstance(divergence, Divergence) else Divergence(divergence)
        )
        self.schedule = schedule
        self.within = within
        super().__init__(self._now())

    def step(self, entropy: float | None = None) -> None:
        """Takes a step of the schedule; see `Schedule.step`."""
        self.schedule.step(entropy)
        self._change(self._now())

    def _now(self) -> Region:
        band = Band(self.divergence, self.schedule.value)
        region = band if self.within is None else self.within(band)
        if not isinstance(region, Region):
            raise InvalidTypeError(f"within must return a Region, got {type(region).__name__}")
        return region

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the schedule."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of the schedule; see `Schedule.load_state_dict`."""
        self.schedule.load_state_dict(state)
        self._change(self._now())

    def __repr__(self) -> str:
        return f"ScheduledBand({self.divergence!r}, {self.schedule!r})"


class Bapo(RegionSource):
    """The constant bounds of BAPO, moved until positive advantages have their share of a batch.

    BAPO (arXiv 2510.18927, Eq. 8 and Algorithm 1). Every step starts from the low ends of both
    ranges. While the share of the tokens with positive advantages is below the target, it raises
    the upper bound by its step as long as that stays in range, and then the lower bound. The share
    is the sum of ``p min(r A, clip(r, lower, upper) A)`` over ``A > 0``, divided by the sum of its
    absolute values over all tokens, p being the old probability.

    The numbers are those of section 5.1. The code released with the paper (WooooDyy/BAPO) differs:
    it raises the lower bound first, leaves p out, and says 0.5 for the target.

    Args:
        lower: Least and greatest lower bound of the ratio, in [0, 1].
        upper: Least and greatest upper bound of the ratio, finite and at least 1.
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

    def step(
        self,
        advantages: ArrayLike,
        log_ratio: ArrayLike,
        old_log_prob: ArrayLike,
        *,
        all_reduce: Callable[[Float64Array], Float64Array] | None = None,
    ) -> None:
        """Finds the bounds of a batch, before its loss.

        An advantage of 0 counts for nothing; if all are, the bounds are the low ends. This runs on
        the CPU, on what numpy makes arrays of: tokens on a GPU have to be copied, for which the
        host waits once a step.

        Args:
            advantages: Advantages of the tokens that count: real and finite, any shape.
            log_ratio: Their log-ratios ``ln(new/old)``, the same shape.
            old_log_prob: Their old log-probabilities (natural), the same shape.
            all_reduce: From an array of sums over this rank's tokens, float64 [n], to the sums over
                all ranks, so that all find the same bounds. It is called once.

        Raises:
            InvalidTypeError: If an array does not hold real numbers.
            InvalidValueError: If the shapes differ or a value is NaN or infinite (an old
                log-probability may be -inf).
        """
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
        ratio = np.exp(np.clip(given["log_ratio"], -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        weight = np.exp(np.minimum(given["old_log_prob"], 0.0)) * np.abs(given["advantages"])
        positive, negative = given["advantages"] > 0.0, given["advantages"] < 0.0

        # Each bound acts on one sign, so that sums for every value of each cover all pairs.
        uppers = _values(self.upper, self.upper_step)
        lowers = _values(self.lower, self.lower_step)
        rising = [weight[positive] @ np.minimum(ratio[positive], upper) for upper in uppers]
        falling = [weight[negative] @ np.maximum(ratio[negative], lower) for lower in lowers]
        sums = np.array(rising + falling)
        if all_reduce is not None:
            sums = all_reduce(sums)
        gain, loss = sums[: len(uppers)], sums[len(uppers) :]
        # The upper bound moves first, over all of its range, and then the lower one.
        gains = np.concatenate([gain, np.full(len(lowers) - 1, gain[-1])])
        losses = np.concatenate([np.full(len(uppers) - 1, loss[0]), loss])
        enough = gains >= self.target * (gains + losses)
        moves = int(np.argmax(enough)) if enough.any() else len(enough) - 1
        self._move(lowers[max(moves - (len(uppers) - 1), 0)], uppers[min(moves, len(uppers) - 1)])

    def _move(self, lower: float, upper: float) -> None:
        self._bounds = (lower, upper)
        self._change(_interval(lower, upper))

    def state_dict(self) -> dict[str, Any]:
        """Returns the two bounds of the ratio."""
        return dict(zip(("lower", "upper"), self._bounds, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the two bounds; see `Schedule.load_state_dict`."""
        bounds = _entries(state, "lower", "upper")
        for name, (least, greatest) in (("lower", self.lower), ("upper", self.upper)):
            if not least <= bounds[name] <= greatest:
                raise InvalidValueError(
                    f"{name} must be from {least} to {greatest}, got {bounds[name]}"
                )
        self._move(bounds["lower"], bounds["upper"])

    def __repr__(self) -> str:
        return f"Bapo({self.lower}, {self.upper}, target={self.target})"


def _range(
    argument: str, ends: tuple[float, float], least: float, most: float
) -> tuple[float, float]:
    if not isinstance(ends, tuple) or len(ends) != 2:
        raise InvalidTypeError(f"{argument} must be a pair (least, greatest), got {ends!r}")
    low, high = (real_number(argument, end) for end in ends)
    if not (least <= low <= high <= most and high < math.inf):
        raise InvalidValueError(
            f"{argument} must be a pair that rises and lies in [{least}, {most}], got {ends}"
        )
    return low, high


def _values(ends: tuple[float, float], step: float) -> list[float]:
    """From the low end on by steps, as far as they stay in range."""
    low, high = ends
    # 36 steps of 0.05 are to lead from 1.2 to 3, which their rounded sum exceeds.
    steps = int((high - low) / step * (1.0 + 1e-12))
    return [min(low + k * step, high) for k in range(steps + 1)]


def _interval(lower: float, upper: float) -> Clip:
    return Clip(1.0 - lower, max(upper - 1.0, 0.0))


def _entries(state: Mapping[str, Any], *names: str) -> dict[str, float]:
    """The entries of a state, which must be these and no others, all of them numbers."""
    if not isinstance(state, Mapping):
        raise InvalidTypeError(f"state must be a mapping, got {type(state).__name__}")
    if set(state) != set(names):
        raise InvalidValueError(
            f"state must have the entries {list(names)}, got {[str(name) for name in state]}"
        )
    for name in names:
        real_number(name, state[name])
        if not math.isfinite(state[name]):
            raise InvalidValueError(f"{name} must be finite, got {state[name]}")
    return dict(state)
