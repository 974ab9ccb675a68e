"""Numbers that change between optimiser steps, such as a delta."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from bandpo.check import nonnegative_number, positive_number, real_number
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.schedule.state import entries


class Schedule(ABC):
    """A number that changes from step to step, such as a delta."""

    @property
    @abstractmethod
    def value(self) -> float:
        """The number now."""

    @abstractmethod
    def step(self, entropy: float | None = None) -> None:
        """Advances by one optimiser step.

        Args:
            entropy: Mean entropy of the policy over the tokens of the batch, finite and at least 0.
                `EntropyTargeted` needs it, the others ignore it. All ranks have to pass the same
                number, that of the whole batch. ``Metrics.merge(parts, group=group)["entropy"]`` of
                `bandpo.loss.Metrics` estimates it.

        Raises:
            InvalidTypeError: If the entropy is needed and is not a real number.
            InvalidValueError: If it is out of range, or the schedule is past its end.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns its state as plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that ``state_dict`` returned.

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
        """Accepts an empty state; see `Schedule.load_state_dict`."""
        entries(state)

    def __repr__(self) -> str:
        return f"Constant({self._value})"


class _Ramp(Schedule):
    """From ``start`` to ``end`` in a number of steps."""

    def __init__(self, start: float, end: float, steps: int, *, hold: bool = False) -> None:
        self.start = positive_number("start", start)
        self.end = positive_number("end", end)
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise InvalidTypeError(f"steps must be an int, got {type(steps).__name__}")
        if steps < 1:
            raise InvalidValueError(f"steps must be at least 1, got {steps}")
        if not isinstance(hold, bool):
            raise InvalidTypeError(f"hold must be a bool, got {type(hold).__name__}")
        self.steps = steps
        self.hold = hold
        self._taken = 0

    @abstractmethod
    def _share(self, progress: float) -> float:
        """Returns the share of the way after this share of the steps."""

    @property
    def value(self) -> float:
        """The number after the steps taken so far; ``start`` before the first."""
        share = self._share(self._taken / self.steps)
        return (1.0 - share) * self.start + share * self.end

    def step(self, entropy: float | None = None) -> None:
        """Advances by one step; see `Schedule.step`."""
        if self._taken >= self.steps:
            if self.hold:
                return
            raise InvalidValueError(
                f"all {self.steps} steps are taken and the value is {self.end}; "
                f"give the schedule more steps, or hold=True, or stop calling step"
            )
        self._taken += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps taken."""
        return {"taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the number of steps taken; see `Schedule.load_state_dict`."""
        taken = entries(state, "taken")["taken"]
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
        hold: Keep the last number in steps after these, which are an error otherwise.

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
        hold: Keep the last number in steps after these, which are an error otherwise.

    Raises:
        InvalidTypeError: If an argument has the wrong type.
        InvalidValueError: If it is out of range.
    """

    def _share(self, progress: float) -> float:
        return 0.5 - 0.5 * math.cos(math.pi * progress)


class EntropyTargeted(Schedule):
    """A number that grows while the policy's entropy is below a target, and shrinks above it.

    Each step multiplies it by ``exp(rate * x)``, where x is the relative shortfall
    ``(target - entropy) / target``, limited to [-1, 1], and keeps it from ``min_value`` to
    ``max_value``. So no step changes it by more than a factor of ``e^rate``. This rule is not
    published elsewhere, and a wider band need not raise the entropy of a policy.

    Args:
        start: The number before the first step.
        target: The entropy to reach, above 0, in the unit of the entropy that `step` takes.
        rate: Max change of the logarithm of the number in a step, finite and above 0.
        min_value: Min of the number, finite and above 0.
        max_value: Max of the number, finite and at least ``min_value``.

    Raises:
        InvalidTypeError: If an argument is not a real number.
        InvalidValueError: If it is out of range.
    """

    def __init__(
        self, start: float, *, target: float, rate: float, min_value: float, max_value: float
    ) -> None:
        self.target = positive_number("target", target)
        self.rate = positive_number("rate", rate)
        self.min_value = positive_number("min_value", min_value)
        self.max_value = positive_number("max_value", max_value)
        if self.min_value > self.max_value:
            raise InvalidValueError(
                f"min_value must be at most max_value = {max_value}, got {min_value}"
            )
        self._value = self._in_range("start", start)

    @property
    def value(self) -> float:
        """The number after the steps taken so far."""
        return self._value

    def step(self, entropy: float | None = None) -> None:
        """Moves the number towards the target; see `Schedule.step`."""
        measured = nonnegative_number("entropy", entropy)
        shortfall = max((self.target - measured) / self.target, -1.0)
        changed = self._value * math.exp(self.rate * shortfall)
        self._value = min(max(changed, self.min_value), self.max_value)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number."""
        return {"value": self._value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the number; see `Schedule.load_state_dict`."""
        self._value = self._in_range("value", entries(state, "value")["value"])

    def __repr__(self) -> str:
        return f"EntropyTargeted({self._value}, target={self.target}, rate={self.rate})"

    def _in_range(self, argument: str, value: float) -> float:
        number = real_number(argument, value)
        if not self.min_value <= number <= self.max_value:
            raise InvalidValueError(
                f"{argument} must be from min_value = {self.min_value} "
                f"to max_value = {self.max_value}, got {value}"
            )
        return number
