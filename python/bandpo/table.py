"""A band's bounds as a lookup table that is verified, saved and read by every backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bandpo import _core
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.region import Band, Float64Array, Region, as_float64


class MaxError(NamedTuple):
    """Largest absolute error beyond one float32 ulp of the bound, where log bounds are in +-20."""

    log_upper: float
    lower: float


class BandTable(Region):
    """A tabulated region; make one with `Band.table` or `BandTable.load`.

    It holds ``log_upper`` and ``lower`` over ``-logp`` in float32, as cubic Hermite pieces whose
    cell is read off the bits of the float: a lookup has no exponential, logarithm, division or
    search. A table can be pickled; on a disk it is a safetensors file.
    """

    def __init__(self, core: _core.BandTable) -> None:
        if not isinstance(core, _core.BandTable):
            raise InvalidTypeError(
                "make a BandTable with Band(...).table() or BandTable.load(path)"
            )
        self._core = core

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the tabulated ``(log_lower, log_upper)``; see `Region.log_bounds`.

        ``logp`` is rounded to float32 first. ``lower`` is what is tabulated, so ``log_lower`` has
        an absolute error in ``exp(log_lower)``.
        """
        tokens = as_float64("logp", logp)
        log_lower, log_upper = self._core.log_bounds(np.ascontiguousarray(tokens).reshape(-1))
        return log_lower.reshape(tokens.shape), log_upper.reshape(tokens.shape)

    def table(self) -> BandTable:
        """Returns the table itself."""
        return self

    @property
    def band(self) -> Band:
        """The band that was tabulated."""
        return Band(dict(self._core.metadata)["divergence"], self._core.delta)

    @property
    def words(self) -> NDArray[np.int32]:
        """The image that every backend reads: a copy, one-dimensional."""
        return self._core.words()

    @property
    def nbytes(self) -> int:
        """Bytes of the image."""
        return self._core.nbytes

    @property
    def max_error(self) -> MaxError:
        """Largest error found, by three samples in every cell or by the last `verify`."""
        return MaxError(*self._core.max_error)

    @property
    def metadata(self) -> dict[str, str]:
        """What a saved file says of itself, without its checksum."""
        return dict(self._core.metadata)

    def verify(
        self,
        samples: int = 1_000_000,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> BandTable:
        """Returns this table with `max_error` measured afresh against the exact solver.

        Args:
            samples: How many float32 values of ``-logp`` to look at, at least 2, evenly spaced in
                their bit patterns over [0, 104], both ends included.
            progress: Called with the number of values done, from time to time.

        Raises:
            InvalidValueError: If ``samples`` is below 2.
        """
        if samples < 2:
            raise InvalidValueError(f"samples must be at least 2, got {samples}")
        return BandTable(self._core.verified(samples, progress))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to a safetensors file, which appears whole or not at all.

        Raises:
            OutputPathError: If the file cannot be written.
        """
        self._core.save(os.fspath(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BandTable:
        """Reads a table that `save` wrote.

        Raises:
            InputPathError: If the file cannot be read.
            TableFileError: If it is truncated, altered, foreign or newer; nothing is read then.
        """
        return cls(_core.BandTable.load(os.fspath(path)))

    def __repr__(self) -> str:
        return f"BandTable({self.band!r}, nbytes={self.nbytes}, max_error={tuple(self.max_error)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BandTable):
            return NotImplemented
        return self._core.to_bytes() == other._core.to_bytes()

    def __hash__(self) -> int:
        return hash(self._core.to_bytes())

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        return _from_bytes, (self._core.to_bytes(),)


def _from_bytes(data: bytes) -> BandTable:
    return BandTable(_core.BandTable.from_bytes(data))
