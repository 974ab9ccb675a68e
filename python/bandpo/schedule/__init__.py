"""Regions that change between optimiser steps: schedules of delta, and BAPO's controller.

A `Schedule` is a number that changes. A `RegionSource` is a region that does: `ScheduledBand`
follows a schedule, `Bapo`, `SecondMoment` and `Quantile` the batch. Call ``step`` of a schedule
once after each optimiser step. Call ``update`` of a source that learns from a batch before the loss
of that batch. Keep ``state_dict()`` in the checkpoint.

Each rank of a data-parallel job has a copy of its own, and all copies take the same steps.
``update(..., group=...)`` learns from the tokens of all ranks.
"""

from bandpo.schedule.bapo import Bapo
from bandpo.schedule.schedule import Constant, Cosine, EntropyTargeted, Linear, Schedule
from bandpo.schedule.source import RegionSource, ScheduledBand
from bandpo.schedule.statistics import Quantile, SecondMoment

__all__ = [
    "Bapo",
    "Constant",
    "Cosine",
    "EntropyTargeted",
    "Linear",
    "Quantile",
    "RegionSource",
    "Schedule",
    "ScheduledBand",
    "SecondMoment",
]


def __dir__() -> list[str]:
    return __all__
