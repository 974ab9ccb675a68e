"""Logged tokens as tensors, in the order of the segments that sums are taken over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bandpo.backends.contract import PROBABILITY_BINS
from bandpo.backends.plain import probability_bin
from bandpo.batch.tokens import Tokens
from bandpo.check import BoolArray, Float64Array
from bandpo.divergence import Divergence
from bandpo.record import LoggedTokens
from bandpo.record.layout import select
from bandpo.record.tokens import Int64Array
from bandpo.replay.estimate import GROUPS, group_of
from bandpo.surrogate import LOG_RATIO_LIMIT

SIZE = 1 << 16
"""Tokens that are worked on together, so that their columns stay in the cache."""

MAX_ADVANTAGE = 1e29
"""Max size of an advantage; times a ratio of `e^20`, a larger one is infinite in float32."""

SEGMENTS = GROUPS * PROBABILITY_BINS

DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""Dtypes that a loss computes in, by name."""

_CERTAIN = {torch.float32: math.log1p(-(2.0**-25)), torch.float64: math.log1p(-(2.0**-40))}
"""Max log-prob of a divergence. One nearer to 0 has lost its last digits in the softmax of a model.
With a new probability of exactly 1, the divergence would be infinite.
"""

_NEVER = -700.0
"""Min old log-prob of a divergence; below it, probabilities lose their digits, and then are 0."""

_KL = Divergence("kl")


class Sequences(NamedTuple):
    """The tokens of a chunk in the order of the log, packed."""

    tokens: Tokens  # [1, N], with the offsets of its sequences
    rollout_log_prob: torch.Tensor | None  # [1, N]
    order: NDArray[np.int64]  # place of each token of the chunk here


class Chunk(NamedTuple):
    """Up to `SIZE` tokens, sorted by their segment: a group and a bin of the old probability."""

    tokens: Tokens  # [1, N]
    rollout_log_prob: torch.Tensor | None  # [1, N]
    weight: Float64Array  # [N], tokens of the run that each stands for
    old: Float64Array  # [N], log-probs, less than certain
    moved: Float64Array  # [N], log-ratios from there to the new ones, which are likewise
    log_ratio: torch.Tensor  # [N], as the loss has them, not clamped
    below: BoolArray  # [N], ratios below 1
    unclipped: Float64Array  # [N], the gradient without a rule, -A r
    kl: Float64Array  # [N], KL(old || new) of {this token, everything else}
    tv: Float64Array
    starts: NDArray[np.int64]  # first token of each segment that has any
    segments: NDArray[np.int64]  # their indices
    sequences: Sequences | None  # if the piece has whole ones

    def sums(self, columns: Float64Array) -> Float64Array:
        """Returns the weighted sums of columns, [C, N], over each segment, [C, `SEGMENTS`].

        The columns are overwritten.
        """
        found = np.zeros((len(columns), SEGMENTS))
        if len(self.starts):
            columns *= self.weight
            with np.errstate(invalid="ignore"):  # a divergence may be infinite
                found[:, self.segments] = np.add.reduceat(columns, self.starts, axis=1)
        return found


class Piece(NamedTuple):
    """Up to `SIZE` tokens of a log, as they lie there."""

    part: LoggedTokens
    start: int  # place of the first token in the log
    sequences: Int64Array | None = None  # first token of each, if all are whole


def known_tokens(part: LoggedTokens) -> BoolArray:
    """Returns which tokens have a ratio, and an advantage with which a loss is finite."""
    with np.errstate(invalid="ignore"):  # two infinite log-probs have no ratio
        unknown = np.isnan(part.log_prob - part.old_log_prob)
    return ~unknown & (np.abs(part.advantages) <= MAX_ADVANTAGE)


def pieces_of(logged: Iterable[LoggedTokens]) -> Iterator[Piece]:
    """Yields the tokens of a log in pieces."""
    place = 0
    for part in logged:
        for start in range(0, len(part.old_log_prob), SIZE):
            yield Piece(select(part, slice(start, start + SIZE)), place + start)
        place += len(part.old_log_prob)


def chunk_of(piece: Piece, dtype: torch.dtype) -> Chunk:
    """Returns the tokens of a piece that have a ratio and an advantage, in the dtype of the run."""
    part, chosen = piece.part, np.flatnonzero(known_tokens(piece.part))
    group = group_of(part.sequence, piece.start)[chosen]
    old_bin = probability_bin(torch.from_numpy(part.old_log_prob[chosen]).to(dtype)).numpy()
    # Integers of 16 bits are sorted by their digits, in a fifth of the time of wider ones.
    segment = (group * PROBABILITY_BINS + old_bin).astype(np.uint16)
    order = np.argsort(segment, kind="stable")
    sequences = _sequences(piece, chosen, order, dtype)
    segment, chosen = segment[order], chosen[order]
    starts = np.flatnonzero(np.diff(segment, prepend=SEGMENTS))

    def row(column: Float64Array) -> torch.Tensor:
        return torch.from_numpy(column[chosen]).to(dtype)[None]

    old, new = row(part.old_log_prob), row(part.log_prob)
    given = part.rollout_log_prob
    log_ratio, advantages = (new - old)[0], row(part.advantages)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    at, moved = _moves(part.old_log_prob[chosen], part.log_prob[chosen], _CERTAIN[dtype])
    return Chunk(
        Tokens(old, new, advantages, torch.ones(old.shape, dtype=torch.bool), None),
        None if given is None else row(given),
        part.weight[chosen],
        at,
        moved,
        log_ratio,
        (log_ratio < 0.0).numpy(),
        (-advantages[0] * ratio).double().numpy(),
        _KL.solver.divergences(at, moved),
        # abs(p - q), in which nothing cancels.
        np.exp(at + np.maximum(moved, 0.0)) * -np.expm1(-np.abs(moved)),
        starts,
        segment[starts].astype(np.int64),
        sequences,
    )


def _sequences(
    piece: Piece, chosen: NDArray[np.int64], order: NDArray[np.int64], dtype: torch.dtype
) -> Sequences | None:
    if piece.sequences is None:
        return None
    part = piece.part

    def row(column: Float64Array) -> torch.Tensor:
        return torch.from_numpy(column[chosen]).to(dtype)[None]

    offsets = np.searchsorted(chosen, np.append(piece.sequences, len(part.step)))
    old = row(part.old_log_prob)
    valid = torch.ones(old.shape, dtype=torch.bool)
    given = part.rollout_log_prob
    return Sequences(
        Tokens(old, row(part.log_prob), row(part.advantages), valid, torch.from_numpy(offsets)),
        None if given is None else row(given),
        order,
    )


def _moves(
    old: Float64Array, new: Float64Array, certain: float
) -> tuple[Float64Array, Float64Array]:
    """Old log-probs and log-ratios from there, with both log-probs limited."""
    same = old == new  # two infinite ones as well
    old, new = np.clip(old, _NEVER, certain), np.minimum(new, certain)
    return old, np.where(same, 0.0, new - old)
