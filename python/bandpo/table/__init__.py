"""`BandTable`: the bounds of a region as a verified lookup table, which every backend reads."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bandpo import _core
from bandpo.check import Float64Array, check_log_probs, check_path, real_array
from bandpo.error import BandpoError, InvalidTypeError, InvalidValueError, TableFileError
from bandpo.region import Band, Region, from_description

TARGET = 1e-6
"""Max error of a table: absolute, beyond one float32 ulp of the bound."""


class TableAccuracyWarning(UserWarning):
    """A table was built whose error is above `TARGET`; its metadata holds the error."""


class MaxError(NamedTuple):
    """Max absolute error beyond one float32 ulp of the bound, where log bounds are in +-20."""

    log_upper: float
    lower: float


class BandTable(Region):
    """A tabulated region; make one with `Region.table` or `BandTable.load`.

    It holds ``log_upper`` and ``lower`` over ``-logp`` in float32, as cubic Hermite pieces. The
    bits of the float give the cell, so that a lookup needs no exponential, logarithm, division or
    search. A table pickles; its file is in the safetensors format.
    """

    def __init__(self, core: _core.BandTable) -> None:
        if not isinstance(core, _core.BandTable):
            raise InvalidTypeError(
                "make a BandTable with Band(...).table() or BandTable.load(path)"
            )
        self._core = core

    def log_bounds(self, logp: ArrayLike) -> tuple[Float64Array, Float64Array]:
        """Returns the tabulated ``(log_lower, log_upper)``; see `Region.log_bounds`.

        ``logp`` is rounded to float32 first. The table holds ``lower``, so that the error of
        ``log_lower`` is absolute in ``exp(log_lower)``.
        """
        tokens = real_array("logp", logp)
        check_log_probs("logp", tokens)
        if tokens.dtype != np.float32:
            tokens = tokens.astype(np.float64, copy=False)
        log_lower, log_upper = np.empty(tokens.shape), np.empty(tokens.shape)
        self._core.log_bounds(np.ascontiguousarray(tokens), log_lower, log_upper)
        return log_lower, log_upper

    @property
    def per_token(self) -> bool:
        """False; see `Region.per_token`."""
        return False

    def table(self) -> BandTable:
        """Returns the table itself."""
        return self

    @classmethod
    def build(cls, region: Region) -> BandTable:
        """Tabulates a region; `Region.table` does so once and keeps the table.

        Warns with `TableAccuracyWarning` if the error found is above `TARGET`.

        Raises:
            InvalidValueError: If a delta is an array, or a side has more than eight smooth pieces.
        """
        core = _core.BandTable.build(
            region.curves(False),
            region.curves(True),
            json.dumps(region.describe(), sort_keys=True),
            _exact(region),
        )
        table = cls(core)
        if max(table.max_error) > TARGET:
            warnings.warn(
                f"the table of {region!r} is off by {max(table.max_error):.1e}, above {TARGET:g}",
                TableAccuracyWarning,
                stacklevel=2,
            )
        return table

    @property
    def region(self) -> Region:
        """The region that was tabulated.

        Raises:
            InvalidValueError: If it was made from a Python function, which a table cannot hold.
            TableFileError: If the file that it was read from describes no region.
        """
        try:
            return from_description(self.describe())
        except (BandpoError, MemoryError):
            raise
        except Exception as error:  # whatever a forged description makes of our constructors
            raise TableFileError(f"the table describes no region: {error}") from None

    def describe(self) -> dict[str, Any]:
        """Returns the description of the tabulated region; see `Region.describe`.

        Raises:
            TableFileError: If the file that it was read from describes no region.
        """
        try:
            description = json.loads(self._core.region)
        except (ValueError, RecursionError) as error:
            raise TableFileError(f"the table describes no region: {error}") from None
        if not isinstance(description, dict) or len(description) != 1:
            raise TableFileError("the table describes no region: not one kind with its numbers")
        return description

    @property
    def words(self) -> NDArray[np.int32]:
        """A copy of the image that every backend reads, int32 [n]."""
        return self._core.words()

    @property
    def nbytes(self) -> int:
        """Bytes of the image."""
        return self._core.nbytes

    @property
    def max_error(self) -> MaxError:
        """Max error found, by samples in every cell or by the last `verify`."""
        return MaxError(*self._core.max_error)

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of a saved file, without its checksum."""
        return dict(self._core.metadata)

    def verify(
        self,
        samples: int | None = 1_000_000,
        *,
        region: Region | None = None,
        progress: Callable[[int, int], object] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> BandTable:
        """Returns this table with `max_error` measured against the exact solver.

        Samples can only raise the error; a comparison of every float32 replaces it.

        Args:
            samples: Number of float32 values of ``-logp`` to compare, at least 2, evenly spaced in
                their bit patterns over [0, 104], both ends included; 16 values in every cell of the
                table come on top. None compares every float32, about 1.1e9, and sets the metadata
                to ``exhaustive``.
            region: The region to compare with; needed only if a Python function is part of it.
            progress: Called with the numbers of values done and in total, after every 2^20 values.
            checkpoint: A file that records the progress, from which the same call resumes after an
                interruption; removed at the end.

        Raises:
            InvalidTypeError: If an argument has the wrong type.
            InvalidValueError: If ``samples`` is below 2 or more than there are, or ``region`` is
                needed and not given.
            OutputPathError: If the checkpoint cannot be written.
        """
        count = _core.BandTable.checkable() if samples is None else samples
        if not isinstance(count, int):
            raise InvalidTypeError(f"samples must be an int or None, got {type(samples).__name__}")
        if not 2 <= count <= _core.BandTable.checkable():
            raise InvalidValueError(
                f"samples must be from 2 to {_core.BandTable.checkable()}, got {samples}"
            )
        if region is not None and not isinstance(region, Region):
            raise InvalidTypeError(f"region must be a Region, got {type(region).__name__}")
        exact = _exact(self.region if region is None else region)
        from bandpo.table.verification import verify  # its imports take longer than a table

        return BandTable(verify(self._core, exact, count, samples is None, progress, checkpoint))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to a safetensors file, which appears whole or not at all.

        Raises:
            InvalidTypeError: If ``path`` is no path.
            OutputPathError: If the file cannot be written.
        """
        check_path("path", path)
        self._core.save(os.fsdecode(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BandTable:
        """Reads a table that `save` wrote.

        Raises:
            InvalidTypeError: If ``path`` is no path.
            InputPathError: If the file cannot be read, is no regular file, or has more than 1 MiB.
            TableFileError: If it is truncated, altered, foreign or newer; nothing is read then.
        """
        check_path("path", path)
        return cls(_core.BandTable.load(os.fsdecode(path)))

    def __repr__(self) -> str:
        errors = tuple(self.max_error)
        return f"BandTable({self._core.region}, nbytes={self.nbytes}, max_error={errors})"

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


def _exact(region: Region) -> object:
    """Returns the exact bounds of the region, as the core takes them, to measure a table."""
    if isinstance(region, Band) and region.divergence.solver.core is not None:
        return region.divergence.solver.core, region.delta_low, region.delta_high
    return region.log_bounds


def __dir__() -> list[str]:
    return ["TARGET", "BandTable", "MaxError", "TableAccuracyWarning"]
