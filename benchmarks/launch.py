"""Time of the host for a launch of a CUDA kernel, on a driver that does nothing.

The driver's own time, NVIDIA's bindings and torch's look-up of a stream are not included.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from unittest.mock import patch

from benchmarks.availability import need_torch, torch

TYPES = 6 * "P" + 12 * "q" + 8 * "i" + 4 * "f"
ARGUMENTS = (
    *(2**40 + 64 * k for k in range(6)),
    *range(12),
    *range(8),
    *map(float, range(4)),
)
"""As many as the loss has, some thirty, of its types."""


class NoDriver:
    """The driver of ``cuda.bindings`` that does nothing."""

    def cuCtxGetCurrent(self) -> tuple[int, int]:  # noqa: N802
        """Returns the context of the kernel."""
        return 0, 1

    def cuLaunchKernel(self, *given: object) -> tuple[int]:  # noqa: N802
        """Returns success."""
        return (0,)


class Launch:
    """One launch, of a kernel that has been launched before."""

    def setup(self) -> None:
        """Makes a kernel on a driver that does nothing."""
        need_torch()
        from bandpo.backends.cuda import launch
        from bandpo.backends.cuda.driver import Kernel

        self.launch = launch.launch
        self.kernel = Kernel(NoDriver(), 1, 2)
        self.device = torch.device("cuda", 0)
        found = launch._Compiled(self.kernel, 1056)
        self.patches = ExitStack()
        for name, value in (("compiled", cache(lambda *key: found)), ("_stream", lambda index: 7)):
            self.patches.enter_context(patch.object(launch, name, value))

    def teardown(self) -> None:
        """Restores the module."""
        self.patches.close()

    def time_launch(self) -> None:
        """Times the launch as the kernels of tensors call it."""
        self.launch("kernel", self.device, 512, TYPES, ARGUMENTS, 4096)

    def time_kernel(self) -> None:
        """Times the packing of the arguments and the calls of the driver."""
        self.kernel(512, 256, 7, TYPES, ARGUMENTS, 4096)
