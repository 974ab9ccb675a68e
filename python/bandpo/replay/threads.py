"""Chunks of a log on several threads, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

MAX_THREADS = 16


def in_threads(work: Callable[[Chunk], Result], chunks: Iterable[Chunk]) -> Iterator[Result]:
    """Yields the results of the chunks in their order, with a few chunks in memory at a time.

    Each worker has one thread of PyTorch, because those of PyTorch would share the processors with
    the workers and wait for each other at every operation on a chunk.
    """
    count = min(MAX_THREADS, len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count() or 1)
    before = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()

    def worked(chunk: Chunk) -> Result:
        with torch.no_grad():
            return work(chunk)

    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    has_ended = False
    try:
        for chunk in chunks:
            waiting.append(pool.submit(worked, chunk))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        has_ended = True
    finally:
        # After an interrupt nothing waits for the chunks under way, which may take seconds.
        pool.shutdown(wait=has_ended, cancel_futures=True)
        torch.set_num_threads(before)


_HAS_AFFINITY = hasattr(os, "sched_getaffinity")
