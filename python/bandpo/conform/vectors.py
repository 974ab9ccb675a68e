"""The file of vectors, read with numpy alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bandpo.check import bytes_of_file
from bandpo.error import InvalidValueError

FILE = Path(__file__).with_name("vectors.safetensors")
"""The vectors of this version, written by ``tools/make_vectors.py``."""

FORMAT = "bandpo-conformance-1"
"""The entry ``format`` of a file's metadata."""

LARGEST = 2**26
"""Max bytes of a file; that of this version has a few hundred thousand."""

ANY = "any"
"""The mode of fields that are the same in every mode."""

Array = NDArray[Any]

_DTYPES = {"F64": "<f8", "F32": "<f4", "I32": "<i4", "U8": "<u1"}


class Vector(NamedTuple):
    """A batch, a rule and a mode, with what the rule makes of the batch."""

    preset: str
    case: str
    mode: str
    inputs: Mapping[str, Array]  # by argument of policy_loss, [B, T]
    loss: float
    loss_size: float  # sum of the absolute values of the loss's terms
    gradient: Array  # float64 [B, T]
    counts: Array  # clipped low, clipped high, with a gradient, all


def read_vectors(path: str | Path = FILE) -> list[Vector]:
    """Returns the vectors of a file.

    Raises:
        InputPathError: If it cannot be read.
        InvalidValueError: If it is no file of vectors, or lacks a field.
    """
    content = bytes_of_file(Path(path), LARGEST)
    try:
        tensors = dict(_tensors(content))
        return list(_vectors(tensors))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidValueError(f"{path} holds no vectors of {FORMAT}: {error}") from None


def _tensors(content: bytes) -> Iterator[tuple[str, Array]]:
    """The tensors of a safetensors file by name."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    found = header.pop("__metadata__", {}).get("format")
    if found != FORMAT:
        raise ValueError(f"its format is {found!r}")
    for name, entry in header.items():
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(content[start:end], dtype=_DTYPES[entry["dtype"]])
        yield name, array.reshape(entry["shape"])


def _vectors(tensors: Mapping[str, Array]) -> Iterator[Vector]:
    inputs: dict[str, dict[str, Array]] = {}
    for name, array in tensors.items():
        what, case, _, field = name.split("/")
        if what == "inputs":
            inputs.setdefault(case, {})[field] = array
    for name, array in tensors.items():
        preset, case, mode, field = name.split("/")
        if preset != "inputs" and field == "loss":
            yield Vector(
                preset,
                case,
                mode,
                inputs[case],
                float(array[0]),
                float(array[1]),
                tensors[f"{preset}/{case}/{mode}/gradient"],
                tensors[f"{preset}/{case}/{ANY}/counts"],
            )
