"""Copies of tensors on the host, which the training loop does not wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def host_copy(tensor: torch.Tensor) -> Callable[[], NDArray[Any]]:
    """Returns a function that waits for a copy of the tensor, which is begun here.

    The copy holds no graph. It is ordered behind what the current stream has been given, so the
    tensor may change afterwards.

    Args:
        tensor: On any device. One of CUDA is copied to pinned memory, without waiting for it.
    """
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        copy = tensor.to("cpu", copy=True)
        return lambda: _array(copy)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> NDArray[Any]:
        copied.synchronize()
        return _array(pinned)

    return wait


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    if tensor.dtype == torch.bfloat16:  # numpy has none
        tensor = tensor.float()
    return np.asarray(tensor.numpy())


def process_group() -> tuple[int, int] | None:
    """Returns rank and world size of the default process group, if there is one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.get_rank(), distributed.get_world_size()
