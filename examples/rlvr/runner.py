"""Chunks that are missing in a folder of results are trained, one file each."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich import progress
from rich.console import Console

from bandpo.plot.output import whole_file

from .grid import Chunk
from .policy import checkpoint
from .task import TASKS
from .train import train


def run(
    chunks: Iterable[Chunk],
    folder: Path,
    *,
    seconds: float = float("inf"),
    quiet: bool = False,
) -> int:
    """Trains the chunks without results and returns how many are still missing.

    A file of results appears whole or not at all, so that a run that was cut off goes on with the
    chunk in which it stood. The numbers do not depend on where it was cut off.

    Args:
        chunks: All chunks of a study.
        folder: Where the results are; checkpoints go into its ``checkpoints``.
        seconds: Time after which no further chunk begins.
        quiet: True leaves out the bar on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [chunk for chunk in chunks if not (folder / chunk.name).exists()]
    began = time.monotonic()
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    threads = torch.get_num_threads()
    # The matrices are too small to share; two processes serve two cores.
    torch.set_num_threads(1)
    try:
        console = Console(stderr=True)
        with progress.Progress(*columns, console=console, disable=quiet) as bar:
            shown = bar.add_task("runs", total=sum(len(chunk.rules) for chunk in missing))
            for done, chunk in enumerate(missing):
                if time.monotonic() - began >= seconds:
                    return len(missing) - done
                _write(_rows(chunk, folder / "checkpoints"), folder / chunk.name)
                bar.advance(shown, len(chunk.rules))
    finally:
        torch.set_num_threads(threads)
    return 0


def _rows(chunk: Chunk, checkpoints: Path) -> list[dict[str, Any]]:
    task = TASKS[chunk.task](chunk.seed)
    path = checkpoints / f"{chunk.task}-{chunk.seed}-{chunk.pretrain_steps}.safetensors"
    start = checkpoint(task, seed=chunk.seed, path=path, steps=chunk.pretrain_steps)
    began = time.monotonic()
    # The stream of one seed and stream is shared by all rules and settings.
    runs = train(start, task, chunk.rules, chunk.setting, seed=chunk.seed * 1000 + chunk.stream)
    each = (time.monotonic() - began) / len(runs)
    of_chunk = {"study": chunk.study, "task": chunk.task, "seed": chunk.seed}
    return [
        of_chunk
        | {"stream": chunk.stream, "family": rule.family, "region": rule.region}
        | asdict(chunk.setting)
        | {"area": sum(run.reward) / len(run.reward)}
        | asdict(run)
        | {"seconds": each}
        for rule, run in zip(chunk.rules, runs, strict=True)
    ]


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    table = pa.Table.from_pylist(rows)
    for name in ("reward", "entropy"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table[name].cast(pa.list_(pa.float32())))
    with whole_file(path, (".parquet",)) as file:
        pq.write_table(table, file, compression="zstd")


def read(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of all files of a folder, in the order of their names."""
    paths = sorted(folder.glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def pack(folder: Path, path: Path) -> int:
    """Writes all rows of a folder into one file and returns their number."""
    rows = read(folder)
    _write(rows, path)
    return len(rows)
