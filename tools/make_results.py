"""Measures the targets of speed and size on this machine and writes benchmarks/RESULTS.md.

    python tools/make_results.py        about four minutes on two idle cores

Both sides of a ratio are timed in turns in one process; see benchmarks/interleaved.py.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import bandpo  # noqa: E402
from bandpo import _core  # noqa: E402
from bandpo.backends.select import gpu_report  # noqa: E402
from benchmarks import loss, process, solver, table  # noqa: E402
from benchmarks.interleaved import Comparison, median_seconds  # noqa: E402
from benchmarks.solver import EXPRESSION, region  # noqa: E402
from benchmarks.tokens import DELTA, SIZE, SIZES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "RESULTS.md"

GPU = ROOT / "benchmarks" / "gpu.json"
"""Measurements of tools/bench_gpu.py, if it has run on a GPU."""

GPU_SIZE = 2**24
GPU_TARGETS = (
    (
        "bandpo",
        "copy",
        "losses and gradients",
        "a copy of the same bytes",
        ">= 90 % of its speed",
        1.0 / 0.9,
    ),
    (
        "policy_loss",
        "compiled clip",
        "`policy_loss`, forward + backward",
        "compiled PPO clip",
        "<= 1.0x its time",
        1.0,
    ),
    (
        "policy_loss",
        "eager clip",
        "`policy_loss`, forward + backward",
        "eager PPO clip",
        ">= 10x faster",
        0.1,
    ),
    (
        "policy_loss",
        "bisection",
        "`policy_loss`, forward + backward",
        "50 bisection steps",
        ">= 100x faster",
        0.01,
    ),
)
"""Method, peer, their descriptions, the target, and the allowed share of the peer's time."""

REASONS = {
    "bounds": "a few bounds in a thousand are polished in double-double, one token at a time",
    "table": "numpy's bounds are float64, and `lower` takes a logarithm",
    "loss": "it reads and writes as much as the peer, and also looks up bounds and sums metrics",
    "small loss": "checks of the arguments and the autograd of torch have a fixed cost",
    "anchor": "it reads one column more, 25 bytes a token instead of 21, at the speed of memory",
    "gpu": "masks are random and steps large, so that every warp looks tokens up; see docs/gpu.md",
    "build": "a table and the measurement of its error take exact bounds",
    "import": "bandpo's modules and what they import of the standard library",
}
"""Known causes, printed for each target that is missed."""


@dataclass(frozen=True)
class Row:
    """One target."""

    key: str  # of REASONS
    columns: str  # what | against | target
    measured: str
    spread: str
    excess: float  # the cost over the allowed cost: missed above 1

    def markdown(self) -> str:
        """Returns the row of the table."""
        verdict = "met" if self.excess <= 1.0 else f"missed, by {digits(self.excess)}x"
        return f"| {self.columns} | {self.measured} | {self.spread} | {verdict} |"


def at_least(key: str, what: str, against: str, times: float, found: Comparison) -> Row:
    """Returns a row whose target is a min speed-up over the peer."""
    return Row(
        key,
        f"{what} | {against} | >= {times:g}x faster",
        f"{digits(1.0 / found.ratio)}x",
        f"{digits(1.0 / found.high)} to {digits(1.0 / found.low)}",
        found.ratio * times,
    )


def at_most(key: str, what: str, against: str, share: float, found: Comparison) -> Row:
    """Returns a row whose target is a max share of the peer's time."""
    return Row(
        key,
        f"{what} | {against} | <= {share:g}x its time",
        f"{digits(found.ratio)}x",
        f"{digits(found.low)} to {digits(found.high)}",
        found.ratio / share,
    )


def milliseconds(key: str, what: str, against: str, allowed: float, seconds: float) -> Row:
    """Returns a row whose target is a max time."""
    found = 1e3 * seconds
    columns = f"{what} | {against} | <= {allowed:g} ms"
    return Row(key, columns, f"{digits(found)} ms", "", found / allowed)


