"""Numbers and arrays of every type."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandpo import Band, BandTable, Clip, Divergence, PriceBand
from bandpo.region import Dcpo
from bandpo.spec import region_or_source_from_spec, schedule_from_spec
from reliability.choices import Choices

Array = NDArray[Any]

_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 0.05, 1e-320, 1e308, float("nan"), float("inf"), -0.0, 10**400, -(10**400), True),
    *(None, "0.1", b"1", [], [0.1], (0.1, 0.2), (0.1, None), {}, object(), 1j, Fraction(1, 20)),
    *(Fraction(10**400), Decimal("0.1"), Decimal("1e999"), np.float16(0.1), np.float32(0.1)),
    *(np.longdouble("1e4000"), np.array(0.1), np.array([0.1]), np.array([]), np.array("x"), 2**63),
    *(np.array(None), np.timedelta64(1, "s"), np.bool_(True), range(2), lambda u: u),
)

_MAKERS: tuple[Callable[..., Any], ...] = (
    lambda a, b: Band("kl", a),
    lambda a, b: Band("kl", (a, b)),
    lambda a, b: Band(a, 0.1),
    lambda a, b: Clip(a, b),
    lambda a, b: Clip.between(a, b),
    lambda a, b: Clip.from_log_ratio(a, b),
    lambda a, b: Clip.kl3(a),
    lambda a, b: Dcpo(a, b),
    lambda a, b: PriceBand("tv", (a, b)),
    lambda a, b: Clip(0.2).cap(a),
    lambda a, b: Band("kl", 0.1).at_least(a, b),
    lambda a, b: Band("kl", 0.1).calibrated("tv", p=a),
    lambda a, b: Divergence.from_expression("u*ln(u)-u+1", at_zero=a, slope_at_infinity=b),
    lambda a, b: Divergence(a),
    lambda a, b: BandTable.load(a),
    lambda a, b: region_or_source_from_spec(a),
    lambda a, b: schedule_from_spec(a),
)


def numbers(data: bytes) -> None:
    """Arguments of every type for constructors of regions and readers."""
    choices = Choices(data)
    choices.of(_MAKERS)(choices.of(_NUMBERS), choices.of(_NUMBERS))


_DTYPES = (
    *("f2", "f4", "f8", "g", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16"),
    *("O", "S3", "U3", "M8[s]", "m8[s]", "V4"),
)

_READERS: tuple[Callable[[Array], Any], ...] = (
    Band("kl", 0.05).log_bounds,
    Band("kl", 0.05).bounds,
    Band("jensen-shannon", (0.05, 0.1)).diagnose,
    Band("tv", 0.05).table().log_bounds,
    Band("renyi:2", 0.05).cap(10).log_bounds,
    PriceBand("kl", 0.1).log_bounds,
    Clip(0.2).log_bounds,
    Dcpo().log_bounds,
    lambda logp: Band("kl", 0.05).contains(logp, logp),
    lambda logp: PriceBand("kl", 0.05).contains(logp, -0.1),
    lambda logp: Band("kl", 0.05).table().contains(-0.3, logp),
    lambda logp: Divergence("kl").between(logp, logp),
    lambda logp: Band("kl", logp).log_bounds(-1.0),
    lambda logp: Band("tv", 0.1).log_bounds(logp.tolist()),
)


def array_of(choices: Choices) -> Array:
    """An array of any dtype, byte order, layout and shape."""
    shape = choices.of(((), (0,), (1,), (5,), (2, 3), (0, 4), (1, 1, 3), (3, 0, 2), (40,)))
    bits = np.frombuffer((choices.rest() * 9 + bytes(320))[: 8 * 40], np.uint8)
    dtype = np.dtype(choices.of(_DTYPES))
    count = max(1, int(np.prod(shape)))
    if choices.below(2) or dtype.kind not in "fiu":
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = -(bits[:count].astype("f8") / 16.0)
            array = array.astype(dtype) if dtype.kind != "V" else np.zeros(count, dtype)
    else:
        raw = np.resize(bits, count * dtype.itemsize)
        if dtype.char == "g":  # not every pattern of its bits is a number
            raw = np.zeros_like(raw)
        array = np.frombuffer(raw.tobytes(), dtype).copy()
    if array.dtype.kind == "f":  # numpy warns about a signalling NaN
        array[np.isnan(array)] = np.nan
    array = np.resize(array, shape).reshape(shape) if shape else array[:1].reshape(())
    kind = choices.below(7)
    if kind == 0 and array.dtype.itemsize > 1:
        array = array.astype(array.dtype.newbyteorder())
    elif kind == 1 and array.ndim:
        array = array[::-1]
    elif kind == 2 and array.ndim:
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif kind == 3:
        array = array.T
    elif kind == 4:
        array.flags.writeable = False
    elif kind == 5 and array.ndim:
        array = np.broadcast_to(array[:1], array.shape)
    elif kind == 6 and array.dtype.itemsize > 1:  # not aligned
        room = np.zeros(array.nbytes + 1, np.uint8)
        moved = room[1:].view(array.dtype) if array.dtype.kind != "O" else array.reshape(-1)
        moved = moved[: array.size].reshape(array.shape)
        moved[...] = array
        array = moved
    return np.asarray(array)


def arrays(data: bytes) -> None:
    """Arrays of every dtype and layout, against the same numbers in order."""
    choices = Choices(data)
    reader = choices.of(_READERS)
    array = array_of(choices)
    before = array.tobytes() if array.dtype.kind != "O" else b""
    try:
        found = reader(array)
    finally:
        assert array.dtype.kind == "O" or array.tobytes() == before, "the argument was changed"
    plain = np.array(array, array.dtype.newbyteorder("="), order="C")
    wanted = reader(plain)
    assert _bits(found) == _bits(wanted), "the layout changed the result"


def _bits(result: Any) -> bytes:
    parts = result if isinstance(result, tuple) else (result,)
    return b"".join(
        _bits(part) if isinstance(part, tuple) else np.asarray(part).tobytes() for part in parts
    )
