"""Times of the CUDA kernel of the loss, forward and backward, and of its peers.

Prints a line for each measurement and writes each time to benchmarks/gpu.json. Needs a GPU.

    python tools/bench_gpu.py [--max 28] [--parts sizes cases calls] [--to FILE]

- sizes: the kernel and its peers at 2^16 to 2^28 tokens
- cases: the kernel on the tokens of tools/count_sass.py, by dtype, beside copies
- calls: the host's time of a call with 8192 tokens, with and without a graph

The batch of sizes is one row of N tokens in float32, with an advantage for each token. A tenth is
masked.

- copy: a device copy of the bytes that the kernel has to move, 13 read and 8 written a token
- bandpo: `bandpo::token_loss` with a table of Band("kl", 0.05): losses, gradients, counts and sums
- policy_loss: `bandpo.loss.policy_loss` with its gradient, by the same table
- compiled clip: PPO's clip loss in torch with its gradient, compiled for each size
- eager clip: the same, not compiled
- compiled band: `policy_loss` by plain torch, compiled, as it runs without a launcher
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
import math
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from torch.nn.functional import logsigmoid  # noqa: E402

from bandpo import Band, __version__  # noqa: E402
from bandpo.backends.contract import LossInputs, Weight  # noqa: E402
from bandpo.backends.cuda import kernels  # noqa: E402
from bandpo.backends.cuda.availability import obstacle  # noqa: E402
from bandpo.backends.cuda.launch import launcher  # noqa: E402
from bandpo.backends.native import token_loss_op  # noqa: E402
from bandpo.loss import PolicyLoss, policy_loss  # noqa: E402
from bandpo.tensors.bounds import bounds_of  # noqa: E402
from benchmarks import peers  # noqa: E402
from benchmarks.tokens import DELTA  # noqa: E402
from support.emulated import KERNELS, Emulator, build  # noqa: E402

BYTES_A_TOKEN = 4 + 4 + 4 + 1 + 4 + 4
RESULTS = ROOT / "benchmarks" / "gpu.json"
TARGET_SIZE = 1 << 24
KL = Band("kl", DELTA)
ROW = 1024  # tokens of a sequence, for Liger
EMULATED = r"<(float|bandpo::BFloat16), bandpo::Table, .*ALONE|totals|scale|count"
ROWS = {"sizes": "rows", "cases": "cases", "calls": "calls"}
PARTS = tuple(ROWS)
Tokens: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]"
Call: TypeAlias = Callable[[], Any]
Make: TypeAlias = Callable[[Tokens], Call]
Device: TypeAlias = "Gpu | Emulated"


class Gpu:
    """Times by events of a GPU."""

    name = "cuda"
    repeats = 20

    def __init__(self) -> None:
        if reason := obstacle():
            raise SystemExit(f"needs a GPU: {reason}")
        self._before = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

    def synchronize(self) -> None:
        """Waits for the GPU."""
        torch.cuda.synchronize()

    def seconds(self, call: Call) -> list[float]:
        """The times of single calls, each after a write of a GiB."""
        for _ in range(3):
            call()
        times = []
        for _ in range(self.repeats):
            start, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            self._before.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(1e-3 * float(start.elapsed_time(end)))
        return times

    def extra_bytes(self, call: Call, count: int) -> float:
        """The peak memory of a call beyond one gradient, in bytes a token."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        extra: float = (torch.cuda.max_memory_allocated() - before - 4 * count) / count
        return extra

    def replay_of(self, call: Call) -> Call:
        """A call captured in a graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


class Emulated:
    """A CPU that runs the kernels in the emulator of the tests, to try this script."""

    name = "cpu"
    repeats = 2

    def __init__(self, emulator: Emulator) -> None:
        vars(kernels)["launch"] = emulator.launch
        token_loss_op._backend_fns["cpu"] = kernels.token_loss

    def synchronize(self) -> None:
        """Returns at once."""

    def seconds(self, call: Call) -> list[float]:
        """The host's times."""
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    def extra_bytes(self, call: Call, count: int) -> float:
        """NaN, because a CPU does not count memory."""
        call()
        return math.nan

    def replay_of(self, call: Call) -> Call:
        """The call itself."""
        return call


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


def weighted(tokens: Tokens) -> Call:
    """The kernel of a loss that is a mean over a known number of tokens."""
    old, new, advantages, valid = tokens
    inputs = LossInputs(
        old, new, None, advantages, valid, bounds_of(KL, old), "min-clip", [], False
    )
    return lambda: kernels.weighted_sum(inputs, Weight(1, old.numel()))


