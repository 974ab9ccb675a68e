"""BANDPO_SIMD, which is read once in a process, and so is tested in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BOUNDS = """
import numpy as np
from bandpo import Band
table = Band("kl", 0.05).table()
lower, upper = table.log_bounds(np.linspace(-20.0, 0.0, 1000, dtype=np.float32))
print(lower.tobytes().hex(), upper.tobytes().hex())
"""


def run(code: str, level: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "BANDPO_SIMD"}
    if level is not None:
        environment["BANDPO_SIMD"] = level
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_every_level_gives_the_same_bits() -> None:
    done = [run(BOUNDS, level) for level in (None, "portable", "avx2", "avx512")]
    assert [process.returncode for process in done] == [0] * 4, done
    assert len({process.stdout for process in done}) == 1


@pytest.mark.parametrize("level", ["sse2", "AVX2", ""])
def test_an_unknown_level_is_refused_on_import(level: str) -> None:
    done = run("import bandpo", level)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "bandpo.error.InvalidValueError: "
        f'BANDPO_SIMD must be portable, avx2 or avx512, got "{level}"'
    )
