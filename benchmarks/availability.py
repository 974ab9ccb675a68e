"""What this machine has. A benchmark that needs more raises NotImplementedError: asv says n/a."""

from __future__ import annotations

import os

try:
    import torch as torch
except ImportError:
    torch = None  # type: ignore[assignment]
HAS_TORCH = torch is not None

DEVICES = ("cpu", "cuda")

SLOW = "BANDPO_BENCHMARK_SLOW"
"""The environment variable that asks for what takes minutes as well."""


def need_torch(device: str = "cpu") -> None:
    """Raises NotImplementedError without torch, or where it cannot reach the device."""
    if not HAS_TORCH:
        raise NotImplementedError("torch is not installed")
    if device == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("torch finds no GPU")


def need_patience() -> None:
    """Raises NotImplementedError unless what takes minutes was asked for."""
    if not os.environ.get(SLOW):
        raise NotImplementedError(f"takes long: set {SLOW}=1")


def synchronize(device: str) -> None:
    """Waits for the device, so that its work counts."""
    if device == "cuda":
        torch.cuda.synchronize()
