"""Requirements of benchmarks: torch, a GPU, time.

A benchmark whose requirement is missing raises NotImplementedError, which asv reports as n/a.
"""

from __future__ import annotations

import os

try:
    import torch as torch
except ImportError:
    torch = None  # type: ignore[assignment]
HAS_TORCH = torch is not None

DEVICES = ("cpu", "cuda")

SLOW = "BANDPO_BENCHMARK_SLOW"
"""The environment variable that adds the benchmarks that take minutes."""


def need_torch(device: str = "cpu") -> None:
    """Raises NotImplementedError if torch is missing, or has no such device."""
    if not HAS_TORCH:
        raise NotImplementedError("torch is not installed")
    if device == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("torch finds no GPU")


def need_patience() -> None:
    """Raises NotImplementedError unless SLOW is set."""
    if not os.environ.get(SLOW):
        raise NotImplementedError(f"takes long: set {SLOW}=1")


def synchronize(device: str) -> None:
    """Waits for the device, so that the time of its work is included."""
    if device == "cuda":
        torch.cuda.synchronize()
