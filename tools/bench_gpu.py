"""Times of the CUDA kernel of the loss, forward and backward, and of its peers.

Prints a line for each size, then the targets. Writes each time to benchmarks/gpu.json. Needs a GPU.

    python tools/bench_gpu.py [--max 28]

The batch is one row of N tokens in float32, with an advantage for each token. A tenth is masked.

- copy: a device copy of the bytes that the kernel has to move, 13 read and 8 written a token
- bandpo: `bandpo::token_loss` with a table of Band("kl", 0.05): losses, gradients, counts and sums
- compiled clip: PPO's clip loss in torch with its gradient, compiled for each size
- eager clip: the same, not compiled
- bisection: the published scheme for the upper bound, 50 halvings in torch, in place of a table
- liger: Liger's Triton GRPO loss, if it is installed, from logits of two tokens, its min

A time is the time between two events of the device. A GiB is written before the first event. That
empties the cache and lets the host run ahead; otherwise the host would be timed.

Memory is the peak of a call beyond its inputs and the gradient, in bytes a token. The copy has no
gradient and shows -4.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bandpo import Band, __version__  # noqa: E402
from bandpo.backends.cuda.availability import obstacle  # noqa: E402
from bandpo.backends.native import token_loss_op  # noqa: E402
from bandpo.tensors.bounds import bounds_of  # noqa: E402
from benchmarks import peers  # noqa: E402
from benchmarks.tokens import DELTA  # noqa: E402

BYTES_A_TOKEN = 4 + 4 + 4 + 1 + 4 + 4
REPEATS = 20
RESULTS = ROOT / "benchmarks" / "gpu.json"
TARGET_SIZE = 1 << 24
KL = Band("kl", DELTA)
ROW = 1024  # tokens of a sequence, for Liger
Tokens: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]"
Call: TypeAlias = Callable[[], Any]
Make: TypeAlias = Callable[[Tokens], Call]


def bisected_loss(old: Any, new: Any, advantages: Any, valid: Any) -> Any:
    """PPO's clip loss with the upper bound of KL alone, by 50 halvings."""
    p = old.exp()
    ratio = (new - old).exp()
    clipped = torch.minimum(ratio, peers.bisected_side(DELTA, p, 1.0 / p))
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return torch.where(valid, loss, 0.0).sum()


def with_gradient(loss: Callable[..., Any]) -> Make:
    """Returns the maker of a call of a loss and its gradient."""

    def make(tokens: Tokens) -> Call:
        old, new, advantages, valid = tokens
        new = new.detach().requires_grad_()
        return lambda: torch.autograd.grad(loss(old, new, advantages, valid), new)

    return make


def compiled_clip(tokens: Tokens) -> Call:
    """The clip loss, compiled for this size, because one for all sizes may be slower."""
    torch.compiler.reset()
    return with_gradient(peers.compiled_ppo_clip())(tokens)


def kernel(tokens: Tokens) -> Call:
    """The kernel with its bounds from a table."""
    old, new, advantages, valid = tokens
    bounds = bounds_of(KL, old)
    return lambda: token_loss_op(old, new, None, advantages, valid, bounds, "min-clip", [], False)


def copy(tokens: Tokens) -> Call:
    """A copy that reads half of the kernel's bytes and writes the other half."""
    count = tokens[0].numel() * BYTES_A_TOKEN // 2
    source = torch.empty(count, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def liger() -> Make | None:
    """Liger's Triton kernel on logits of two tokens, None if it is not installed."""
    try:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss
    except ImportError:
        return None

    def make(tokens: Tokens) -> Call:
        old, _, advantages, valid = (tensor.reshape(-1, ROW) for tensor in tokens)
        logits = torch.randn((old.shape[0], ROW + 1, 2), device="cuda", requires_grad=True)
        chosen = torch.zeros_like(old, dtype=torch.int64)
        arguments = old, None, chosen, advantages[:, 0].contiguous(), valid

        def call() -> Any:
            per_token, *_ = triton_grpo_loss(
                logits, *arguments, temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.28,
                inplace=False,
            )  # fmt: skip
            return torch.autograd.grad(per_token.sum(), logits)

        return call

    return make


def seconds(call: Call, before: torch.Tensor) -> list[float]:
    """The times of single calls, each after a write of `before`."""
    for _ in range(3):
        call()
    times = []
    for _ in range(REPEATS):
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        before.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e-3 * float(start.elapsed_time(end)))
    return times


