"""Long exact calls: a signal stops them, and parts change no bit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import ArrayLike

from bandpo import Band, Clip, Divergence, PriceBand, Region, _core, generator, parts
from bandpo.check import Float64Array
from bandpo.region import Dcpo, sides

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals of Unix")

MINUTES = 40_000_000
"""Tokens of a call that takes minutes."""


class Stop(KeyboardInterrupt):
    """Raised by the signal's handler. No ``except Exception`` of a callable takes it."""


@contextmanager
def signal_soon(seconds: float = 0.2) -> Iterator[None]:
    """Raises `Stop` in the main thread."""

    def handler(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def tokens(count: int) -> Float64Array:
    return -np.random.default_rng(0).exponential(3.0, count)


def square(u: Float64Array) -> Float64Array:
    return np.asarray((u - 1.0) ** 2)


class Stored(Region):
    """Bounds that take no time, so that their ratios do."""

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        found = np.asarray(logp)
        return found, found


CALLS: dict[str, Callable[[Float64Array], object]] = {
    "bounds": lambda logp: Band("vajda:1.37", 0.05).log_bounds(logp),
    "bounds by vectors": lambda logp: Band("jensen-shannon", 0.05).log_bounds(logp),
    "bounds of an expression": lambda logp: Band(
        Divergence.from_expression("(u - 1)^2"), 0.05
    ).log_bounds(logp),
    "bounds of a function": lambda logp: Band(Divergence.from_callable(square), 0.05).log_bounds(
        logp
    ),
    "membership": lambda logp: Band("vajda:1.37", 0.05).contains(logp, logp / 64.0),
    "prices": lambda logp: PriceBand("kl", 0.1).log_bounds(logp),
    "membership of a price": lambda logp: PriceBand("kl", 0.1).contains(logp, logp / 64.0),
    "diagnosis": lambda logp: Band("kl", 0.05).diagnose(logp),
    "divergences of a function": lambda logp: [
        Divergence.from_callable(square).between(logp, logp / 64.0) for _ in range(9)
    ],
    "membership of a clip": lambda logp: [Clip(0.2).contains(logp, logp / 64.0) for _ in range(99)],
    "closed form": lambda logp: [Dcpo().bounds(logp) for _ in range(99)],
    "ratios": lambda logp: [Stored().bounds(logp) for _ in range(999)],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_signal_stops_a_call_that_would_take_minutes(name: str) -> None:
    call = CALLS[name]
    before = call(tokens(100))
    logp = tokens(MINUTES)
    with pytest.raises(Stop), signal_soon():
        call(logp)
    assert repr(call(tokens(100))) == repr(before)


def test_a_signal_stops_a_native_loss_of_many_tokens() -> None:
    logp = np.full(30_000_000, -1.0, np.float32)
    mask, gradient = np.ones(len(logp), np.uint8), np.full_like(logp, 7.0)
    one, bounds = np.ones(1, np.float32), np.array([-0.2, 0.2], np.float32)

    def call() -> None:
        batch = (logp, logp, None, one, mask, bounds, len(logp))
        _core.policy_loss(*batch, "min-clip", [], False, None, 1.0, None, gradient)

    with pytest.raises(Stop), signal_soon(0.01):
        call()
    assert gradient[-1] == 7.0
    call()
    assert (gradient == -1.0).all()


def test_a_signal_stops_a_lookup_of_many_tokens() -> None:
    logp = np.full(30_000_000, -1.0, np.float32)
    table = Band("kl", 0.05).table()
    lower, upper = np.full(len(logp), 7.0), np.full(len(logp), 7.0)
    with pytest.raises(Stop), signal_soon(0.01):
        table._core.log_bounds(logp, lower, upper)
    assert upper[-1] == 7.0
    table._core.log_bounds(logp, lower, upper)
    assert np.array_equal([lower[-1], upper[-1]], np.ravel(table.log_bounds(logp[:1])))


def test_another_thread_is_not_stopped() -> None:
    found = []
    thread = threading.Thread(
        target=lambda: found.append(Band("kl", 0.05).log_bounds(tokens(10**6)))
    )
    thread.start()
    with pytest.raises(Stop), signal_soon():
        signal.pause()
    thread.join()
    assert len(found[0][0]) == 10**6


@pytest.mark.parametrize("name", ["bounds", "bounds by vectors", "membership", "prices"])
def test_parts_change_no_bit(name: str) -> None:
    logp = tokens(50_000)
    whole = np.atleast_2d(np.asarray(CALLS[name](logp)))
    pieces = [np.atleast_2d(np.asarray(CALLS[name](logp[start:]))) for start in (1, 2047, 10_241)]
    for start, piece in zip((1, 2047, 10_241), pieces, strict=True):
        assert np.array_equal(whole[:, start:], piece, equal_nan=True)


def test_deltas_go_with_their_tokens() -> None:
    logp, deltas = tokens(20_000), np.random.default_rng(1).uniform(0.01, 0.2, 20_000)
    whole = np.array(Band("kl", deltas).log_bounds(logp))
    for part in (slice(0, 3000), slice(9000, 20_000)):
        found = np.array(Band("kl", deltas[part]).log_bounds(logp[part]))
        assert np.array_equal(whole[:, part], found)


@pytest.mark.parametrize("call", [Dcpo().bounds, Stored().bounds])
def test_parts_of_numpy_change_no_bit_and_take_every_shape(
    call: Callable[[Float64Array], tuple[Float64Array, Float64Array]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logp = np.append(tokens(1000), [-np.inf, np.nan, -800.0, -0.0])
    shapes = (logp, logp.reshape(4, -1).T, np.broadcast_to(logp, (3, len(logp))), logp[:0], logp[0])
    whole = [call(values) for values in shapes]
    monkeypatch.setattr(parts, "_PART", 7)
    for values, wanted in zip(shapes, whole, strict=True):
        for a, b in zip(call(values), wanted, strict=True):
            assert a.shape == values.shape
            assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize(
    "call",
    [
        Clip(0.2).log_bounds,
        lambda logp: Clip(0.2).contains(logp, logp / 8.0),
        lambda logp: Dcpo().contains(logp, logp / 8.0),
        (Clip(0.2) | Dcpo()).log_bounds,
        (Clip(0.2) & Dcpo()).log_bounds,
        lambda logp: (Clip(0.2) | Dcpo()).contains(logp, logp / 8.0),
        lambda logp: (Clip(0.2) & Dcpo()).contains(logp, logp / 8.0),
        lambda logp: sides(lower=Clip(0.2), upper=Dcpo()).contains(logp, logp / 8.0),
    ],
)
def test_parts_of_regions_change_no_bit(
    call: Callable[[Float64Array], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    logp = np.append(tokens(1000), [-np.inf, np.nan, -800.0, -0.0]).reshape(4, -1)
    whole = np.asarray(call(logp))
    monkeypatch.setattr(parts, "_PART", 7)
    found = np.asarray(call(logp))
    assert found.dtype == whole.dtype
    assert np.array_equal(found, whole, equal_nan=whole.dtype != np.bool_)


def test_blocks_of_a_function_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    divergence = Divergence.from_callable(square)
    band, logp = Band(divergence, np.linspace(0.01, 0.2, 1000)), tokens(1000)
    ratios = np.random.default_rng(1).normal(size=1000)
    whole = divergence.between(logp, ratios), band.contains(logp, ratios)
    monkeypatch.setattr(generator, "BLOCK", 7)
    found = divergence.between(logp, ratios), band.contains(logp, ratios)
    assert np.array_equal(found, whole, equal_nan=True)


def test_a_signal_stops_a_verification_between_few_values() -> None:
    slow = Divergence.from_expression("(u - 1)^2 + 0.001 * (1 - cos(u - 1))")
    table = Band(slow, 0.05).table()
    reports: list[int] = []
    with pytest.raises(Stop), signal_soon():
        table.verify(progress=lambda done, _: reports.append(done))
    assert reports == []  # it came within the first 2^20 values, which take 14 s
    assert table.max_error == Band(slow, 0.05).table().max_error


def test_parts_of_a_verification_change_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Band("kl", 0.05).table()
    whole = table.verify(5000)
    monkeypatch.setattr("bandpo.table.verification._PART", 7)
    assert table.verify(5000) == whole
    assert table.verify(5000).max_error == whole.max_error
