"""Regions that change between steps, as the loss reads them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
import bandpo.torch
from bandpo.loss import PolicyLoss
from bandpo.schedule import Bapo, Linear, RegionSource, ScheduledBand
from bandpo.tensors.bounds import _LIVE, bounds_of
from support.batches import random_batch

# A warning of torch itself, on the first import of its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def scheduled() -> ScheduledBand:
    return ScheduledBand("kl", Linear(0.3, 0.01, 5))


class Alternating(RegionSource):
    """From one region to another, and back."""

    def __init__(self, first: bandpo.Region, second: bandpo.Region) -> None:
        super().__init__(first)
        self._other = second

    def step(self) -> None:
        now = self.region
        self._change(self._other)
        self._other = now

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


SOURCES = [
    scheduled,
    lambda: ScheduledBand("kl", Linear(0.3, 0.01, 5), within=lambda band: band.cap(10)),
    lambda: Alternating(bandpo.Clip(0.2), bandpo.Clip(0.1, 0.4)),
    # From a small table to a large one: the tensor has room for either.
    lambda: Alternating(bandpo.Clip(0.2) | bandpo.Clip(0.3), bandpo.Band("jeffreys", 1e-4)),
]


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("exact", [False, True])
def test_the_loss_is_that_of_the_region_of_the_last_step(
    make: Any, exact: bool, backend: str
) -> None:
    batch, source = random_batch((6, 20)), make()
    seen = set()
    for _ in range(4):
        options: dict[str, Any] = {"backend": backend, "exact": exact}
        actual = batch.loss(region=source, **options)
        wanted = batch.loss(region=source.region, **options)
        torch.testing.assert_close(actual, wanted, rtol=0.0, atol=0.0)
        seen.add(float(actual.loss))
        source.step()
    assert len(seen) > 1, "no step changed anything"


@pytest.mark.parametrize("make", SOURCES)
def test_a_step_causes_no_recompilation(make: Any, backend: str) -> None:
    source, batch = make(), random_batch((6, 20))
    compiled_graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal compiled_graphs
        compiled_graphs += 1
        return graph

    module = PolicyLoss(source, backend=backend)  # type: ignore[arg-type]
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=count)
    for _ in range(4):
        wanted = batch.loss(region=source.region, backend=backend)
        found = compiled(*batch)
        torch.testing.assert_close(found.per_token, wanted.per_token, rtol=0.0, atol=0.0)
        # Their sum is taken in another order, in float32.
        torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-6, atol=0.0)
        source.step()
    assert compiled_graphs == 1


@pytest.mark.parametrize("make", SOURCES)
def test_a_change_fills_the_same_tensor_in_place(make: Any) -> None:
    source, old = make(), torch.full((3,), -1.0)
    first = bounds_of(source, old)
    kept = first.clone()
    source.step()
    second = bounds_of(source, old)
    assert second.data_ptr() == first.data_ptr()
    assert not torch.equal(second, kept)
    words = bounds_of(source.region, old)
    assert torch.equal(second[: words.shape[0]], words)


def test_a_tensor_that_was_made_in_inference_mode_can_change() -> None:
    source, batch = scheduled(), random_batch((2, 8))
    with torch.inference_mode():
        batch.loss(region=source)
    source.step()
    torch.testing.assert_close(batch.loss(region=source), batch.loss(region=source.region))


def test_a_source_of_a_clip_serves_whole_sequences(backend: str) -> None:
    source, batch = Bapo(), random_batch((6, 20))
    source.step([1.0, -1.0], [0.1, 0.2], [-0.1, -3.0])
    options: dict[str, Any] = {"ratio_level": "sequence", "backend": backend}
    torch.testing.assert_close(
        batch.loss(region=source, **options), batch.loss(region=source.region, **options)
    )
    with pytest.raises(bandpo.error.InvalidValueError, match="must be a Clip with ratio_level"):
        batch.loss(region=scheduled(), **options)


def test_a_source_may_not_change_between_a_clip_and_a_table() -> None:
    source = Alternating(bandpo.Clip(0.2), bandpo.Band("kl", 0.05))
    random_batch((2, 8)).loss(region=source)
    with pytest.raises(bandpo.error.InvalidValueError, match="must stay a Clip or stay none"):
        source.step()


def test_tensors_of_a_source_are_freed_with_it() -> None:
    source = scheduled()
    random_batch((2, 8)).loss(region=source)
    bounds = weakref.ref(_LIVE[source])
    del source
    gc.collect()
    assert bounds() is None


def test_log_bounds_and_clip_follow_a_source() -> None:
    source, logp = scheduled(), np.log([0.01, 0.5, 0.99])
    for _ in range(3):
        wanted = source.region.table().log_bounds(logp.astype(np.float32))
        for bound, exact in zip(
            bandpo.torch.log_bounds(source, torch.from_numpy(logp)), wanted, strict=True
        ):
            np.testing.assert_allclose(bound.numpy(), exact, rtol=1e-6)
        source.step()
