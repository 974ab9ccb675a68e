"""Tensors that outlive the call that makes them: constants, tables, radii.

A copy to a device is ordered by an event, so the host never waits: the stream that fills a tensor
records it, and any other stream waits for it before it reads.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray

from bandpo.error import InvalidValueError
from bandpo.region import Region
from bandpo.tensors.internals import outside_transforms


class Cached:
    """A tensor that any stream may read after the stream that filled it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._filled: torch.cuda.Event | None = None
        self.mark_filled()
        self._allocated_on = self._filled_on

    def mark_filled(self) -> None:
        """Records that the current stream has filled the tensor, without waiting for it."""
        self._filled_on = None
        if self.tensor.is_cuda:
            self._filled_on = torch.cuda.current_stream(self.tensor.device)
            self._filled = self._filled_on.record_event()

    def ready(self) -> torch.Tensor:
        """Returns the tensor; the current stream waits for it and keeps it until it has read it."""
        if self._filled is None:
            return self.tensor
        stream = torch.cuda.current_stream(self.tensor.device)
        # On the stream of its memory and its fill, the order of the stream is enough. A graph
        # cannot wait for an event outside it; no fill is in flight when its capture begins.
        if not (
            stream == self._allocated_on == self._filled_on
            or torch.cuda.is_current_stream_capturing()
        ):
            stream.wait_event(self._filled)
            self.tensor.record_stream(stream)
        return self.tensor


_CACHED: dict[tuple[int, object, torch.device], Cached] = {}


def cached(
    region: Region, what: object, device: torch.device, make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Returns a tensor that is made once for a region and a device, and dies with the region.

    Args:
        region: The region that the tensor belongs to.
        what: Its kind, such as a dtype or a name; hashable.
        device: Its device.
        make: Returns the tensor; called at the first use.

    Raises:
        InvalidValueError: If the first use is in the capture of a CUDA graph.
    """
    # By identity, because the hash of a region is costly.
    key = id(region), what, device
    found = _CACHED.get(key)
    if found is None:
        check_no_capture(device)
        # Otherwise autograd could not save it later, and it would belong to a transform.
        with torch.inference_mode(False), outside_transforms(device):
            tensor = make()
        if type(tensor) is not torch.Tensor:  # a fake one would outlive its mode
            return tensor
        found = _CACHED[key] = Cached(tensor)
        weakref.finalize(region, _CACHED.pop, key, None)
    return found.ready()


def check_no_capture(device: torch.device) -> None:
    """Raises InvalidValueError while the current stream is captured to a CUDA graph."""
    if device.type != "cuda" or not torch.cuda.is_available():  # a fake tensor's device
        return
    if torch.cuda.is_current_stream_capturing():
        raise InvalidValueError(
            f"region must be used on {device} once before a CUDA graph is captured: the copy at "
            f"its first use would become a part of the graph"
        )


def upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Returns an array on a device, copied without waiting for the device."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and type(tensor) is torch.Tensor:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
