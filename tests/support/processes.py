"""Functions run on several processes of a gloo group; a failure comes back with its traceback."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.multiprocessing.spawn import start_processes

Arrays = dict[str, NDArray[Any]]

# A server that has imported torch, and run no thread of it, forks a process in milliseconds.
FORKSERVER = "forkserver" in multiprocessing.get_all_start_methods()
PRELOADED = ["torch.distributed.fsdp", "torch.nn.parallel", "bandpo.loss", "bandpo.schedule"]


def on_processes(
    function: Callable[..., Arrays],
    count: int,
    folder: Path,
    *arguments: Any,
    timeout: float = 60.0,
) -> list[Arrays]:
    """Returns ``function(*arguments)`` of each process, which finds its rank in `dist`.

    Args:
        function: A function of a module.
        count: Number of processes.
        folder: An empty one, for the rendezvous and the arrays.
        arguments: What it takes; pickled.
        timeout: Seconds until all processes are killed.

    Raises:
        ProcessRaisedException: With the traceback of the first process that raised.
        TimeoutError: If a process has not ended in time.
    """
    if FORKSERVER:
        multiprocessing.set_forkserver_preload(PRELOADED)
    processes = start_processes(  # type: ignore[no-untyped-call]
        _process,
        (function, count, folder, arguments, timeout),
        nprocs=count,
        join=False,
        start_method="forkserver" if FORKSERVER else "spawn",
    )
    assert processes is not None
    end = time.monotonic() + timeout
    try:
        while not processes.join(timeout=max(end - time.monotonic(), 0.0)):
            if time.monotonic() >= end:
                raise TimeoutError(f"{function.__name__} has not ended in {timeout:g} s")
    finally:
        for process in processes.processes:
            process.kill()
            process.join()
    return [_read(_file(folder, rank)) for rank in range(count)]


def _read(file: Path) -> Arrays:
    with np.load(file) as arrays:
        return dict(arrays)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.npz"


def _process(
    rank: int,
    function: Callable[..., Arrays],
    count: int,
    folder: Path,
    arguments: tuple[Any, ...],
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=timeout),
    )
    found = function(*arguments)
    np.savez(_file(folder, rank), **found)  # type: ignore[arg-type]
    dist.destroy_process_group()
