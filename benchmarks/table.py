"""Times of tables: build, save, load, and bounds read from them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import bandpo
from benchmarks import peers
from benchmarks.availability import DEVICES, need_patience, need_torch, synchronize, torch
from benchmarks.interleaved import Comparison, compare
from benchmarks.solver import DIVERGENCES, EXPRESSION, region
from benchmarks.tokens import DELTA, SIZE, SIZES, log_probs

METHODS = ("bandpo.torch", "numpy", "bisection")
"""`bandpo.torch.log_bounds`, `BandTable.log_bounds`, and the paper's scheme in torch."""

RATIO_SIZE = 2**18
"""Number of tokens beside a bisection, which takes seconds for more."""

DTYPES = ("float64",)
"""Precisions besides float32."""


def read(
    method: str,
    device: str = "cpu",
    size: int = SIZE,
    dtype: str = "float32",
    divergence: str = "kl",
) -> Callable[[], object]:
    """Returns the call that finds both bounds of every token, by a table or by bisection."""
    if method == "numpy":
        if device != "cpu":
            raise NotImplementedError("numpy has no GPU")
        table, array = region(divergence).table(), log_probs(size).astype(dtype)
        return lambda: table.log_bounds(array)
    need_torch(device)
    tokens = torch.tensor(log_probs(size), dtype=getattr(torch, dtype), device=device)
    if method == "bisection":
        if divergence != "kl":
            raise NotImplementedError(f"the bisection has no {divergence}")
        bounds: Callable[..., object] = partial(peers.bisection, DELTA)
    else:
        from bandpo.torch import log_bounds

        bounds = partial(log_bounds, region(divergence))

    def call() -> None:
        bounds(tokens)
        synchronize(device)

    return call


def build(divergence: str) -> Callable[[], object]:
    """Returns the call that builds a table, as the first use of a band does."""
    band = region(divergence)
    return lambda: bandpo.BandTable.build(band)


def compare_to_bisection(
    method: str, device: str = "cpu", size: int = RATIO_SIZE, seconds: float = 2.0
) -> Comparison:
    """Times a read and 50 bisection steps a side, both in float32."""
    ours, peer = (read(name, device, size) for name in (method, "bisection"))
    return compare(ours, peer, seconds=seconds)


class Build:
    """Times and sizes of a table build, which includes the measurement of its errors."""

    params: ClassVar = [(*DIVERGENCES, EXPRESSION)]
    param_names: ClassVar = ["divergence"]

    def setup(self, divergence: str) -> None:
        """Prepares the call."""
        self.call = build(divergence)

    def time_build(self, divergence: str) -> None:
        """Times a build."""
        self.call()

    def track_nbytes(self, divergence: str) -> int:
        """Returns the size of the image."""
        return region(divergence).table().nbytes

    track_nbytes.unit = "bytes"  # type: ignore[attr-defined]


class File:
    """Times of a table on disk."""

    def setup(self) -> None:
        """Writes a table."""
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "band.safetensors"
        self.table = region("kl").table()
        self.table.save(self.path)

    def teardown(self) -> None:
        """Removes the table."""
        self.folder.cleanup()

    def time_save(self) -> None:
        """Times a write."""
        self.table.save(self.path)

    def time_load(self) -> None:
        """Times a read, with all its checks."""
        bandpo.BandTable.load(self.path)


class Read:
    """Times of both bounds of every token, at every size."""

    params: ClassVar = [METHODS, DEVICES, SIZES]
    param_names: ClassVar = ["method", "device", "size"]
    timeout = 300

    def setup(self, method: str, device: str, size: int) -> None:
        """Prepares the call; raises NotImplementedError if a requirement is missing."""
        if method != "numpy" and size > SIZE:
            need_patience()
        self.call = read(method, device, size)

    def time_log_bounds(self, *_: object) -> None:
        """Times both bounds of all tokens, in float32."""
        self.call()


class ReadDtype:
    """Times of other precisions, at one size."""

    params: ClassVar = [METHODS, DEVICES, DTYPES]
    param_names: ClassVar = ["method", "device", "dtype"]
    timeout = 300

    def setup(self, method: str, device: str, dtype: str) -> None:
        """Prepares the call; raises NotImplementedError if a requirement is missing."""
        self.call = read(method, device, SIZE, dtype)

    def time_log_bounds(self, *_: object) -> None:
        """Times both bounds of all tokens."""
        self.call()


class Ratio:
    """Times relative to the paper's bisection, in turns in one process."""

    params: ClassVar = [METHODS[:2], DEVICES]
    param_names: ClassVar = ["method", "device"]
    timeout = 300

    def setup(self, method: str, device: str) -> None:
        """Raises NotImplementedError if a requirement is missing."""
        need_torch(device)
        if method == "numpy" and device != "cpu":
            raise NotImplementedError("numpy has no GPU")

    def track_time_ratio_to_bisection(self, method: str, device: str) -> float:
        """Returns the time over that of 50 bisection steps a side."""
        return compare_to_bisection(method, device).ratio

    track_time_ratio_to_bisection.unit = "ratio"  # type: ignore[attr-defined]
