"""Training with regions that change, on ranks that each step their own copy of a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", "2.6")  # in which fully_shard became public

import torch
import torch.distributed as dist

from bandpo.loss import GlobalBatch, Metrics
from bandpo.schedule import (
    Bapo,
    Cosine,
    EntropyTargeted,
    Quantile,
    ScheduledBand,
    SecondMoment,
)
from support.processes import Arrays, on_processes
from support.training import (
    MicroBatches,
    Rollouts,
    Split,
    TinyPolicy,
    counts_of,
    counts_of_all_ranks,
    loss_of,
    micro_batches,
    parameters_of,
    synchronised,
    wrapped,
)

STEPS = 4

SPLITS: dict[int, Split] = {
    2: [[[0, 2, 3, 4, 5, 6, 7], [1]], [[], [8, 9]]],
    4: [[[3, 6], [0]], [[2, 4, 5], [7, 9]], [[1], [8]], [[], []]],
}
"""Of four, the third rank has no token that counts, and the last no sequence."""

SOURCES = ("cosine", "entropy", "bapo", "second moment", "quantile")

ROUNDING = 64 * 2.0**-53
"""Relative to the largest number: sums in another order, over all steps. At most 13 were seen."""


def source_named(name: str) -> Any:
    return {
        "cosine": ScheduledBand("kl", Cosine(0.1, 0.001, STEPS), cap=10),
        "entropy": ScheduledBand(
            "kl", EntropyTargeted(0.01, target=3.0, rate=0.9, min_value=1e-4, max_value=1.0)
        ),
        "bapo": Bapo(target=0.7),
        "second moment": SecondMoment(1e-3),
        "quantile": Quantile(0.8),
    }[name]


def learn(
    source: Any, model: torch.nn.Module, micros: MicroBatches, group: dist.ProcessGroup | None
) -> None:
    """Updates a source with the tokens of this rank that count."""
    columns: list[list[torch.Tensor]] = [[], [], []]
    for rollouts, _ in micros:
        valid = rollouts.response_mask
        with torch.no_grad():
            log_prob = model(rollouts.previous, rollouts.tokens).squeeze(-1)
        advantages = rollouts.advantages[:, None].expand(valid.shape)
        found = advantages, log_prob - rollouts.old_log_prob, rollouts.old_log_prob
        for column, values in zip(columns, found, strict=True):
            column.append(values[valid])
    source.update(*(torch.cat(column) for column in columns), group=group)


def train(
    name: str,
    model: torch.nn.Module,
    micros: MicroBatches,
    counts: GlobalBatch,
    group: dist.ProcessGroup | None,
) -> Arrays:
    """Some steps on one batch; returns the parameters, and states and metrics after each step."""
    source = source_named(name)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    states, scalars = [], []
    for _ in range(STEPS):
        if not isinstance(source, ScheduledBand):
            learn(source, model, micros, group)
        parts = []
        for k, micro in enumerate(micros):
            with synchronised(model, k == len(micros) - 1):
                result = loss_of(model, *micro, region=source, global_batch=counts)
                torch.autograd.backward(result.loss)
            parts.append(result.metrics)
        optimiser.step()
        optimiser.zero_grad()
        metrics = Metrics.merge(parts, group=group).scalars()
        if isinstance(source, ScheduledBand):
            source.step(entropy=metrics["entropy"])
        states.append([*source.state_dict().values(), *source.region.bounds(-1.0)])
        scalars.append(list(metrics.values()))
    return {
        f"{name}/parameters": parameters_of(model).numpy(),
        f"{name}/states": np.array(states),
        f"{name}/metrics": np.array(scalars),
    }


def trained(split: Split, wrapper: str) -> Arrays:
    """Training of one rank with every source."""
    found: Arrays = {}
    rollouts = Rollouts.drawn(torch.float64)
    counts = counts_of_all_ranks(rollouts, split)
    for name in SOURCES:
        model = wrapped(TinyPolicy(1, torch.float64), wrapper)
        micros = micro_batches(rollouts, split, packed=False)
        found |= train(name, model, micros, counts, dist.group.WORLD)
    return found


@pytest.mark.parametrize("count", SPLITS)
def test_every_rank_trains_as_one_process_with_the_whole(count: int, tmp_path: Path) -> None:
    wrapper = {2: "ddp", 4: "fsdp2"}[count]
    ranks = on_processes(trained, count, tmp_path, SPLITS[count], wrapper)
    rollouts = Rollouts.drawn(torch.float64)
    for name in SOURCES:
        model = TinyPolicy(1, torch.float64)
        wanted = train(name, model, [(rollouts, None)], counts_of(rollouts), None)
        states = wanted[f"{name}/states"]
        assert (states[0] != states[-1]).any(), "the region changes"
        for key, values in wanted.items():
            room = ROUNDING * abs(values).max(0)
            assert all((abs(found[key] - values) <= room).all() for found in ranks), key
            if not key.endswith("parameters"):
                assert all((found[key] == ranks[0][key]).all() for found in ranks), key
