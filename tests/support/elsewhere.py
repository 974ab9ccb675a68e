"""Tensors on a device that this machine need not have."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map


class Elsewhere(torch.Tensor):
    """A number that is on another device until it is copied to the CPU."""

    within: torch.Tensor

    @staticmethod
    def __new__(cls, within: torch.Tensor, device: str) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, within.shape, dtype=within.dtype, device=torch.device(device)
        )
        made.within = within
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        (device,) = {tensor.device for tensor in tensors}  # torch accepts one alone
        found = func(*tree_map(_opened, args), **(kwargs or {}))
        return found if "device" in (kwargs or {}) else cls(found, str(device))  # that of cpu()


def _opened(value: object) -> object:
    return value.within if isinstance(value, Elsewhere) else value