def target_rows() -> Iterator[Row]:
    """Measures every target that needs no GPU."""
    for divergence in solver.PEER_DIVERGENCES:
        found = solver.compare_to_find_root(divergence)
        roots = solver.SIZE * solver.ROOTS_A_TOKEN
        what = f"exact bounds, float64, {divergence}: {digits(1e9 * found.ours / roots)} ns a root"
        peer = f"scipy find_root: {digits(1e9 * found.peer / roots)} ns"
        yield at_least("bounds", what, peer, 50.0, found)
    for method, name in (("bandpo.torch", "torch"), ("numpy", "numpy")):
        found = table.compare_to_bisection(method)
        ours, peer_ns = (1e9 * s / table.RATIO_SIZE / 2 for s in (found.ours, found.peer))
        what = f"bounds from a table, float32, {name}: {digits(ours)} ns a side"
        yield at_least("table", what, f"50 bisection steps: {digits(peer_ns)} ns", 100.0, found)
    for size, peer, bound in (
        (SIZE, loss.COMPILED_CLIP, at_most),
        (SIZE, loss.EAGER_CLIP, at_least),
        (min(SIZES), loss.EAGER_CLIP, at_most),
    ):
        found = loss.compare_to_clip("native", peer, size=size, seconds=4.0)
        key = "loss" if size == SIZE else "small loss"
        ours, peer_ns = (1e9 * s / size for s in (found.ours, found.peer))
        what = f"CPU loss, forward + backward, {power(size)} tokens: {digits(ours)} ns a token"
        yield bound(
            key, what, f"{peer}: {digits(peer_ns)} ns", 10.0 if bound is at_least else 1.0, found
        )
    for surrogate in ("min-clip", "weight"):
        found = loss.compare_to_own_edge(surrogate, seconds=4.0)
        ours, own = (1e9 * s / SIZE for s in (found.ours, found.peer))
        what = f"CPU loss at an anchor, {surrogate}, {power(SIZE)} tokens: {digits(ours)} ns"
        yield at_most("anchor", what, f"the same without one: {digits(own)} ns", 1.15, found)
    for divergence, allowed in (("kl", 2.0), (EXPRESSION, 50.0)):
        seconds = median_seconds(table.build(divergence))
        yield milliseconds("build", f"table build, `{divergence}`", "", allowed, seconds)
    found = process.compare_imports()
    on_top = found.ours - found.peer
    yield milliseconds("import", "import bandpo", "on top of import numpy", 30.0, on_top)


def gpu_rows() -> Iterator[str]:
    """Yields the rows of a GPU's targets; they read "not measured" without measurements."""
    of_size = {row["tokens"]: row["seconds"] for row in gpu().get("rows", ())}.get(GPU_SIZE, {})
    for method, peer, what, against, target, allowed in GPU_TARGETS:
        columns = f"GPU, {what}, {power(GPU_SIZE)} tokens | {against} | {target}"
        if not of_size.get(peer) or not of_size.get(method):
            yield f"| {columns} | not measured | | no GPU |"
            continue
        low, ours, high = statistics.quantiles(of_size[method], n=4)
        ratios = [time / statistics.median(of_size[peer]) for time in (ours, low, high)]
        found, *spread = (f"{digits(ratio)}x its time" for ratio in ratios)
        yield Row("gpu", columns, found, " to ".join(spread), ratios[0] / allowed).markdown()


def gpu() -> dict[str, Any]:
    """Returns the measurements on a GPU, or an empty dict."""
    return json.loads(GPU.read_text(encoding="utf-8")) if GPU.exists() else {}


def gpu_section() -> str:
    """Returns the times on a GPU, with the machine."""
    measured = gpu()
    rows, cases, calls = (measured.pop(part, []) for part in ("rows", "cases", "calls"))
    if not rows:
        return "Not measured: `make bench-gpu` writes benchmarks/gpu.json on a machine with one."
    about = ", ".join(f"{name} {value}" for name, value in measured.items())
    methods = list(rows[0]["seconds"])

    def nanoseconds_of(row: dict[str, Any], method: str) -> str:
        times = row["seconds"][method]
        return digits(1e9 * statistics.median(times) / row["tokens"]) if times else "no memory"

    by_size = markdown(
        ["tokens", *methods],
        ([power(row["tokens"]), *(nanoseconds_of(row, name) for name in methods)] for row in rows),
    )

    def shares(row: dict[str, Any]) -> Iterator[str]:
        for times in row["seconds"].values():
            ours, copy = (statistics.median(times[of]) for of in ("bandpo", "copy"))
            yield f"{digits(1e12 * ours / row['tokens'])} ({copy / ours:.0%})"

    by_case = markdown(
        ["tokens of tools/count_sass.py", *(cases[0]["seconds"] if cases else ())],
        ([row["case"], *shares(row)] for row in cases),
    )
    by_call = markdown(
        ["call of 8192 tokens", "host", "replay of a graph"],
        (
            [row["call"], *(digits(1e6 * statistics.median(row[part])) for part in SIDES)]
            for row in calls
        ),
    )
    return f"""From benchmarks/gpu.json: {about}.

Tokens of `sizes` in tools/bench_gpu.py. bandpo is the kernel with losses and gradients.

{by_size}

Picoseconds a token, and in parentheses the share of the speed of a copy that moves as many bytes.

{by_case}

Microseconds of a call.

{by_call}"""


