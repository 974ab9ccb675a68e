"""Regions that change between optimiser steps."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, NoReturn

from bandpo.divergence import Divergence
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.region import Band, Combined, Region
from bandpo.region.live import Live
from bandpo.schedule.schedule import Constant, Schedule


class RegionSource(Live, ABC):
    """A region that changes between optimiser steps; a loss reads it at each call.

    ``region`` is the same object until it changes. A change calls the subscribers with the new
    region, so that they can refill their tensors in place.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._is_stepped = False
        self._subscribers: list[weakref.ref[Callable[[Region], object]]] = []

    @property
    def region(self) -> Region:
        """The region now."""
        return self._region

    @property
    def is_stepped(self) -> bool:
        """True if it was ever stepped or restored, or needs no steps."""
        return self._is_stepped

    def subscribe(self, callback: Callable[[Region], object]) -> None:
        """Registers ``callback(region)``, which is called after each change.

        The reference is weak: a bound method lasts as long as its object, and a lambda that nothing
        else refers to is dropped at once. A copy starts without subscribers.
        """
        kind = weakref.WeakMethod if hasattr(callback, "__self__") else weakref.ref
        reference = kind(callback)
        if reference not in self._subscribers:
            self._subscribers.append(reference)

    def __or__(self, other: object) -> NoReturn:
        """Raises InvalidTypeError, as ``&`` does: only regions combine."""
        raise InvalidTypeError(
            f"{type(self).__name__} is no Region and combines with none; combine within it: "
            f"ScheduledBand(..., within=lambda band: band | ...), or cap= and at_least="
        )

    __ror__ = __and__ = __rand__ = __or__

    def _change(self, region: Region) -> None:
        self._is_stepped = True
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
        """Returns its state as plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state of ``state_dict`` and calls the subscribers; see `Schedule`."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_subscribers": []}


class ScheduledBand(RegionSource):
    """The band of a divergence with a delta that follows a schedule.

    The table of each delta is built at its first use, in 1 to 3 ms for a band and some milliseconds
    for combined regions. The last 64 tables are kept.

    >>> from bandpo.schedule import Linear
    >>> source = ScheduledBand("kl", Linear(0.1, 0.05, 100), cap=10)
    >>> source.step()
    >>> source.region
    (Band('kl', 0.0995) & Clip(1.0, 9.0))

    Args:
        divergence: A `bandpo.Divergence` or the name of one.
        schedule: The delta. Call ``step`` of this object, not of the schedule.
        cap: Max ratio of the region; see `Region.cap`. None for no cap.
        at_least: Min width of the region, applied before the cap: eps_low and eps_high of
            `Region.at_least`, or one number for both. None for no min width.
        within: A function from the band to a region, applied first, for regions that ``cap`` and
            ``at_least`` cannot make. It must be a function of a module if this object is pickled.

    Raises:
        InvalidTypeError: If an argument has the wrong type, or ``within`` returns no region.
        InvalidValueError: If the divergence is not known, or ``cap`` or ``at_least`` out of range.
    """

    def __init__(
        self,
        divergence: Divergence | str,
        schedule: Schedule,
        *,
        cap: float | None = None,
        at_least: float | tuple[float, float] | None = None,
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
        self.cap = cap
        self.at_least = at_least
        self.within = within
        super().__init__(self._now())

    @classmethod
    def of(cls, region: Region, schedule: Schedule) -> ScheduledBand:
        """Returns a region whose one band has a delta that follows a schedule.

        >>> from bandpo import Clip
        >>> from bandpo.schedule import Constant
        >>> ScheduledBand.of(Band("kl", 0.1).cap(10) | Clip(0.2), Constant(0.05)).region
        ((Band('kl', 0.05) & Clip(1.0, 9.0)) | Clip(0.2, 0.2))

        Args:
            region: A band, or a combination of regions in which there is one. Its delta is left
                out; the rest stays.
            schedule: The delta of both sides.

        Raises:
            InvalidTypeError: If an argument has the wrong type.
            InvalidValueError: If there is no band or more than one, or it has more than one delta.
        """
        if not isinstance(region, Region):
            raise InvalidTypeError(f"region must be a Region, got {type(region).__name__}")
        bands = _bands(region)
        if len(bands) != 1:
            raise InvalidValueError(
                f"region must have one band, whose delta follows the schedule, such as "
                f"(kl@0.05).cap(10), got {len(bands)} in {region!r}"
            )
        (band,) = bands
        if band.per_token or band.delta_low != band.delta_high:
            raise InvalidValueError(
                f"region must have a band of one delta, which the schedule replaces, got {band!r}"
            )
        return cls(band.divergence, schedule, within=_Around(region))

    def step(self, measured: float | None = None, /, *, entropy: float | None = None) -> None:
        """Advances the schedule by one step; see `Schedule.step`.

        Args:
            measured: The entropy by position, if it is not given by name.
            entropy: Mean entropy of the policy over the tokens of the batch, of all ranks.

        Raises:
            InvalidTypeError: If a whole number is given by position, as the number of a step is.
            InvalidValueError: If the entropy is given twice.
        """
        if isinstance(measured, Integral):
            raise InvalidTypeError(
                f"step takes the entropy of the policy, not the number of a step, got {measured}; "
                f"call step(), or step(entropy={measured}) if that is the entropy"
            )
        if measured is not None and entropy is not None:
            raise InvalidValueError(f"entropy must be given once, got {measured} and {entropy}")
        self.schedule.step(measured if entropy is None else entropy)
        self._change(self._now())

    def _now(self) -> Region:
        band = Band(self.divergence, self.schedule.value)
        region = band if self.within is None else self.within(band)
        if not isinstance(region, Region):
            raise InvalidTypeError(f"within must return a Region, got {type(region).__name__}")
        if self.at_least is not None:
            widths = self.at_least if isinstance(self.at_least, (tuple, list)) else [self.at_least]
            region = region.at_least(*widths)
        return region if self.cap is None else region.cap(self.cap)

    @property
    def is_stepped(self) -> bool:
        """True if it was ever stepped or restored, or its delta is constant."""
        return self._is_stepped or isinstance(self.schedule, Constant)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the schedule."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state of the schedule; see `Schedule.load_state_dict`."""
        self.schedule.load_state_dict(state)
        self._change(self._now())

    def __repr__(self) -> str:
        return f"ScheduledBand({self.divergence!r}, {self.schedule!r})"


def _bands(region: Region) -> list[Band]:
    """The bands that a region is made of."""
    if isinstance(region, Combined):
        return [band for part in region.parts for band in _bands(part)]
    return [region] if isinstance(region, Band) else []


class _Around:
    """A region as a function of its band; a class, because a function in a call has no pickle."""

    def __init__(self, region: Region) -> None:
        self._region = region

    def __call__(self, band: Band) -> Region:
        return _with_band(self._region, band)


def _with_band(region: Region, band: Band) -> Region:
    """The region with another band in the place of each."""
    if isinstance(region, Combined):
        return Combined(region.kind, *(_with_band(part, band) for part in region.parts))
    return band if isinstance(region, Band) else region
