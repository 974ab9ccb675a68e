"""Digests of results, bit for bit, before and after a change that must not change any.

    python tools/compare_bits.py write build/before.json     # before the change
    python tools/compare_bits.py check build/before.json     # after it; prints the differences

The results are bounds, tables, bounds read from tables, losses, gradients and metrics. They come
from the backends native and torch, for each set of instructions of this processor (`BANDPO_SIMD`).
A file is compared on the machine that wrote it, because the digits of `exp` and `ln` in double
precision are those of the C library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bandpo import Band, BandTable, Clip, Dcpo, Divergence, GradientPreserving, Mask, sides
from bandpo.loss import policy_loss
from bandpo.torch import clip, log_bounds

SIMD_LEVELS = ("portable", "avx2", "avx512")
SPECS = (
    "kl", "reverse-kl", "tv", "pearson-chi2", "neyman-chi2", "hellinger", "le-cam",
    "jensen-shannon", "jeffreys", "alpha:0.5", "alpha:-0.5", "alpha:3", "renyi:0.5", "renyi:2",
    "bhattacharyya", "vajda:1", "vajda:1.5", "vajda:4", "bwcs:0.3", "hockey-stick:1.2",
)  # fmt: skip
EXPRESSION = "u*ln(u) - u + 1"
DELTAS = (1e-8, 1e-4, 0.05, 0.5, 10.0)
Digests = dict[str, str]


def digest(*arrays: Any) -> str:
    """A hash of shapes, types and bytes; every NaN counts as the same."""
    found = hashlib.sha256()
    for array in arrays:
        if isinstance(array, torch.Tensor):
            array = array.detach()
            wide = array.float() if array.dtype in (torch.bfloat16, torch.float16) else array
            array = wide.numpy()
        array = np.ascontiguousarray(array)
        if array.dtype.kind == "f":
            array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def log_probs() -> NDArray[np.float64]:
    """Log-probabilities of every size, limits and special values."""
    random = np.random.default_rng(0)
    special = [0.0, -0.0, 1e-3, np.nan, -np.inf, -1e-300, -5e-324, -700.0, -745.2, -3e38, -1e300]
    p = np.concatenate([random.random(600), 10.0 ** random.uniform(-300, 0, 400)])
    return np.concatenate([special, np.log(p), -(10.0 ** random.uniform(-17, 3, 400))])


def regions() -> Iterator[tuple[str, Any]]:
    """Regions of every kind, by name."""
    for spec, delta in product(SPECS, DELTAS):
        yield f"{spec}@{delta}", Band(spec, delta)
    own = Divergence.from_expression(EXPRESSION)
    for delta in (1e-4, 0.05):
        yield f"{EXPRESSION}@{delta}", Band(own, delta)
    kl = Band("kl", 0.05)
    yield "pair", Band("kl", (0.01, 0.1))
    yield "cap", kl.cap(10.0)
    yield "union", (kl | Clip(0.2, 0.28)).cap(10.0)
    yield "intersection", kl & Clip(0.5, 3.0)
    yield "sides", sides(lower=Clip(0.2), upper=kl)
    yield "floor", kl.at_least(0.1)
    yield "dcpo", Dcpo(0.16, 0.2)
    yield "clip", Clip(0.2, 0.28)


def bounds_and_tables() -> Iterator[tuple[str, str]]:
    """Bounds, membership and tables."""
    logp = log_probs()
    steps = np.random.default_rng(1).normal(0.0, 0.5, logp.size)
    with np.errstate(over="ignore"):
        singles = torch.from_numpy(logp.astype(np.float32))
    with tempfile.TemporaryDirectory() as folder:
        for name, region in regions():
            yield f"bounds {name}", digest(*region.log_bounds(logp), *region.bounds(logp))
            yield f"contains {name}", digest(region.contains(logp, steps))
            if isinstance(region, Band):
                found = region.diagnose(logp[:200])
                yield f"diagnosis {name}", digest(*[np.asarray(x) for side in found for x in side])
            table = region.table()
            table.save(Path(folder) / "table")
            yield f"table {name}", hashlib.sha256((Path(folder) / "table").read_bytes()).hexdigest()
            yield f"table bounds {name}", digest(*table.log_bounds(logp), *table.bounds(logp))
            yield f"tensor bounds {name}", digest(*log_bounds(table, singles))
            if not isinstance(region, BandTable):
                yield f"exact tensor {name}", digest(*log_bounds(region, singles, exact=True))
    function = Divergence.from_callable(lambda u: u * np.log(u) - u + 1)
    yield "bounds callable", digest(*Band(function, 0.05).log_bounds(logp))


def batch(dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    """Old and new log-probs, advantages and mask, with some values that are not finite."""
    random = np.random.default_rng(seed)
    rows, width = 7, 333
    old = np.log(random.beta(0.6, 0.4, (rows, width)).clip(1e-30, 1.0))
    new = old + random.normal(0.0, random.choice([0.01, 0.3, 2.0], (rows, 1)), (rows, width))
    mask = random.random((rows, width)) < 0.8
    mask[2] = False
    for values, bad in product((old, new), (np.nan, np.inf, -np.inf)):
        values[random.random((rows, width)) < 0.002] = bad
    old[0, :5] = (-np.inf, 0.0, 1e-3, -3e38, np.nan)
    advantages = random.normal(0.0, 1.0, (rows, width))
    tensors = [torch.from_numpy(x).to(dtype) for x in (old, new, advantages)]
    return *tensors, torch.from_numpy(mask)


def losses() -> Iterator[tuple[str, str]]:
    """Losses, gradients and metrics."""
    surrogates: dict[str, Any] = {
        "min-clip": "min-clip", "mask": Mask(), "mask5": Mask(truncation=5.0),
        "sequence mask": Mask(truncation=None, whole_sequence=True), "weight": "weight",
        "gradient-preserving": GradientPreserving(0.75, 1.0),
    }  # fmt: skip
    names = (
        "kl@0.05", "kl@0.0001", "tv@0.05", "vajda:1.5@0.05",
        "cap", "union", "sides", "clip", "dcpo",
    )  # fmt: skip
    some = {name: region for name, region in regions() if name in names}
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def one(label: str, dtype: torch.dtype, seed: int = 0, **arguments: Any) -> tuple[str, str]:
        old, new, advantages, mask = batch(dtype, seed)
        if advantages_of_rows := arguments.pop("advantages_of_rows", False):
            advantages = advantages[:, :1]
        new.requires_grad_()
        result = policy_loss(old, new, advantages, mask, **arguments)
        result.loss.backward()  # type: ignore[no-untyped-call]
        metrics = [result.metrics[name].to(torch.float64) for name in sorted(result.metrics)]
        return (
            f"loss {label} {dtype} {seed} {advantages_of_rows}",
            digest(result.loss, result.per_token, new.grad, *metrics),
        )

    for (name, region), (rule, surrogate), dtype, backend in product(
        some.items(), surrogates.items(), dtypes, ("native", "torch")
    ):
        yield one(
            f"{name} {rule} {backend}", dtype, region=region, surrogate=surrogate, backend=backend,
            metrics_by_probability=True,
        )  # fmt: skip
    kl, fixed = some["kl@0.05"], some["clip"]
    for backend in ("native", "torch"):
        for mode, seed in product(
            ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean",
             "seq-mean-token-sum-norm"), (1, 2),
        ):  # fmt: skip
            yield one(f"{mode} {backend}", torch.float32, seed, region=kl, loss_agg_mode=mode,
                      backend=backend, advantages_of_rows=True)  # fmt: skip
        for level, dtype in product(("sequence", "geometric-mean"), dtypes):
            yield one(f"{level} {backend}", dtype, region=fixed, ratio_level=level, backend=backend)
        yield one(f"exact {backend}", torch.float32, region=kl, exact=True, backend=backend)
        yield one(f"dual {backend}", torch.float32, region=kl, dual_clip=3.0, backend=backend)
        old, new, *_ = batch(torch.float32, 3)
        yield f"clip {backend}", digest(clip(kl, old, new - old))


def digests() -> Digests:
    """Every result of this process."""
    return dict(pair for results in (bounds_and_tables, losses) for pair in results())


def all_levels() -> dict[str, Digests]:
    """The digests at each level, each from a process of its own, which reads the level once."""
    found = {}
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    for level in SIMD_LEVELS:
        if level != "portable" and level.replace("avx512", "avx512bw") not in flags:
            print(f"skipped: this processor has no {level}", file=sys.stderr)
            continue
        done = subprocess.run(
            [sys.executable, __file__, "one"], env={**os.environ, "BANDPO_SIMD": level},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        found[level] = json.loads(done.stdout)
        print(f"{level}: {len(found[level])} results", file=sys.stderr)
    return found


def main() -> int:
    """Writes or checks a file of digests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("action", choices=("write", "check", "one"))
    parser.add_argument("file", type=Path, nargs="?")
    arguments = parser.parse_args()
    if arguments.action == "one":
        print(json.dumps(digests()))
        return 0
    found = all_levels()
    if arguments.action == "write":
        arguments.file.parent.mkdir(parents=True, exist_ok=True)
        arguments.file.write_text(json.dumps(found, indent=1))
        return 0
    before = json.loads(arguments.file.read_text())
    different = [
        f"{level}: {name}"
        for level in before
        for name in before[level]
        if found.get(level, {}).get(name) != before[level][name]
    ]
    for line in different:
        print(line)
    print(f"{len(different)} of {sum(map(len, before.values()))} results differ")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
