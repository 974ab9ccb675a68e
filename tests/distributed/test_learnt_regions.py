"""Regions that are learnt from a batch, on two processes that have a part of it each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch.distributed as dist

from bandpo.check import Float64Array
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.schedule import Bapo, Quantile, SecondMoment
from support.processes import Arrays, on_processes

TOKENS = 1200

CUTS = (700, TOKENS, 0)
"""Tokens of the first rank; the other has the rest, or none, or all."""

BAD: dict[str, tuple[list[float], list[float], str]] = {
    "NaN": ([1.0], [np.nan], "InvalidValueError: log_ratio must be finite, got nan"),
    "shape": ([1.0], [0.1, 0.2], "InvalidValueError: log_ratio must have shape (1,), got (2,)"),
    "type": ([1.0], ["0.1"], "InvalidTypeError: log_ratio must"),  # type: ignore[list-item]
}
"""Advantages and log-ratios of the second rank, and how the error begins on both."""


def sources() -> list[Bapo | SecondMoment | Quantile]:
    return [Bapo(), SecondMoment(1e-3), SecondMoment(10.0), Quantile(0.9)]


def tokens() -> tuple[Float64Array, Float64Array, Float64Array]:
    """Advantages, log-ratios and old log-probs."""
    rng = np.random.default_rng(5)
    advantages = rng.normal(-0.5, 1.0, TOKENS)
    return advantages, rng.normal(0.0, 0.3, TOKENS), -rng.exponential(1.5, TOKENS)


def state_of(source: Bapo | SecondMoment | Quantile) -> Float64Array:
    return np.array([*source.state_dict().values(), *source.region.bounds(-1.0)])


def learnt() -> Arrays:
    """States of one rank after a batch for each cut, and what bad arguments raise on it."""
    found: Arrays = {}
    first, group = dist.get_rank() == 0, dist.group.WORLD
    for cut in CUTS:
        own = slice(None, cut) if first else slice(cut, None)
        for k, source in enumerate(sources()):
            source.update(*(column[own] for column in tokens()), group=group)
            found[f"{cut}/{k}"] = state_of(source)
    for name, (advantages, log_ratio, _) in BAD.items():
        for k, source in enumerate(sources()):
            before = state_of(source)
            own_tokens = ([0.5], [0.1]) if first else (advantages, log_ratio)
            try:
                source.update(*own_tokens, [-1.0], group=group)
            except (InvalidValueError, InvalidTypeError) as error:
                found[f"{name}/{k}"] = np.array(f"{type(error).__name__}: {error}")
            assert (state_of(source) == before).all(), source
    try:
        Quantile().update([], [], group=group)
    except InvalidValueError as error:
        found["nothing"] = np.array(str(error))
    return found


def test_both_ranks_have_the_region_of_the_whole_batch(tmp_path: Path) -> None:
    ranks = on_processes(learnt, 2, tmp_path)
    for k, source in enumerate(sources()):
        before = state_of(source)
        source.update(*tokens())
        assert (state_of(source) != before).any() == (k != 2), "the second budget is not reached"
        for found in ranks:
            for cut in CUTS:
                # Equal, because sorted values and bounds on a grid depend on no order.
                np.testing.assert_array_equal(found[f"{cut}/{k}"], state_of(source))
            for name, (_, _, message) in BAD.items():
                text = str(found[f"{name}/{k}"])
                assert text.startswith(message)
                assert text.endswith("(rank 1 of the group)")
            assert str(found["nothing"]).startswith("log_ratio must hold a token that counts")


def test_a_group_takes_the_place_of_an_all_reduce() -> None:
    with pytest.raises(InvalidValueError, match="all_reduce must be left out with a group"):
        Bapo().update([], [], [], group=dist.group, all_reduce=lambda sums: sums)  # type: ignore[arg-type]


def test_without_processes_there_is_no_group_and_none_is_needed() -> None:
    source, alone = Quantile(), Quantile()
    source.update([1.0, -1.0], [0.5, 0.1], group=dist.group.WORLD)
    alone.update([1.0, -1.0], [0.5, 0.1])
    assert source.region == alone.region
