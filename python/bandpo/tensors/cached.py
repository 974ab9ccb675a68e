"""Tensors that outlive the call that makes them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray

from bandpo.error import InvalidValueError
from bandpo.region import Region


class Cached:
    """A tensor that outlives the call which fills it, for whichever stream is current later."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._filled: torch.cuda.Event | None = None
        self.note_filled()

    def note_filled(self) -> None:
        """Marks where the current stream has filled the tensor; the host does not wait for it."""
        if self.tensor.is_cuda:
            self._filled = torch.cuda.current_stream(self.tensor.device).record_event()

    def ready(self) -> torch.Tensor:
        """The tensor, filled before the current stream reads it and not freed before it has."""
        # A graph has no such event outside of it, and nothing is in flight when its capture begins.
        if self._filled is not None and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self._filled)
            self.tensor.record_stream(stream)
        return self.tensor


_CACHED: dict[tuple[int, object, torch.device], Cached] = {}


def cached(
    region: Region, what: object, device: torch.device, make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Returns a tensor that is made once for a region on a device and kept as long as it lives.

    Args:
        region: What the tensor says something of.
        what: What that is, hashable.
        device: Where the tensor is.
        make: Returns it; called at the first use.

    Raises:
        InvalidValueError: If the first use is in the capture of a CUDA graph.
    """
    # By identity: a look-up by value would hash the region at every call.
    key = id(region), what, device
    found = _CACHED.get(key)
    if found is None:
        check_no_capture(device)
        with torch.inference_mode(False):  # or autograd could not save it outside of it
            tensor = make()
        if type(tensor) is not torch.Tensor:  # a fake one would outlive its mode
            return tensor
        found = _CACHED[key] = Cached(tensor)
        weakref.finalize(region, _CACHED.pop, key, None)
    return found.ready()


def check_no_capture(device: torch.device) -> None:
    """Raises InvalidValueError where the current stream is captured to a CUDA graph."""
    if device.type != "cuda" or not torch.cuda.is_available():  # but fake tensors say so
        return
    if torch.cuda.is_current_stream_capturing():
        raise InvalidValueError(
            f"region must be used on {device} once before a CUDA graph is captured: what is copied "
            f"there at its first use would become a part of the graph"
        )


def upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Returns an array on a device, by a copy that the host does not wait for."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and type(tensor) is torch.Tensor:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
