"""Checks of arguments: numbers, arrays of numbers, and names out of a list."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bandpo.error import InputPathError, InvalidTypeError, InvalidValueError

Float64Array: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]


def real_number(argument: str, value: object) -> float:
    """Returns one real number as a float: a Python or numpy number, or a 0-dim array or tensor.

    Raises:
        InvalidTypeError: If it is none of these; the message names ``argument``.
        InvalidValueError: If it is a whole number beyond a float64.
    """
    # Float and int before Real, whose check takes a microsecond. A timedelta64 is a whole number
    # for Python.
    if isinstance(value, (float, int, Real)) and not isinstance(value, (bool, np.timedelta64)):
        try:
            return float(value)
        except OverflowError:  # a whole number or a fraction
            raise InvalidValueError(f"{argument} must be a number that a float64 holds") from None
    try:
        # The value of a masked element means nothing.
        array = np.asarray(None if np.ma.is_masked(value) else value)
    except (ValueError, TypeError, RuntimeError):
        array = np.asarray(None)
    if array.dtype.kind not in "fiu":
        raise InvalidTypeError(f"{argument} must be a real number, got {type(value).__name__}")
    if array.ndim != 0:
        raise InvalidTypeError(f"{argument} must be one number, got shape {array.shape}")
    return float(array)


def positive_number(argument: str, value: object) -> float:
    """Returns a finite real number above 0 as a float.

    Raises:
        InvalidTypeError: If it is not a real number.
        InvalidValueError: If it is not finite or not above 0.
    """
    number = real_number(argument, value)
    if not 0.0 < number < math.inf:
        raise InvalidValueError(f"{argument} must be finite and above 0, got {value}")
    return number


def nonnegative_number(argument: str, value: object) -> float:
    """Returns a finite real number that is at least 0 as a float.

    Raises:
        InvalidTypeError: If it is not a real number.
        InvalidValueError: If it is not finite or below 0.
    """
    number = real_number(argument, value)
    if not 0.0 <= number < math.inf:
        raise InvalidValueError(f"{argument} must be finite and at least 0, got {value}")
    return number


def whole_number(argument: str, value: object, minimum: int) -> int:
    """Returns a whole number of Python or numpy, which is not below a minimum, as an int.

    Raises:
        InvalidTypeError: If it is none.
        InvalidValueError: If it is below ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidTypeError(f"{argument} must be a whole number, got {type(value).__name__}")
    if value < minimum:
        raise InvalidValueError(f"{argument} must be at least {minimum}, got {value}")
    return int(value)


def real_array(argument: str, values: ArrayLike) -> NDArray[Any]:
    """Returns real numbers as an array of their own dtype.

    Raises:
        InvalidTypeError: If ``values`` is not made of real numbers; the message names ``argument``.
    """
    if np.ma.is_masked(values):
        raise InvalidTypeError(
            f"{argument} must have no masked elements, whose values mean nothing; "
            f"pass .compressed() or .filled(...)"
        )
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as reason:
        # Ragged lists, and tensors that numpy does not take: bfloat16, or with a gradient.
        raise InvalidTypeError(f"{argument} must be an array of real numbers: {reason}") from None
    if array.dtype.kind not in "fiu":
        raise InvalidTypeError(f"{argument} must hold real numbers, got dtype {array.dtype}")
    return array if array.flags.aligned else array.copy()  # Rust reads aligned numbers alone


def float64_array(argument: str, values: ArrayLike) -> Float64Array:
    """Returns real numbers as a float64 array; see `real_array`."""
    return real_array(argument, values).astype(np.float64, copy=False)


MAX_LOG_PROB = 0.05
"""Max log-probability that rounding may make of one that is at most 0, also in bfloat16."""


def check_log_probs(argument: str, values: NDArray[Any]) -> None:
    """Raises InvalidValueError if a log-probability is further above 0 than rounding puts it."""
    # One of the numbers that a broadcast repeats, maybe more often than memory could hold.
    distinct = values[tuple(slice(None) if stride else slice(1) for stride in values.strides)]
    if values.size and (largest := np.fmax.reduce(distinct, axis=None)) > MAX_LOG_PROB:
        raise InvalidValueError(
            f"{argument} must be natural logarithms of probabilities, at most 0 but for rounding, "
            f"got {largest}; are they probabilities, or negative log-probabilities?"
        )


def log_probs(argument: str, values: ArrayLike) -> Float64Array:
    """Returns log-probabilities as a float64 array; see `float64_array` and `check_log_probs`."""
    array = float64_array(argument, values)
    check_log_probs(argument, array)
    return array


def broadcast(**arrays: Float64Array) -> list[Float64Array]:
    """Returns the arrays in their common shape.

    Raises:
        InvalidValueError: If they have none; the message names all of them.
    """
    try:
        return list(np.broadcast_arrays(*arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise InvalidValueError(f"shapes do not broadcast: {shapes}") from None


def check_text(argument: str, text: object) -> None:
    """Raises unless ``text`` is a str that UTF-8 can hold, which Rust takes.

    Raises:
        InvalidTypeError: If it is no str.
        InvalidValueError: If it has a byte of an argument or a path that is no character.
    """
    if not isinstance(text, str):
        raise InvalidTypeError(f"{argument} must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidValueError(
            f"{argument} must be text of UTF-8, got {text[error.start]!a} at column "
            f"{error.start + 1}"
        ) from None


def check_path(argument: str, path: object) -> None:
    """Raises InvalidTypeError unless ``path`` is one."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise InvalidTypeError(f"{argument} must be a path, got {type(path).__name__}")


def bytes_of_file(path: Path, largest: int) -> bytes:
    """Returns the content of a regular file, because a pipe would wait and a device never end.

    Raises:
        InputPathError: If it cannot be read, is another kind of file, or has more bytes than
            ``largest``.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputPathError(f"cannot read {path}: it is not a regular file")
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except InputPathError:
        raise
    except OSError as error:
        raise InputPathError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > largest:
        raise InputPathError(f"cannot read {path}: it has more than {largest} bytes")
    return content


def check_bool(argument: str, value: object) -> None:
    """Raises InvalidTypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise InvalidTypeError(f"{argument} must be a bool, got {type(value).__name__}")


def check_name(argument: str, name: object, names: Iterable[str]) -> None:
    """Raises InvalidValueError unless ``name`` is one of the names; suggests the nearest."""
    names = tuple(names)
    if not isinstance(name, str) or name not in names:  # an array is compared by element
        raise InvalidValueError(
            f"{argument} must be one of {', '.join(names)}, got {name!r}{suggestion(name, names)}"
        )


_SYNONYMS = {
    "chi2": "pearson-chi2",
    "forward-kl": "kl",
    "js": "jensen-shannon",
    "total-variation": "tv",
}
"""Names in use elsewhere that are spelled too differently to be found by comparison."""


def suggestion(name: object, names: Iterable[str]) -> str:
    """Returns the end of a message, ``; did you mean 'kl'?``, or nothing if no name is near."""
    import difflib  # for messages alone

    known = list(names)
    if not isinstance(name, str) or name in known:
        return ""
    lower = name.lower()
    near = difflib.get_close_matches(lower, known, 1)
    if _SYNONYMS.get(lower) in known:
        near = [_SYNONYMS[lower]]
    return f"; did you mean {near[0]!r}?" if near else ""


def flat(array: Float64Array) -> Float64Array:
    """Returns the elements in one contiguous dimension, which Rust reads."""
    return np.ascontiguousarray(array).reshape(-1)
