"""The CUDA kernels on the CPU: the source that is shipped, with tests/support/emulator.h."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from bandpo import _core
from bandpo.backends.cuda.raw_module import numpy_scalars

EMULATOR = Path(__file__).parent / "emulator.h"

STORED = ("float", "double", "bandpo::Half", "bandpo::BFloat16")
BOUNDS = ("bandpo::Constant", "bandpo::Table", "bandpo::PerToken")
FAMILIES = ("MIN_CLIP_ALONE", "PLAIN", "EXTENDED")
KERNELS = (
    *(
        f"bandpo::policy_loss<{stored}, {bounds}, bandpo::{family}>"
        for stored, bounds, family in product(STORED, BOUNDS, FAMILIES)
    ),
    *(f"bandpo::policy_loss_totals<{computed}>" for computed in STORED[:2]),
    "bandpo::count_valid<unsigned char>",
    *(f"bandpo::scale_gradient<{STORED[k]}>" for k in (0, 1, 3)),
    *(f"bandpo::band_bounds<{stored}>" for stored in STORED),
    *(f"bandpo::band_clip<{stored}, {bounds}>" for stored, bounds in product(STORED, BOUNDS)),
    *(f"bandpo::band_solve<{stored}>" for stored in STORED),
    *(f"bandpo::band_contains<{stored}>" for stored in STORED[:2]),
)
"""Every kernel that the CUDA backend launches."""

INDEXING_TESTS = (
    "any_size or any_strides or bounds_per_token or half_precision_equals or float64_log_probs "
    "or test_clip or combined_regions or limits or Totals or are_counted or scaled_in_place "
    "or gradient_of_half"
)
"""Tests of test_cuda.py that run every kernel and every way to index, as an argument of ``-k``."""

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0")
"""Without optimisation, which takes a third of the time to compile and removes no fault."""

FLAGS = (
    "-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-Wno-clobbered", "-ffp-contract=off",
)  # fmt: skip
"""Pragmas of loops are unknown to g++, and it assumes that getcontext returns twice. A fused
multiply-add would change the last bit, which -fmad=false prevents on a device."""

_DRIVER = """
#include "{emulator}"
#include <xmmintrin.h>
{source}
#line 1 "driver"
{more}
struct Entry {{ const char* name; void (*run)(void**); int parameters; }};
static const Entry ENTRIES[] = {{ {entries} }};

// Returns the number of parameters, or -1 for a kernel that is not there.
extern "C" int parameters_of(const char* name) {{
  for (const Entry& entry : ENTRIES) if (!std::strcmp(entry.name, name)) return entry.parameters;
  return -1;
}}

// Flushes subnormal float32 to 0, as CuPy has it on a device, and float64, which a device does not.
extern "C" void launch(const char* name, unsigned blocks, unsigned first, unsigned threads,
                       unsigned shared, void** arguments, int flush_to_zero, int last_warp_first) {{
  emulator::last_warp_first = last_warp_first;
  const unsigned before = _mm_getcsr();
  if (flush_to_zero) _mm_setcsr(before | 0x8040);
  for (const Entry& entry : ENTRIES) {{
    if (std::strcmp(entry.name, name)) continue;
    emulator::launch(entry.run, blocks, first, threads, shared, arguments);
  }}
  _mm_setcsr(before);
}}
"""


def missing_compiler() -> str | None:
    """The reason why no kernel can be compiled here, None if one can."""
    # Fibers need ucontext.h, flushing an x86 register; on macOS g++ is clang.
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "needs Linux on x86-64"
    return None if shutil.which("g++") else "needs g++"


def build(
    folder: Path,
    *,
    flags: Sequence[str] = (),
    kernels: Sequence[str] = KERNELS,
    more: str = "",
) -> Path:
    """Compiles kernels to a shared library, among them those of the C++ in `more`."""
    entries = ", ".join(
        f'{{"{name}", &emulator::Call<&{name}>::run, emulator::Call<&{name}>::COUNT}}'
        for name in kernels
    )
    source = folder / "driver.cpp"
    source.write_text(
        _DRIVER.format(emulator=EMULATOR, source=_core.KERNEL_SOURCE, entries=entries, more=more)
    )
    library = folder / "kernels.so"
    command = ["g++", *FLAGS, *flags, "-shared", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


class Emulator:
    """Launches kernels of a library that `build` made.

    Attributes:
        grid: Max blocks of a launch, as on a device.
        skipped: Number of blocks that are left out, from the first on.
        flush_to_zero: True if subnormal numbers become 0.
        last_warp_first: True if the warps of a block run in this order.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.grid = 3
        self.skipped = 0
        self.flush_to_zero = True
        self.last_warp_first = False

    def launch(
        self,
        kernel: str,
        device: object,
        blocks: int,
        types: str,
        arguments: tuple[float, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Takes the place of `bandpo.backends.cuda.launch.launch`."""
        self.launch_scalars(kernel, blocks, numpy_scalars(types, arguments), shared_bytes)

    def launch_scalars(
        self, kernel: str, blocks: int, arguments: tuple[np.generic, ...], shared_bytes: int
    ) -> None:
        """Launches a kernel as CuPy does, with numpy scalars."""
        name = kernel.encode()
        wanted = self._library.parameters_of(name)
        if wanted != len(arguments):
            raise ValueError(f"{kernel} takes {wanted} arguments, got {len(arguments)}")
        held = [np.array([argument]) for argument in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(array.ctypes.data for array in held))
        grid = max(1, min(blocks, self.grid))
        self.launch_packed(kernel, grid, 256, ctypes.addressof(pointers), shared_bytes)

    def launch_packed(
        self, kernel: str, grid: int, threads: int, addresses: int, shared_bytes: int
    ) -> None:
        """Launches a kernel as a driver does, with the address of an array of addresses."""
        self._library.launch(
            kernel.encode(),
            ctypes.c_uint(grid),
            ctypes.c_uint(self.skipped),
            ctypes.c_uint(threads),
            ctypes.c_uint(shared_bytes),
            ctypes.c_void_p(addresses),
            ctypes.c_int(self.flush_to_zero),
            ctypes.c_int(self.last_warp_first),
        )