SIDES = "host seconds", "graph seconds"


def digits(value: float) -> str:
    """Returns a number with three digits, or all digits before the point."""
    return f"{value:.3g}" if abs(value) < 1000.0 else f"{value:.0f}"


def nanoseconds(call: Callable[[], object], size: int) -> str:
    """Returns the time of a call for each token."""
    return f"{digits(1e9 * median_seconds(call) / size)}"


def growth() -> Iterator[Sequence[str]]:
    """Measures the loss at every size, beside the peers."""
    for size in SIZES:
        steps = (loss.Step(method, size=size) for method in ("native", *loss.PEERS))
        yield [power(size), *(nanoseconds(step.forward_backward, size) for step in steps)]


def divergences() -> Iterator[Sequence[str]]:
    """Measures solver, table build and loss for every divergence."""
    for divergence in (*solver.DIVERGENCES, EXPRESSION):
        yield [
            f"`{divergence}`",
            nanoseconds(solver.bounds("bandpo", divergence), solver.ROOTS_A_TOKEN * solver.SIZE),
            f"{digits(1e3 * median_seconds(table.build(divergence)))}",
            nanoseconds(loss.Step("native", region=region(divergence)).forward_backward, SIZE),
        ]


def rules() -> Iterator[Sequence[str]]:
    """Measures every surrogate in every dtype."""
    for surrogate in loss.SURROGATES:
        steps = (loss.Step("native", dtype=dtype, surrogate=surrogate) for dtype in loss.DTYPES)
        yield [surrogate, *(nanoseconds(step.forward_backward, SIZE) for step in steps)]


def power(size: int) -> str:
    """Returns a power of two in the form 2^k."""
    return f"2^{size.bit_length() - 1}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table, the first column left-aligned, the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Returns the machine and the versions of a measurement."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "scipy", "torch")
    ]
    load = os.getloadavg()[0]
    busy = f"Load at the start: {load:.1f}"
    if load > 1.0:
        busy += ", so other work ran and slowed both sides"
    return f"""- Machine: {cpu}, {os.cpu_count()} cores. {busy}.
- GPU: {gpu_report()}.
- Threads: bandpo {_core.thread_count()}, torch {torch.get_num_threads()}, scipy 1.
- Versions: bandpo {bandpo.__version__} at {output("git", "describe", "--always", "--dirty")}, \
Python {platform.python_version()}, {", ".join(versions)}, {output("rustc", "--version")}.
- Date: {datetime.datetime.now(tz=datetime.timezone.utc):%Y-%m-%d}."""


def output(*command: str) -> str:
    """Returns the output of a program, or a note that it failed."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return f"unknown ({command[0]} does not say)"
    return done.stdout.strip()


def main() -> None:
    """Measures everything and writes the file."""
    head = machine()
    rows = []
    for row in target_rows():
        rows.append(row)
        print(row.markdown(), flush=True)
    on_gpu = list(gpu_rows())
    missed = {row.key for row in rows if row.excess > 1.0}
    missed |= {"gpu"} if any("missed" in row for row in on_gpu) else set()
    reasons = "\n".join(f"- {key}: {reason}." for key, reason in REASONS.items() if key in missed)
    causes = "No measured target is missed."
    if reasons:
        causes = f"Known causes:\n\n{reasons}"
    lines = "\n".join([*(row.markdown() for row in rows), *on_gpu])
    text = f"""# Results

Written by `make results` from the suite in `benchmarks/`, which asv runs as well; see
CONTRIBUTING.md.

{head}

The times are those of whole calls, as a user makes them, with delta {DELTA:g}. Both sides of a
ratio were timed in turns in one process. The table gives the median of the ratio and its quartiles.
Exact bounds are compared for p from 0.2 to 0.8, because both bounds are roots there for any f, and
find_root is fastest.

## Targets

| what | against | target | measured | quartiles | |
| --- | --- | ---: | ---: | ---: | --- |
{lines}

{causes}

## Growth

Nanoseconds a token of the loss, float32, forward + backward.

{markdown(["tokens", "bandpo native", *loss.PEERS], growth())}

## GPU

Nanoseconds a token, forward + backward, medians of single calls.

{gpu_section()}

## Divergences

The loss ({power(SIZE)} tokens, float32, forward + backward) reads a table, so the divergence
should not change its cost.

{markdown(["divergence", "exact, ns a root", "table build, ms", "loss, ns a token"], divergences())}

## Surrogates

Nanoseconds a token of the native loss, {power(SIZE)} tokens, forward + backward.

{markdown(["surrogate", *loss.DTYPES], rules())}
"""
    RESULTS.write_text(text, encoding="utf-8")
    print(f"written to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
