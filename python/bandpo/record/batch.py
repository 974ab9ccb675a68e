"""A batch that a training loop gives: its checks, its copy on the host, and its tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bandpo.check import BoolArray
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.record.reservoir import Columns
from bandpo.record.tokens import UNKNOWN, Int64Array

Array = Any
"""A numpy array or a tensor of torch, on any device."""

FLOATS = ("float32", "float64", "bfloat16", "float16")

_OF_TOKENS = ("old_log_prob", "log_prob", "response_mask", "rollout_log_prob")
"""Arguments with one number a token."""
_OF_SEQUENCES = ("reward", "sequence")
"""Arguments with one number a sequence or a token, also where tokens are packed."""
_FLOATING = ("old_log_prob", "log_prob", "advantages", "rollout_log_prob")


class Batch(NamedTuple):
    """The arguments of a call, whose shapes and dtypes fit together; made by `Batch.of`."""

    arrays: dict[str, Array]  # by argument
    shape: tuple[int, ...]  # of the tokens, [B, T] or packed [N]
    dtype: str  # the coarser one of the old and the new log-probs

    @classmethod
    def of(cls, **arguments: Array | None) -> Batch:
        """Returns the batch of a call, without reading a value.

        Raises:
            InvalidTypeError: If an argument is no array, or has another dtype.
            InvalidValueError: If shapes do not fit.
        """
        arrays = {name: array for name, array in arguments.items() if array is not None}
        dtypes = {name: _dtype(name, array) for name, array in arrays.items()}
        shape = _without_last_1(arrays["log_prob"])
        if len(shape) not in (1, 2):
            raise InvalidValueError(
                f"log_prob must have shape [B, T], [B, T, 1] or, packed, [N], "
                f"got {tuple(arrays['log_prob'].shape)}"
            )
        sequences = _shapes_of_sequences(arrays, shape)
        for name, array in arrays.items():
            if name == "cu_seqlens":
                continue
            allowed = [shape, *(sequences if _may_be_of_sequences(name, shape) else ())]
            if _without_last_1(array) not in allowed:
                raise InvalidValueError(
                    f"{name} must have shape {' or '.join(map(str, allowed))} like log_prob's "
                    f"{tuple(arrays['log_prob'].shape)}, got {tuple(array.shape)}"
                )
        old, new = dtypes["old_log_prob"], dtypes["log_prob"]
        return cls(arrays, shape, old if _DIGITS[old] < _DIGITS[new] else new)

    def on_host(self) -> HostBatch:
        """Returns a copy on the host, for which nothing waits yet."""
        copies: dict[str, Callable[[], NDArray[Any]]] = {}
        for name, array in self.arrays.items():
            if isinstance(array, np.ndarray):
                copies[name] = partial(np.asarray, array.copy())
            else:
                from bandpo.record.tensors import host_copy  # torch is optional

                copies[name] = host_copy(array)
        return HostBatch(copies, self.shape)


_DIGITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
"""Bits of the fraction of a float."""


class HostBatch(NamedTuple):
    """The arguments of a call on their way to the host."""

    copies: dict[str, Callable[[], NDArray[Any]]]  # each waits for the array
    shape: tuple[int, ...]

    def tokens(self, first_sequence: int, stride: int) -> tuple[Columns, int]:
        """Returns the tokens that count, and the number of sequences of the batch.

        Args:
            first_sequence: Number of the first sequence, where the call gave none.
            stride: Difference between the numbers of two.

        Raises:
            InvalidValueError: If ``cu_seqlens`` are no offsets of the tokens, or a mask of floats
                has another number than 0 and 1.
        """
        arrays = {name: copy() for name, copy in self.copies.items()}
        total = int(np.prod(self.shape))
        token = np.flatnonzero(_checked_mask(arrays.pop("response_mask").reshape(-1)))
        offsets = arrays.pop("cu_seqlens", None)
        if len(self.shape) == 2:
            sequences, width = self.shape
            starts = np.arange(sequences, dtype=np.int64) * width
        elif offsets is not None:
            starts = _checked_offsets(offsets, total)[:-1]
            sequences = len(starts)
        else:
            sequences, starts = 0, np.empty(0, np.int64)
        row = np.searchsorted(starts, token, side="right") - 1
        known = sequences > 0
        columns: Columns = {
            "sequence": first_sequence + stride * row if known else np.full_like(token, UNKNOWN),
            "position": token - starts[row] if known else np.full_like(token, UNKNOWN),
        }
        for name, array in arrays.items():
            by_row = array.size == sequences and _may_be_of_sequences(name, self.shape)
            values = array.reshape(-1)[row if by_row else token]
            columns[name] = values.astype(_stored_dtype(name, array.dtype), copy=False)
        return columns, sequences


def _stored_dtype(name: str, dtype: np.dtype[Any]) -> type[np.generic]:
    """The dtype of a column: halves become float32, because few readers have them."""
    if name == "sequence":
        return np.int64
    return np.float32 if str(dtype) in ("float32", "bfloat16", "float16") else np.float64


def _dtype(name: str, array: Array) -> str:
    """The name of the dtype of an argument."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or not (isinstance(array, np.ndarray) or hasattr(array, "detach")):
        raise InvalidTypeError(
            f"{name} must be a tensor or a numpy array, got {type(array).__name__}"
        )
    found = str(dtype).removeprefix("torch.")
    kind = found.rstrip("0123456789")
    if name in _FLOATING and found not in FLOATS:
        raise InvalidTypeError(f"{name} must be {', '.join(FLOATS[:-1])} or float16, got {found}")
    if name in ("sequence", "cu_seqlens") and kind not in ("int", "uint"):
        raise InvalidTypeError(f"{name} must hold whole numbers, got dtype {found}")
    if kind not in ("bool", "int", "uint", "float", "bfloat"):
        raise InvalidTypeError(f"{name} must hold real numbers, got dtype {found}")
    return found


def _without_last_1(array: Array) -> tuple[int, ...]:
    """A shape, without the last dimension of [B, T, 1]."""
    shape = tuple(array.shape)
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape


def _may_be_of_sequences(name: str, shape: tuple[int, ...]) -> bool:
    """Returns True if an argument may have one number a sequence."""
    return name in _OF_SEQUENCES or (name not in _OF_TOKENS and len(shape) == 2)


def _shapes_of_sequences(arrays: dict[str, Array], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of an argument with one number a sequence."""
    offsets = arrays.get("cu_seqlens")
    if len(shape) == 2:
        if offsets is not None:
            raise InvalidValueError("cu_seqlens must be left out unless tensors are packed, [N]")
        return [(shape[0], 1), (shape[0],)]
    if offsets is None:
        return []
    if len(offsets.shape) != 1 or offsets.shape[0] < 1:
        raise InvalidValueError(f"cu_seqlens must have shape [S + 1], got {tuple(offsets.shape)}")
    return [(int(offsets.shape[0]) - 1,)]


def _checked_mask(mask: NDArray[Any]) -> BoolArray:
    other = mask[(mask != 0) & (mask != 1)] if mask.dtype.kind == "f" else mask[:0]
    if other.size:
        raise InvalidValueError(f"response_mask must hold 0 and 1 if it is a float, got {other[0]}")
    return np.asarray(mask != 0)


def _checked_offsets(offsets: NDArray[Any], total: int) -> Int64Array:
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise InvalidValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {total}, "
            f"got {np.array2string(offsets, threshold=8)}"
        )
    return offsets
