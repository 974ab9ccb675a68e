"""The thread of a recorder, which owns the sample of a step and the files."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue

import numpy as np

from bandpo.record.batch import Batch, HostBatch
from bandpo.record.parquet import encoded
from bandpo.record.parts import Parts
from bandpo.record.reservoir import Columns, Reservoir
from bandpo.record.tokens import LoggedTokens, LogMetadata

MAX_WAITING = 4
"""Max batches that wait for the thread; another call waits, otherwise memory had no bound."""

TOKENS_OF_PART = 2**18
"""Tokens at which a part is written at once."""

SECONDS_OF_PART = 60.0
"""Seconds after the last part at which the next one is written, however small it is."""


class Writer:
    """Samples batches and writes the samples, in the order of the calls.

    Public methods are those of the training loop's thread.

    Args:
        parts: The files.
        metadata: Data of the log, without the dtype.
        size: Max tokens of a step.
        seed: Seed of the samples, which ranks make different.

    Attributes:
        is_full: True if the files have their max size; nothing is written any more.
    """

    is_full: bool

    def __init__(self, parts: Parts, metadata: LogMetadata, size: int, seed: int) -> None:
        self.is_full = False
        self._parts = parts
        self._metadata = metadata
        self._size = size
        self._generator = np.random.default_rng((seed, metadata.rank or 0))
        # Ranks number their sequences in turns, and a run that continues begins elsewhere.
        self._stride = metadata.world_size or 1
        self._sequence = (parts.present << 32) * self._stride + (metadata.rank or 0)
        self._reservoir: Reservoir | None = None  # of the step under way
        self._has_failed = False  # in that step
        self._step = 0
        self._samples: list[Columns] = []  # to be written
        self._written = -float("inf")  # time of the last part
        self._problems: SimpleQueue[str] = SimpleQueue()
        self._told: set[str] = set()
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._room = threading.Semaphore(MAX_WAITING)
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bandpo-record", daemon=True)
        self._thread.start()

    def add(self, step: int, batch: Batch) -> None:
        """Adds a batch to the sample of the step under way."""
        self._room.acquire()
        try:
            host = batch.on_host()
        except BaseException:
            self._room.release()
            raise
        # The batch itself would keep the graph of its tensors until the thread has come to it.
        self._tasks.put(partial(self._add, step, host, batch.dtype))

    def end_step(self) -> None:
        """Ends the step under way."""
        self._tasks.put(self._end_step)

    def flush(self) -> None:
        """Ends the step under way and waits until everything is written."""
        done = threading.Event()
        for task in (self._end_step, self._write, done.set):
            self._tasks.put(task)
        done.wait()

    def close(self) -> None:
        """Ends the step under way, writes everything and ends the thread."""
        for task in (self._end_step, self._write, None):
            self._tasks.put(task)
        if threading.current_thread() is not self._thread:  # it may collect its own recorder
            # First, because an interrupted join takes the thread for ended, up to Python 3.12.
            self._has_ended.wait()
            self._thread.join()

    def problem(self) -> str | None:
        """Returns the next message that the user has not seen, if there is one."""
        try:
            return self._problems.get_nowait()
        except Empty:
            return None

    def _run(self) -> None:
        try:
            self._run_tasks()
        finally:
            self._has_ended.set()

    def _run_tasks(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=self._seconds_left())
            except Empty:
                task = self._write
            if task is None:
                return
            try:
                task()
            except Exception as error:  # training goes on, whatever it is
                self._tell("lost", f"a step was not recorded: {type(error).__name__}: {error}")

    def _seconds_left(self) -> float | None:
        """Seconds until a part is due; None if there is nothing to write."""
        if not self._samples:
            return None
        return max(0.0, self._written + SECONDS_OF_PART - time.monotonic())

    def _add(self, step: int, host: HostBatch, dtype: str) -> None:
        try:
            if self._has_failed:
                return
            self._has_failed = True
            if self._metadata.dtype is None:
                self._metadata = replace(self._metadata, dtype=dtype)
            if self._reservoir is None:
                self._reservoir = Reservoir(self._size, self._generator)
                self._step = step
            tokens, sequences = host.tokens(self._sequence, self._stride)
            self._sequence += sequences * self._stride
            self._reservoir.add(tokens)
            self._has_failed = False
        finally:
            self._room.release()

    def _end_step(self) -> None:
        if self._reservoir is not None and not self._has_failed:
            sample = self._reservoir.sample()
            if sample:
                sample["step"] = np.full(len(sample["weight"]), self._step, np.int64)
                self._samples.append(sample)
        self._reservoir, self._has_failed = None, False
        tokens = sum(len(sample["weight"]) for sample in self._samples)
        if tokens >= TOKENS_OF_PART or self._seconds_left() == 0.0:
            self._write()

    def _write(self) -> None:
        samples, self._samples = self._samples, []
        if not samples or self.is_full:
            return
        self._written = time.monotonic()
        columns = {
            field: np.concatenate([sample[field] for sample in samples])
            for field in LoggedTokens._fields
            if field in samples[0]
        }
        try:
            self.is_full = not self._parts.write(encoded(columns, self._metadata))
        except OSError as error:
            self._tell(
                "disk",
                f"{self._parts.folder}: {error.strerror or error}: tokens were lost; recording "
                f"goes on with the next part",
            )
        if self.is_full:
            self._tell(
                "full",
                f"{self._parts.folder}: recording has ended, because the files of rank "
                f"{self._metadata.rank} have max_bytes, {self._parts.max_bytes}",
            )

    def _tell(self, kind: str, message: str) -> None:
        """Leaves a message for the user, once of each kind."""
        if kind not in self._told:
            self._told.add(kind)
            self._problems.put(message)
