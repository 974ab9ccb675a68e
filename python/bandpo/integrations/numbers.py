"""Metrics as Python numbers, for trainers that log those."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def numbers(metrics: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, float]:
    """Returns the 0-dim metrics as floats, after one wait for their device.

    Args:
        metrics: Tensors by name, on one device; those with more numbers are left out.
        prefix: Text before each name, such as ``"actor/band/"``.
    """
    single = {name: value for name, value in metrics.items() if value.ndim == 0}
    if not single:
        return {}
    # Counts of tokens are exact in float64, which MPS does not have.
    on_mps = next(iter(single.values())).device.type == "mps"
    dtype = torch.float32 if on_mps else torch.float64
    values = torch.stack([value.detach().to(dtype) for value in single.values()]).tolist()
    return dict(zip((prefix + name for name in single), values, strict=True))