def extra_bytes(call: Call, count: int) -> float:
    """The peak memory of a call beyond one gradient, in bytes a token."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    extra: float = (torch.cuda.max_memory_allocated() - before - 4 * count) / count
    return extra


def about() -> dict[str, Any]:
    """The machine and the versions of a measurement."""
    properties = torch.cuda.get_device_properties("cuda")
    driver = None
    if (program := shutil.which("nvidia-smi")) is not None:
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    packages = "torch", "triton", "numpy", "cupy-cuda12x", "cupy-cuda13x", "liger-kernel"
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": driver,
        "cuda of torch": torch.version.cuda,
        "python": platform.python_version(),
        "bandpo": __version__,
        **versions,
        "bytes a token": BYTES_A_TOKEN,
        "unit": "seconds of single calls",
    }


def of_call(make: Make, tokens: Tokens, before: torch.Tensor) -> tuple[list[float], float]:
    """The times and the extra bytes a token of one method; its tensors are freed on return."""
    call = make(tokens)
    return seconds(call, before), extra_bytes(call, tokens[0].numel())


def measure(count: int, makers: dict[str, Make], before: torch.Tensor) -> dict[str, Any]:
    """Measures every method on ``count`` tokens, None where memory runs out."""
    old = -torch.empty((1, count), device="cuda").exponential_(0.3)
    new = old + 0.3 * torch.randn_like(old)
    tokens = old, new, torch.randn_like(old), torch.rand_like(old) < 0.9
    row: dict[str, Any] = {"tokens": count, "seconds": {}, "extra bytes a token": {}}
    for name, make in makers.items():
        try:
            row["seconds"][name], row["extra bytes a token"][name] = of_call(make, tokens, before)
        except torch.cuda.OutOfMemoryError:
            row["seconds"][name] = row["extra bytes a token"][name] = None
        torch.cuda.empty_cache()
    return row


def targets(row: dict[str, Any]) -> str:
    """The targets, for the size that they are stated for."""
    median = {name: statistics.median(times) for name, times in row["seconds"].items() if times}
    mine = median["bandpo"]
    speed = BYTES_A_TOKEN * row["tokens"] / mine
    lines = [f"bandpo: {mine * 1e6:.0f} us, {speed:.3g} bytes a second"]
    wanted = {"copy": " (target >= 0.9)", "compiled clip": " (>= 1)", "bisection": " (>= 100)"}
    for peer in ("copy", "compiled clip", "eager clip", "bisection", "liger"):
        found = f"{median[peer] / mine:.3g} of that" if peer in median else "not measured"
        lines.append(f"{peer}: {found}{wanted.get(peer, '')}")
    extra = row["extra bytes a token"]["bandpo"]
    return "\n".join([*lines, f"extra bytes a token: {extra:.3g} (target <= 8)"])


def main() -> None:
    """Measures every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max", type=int, default=28, help="binary logarithm of the max tokens")
    last = parser.parse_args().max
    if reason := obstacle():
        raise SystemExit(f"needs a GPU: {reason}")
    makers: dict[str, Make] = {
        "copy": copy,
        "bandpo": kernel,
        "compiled clip": compiled_clip,
        "eager clip": with_gradient(peers.ppo_clip),
        "bisection": with_gradient(bisected_loss),
    }
    if (of_liger := liger()) is not None:
        makers["liger"] = of_liger
    before = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    rows: list[dict[str, Any]] = []
    for exponent in range(16, last + 1, 2):
        row = measure(1 << exponent, makers, before)
        rows.append(row)
        times = "  ".join(
            f"{name} {statistics.median(times) * 1e6:.0f} us" if times else f"{name} out of memory"
            for name, times in row["seconds"].items()
        )
        print(f"2^{exponent}: {times}", flush=True)
    for row in rows:
        if row["tokens"] == TARGET_SIZE and row["seconds"]["bandpo"]:
            print(targets(row))
    RESULTS.write_text(json.dumps({**about(), "rows": rows}, indent=1) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
