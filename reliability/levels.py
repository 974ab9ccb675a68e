"""Levels of vector instructions against each other.

python -m reliability.levels --cases 1000000
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from bandpo import Band, Divergence, _core
from reliability.result import Row, run_cases
from reliability.tokens import NAMES, SEED, log_probs

LEVELS = ("portable", "avx2", "avx512")

FAMILIES = (
    *("alpha:0.5", "alpha:-0.7", "alpha:0.3", "alpha:1.37", "renyi:2", "renyi:3.5"),
    *("vajda:1.5", "bwcs:0.3", "hockey-stick:1.2"),
)
"""Divergences with a parameter, of every formula."""

TEXTS = ("-ln(u) + u - 1", "(sqrt(u)-1)^2", "abs(u-1)", "u^1.3 - 1 - 1.3*(u-1)", "exp(u-1) - u")
"""Divergences given as text, with most operations of vectors."""


def levels(cases: int, seed: int = SEED) -> Iterator[Row]:
    """Bounds, lookups, losses and gradients under each level of instructions.

    Raises:
        AssertionError: If the bits differ.
    """
    found = {level: _bits_under(level, cases, seed) for level in LEVELS}
    assert len({ran["losses"] for ran in found.values()}) == 1, found
    # Without fused multiply-adds the scalar solver takes every token, see rust/simd/mod.rs.
    assert found["avx2"]["bounds"] == found["avx512"]["bounds"], found
    for level in LEVELS[1:]:
        # A processor without the instructions of a level runs a lower one.
        counts = {
            "of another bit than those of other levels": 0,
            f"by {found[level]['ran']}": cases,
        }
        yield Row(f"tokens under BANDPO_SIMD={level}", cases, counts)


def _bits_under(level: str, cases: int, seed: int) -> dict[str, str]:
    code = f"from reliability.levels import print_bits; print_bits({cases}, {seed})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BANDPO_SIMD": level, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    digests: dict[str, str] = json.loads(done.stdout)
    return digests


def print_bits(cases: int, seed: int) -> None:
    """Prints a digest of bounds, lookups, losses and gradients of so many tokens."""
    rng = np.random.default_rng(seed)
    losses, exact = hashlib.sha256(), hashlib.sha256()
    for part in _parts(cases):
        logp = log_probs(rng, part)
        texts = [Divergence.from_expression(text) for text in TEXTS]
        divergences: list[Divergence | str] = [*NAMES, *FAMILIES, *texts]
        for spec in divergences:
            for bound in Band(spec, 0.05).log_bounds(logp[: max(1, part // 16)]):
                exact.update(bound.tobytes())
        for spec in ("kl", "tv", "renyi:2"):
            for bound in Band(spec, 0.05).table().log_bounds(logp.astype(np.float32)):
                losses.update(bound.tobytes())
        losses.update(_loss_bits(logp, rng))
    ran = _core.simd_level()
    print(json.dumps({"losses": losses.hexdigest(), "bounds": exact.hexdigest(), "ran": ran}))


def _loss_bits(logp: Any, rng: np.random.Generator) -> bytes:
    try:
        import torch
    except ImportError:
        return b""
    from bandpo.loss import policy_loss

    bits = b""
    for dtype in (torch.float32, torch.float64):
        old = torch.from_numpy(logp).to(dtype)
        new = (old + torch.from_numpy(rng.laplace(0.0, 0.5, len(logp))).to(dtype)).clamp(max=0.0)
        advantages = torch.from_numpy(rng.normal(size=len(logp))).to(dtype)
        for surrogate in ("min-clip", "weight", "mask", "gradient-preserving", "soft-gate"):
            leaf = new.detach().requires_grad_()
            region = Band("kl", 0.05).cap(10)
            result = policy_loss(
                old, leaf, advantages, torch.ones_like(old), region=region,
                surrogate=surrogate, backend="native",
                cu_seqlens=torch.tensor([0, len(logp)]),
            )  # fmt: skip
            bits += torch.autograd.grad(result.loss, leaf)[0].numpy().tobytes()
    return bits


def _parts(cases: int) -> Iterator[int]:
    while cases > 0:
        yield min(cases, 2**16)
        cases -= 2**16


if __name__ == "__main__":
    run_cases("levels", __doc__, levels, cases=1_000_000, seed=SEED, of="tokens")