def whole_loss(tokens: Tokens) -> Call:
    """The loss as a trainer calls it."""
    return with_gradient(lambda *tokens: policy_loss(*tokens, region=KL).loss)(tokens)


def compiled_band(tokens: Tokens) -> Call:
    """The loss by plain torch, compiled for this size."""
    torch.compiler.reset()
    module = PolicyLoss(KL, backend="torch")
    compiled = torch.compile(lambda *tokens: module(*tokens).loss, dynamic=False)
    return with_gradient(compiled)(tokens)


def copy(tokens: Tokens) -> Call:
    """A copy that reads half of the kernel's bytes and writes the other half."""
    count = tokens[0].numel() * BYTES_A_TOKEN // 2
    source = torch.empty(count, dtype=torch.uint8, device=tokens[0].device)
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
        logits = torch.randn((old.shape[0], ROW + 1, 2), device=old.device, requires_grad=True)
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


def about() -> dict[str, Any]:
    """The machine and the versions of a measurement."""
    properties = torch.cuda.get_device_properties("cuda")
    driver = None
    if (program := shutil.which("nvidia-smi")) is not None:
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    packages = "torch", "triton", "numpy", "cuda-bindings", "cupy-cuda13x", "liger-kernel"
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
        "launcher": launcher().name,
        **versions,
        "bytes a token": BYTES_A_TOKEN,
        "unit": "seconds of single calls",
    }


def of_call(on: Device, make: Make, tokens: Tokens) -> tuple[list[float], float]:
    """The times and the extra bytes a token of one method; its tensors are freed on return."""
    call = make(tokens)
    return on.seconds(call), on.extra_bytes(call, tokens[0].numel())


def measure(on: Device, count: int, makers: dict[str, Make]) -> dict[str, Any]:
    """Measures every method on ``count`` tokens, None where memory runs out."""
    old = -torch.empty((1, count), device=on.name).exponential_(0.3)
    new = old + 0.3 * torch.randn_like(old)
    tokens = old, new, torch.randn_like(old), torch.rand_like(old) < 0.9
    row: dict[str, Any] = {"tokens": count, "seconds": {}, "extra bytes a token": {}}
    for name, make in makers.items():
        try:
            row["seconds"][name], row["extra bytes a token"][name] = of_call(on, make, tokens)
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


def of_sizes(on: Device, last: int) -> Iterator[dict[str, Any]]:
    """Measures every size."""
    makers: dict[str, Make] = {
        "copy": copy,
        "bandpo": kernel,
        "policy_loss": whole_loss,
        "compiled clip": compiled_clip,
        "eager clip": with_gradient(peers.ppo_clip),
        "compiled band": compiled_band,
        "bisection": with_gradient(bisected_loss),
    }
    if (of_liger := liger()) is not None:
        makers["liger"] = of_liger
    for exponent in range(min(16, last), last + 1, 4):
        row = measure(on, 1 << exponent, makers)
        times = "  ".join(
            f"{name} {statistics.median(times) * 1e6:.0f} us" if times else f"{name} out of memory"
            for name, times in row["seconds"].items()
        )
        print(f"2^{exponent}: {times}", flush=True)
        yield row
        if row["tokens"] == TARGET_SIZE and row["seconds"]["bandpo"]:
            print(targets(row), flush=True)


