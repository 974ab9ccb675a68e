"""Regions, tables and losses in a few KiB, as Ray carries them to workers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import cloudpickle
import torch

from bandpo import Band, BandTable, Clip, Divergence, Mask, Region, region_from_spec, sides
from bandpo.correction import Correction
from bandpo.loss import GlobalBatch, PolicyLoss, policy_loss
from bandpo.presets import PRESETS
from bandpo.region import Dcpo, PriceBand, by_sign
from bandpo.schedule import (
    Bapo,
    Cosine,
    EntropyTargeted,
    Quantile,
    RegionSource,
    ScheduledBand,
    SecondMoment,
)
from support.batches import Batch, random_batch

KIB = 1024

Pickler = Callable[[Any], bytes]

PICKLERS = pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])

BAND = Band("kl", 0.05)

REGIONS: list[Region] = [
    BAND,
    Band("renyi:2.5", (0.1, 0.2)),
    Clip(0.2, 0.28),
    Dcpo(),
    PriceBand("kl", 0.1),
    region_from_spec('"u*ln(u) - u + 1"@0.01'),
    (BAND | Clip(0.2, 0.28)).at_least(0.1, 0.2).cap(10),
    sides(lower=Clip(0.2), upper=BAND),
]

SOURCES: list[RegionSource] = [
    ScheduledBand("kl", Cosine(0.05, 0.005, 1000), cap=10, at_least=(0.1, 0.2)),
    ScheduledBand("tv", EntropyTargeted(0.05, target=1.0, rate=0.1, min_value=0.01, max_value=0.1)),
    Bapo(),
    SecondMoment(),
    Quantile(),
]

TABLES: list[BandTable] = [
    BAND.table(),
    Band("alpha:0.5", (0.01, 0.2)).table(),
    Band("pearson-chi2", 1.0).table(),
    REGIONS[-2].table(),
]


def again(dumps: Pickler, value: Any, size: int) -> Any:
    """The value, pickled and read, if that takes at most a number of bytes."""
    data = dumps(value)
    assert len(data) <= size, value
    return pickle.loads(data)  # noqa: S301 -- our own bytes


def loss_of(region: Region | RegionSource, batch: Batch | None = None) -> torch.Tensor:
    return policy_loss(*(batch or random_batch((4, 8))), region=region).loss


@PICKLERS
def test_a_region_takes_a_kib_and_no_more_after_its_use(dumps: Pickler) -> None:
    regions: list[Region | RegionSource] = [*REGIONS, *SOURCES]
    for region in regions:
        loss = loss_of(region)
        copied = again(dumps, region, 1 * KIB)
        if isinstance(region, Region):
            assert copied == region
        assert torch.equal(loss_of(copied), loss)
    signed = by_sign(positive=BAND, negative=Clip(0.2))
    assert again(dumps, signed, 1 * KIB) == signed


@PICKLERS
def test_a_table_takes_nine_kib(dumps: Pickler) -> None:
    for table in TABLES:
        copied = again(dumps, table, 9 * KIB)
        assert copied == table
        assert torch.equal(loss_of(copied), loss_of(table))


@PICKLERS
def test_a_loss_takes_two_kib_with_a_region_of_one(dumps: Pickler) -> None:
    batch = random_batch((4, 8))
    modules = [PolicyLoss(region, surrogate=Mask(truncation=5.0)) for region in REGIONS]
    modules += [
        PolicyLoss(source, correction=Correction(Clip.between(0.5, 5))) for source in SOURCES
    ]
    for module in modules:
        given: dict[str, Any] = {}
        if module.correction is not None:
            given["rollout_log_prob"] = batch.old_log_prob
        wanted = module(*batch, **given).loss
        copied = again(dumps, module, 2 * KIB)
        assert torch.equal(copied(*batch, **given).loss, wanted)
    for name in PRESETS:
        again(dumps, PRESETS[name], 1 * KIB)
        again(dumps, PolicyLoss.from_preset(name), 2 * KIB)
    assert again(dumps, GlobalBatch(90, 9, 2, 7.0), 1 * KIB) == GlobalBatch(90, 9, 2, 7.0)


@PICKLERS
def test_a_band_with_a_delta_for_each_token_takes_its_array(dumps: Pickler) -> None:
    region = Band("kl", np.linspace(0.01, 0.5, 4000).reshape(40, 100))
    assert again(dumps, region, 1 * KIB + 2 * 4000 * 8) == region


def test_functions_without_a_name_need_cloudpickle() -> None:
    own = Band(Divergence.from_callable(lambda u: (u - 1.0) ** 2), 0.05)
    scheduled = ScheduledBand("kl", Cosine(0.05, 0.005, 1000), within=lambda band: band | Clip(0.1))
    for region in (own, scheduled):
        assert torch.equal(loss_of(again(cloudpickle.dumps, region, 2 * KIB)), loss_of(region))
        with pytest.raises((pickle.PicklingError, AttributeError)):
            pickle.dumps(region)


@PICKLERS
def test_a_copy_keeps_the_state_of_a_source_and_then_goes_its_own_way(dumps: Pickler) -> None:
    loss = PolicyLoss(copy.deepcopy(SOURCES[0]))
    assert isinstance(loss.region, ScheduledBand)
    loss.region.step()
    copied = again(dumps, loss, 2 * KIB)
    assert copied.region.region == loss.region.region
    copied.region.step()
    assert copied.region.region != loss.region.region
    assert copied.region.state_dict() == {"taken": 2}


IN_A_WORKER = """
import pickle, sys
regions, batch = pickle.loads(sys.stdin.buffer.read())
from bandpo.loss import policy_loss
print(*(policy_loss(*batch, region=region).loss.item() for region in regions))
"""


def test_a_fresh_process_computes_the_same_losses() -> None:
    regions: list[Region | RegionSource] = [*REGIONS, *SOURCES, *TABLES]
    batch = random_batch((4, 8))
    data = cloudpickle.dumps((regions, tuple(batch)))
    run = subprocess.run(
        [sys.executable, "-c", IN_A_WORKER], input=data, capture_output=True, check=True
    )
    assert run.stdout.split() == [str(loss_of(region, batch).item()).encode() for region in regions]
