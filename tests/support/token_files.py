"""Files of tokens in every format, for the tests of the reader."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TOKENS, WIDTH = 60, 12
"""Tokens of a log, and of a row where rows are sequences."""


def log_of_tokens(seed: int = 0) -> dict[str, Array]:
    """A log with one row a token and every column."""
    rng = np.random.default_rng(seed)
    return {
        "step": np.sort(rng.integers(0, 9, TOKENS)),
        "sequence": rng.integers(0, 2**60, TOKENS),
        "position": rng.integers(0, 40, TOKENS),
        "old_log_prob": -rng.exponential(2.0, TOKENS),
        "log_prob": -rng.exponential(2.0, TOKENS),
        "advantages": rng.normal(size=TOKENS),
        "rollout_log_prob": -rng.exponential(2.0, TOKENS),
        "reward": rng.normal(size=TOKENS),
        "weight": rng.uniform(1, 50, TOKENS),
        "response_mask": rng.random(TOKENS) < 0.7,
    }


def log_of_sequences(seed: int = 0) -> dict[str, Array]:
    """A log [B, T], with one advantage, one reward and one step a row."""
    log = {name: array.reshape(-1, WIDTH) for name, array in log_of_tokens(seed).items()}
    per_row = {name: log[name][:, 0] for name in ("step", "sequence", "advantages", "reward")}
    return {name: array for name, array in (log | per_row).items() if name != "position"}


def write_npz(path: Path, log: Mapping[str, Array]) -> None:
    np.savez(path, **log)  # type: ignore[arg-type]  # it takes an option as well


def write_safetensors(path: Path, log: Mapping[str, Array]) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.array(array, order="C") for name, array in log.items()}, path)


def write_json_lines(path: Path, log: Mapping[str, Array]) -> None:
    rows = zip(*(array.tolist() for array in log.values()), strict=True)
    lines = (json.dumps(dict(zip(log, row, strict=True))) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def write_csv(path: Path, log: Mapping[str, Array]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(log)
        columns = ([str(cell).lower() for cell in array.tolist()] for array in log.values())
        writer.writerows(zip(*columns, strict=True))


def write_parquet(path: Path, log: Mapping[str, Array]) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {name: pyarrow.array(array.tolist()) for name, array in log.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=13)


WRITERS: dict[str, Callable[[Path, Mapping[str, Array]], None]] = {
    "npz": write_npz,
    "safetensors": write_safetensors,
    "jsonl": write_json_lines,
    "csv": write_csv,
    "parquet": write_parquet,
}
"""How each format is written, by its suffix."""
