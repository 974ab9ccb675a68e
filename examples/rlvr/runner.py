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

CURVES = ("reward", "entropy", "distinct_share")


def run(
    chunks: Iterable[Chunk],
    folder: Path,
    *,
    seconds: float = float("inf"),
    device: str = "cpu",
    quiet: bool = False,
) -> int:
    """Trains the chunks without results and returns how many are still missing.

    A file of results appears whole or not at all, so that a run that was cut off goes on with the
    chunk in which it stood. The numbers do not depend on where it was cut off.

    Args:
        chunks: All chunks of a study.
        folder: Where the results are; checkpoints go into ``checkpoints`` beside it.
        seconds: Time after which no further chunk begins.
        device: Device of the policies, `cpu` or `cuda`.
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
            shown = bar.add_task("runs", total=sum(len(chunk.copies) for chunk in missing))
            for done, chunk in enumerate(missing):
                if time.monotonic() - began >= seconds:
                    return len(missing) - done
                _write(_rows(chunk, folder.parent / "checkpoints", device), folder / chunk.name)
                bar.advance(shown, len(chunk.copies))
    finally:
        torch.set_num_threads(threads)
    return 0


def _rows(chunk: Chunk, checkpoints: Path, device: str) -> list[dict[str, Any]]:
    tasks = {copy.seed: TASKS[chunk.task](copy.seed) for copy in chunk.copies}
    began = time.monotonic()
    starts = {
        seed: checkpoint(
            task,
            seed=seed,
            path=checkpoints
            / f"{chunk.task}-{seed}-{chunk.size.width}-{chunk.pretrain_steps}.safetensors",
            size=chunk.size,
            steps=chunk.pretrain_steps,
            device=device,
        )
        for seed, task in tasks.items()
    }
    runs = train(starts, tasks, chunk.copies, chunk.setting, size=chunk.size, device=device)
    each = (time.monotonic() - began) / len(runs)
    return [
        {"study": chunk.study, "task": chunk.task, "width": chunk.size.width}
        | {"family": copy.rule.family, "region": copy.rule.region}
        | {"seed": copy.seed, "stream": copy.stream, "noise": copy.noise}
        | asdict(chunk.setting)
        | {"area": sum(run.reward) / len(run.reward)}
        | asdict(run)
        | {"device": device, "seconds": each}
        for copy, run in zip(chunk.copies, runs, strict=True)
    ]


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes rows, with curves in float16, whose error is below that of a sampled mean."""
    table = pa.Table.from_pylist(rows)
    for name in CURVES:
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table[name].cast(pa.list_(pa.float16())))
    with whole_file(path, (".parquet",)) as file:
        pq.write_table(table, file, compression="zstd")


def files(results: Path, study: str) -> list[Path]:
    """Returns the files of a study: those of its chunks by name, or else the packed one, if any."""
    chunks = sorted((results / study).glob("*.parquet"))
    packed = results / f"{study}.parquet"
    return chunks or ([packed] if packed.exists() else [])


def read(results: Path, study: str) -> list[dict[str, Any]]:
    """Returns the rows of all files of a study, none if it has no file."""
    return [row for path in files(results, study) for row in pq.read_table(path).to_pylist()]


def pack(results: Path, study: str) -> int:
    """Writes all rows of a study into one file and returns their number."""
    rows = read(results, study)
    _write(rows, results / f"{study}.parquet")
    return len(rows)
