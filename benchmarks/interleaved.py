"""Ratios of times, insensitive to noise of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

BATCH_SECONDS = 0.02
"""Time of a batch of repeated calls, far above the resolution of the clock."""

MIN_ROUNDS = 5


class Comparison(NamedTuple):
    """Medians over rounds; a round times one side right after the other."""

    ours: float  # seconds a call
    peer: float  # seconds a call
    ratio: float  # ours over the peer's within a round
    low: float  # quartiles of the ratio
    high: float


def compare(
    ours: Callable[[], object], peer: Callable[[], object], *, seconds: float = 2.0
) -> Comparison:
    """Times two calls in turns.

    A disturbance longer than a round slows both sides, so that the ratio within a round hardly
    changes. The side that begins alternates.

    Args:
        ours: The call of bandpo.
        peer: The call that it is compared with. Both are called once before they are timed.
        seconds: Approximate duration; ``MIN_ROUNDS`` rounds are run in any case.
    """
    calls = (ours, peer)
    numbers = [_repeats(call) for call in calls]
    rounds: list[tuple[float, float]] = []
    deadline = time.perf_counter() + seconds
    while len(rounds) < MIN_ROUNDS or time.perf_counter() < deadline:
        times = [0.0, 0.0]
        for side in (0, 1) if len(rounds) % 2 == 0 else (1, 0):
            times[side] = _time(calls[side], numbers[side])
        rounds.append((times[0], times[1]))
    ratios = [own / other for own, other in rounds]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return Comparison(
        statistics.median(own for own, _ in rounds),
        statistics.median(other for _, other in rounds),
        ratio,
        low,
        high,
    )


def median_seconds(call: Callable[[], object], *, seconds: float = 1.0) -> float:
    """Returns the median time of a call in seconds, after one call that is not timed."""
    number = _repeats(call)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < MIN_ROUNDS or time.perf_counter() < deadline:
        times.append(_time(call, number))
    return statistics.median(times)


def _repeats(call: Callable[[], object]) -> int:
    call()  # the first call may build, compile or allocate
    return max(1, round(BATCH_SECONDS / _time(call, 1)))


def _time(call: Callable[[], object], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number
