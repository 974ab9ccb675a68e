"""Peak memory: of the process, with all it has imported, and of a GPU."""

from __future__ import annotations

from typing import ClassVar

import bandpo
from benchmarks.availability import torch
from benchmarks.loss import METHODS, PEERS, Step
from benchmarks.tokens import DELTA, SIZE, log_probs


class Host:
    """The most a process held."""

    def peakmem_solver(self) -> None:
        """Measures exact bounds."""
        bandpo.Band("kl", DELTA).log_bounds(log_probs(2**18))

    def peakmem_table(self) -> None:
        """Measures bounds from a table."""
        bandpo.Band("kl", DELTA).table().log_bounds(log_probs(SIZE))


class HostLoss:
    """The most a process with torch held."""

    params: ClassVar = [(*METHODS, *PEERS)]
    param_names: ClassVar = ["method"]
    timeout = 300

    def setup(self, method: str) -> None:
        """Prepares the batch, or says n/a."""
        self.step = Step(method)

    def peakmem_loss(self, method: str) -> None:
        """Measures forward and backward."""
        self.step.forward_backward()


class DeviceLoss:
    """The most that torch held on a GPU."""

    params: ClassVar = HostLoss.params
    param_names: ClassVar = HostLoss.param_names
    timeout = 300

    def setup(self, method: str) -> None:
        """Prepares the batch, or says n/a."""
        self.step = Step(method, "cuda")
        self.step.forward_backward()

    def track_peak_bytes(self, method: str) -> int:
        """Returns what forward and backward add to the batch."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step.forward_backward()
        return torch.cuda.max_memory_allocated() - before

    track_peak_bytes.unit = "bytes"  # type: ignore[attr-defined]
