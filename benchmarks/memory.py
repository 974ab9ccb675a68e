"""Peak memory of a process, with its imports, and of a GPU."""

from __future__ import annotations

from typing import ClassVar

import bandpo
from benchmarks.availability import torch
from benchmarks.loss import METHODS, PEERS, Step
from benchmarks.tokens import DELTA, SIZE, log_probs


class Host:
    """Peak memory of a process with numpy."""

    def peakmem_solver(self) -> None:
        """Measures exact bounds."""
        bandpo.Band("kl", DELTA).log_bounds(log_probs(2**18))

    def peakmem_table(self) -> None:
        """Measures bounds from a table."""
        bandpo.Band("kl", DELTA).table().log_bounds(log_probs(SIZE))


class HostLoss:
    """Peak memory of a process with torch."""

    params: ClassVar = [(*METHODS, *PEERS)]
    param_names: ClassVar = ["method"]
    timeout = 300

    def setup(self, method: str) -> None:
        """Prepares the batch; raises NotImplementedError if a requirement is missing."""
        self.step = Step(method)

    def peakmem_loss(self, method: str) -> None:
        """Measures forward and backward."""
        self.step.forward_backward()


class DeviceLoss:
    """Peak memory of torch on a GPU."""

    params: ClassVar = HostLoss.params
    param_names: ClassVar = HostLoss.param_names
    timeout = 300

    def setup(self, method: str) -> None:
        """Prepares the batch; raises NotImplementedError if a requirement is missing."""
        self.step = Step(method, "cuda")
        self.step.forward_backward()

    def track_peak_bytes(self, method: str) -> int:
        """Returns the peak of forward and backward, without the batch."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step.forward_backward()
        return torch.cuda.max_memory_allocated() - before

    track_peak_bytes.unit = "bytes"  # type: ignore[attr-defined]
