"""A sample of the tokens of one step, of bounded size, with rare tokens in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bandpo.record.tokens import Int64Array
from bandpo.surrogate import PROBABILITY_EDGES

Columns: TypeAlias = dict[str, NDArray[Any]]
"""Tokens, [N] in each column, by field of `bandpo.record.LoggedTokens`."""

_ARRIVAL = "arrival"
"""Column with the number of the tokens that came before."""

STRATA = len(PROBABILITY_EDGES) - 1
"""The strata are the bins of the old probability."""


class Reservoir:
    """A stratified random sample of all tokens that are added, in bounded memory.

    Every token gets a random key. A stratum keeps the tokens with the smallest keys, so each set
    of its tokens is as likely as another of that size, however the tokens were divided among the
    calls. The room is divided when the sample is drawn, by the counts alone: equally, but a stratum
    with fewer tokens leaves the rest to the others. So a token of stratum h is kept with
    probability n_h / N_h, and has the weight N_h / n_h.

    Args:
        size: Max tokens of the sample, at least `STRATA`.
        generator: Source of the keys.
    """

    def __init__(self, size: int, generator: np.random.Generator) -> None:
        self._size = size
        self._generator = generator
        self._counts = np.zeros(STRATA, np.int64)
        self._kept: list[Columns] = [{} for _ in range(STRATA)]
        self._keys = [np.empty(0) for _ in range(STRATA)]

    def add(self, tokens: Mapping[str, NDArray[Any]]) -> None:
        """Adds tokens, whose columns are the same in each call."""
        strata = stratum_of(tokens["old_log_prob"])
        keys = self._generator.random(len(strata))
        # So that the tokens of a sequence are next to each other in the sample.
        arrival = self._counts.sum() + np.arange(len(strata))
        tokens = {**tokens, _ARRIVAL: arrival}
        for stratum in range(STRATA):
            place = np.flatnonzero(strata == stratum)
            self._counts[stratum] += len(place)
            if len(place) > self._size:
                place = place[np.argpartition(keys[place], self._size)[: self._size]]
            if len(place):
                self._merge(stratum, keys[place], {f: v[place] for f, v in tokens.items()})

    def sample(self) -> Columns:
        """Returns the sample in the order of the calls, with the column weight.

        The sum of the weights is the number of tokens.
        """
        room = shares(self._counts, self._size)
        drawn = []
        for kept, keys, count, share in zip(
            self._kept, self._keys, self._counts, room, strict=True
        ):
            if share:
                first = np.argsort(keys)[:share]
                weight = np.full(share, count / share)
                drawn.append({f: v[first] for f, v in kept.items()} | {"weight": weight})
        if not drawn:
            return {}
        sample = {field: np.concatenate([part[field] for part in drawn]) for field in drawn[0]}
        order = np.argsort(sample.pop(_ARRIVAL))
        return {field: values[order] for field, values in sample.items()}

    def _merge(self, stratum: int, keys: NDArray[np.float64], tokens: Columns) -> None:
        kept = self._kept[stratum]
        keys = np.concatenate([self._keys[stratum], keys])
        if kept:
            tokens = {f: np.concatenate([kept[f], v]) for f, v in tokens.items()}
        if len(keys) > self._size:
            smallest = np.argpartition(keys, self._size)[: self._size]
            keys, tokens = keys[smallest], {f: v[smallest] for f, v in tokens.items()}
        self._keys[stratum], self._kept[stratum] = keys, tokens


def stratum_of(old_log_prob: NDArray[Any]) -> Int64Array:
    """Returns the bin of `PROBABILITY_EDGES` that each token is in; NaN is in the first."""
    bins = np.zeros(len(old_log_prob), np.int64)
    for edge in PROBABILITY_EDGES[1:-1]:
        bins += old_log_prob >= math.log(edge)
    return bins


def shares(counts: Int64Array, size: int) -> Int64Array:
    """Returns how many tokens of each stratum a sample has.

    Strata share the room equally, where each has at most its own tokens.

    Args:
        counts: Tokens of each stratum.
        size: Tokens of the sample, at least one a stratum.
    """
    room = np.zeros_like(counts)
    left = size
    order = np.argsort(counts, kind="stable")
    # The smallest first, so that the room it leaves is known.
    for place, stratum in enumerate(order):
        room[stratum] = min(counts[stratum], left // (len(counts) - place))
        left -= room[stratum]
    return room
