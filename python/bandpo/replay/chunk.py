"""Logged tokens as tensors, in the order of the segments that sums are taken over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bandpo.backends.contract import PROBABILITY_BINS
from bandpo.backends.plain import probability_bin
from bandpo.batch.tokens import Tokens
from bandpo.check import BoolArray, Float64Array
from bandpo.record import LoggedTokens
from bandpo.record.layout import select
from bandpo.replay.estimate import GROUPS, group_of
from bandpo.surrogate import LOG_RATIO_LIMIT
from bandpo.tensors.divergence import bernoulli_divergence

SIZE = 1 << 16
"""Tokens that are worked on together, so that their columns stay in the cache."""

SEGMENTS = GROUPS * PROBABILITY_BINS

DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""Dtypes that a loss computes in, by name."""


class Chunk(NamedTuple):
    """Up to `SIZE` tokens, sorted by their segment: a group and a bin of the old probability."""

    tokens: Tokens  # [1, N]
    rollout_log_prob: torch.Tensor | None  # [1, N]
    weight: Float64Array  # [N], tokens of the run that each stands for
    log_ratio: torch.Tensor  # [N], not clamped
    below: BoolArray  # [N], ratios below 1
    unclipped: Float64Array  # [N], the gradient without a rule, -A r
    kl: Float64Array  # [N], KL(old || new) of {this token, everything else}
    tv: Float64Array
    starts: NDArray[np.int64]  # first token of each segment that has any
    segments: NDArray[np.int64]  # their indices

    def sums(self, columns: Float64Array) -> Float64Array:
        """Returns the weighted sums of columns, [C, N], over each segment, [C, `SEGMENTS`].

        The columns are overwritten.
        """
        found = np.zeros((len(columns), SEGMENTS))
        if len(self.starts):
            columns *= self.weight
            found[:, self.segments] = np.add.reduceat(columns, self.starts, axis=1)
        return found


class Piece(NamedTuple):
    """Up to `SIZE` tokens of a log, as they lie there."""

    part: LoggedTokens
    start: int  # place of the first token in the log

    def known(self) -> BoolArray:
        """Returns which tokens have a ratio and an advantage."""
        part = self.part
        return ~(np.isnan(part.log_prob - part.old_log_prob) | np.isnan(part.advantages))


def pieces_of(logged: Iterable[LoggedTokens]) -> Iterator[Piece]:
    """Yields the tokens of a log in pieces."""
    place = 0
    for part in logged:
        for start in range(0, len(part.old_log_prob), SIZE):
            yield Piece(select(part, slice(start, start + SIZE)), place + start)
        place += len(part.old_log_prob)


def chunk_of(piece: Piece, dtype: torch.dtype) -> Chunk:
    """Returns the tokens of a piece that have a ratio and an advantage, in the dtype of the run."""
    part, chosen = piece.part, np.flatnonzero(piece.known())
    group = group_of(part.sequence, piece.start)[chosen]
    old = torch.from_numpy(part.old_log_prob[chosen]).to(dtype)
    segment = group * PROBABILITY_BINS + probability_bin(old).numpy()
    order = np.argsort(segment, kind="stable")
    segment, chosen = segment[order], chosen[order]
    segments, starts = np.unique(segment, return_index=True)

    def row(column: Float64Array) -> torch.Tensor:
        return torch.from_numpy(column[chosen]).to(dtype)[None]

    old, new = row(part.old_log_prob), row(part.log_prob)
    given = part.rollout_log_prob
    double_old, double_new = (
        torch.from_numpy(column[chosen]) for column in (part.old_log_prob, part.log_prob)
    )
    kl, tv = (bernoulli_divergence(name, double_old, double_new).numpy() for name in ("kl", "tv"))
    log_ratio, advantages = (new - old)[0], row(part.advantages)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return Chunk(
        Tokens(old, new, advantages, torch.ones(old.shape, dtype=torch.bool), None),
        None if given is None else row(given),
        part.weight[chosen],
        log_ratio,
        (log_ratio < 0.0).numpy(),
        (-advantages[0] * ratio).double().numpy(),
        kl,
        tv,
        starts,
        segments,
    )
