"""The reason why the kernels cannot run here: torch, the device, or the launchers."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from bandpo.backends.cuda.launch import extra, launcher
from bandpo.error import BackendWarning, BrokenExtraError, MissingExtraError
from bandpo.tensors.cached import check_no_capture


def obstacle() -> ImportError | None:
    """Returns the error with the reason why the kernels cannot run here, or None if they can.

    The first reason is given of those that an extra cannot remove: torch is not built for CUDA, or
    finds no device.
    """
    if torch.version.hip is not None:
        return BrokenExtraError("the kernels need CUDA, this torch is built for ROCm")
    if torch.version.cuda is None:
        return BrokenExtraError(
            f"the kernels of bandpo[{extra()}] need a torch built with CUDA, "
            f"torch {torch.__version__} is not"
        )
    if torch.cuda.device_count() == 0:
        return BrokenExtraError(
            f"the kernels of bandpo[{extra()}] need a CUDA device and its driver: torch finds none"
        )
    try:
        launcher()
    except (BrokenExtraError, MissingExtraError) as reason:
        return reason
    return None


@cache
def kernels_run() -> bool:
    """Returns True if the kernels can run here; otherwise warns why not, once.

    Raises:
        InvalidValueError: If the first call is in the capture of a CUDA graph.
    """
    # A driver loads no kernel in a capture, which would be taken for an obstacle for good.
    check_no_capture(torch.device("cuda"))
    reason = obstacle()
    if reason is not None:
        message = f"CUDA tensors take the torch backend: {reason}"
        warnings.warn(message, BackendWarning, stacklevel=1)
    return reason is None
