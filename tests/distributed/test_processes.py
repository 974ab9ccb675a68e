"""The loss on 1, 2 and 4 gloo processes, under DDP and FSDP2, with a batch split in any way.

The processes of a world size are started once and compute every case. Their losses and gradients
are compared with those of one process that has the whole batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", "2.6")  # in which fully_shard became public

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

from bandpo import Band, Clip, Mask
from bandpo.loss import GlobalBatch
from bandpo.rule import AGGREGATION_MODES
from support.processes import Arrays, on_processes
from support.training import (
    WHOLE,
    MicroBatches,
    Rollouts,
    Split,
    TinyPolicy,
    counts_of,
    counts_of_all_ranks,
    gradient_of,
    loss_of,
    micro_batches,
    synchronised,
    wrapped,
)

SPLITS: dict[int, dict[str, Split]] = {
    1: {
        "even": WHOLE,
        "ragged": [[[3], [0, 1, 2, 4, 5], [], [8], [6, 7, 9]]],
    },
    2: {
        "even": [[[0, 1], [2, 3, 4]], [[5, 6], [7, 8, 9]]],
        "ragged": [[[0, 2, 3, 4, 5, 6, 7], [1]], [[], [8, 9]]],
    },
    4: {
        "even": [[[0, 1, 2]], [[3, 4, 5]], [[6, 7]], [[8, 9]]],
        # The third rank has no token that counts, and the last has no sequence.
        "ragged": [[[3, 6], [0]], [[2, 4, 5], [7, 9]], [[1], [8]], [[], []]],
    },
}

RULES: dict[str, dict[str, Any]] = {
    "band": {"region": Band("kl", 0.05).cap(10)},
    "plain torch": {"region": Band("kl", 0.05).cap(10), "backend": "torch"},
    "sequence": {"region": Clip(0.2), "ratio_level": "sequence", "log_ratio_penalty": 0.1},
    "masked": {"region": Band("tv", 0.2), "surrogate": Mask(whole_sequence=True)},
}

ROUNDING = {"float64": 16 * 2.0**-53, "float32": 16 * 2.0**-24}
"""Relative to the loss or the largest gradient, which are sums of at most 31 tokens in any order.

At most 6 roundings were seen.
"""


def loss_and_gradient(
    model: torch.nn.Module,
    micros: MicroBatches,
    rule: str,
    mode: str,
    counts: GlobalBatch,
) -> tuple[float, torch.Tensor]:
    """The loss, added up over the micro-batches, and the gradient of the model."""
    options = {**RULES[rule], "loss_agg_mode": mode}
    if mode != "none":
        options["global_batch"] = counts
    total = 0.0
    for k, micro in enumerate(micros):
        with synchronised(model, k == len(micros) - 1):
            loss = loss_of(model, *micro, **options).loss
            if mode == "none":  # a mean over the tokens, by its user
                assert counts.tokens is not None
                loss = loss.sum() * counts.dp_size / counts.tokens
            torch.autograd.backward(loss)
        total += loss.item()
    gradient = gradient_of(model)
    model.zero_grad()
    return total, gradient


def cases() -> Iterator[tuple[str, str, str, str, str]]:
    layouts = ("even padded", "ragged padded", "ragged packed")
    return product(("ddp", "fsdp2"), ROUNDING, layouts, RULES, AGGREGATION_MODES)


def every_case(splits: dict[str, Split]) -> Arrays:
    """The loss and the gradient of one rank for every case."""
    found: Arrays = {}
    models: dict[tuple[str, str], torch.nn.Module] = {}
    for wrapper, dtype, layout, rule, mode in cases():
        if (wrapper, dtype) not in models:
            models[wrapper, dtype] = wrapped(TinyPolicy(1, getattr(torch, dtype)), wrapper)
        name, form = layout.split()
        rollouts = Rollouts.drawn(getattr(torch, dtype))
        counts = counts_of_all_ranks(rollouts, splits[name])
        micros = micro_batches(rollouts, splits[name], packed=form == "packed")
        loss, gradient = loss_and_gradient(models[wrapper, dtype], micros, rule, mode, counts)
        case = "/".join((wrapper, dtype, layout, rule, mode))
        found[f"{case}/loss"], found[f"{case}/gradient"] = np.array(loss), gradient.numpy()
    return found


@cache
def of_the_whole(rule: str, mode: str) -> tuple[float, torch.Tensor]:
    """The loss and the gradient of one process, one batch, and float64."""
    rollouts = Rollouts.drawn(torch.float64)
    model = TinyPolicy(1, torch.float64)
    return loss_and_gradient(model, [(rollouts, None)], rule, mode, counts_of(rollouts))


@pytest.mark.parametrize("count", SPLITS)
def test_ranks_and_micro_batches_give_the_whole(count: int, tmp_path: Path) -> None:
    ranks = on_processes(every_case, count, tmp_path, SPLITS[count])
    errors = {}
    for wrapper, dtype, layout, rule, mode in cases():
        loss, gradient = of_the_whole(rule, mode)
        assert loss != 0.0
        assert gradient.any()
        case = "/".join((wrapper, dtype, layout, rule, mode))
        mean = np.mean([found[f"{case}/loss"] for found in ranks])
        errors[f"{case}/loss"] = abs(mean / loss - 1.0) / ROUNDING[dtype]
        largest = max(abs(found[f"{case}/gradient"] - gradient.numpy()).max() for found in ranks)
        errors[f"{case}/gradient"] = largest / float(gradient.abs().max()) / ROUNDING[dtype]
    assert {case: error for case, error in errors.items() if not error <= 1.0} == {}


def one_raises() -> Arrays:
    if dist.get_rank() == 1:
        raise ValueError("of rank 1")
    dist.barrier()  # which rank 1 never joins
    return {}


def one_never_ends() -> Arrays:
    if dist.get_rank() == 1:
        time.sleep(3600.0)
    return {}


def test_a_rank_that_raises_ends_the_others_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match=r"in one_raises(?s:.*)ValueError: of rank 1"):
        on_processes(one_raises, 2, tmp_path)


def test_a_rank_that_never_ends_is_killed(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="one_never_ends has not ended in 2 s"):
        on_processes(one_never_ends, 2, tmp_path, timeout=2.0)
