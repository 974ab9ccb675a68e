"""Optimiser steps, counted for a loss that its trainer tells of none."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from bandpo.error import ResumeWarning
from bandpo.schedule import Cosine, Linear, ScheduledBand


class OptimizerSteps:
    """Moves the schedule of a band after each optimiser step that follows a call of the loss.

    The micro-batches of a step count once. A step that a trainer leaves out does not count, nor
    does an optimiser that steps without a call of the loss between, such as that of a critic;
    only a critic's step after one that was left out counts in its place. Optimisers have to be
    subclasses of torch's.

    A trainer's checkpoint has no state of the loss, but Adam's count of steps. So after the first
    step in a process the schedule goes on from there, with a `bandpo.error.ResumeWarning`: the step
    before had the first delta of the schedule. An optimiser without a count starts it anew.

    Args:
        source: The band. Its schedule must be a number of steps, so that every rank has the same.
    """

    def __init__(self, source: ScheduledBand) -> None:
        self._source = source
        self._is_due = False
        self._taken = 0
        self._is_registered = False

    def loss_is_called(self) -> None:
        """Lets the next optimiser step count."""
        self._is_due = True
        if not self._is_registered:
            self._is_registered = True
            _register(self)

    def optimizer_has_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Counts the step, if the loss was called before it."""
        if not self._is_due:
            return
        self._is_due = False
        self._taken += 1
        schedule = self._source.schedule
        if not isinstance(schedule, (Linear, Cosine)):
            self._source.step()
            return
        if self._taken == 1:
            self._resume(optimizer)
        self._source.load_state_dict({"taken": min(self._taken, schedule.steps)})

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        counted = _count_of(optimizer)
        if counted is None or counted == 1:
            return
        self._taken = counted
        warnings.warn(
            f"the optimiser has taken {counted} steps, all but one before this process began, so "
            f"that the schedule of delta goes on from there; this one step had the first delta, "
            f"{self._source.schedule.value:g}",
            ResumeWarning,
            stacklevel=2,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_is_registered": False}  # in another process


def _register(steps: OptimizerSteps) -> None:
    held = weakref.ref(steps)

    def stepped(optimizer: torch.optim.Optimizer, *_: object) -> None:
        found = held()
        if found is not None:
            found.optimizer_has_stepped(optimizer)

    handle = register_optimizer_step_post_hook(stepped)
    weakref.finalize(steps, handle.remove)


def _count_of(optimizer: torch.optim.Optimizer) -> int | None:
    """The number of steps that an optimiser has counted, in the state of a parameter or a group."""
    for place in (*optimizer.state.values(), *optimizer.param_groups):
        if "step" in place:
            return int(place["step"])
    return None
