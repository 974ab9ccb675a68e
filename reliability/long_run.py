"""Many calls in one process: memory does not grow, caches are bounded, nothing compiles again.

python -m reliability.long_run --cases 1000000
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bandpo import Band, Clip
from bandpo.loss import policy_loss
from bandpo.region.base import _table
from bandpo.schedule import Constant, Linear, ScheduledBand
from bandpo.tensors.cached import _CACHED
from reliability.result import Row, run_cases

MIB = 2**20

GROWTH = 8 * MIB
"""Max growth of the resident memory after the first tenth of the calls, which fills caches."""

CACHED_TENSORS = 400
"""Max tensors that outlive a call, with the 64 tables that are kept."""


def resident() -> int:
    """Bytes of the process in memory, after a collection."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def repeated(check: str, calls: int, call: Callable[[int], object]) -> Row:
    """Calls a function with the numbers of its calls, and measures memory.

    Raises:
        AssertionError: If memory or a cache grows.
    """
    warm = max(1, calls // 10)
    for number in range(warm):
        call(number)
    before = resident()
    for number in range(warm, calls):
        call(number)
    growth = resident() - before
    assert growth < GROWTH, f"{check}: {growth / MIB:.1f} MiB in {calls - warm} calls"
    assert len(_CACHED) <= CACHED_TENSORS, f"{check}: {len(_CACHED)} cached tensors"
    tables = _table.cache_info()
    assert tables.currsize <= (tables.maxsize or 0)
    found = {
        "MiB more memory after the first tenth": max(growth, 0) / MIB,
        "cached tensors": float(len(_CACHED)),
        "tables": float(tables.currsize),
    }
    return Row(check, calls, found)


def _batch(number: int) -> tuple[torch.Tensor, ...]:
    """A batch of a shape that changes between calls."""
    shape = 1 + number % 7, 1 + number * 13 % 61
    generator = torch.Generator().manual_seed(number % 1000)
    old = -torch.rand(shape, generator=generator) * 5.0
    new = (old + 0.1 * torch.randn(shape, generator=generator)).requires_grad_()
    return old, new, torch.randn(shape, generator=generator), torch.ones(shape)


def losses(calls: int) -> Row:
    """Losses with gradient and metrics, of three regions in turn."""
    regions = Band("kl", 0.05).cap(10), Clip(0.2, 0.28), "(tv@0.1).cap(10)"

    def call(number: int) -> None:
        backend: Any = ("native", "torch")[number % 16 == 0]
        result = policy_loss(*_batch(number), region=regions[number % 3], backend=backend)
        torch.autograd.backward(result.loss)
        if number % 8 == 0:
            dict(result.metrics)

    return repeated("loss calls with changing shapes", calls, call)


def bands(calls: int) -> Row:
    """A new band with a table in every call."""

    def call(number: int) -> None:
        region = Band("kl", 0.01 + 1e-7 * number)
        old, new, *rest = _batch(number)
        torch.autograd.backward(policy_loss(old, new, *rest, region=region).loss)

    return repeated("bands, each with its table and a loss", calls, call)


def steps(calls: int) -> Row:
    """A schedule that steps after every call."""
    source = ScheduledBand("kl", Linear(0.1, 0.01, calls, hold=True), cap=10.0)

    def call(number: int) -> None:
        old, new, *rest = _batch(number)
        torch.autograd.backward(policy_loss(old, new, *rest, region=source).loss)
        source.step()

    return repeated("steps of a schedule, each with a loss", calls, call)


def compiled(calls: int) -> Row:
    """Compiled losses with changing shapes, and a region that steps.

    Raises:
        AssertionError: If it compiles more often than once for static and twice for other shapes.
    """
    graphs = 0

    def counting(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return module.forward

    source = ScheduledBand("kl", Constant(0.05))

    def loss(old: Any, new: Any, advantages: Any, mask: Any) -> Any:
        return policy_loss(old, new, advantages, mask, region=source, backend="torch").loss

    torch.compiler.reset()
    function = torch.compile(loss, fullgraph=True, dynamic=True, backend=counting)

    def call(number: int) -> None:
        old, new, *rest = _batch(8 + 7 * (number % 500) + 2)
        torch.autograd.backward(function(old, new, *rest))
        source.step()

    row = repeated("compiled losses with changing shapes", calls, call)
    assert graphs <= 3, f"compiled {graphs} times"
    return row._replace(found={**row.found, "compilations": float(graphs)})


def long_run(cases: int, _: int = 0) -> Iterator[Row]:
    """All parts; bands and steps a tenth of the losses, compiled calls a hundredth."""
    torch.set_num_threads(1)
    yield losses(cases)
    yield bands(cases // 10)
    yield steps(cases // 10)
    yield compiled(cases // 100)


if __name__ == "__main__":
    run_cases("long_run", __doc__, long_run, cases=1_000_000, seed=0, of="losses with gradient")