def steps_of(device: str, steps: str, dtype: torch.dtype, count: int) -> Tokens:
    """The tokens of tools/count_sass.py, in rows of `ROW`, made on the device."""
    shape = (count // ROW, ROW)
    generator = torch.Generator(device).manual_seed(1)
    normal = partial(torch.randn, shape, generator=generator, device=device)
    logits = 3.0 + 3.0 * normal()
    moved = 0.1 * normal() if steps == "near" else 1.5 * normal().sign()
    old, new = (logsigmoid(logit).to(dtype) for logit in (logits, logits + moved))
    return old, new, normal(), torch.ones(shape, dtype=torch.bool, device=device)


def of_cases(on: Device, count: int) -> Iterator[dict[str, Any]]:
    """Measures the kernel on near and far tokens, of each dtype, beside copies of its bytes."""
    for dtype, steps, one_a_row in product(
        (torch.float32, torch.bfloat16), ("near", "far"), (False, True)
    ):
        tokens = steps_of(on.name, steps, dtype, count)
        if one_a_row:
            tokens = tokens[0], tokens[1], tokens[2][:, :1].contiguous(), tokens[3]
        name = f"{steps} {dtype}, {'one advantage a row' if one_a_row else 'one a token'}"
        read = 2 * dtype.itemsize + 1 + 4 * (not one_a_row)
        row: dict[str, Any] = {"case": name, "tokens": count, "seconds": {}}
        for method, call, moved in (
            ("losses and gradients", kernel(tokens), read + 8),
            ("weighted gradients", weighted(tokens), read + dtype.itemsize),
            ("policy_loss", whole_loss(tokens), read + dtype.itemsize),
        ):
            source = torch.empty(count * moved // 2, dtype=torch.uint8, device=on.name)
            target = torch.empty_like(source)
            times = on.seconds(partial(target.copy_, source)), on.seconds(call)
            row["seconds"][method] = dict(zip(("copy", "bandpo"), times, strict=True))
            of_copy, ours = (1e12 / count * statistics.median(found) for found in times)
            print(
                f"{name}, {method}, {moved} bytes: {ours:.2f} ps a token, copy {of_copy:.2f}, "
                f"{of_copy / ours:.1%} of its speed",
                flush=True,
            )
        yield row


def of_calls(on: Device, repeats: int) -> Iterator[dict[str, Any]]:
    """Measures the host's time of a call, and the device's time of a replay."""
    tokens = steps_of(on.name, "near", torch.float32, 8192)
    old, new, advantages, valid = tokens
    new = new.detach().requires_grad_()
    bounds = bounds_of(KL, old)
    clip = peers.compiled_ppo_clip()

    def backward(loss: Callable[..., Any]) -> Call:
        return lambda: torch.autograd.grad(loss(old, new, advantages, valid), new)

    def of_kernels() -> Any:
        return kernels.token_loss(
            old, new.detach(), None, advantages, valid, bounds, "min-clip", [], False
        )

    methods: dict[str, Call] = {
        "kernels": of_kernels,
        "operator": kernel((old, new.detach(), advantages, valid)),
        "policy_loss": lambda: policy_loss(*(old, new, advantages, valid), region=KL),
        "policy_loss, backward": backward(lambda *given: policy_loss(*given, region=KL).loss),
        "eager clip, backward": backward(peers.ppo_clip),
        "compiled clip, backward": backward(clip),
    }
    for name, call in methods.items():
        for _ in range(20):
            call()
        times = []
        for _ in range(repeats):
            on.synchronize()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        try:
            replays = on.seconds(on.replay_of(call))
        except (RuntimeError, ValueError) as reason:
            print(f"{name}: no graph: {str(reason).splitlines()[0]}")
            replays = []
        row = {"call": name, "tokens": 8192, "host seconds": times, "graph seconds": replays}
        replayed = f"{statistics.median(replays) * 1e6:.1f} us" if replays else "none"
        print(f"{name}: host {statistics.median(times) * 1e6:.1f} us, graph {replayed}", flush=True)
        yield row


def main() -> None:
    """Measures the parts, and writes each row at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max", type=int, default=28, help="binary logarithm of the max tokens")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--emulated", action="store_true", help="try the script without a GPU")
    given = parser.parse_args()
    if given.emulated:
        with TemporaryDirectory() as folder:
            needed = [kernel for kernel in KERNELS if re.search(EMULATED, kernel)]
            on: Device = Emulated(Emulator(build(Path(folder), kernels=needed)))
        last, case_size, repeats = 10, 1 << 14, 2
        measured: dict[str, Any] = {"device": "emulated"}
    else:
        on, last, case_size, repeats = Gpu(), given.max, 1 << 26, 200
        measured = about()
    start = time.perf_counter()
    weighted(steps_of(on.name, "near", torch.float32, ROW))()
    on.synchronize()
    measured["seconds of the first call"] = time.perf_counter() - start
    print(f"first call: {measured['seconds of the first call']:.3f} s", flush=True)
    parts = {
        "sizes": lambda: of_sizes(on, last),
        "cases": lambda: of_cases(on, case_size),
        "calls": lambda: of_calls(on, repeats),
    }
    for part in given.parts:
        rows = measured[ROWS[part]] = []
        for row in parts[part]():
            rows.append(row)
            given.to.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"written to {given.to}")


if __name__ == "__main__":
    main()
