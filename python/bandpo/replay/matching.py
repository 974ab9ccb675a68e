"""`match`: the radius at which each divergence acts as strongly as a rule, on a log's tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch

from bandpo.check import Float64Array, check_name
from bandpo.divergence import Divergence
from bandpo.error import InvalidValueError
from bandpo.presets import Preset
from bandpo.record import LoggedTokens
from bandpo.region import Region
from bandpo.replay.action import action_of
from bandpo.replay.bins import BINS, bin_of, edges_of
from bandpo.replay.chunk import DTYPES, Chunk, Piece, chunk_of
from bandpo.replay.rule import ReplayedRule, replayed_rule
from bandpo.replay.sequences import pieces_for
from bandpo.replay.threads import in_threads

Strength: TypeAlias = Literal["clip-fraction", "gradient-removed"]
"""What two rules have alike: the share of tokens clipped, or of the gradient removed."""

STRENGTHS: tuple[str, ...] = get_args(Strength)


_ROUNDING = 1e-12
"""Relative difference of two sums of the same numbers."""


class Match(NamedTuple):
    """A band that acts as strongly as a rule does."""

    divergence: str
    delta: float
    """Its radius. NaN if none acts so strongly: fewer tokens move outwards than the rule clips; inf
    if the rule does nothing."""

    @property
    def is_a_region(self) -> bool:
        """True if there is such a radius."""
        return math.isfinite(self.delta) and self.delta > 0.0

    @property
    def spec(self) -> str:
        """The band as a spec, with four digits, or a word if there is none."""
        if self.is_a_region:
            return f"{self.divergence}@{self.delta:.4g}"
        return "no limit" if self.delta == math.inf else "none"


def match(
    logged: Iterable[LoggedTokens],
    rule: str | Region | Preset,
    divergences: Sequence[str | Divergence],
    *,
    by: Strength = "clip-fraction",
    dtype: str = "float32",
) -> tuple[float, list[Match]]:
    """Returns the strength of a rule, and the radius of each divergence that has it too.

    A band clips, with surrogate min-clip, each token that moves in the direction of its advantage
    and whose divergence is above the radius. So the radius is a weighted quantile of the
    divergences of those tokens, and needs no search.

    Args:
        logged: Parts of a log, as `bandpo.record.read_tokens` yields them.
        rule: As in `compare`.
        divergences: Names or objects.
        by: "clip-fraction" or "gradient-removed".
        dtype: Dtype of the loss in the run, "float32" or "float64".

    Returns:
        The strength, in [0, 1], and a match for each divergence, whose radius has a relative error
        of up to 2^-11.

    Raises:
        InvalidTypeError: If the rule or a divergence has another type.
        InvalidValueError: If it is not known or cannot be replayed, or the log has no token.
    """
    check_name("by", by, STRENGTHS)
    check_name("dtype", dtype, DTYPES)
    reference = replayed_rule(rule)
    solvers = [
        given if isinstance(given, Divergence) else Divergence(given) for given in divergences
    ]
    histograms = np.zeros((len(solvers), BINS))
    acted = of_rule = whole = 0.0
    for part in in_threads(
        lambda piece: _part_of(reference, solvers, by, piece, DTYPES[dtype]),
        pieces_for([reference], logged),
    ):
        acted += part.acted
        of_rule += part.of_rule
        whole += part.whole
        for histogram, divergence in zip(histograms, part.divergences, strict=True):
            histogram += np.bincount(bin_of(divergence), part.weight, BINS)
    if not (whole and of_rule):
        raise InvalidValueError("the log must have at least one token with a gradient, got none")
    strength = acted / of_rule
    matches = [
        Match(solver.spec, _radius(histogram, strength * whole))
        for solver, histogram in zip(solvers, histograms, strict=True)
    ]
    return strength, matches


class _Part(NamedTuple):
    """What a rule acts on in a chunk, and the tokens that move outwards."""

    acted: float
    of_rule: float  # what it could act on, with its own ratio
    whole: float  # the same with the ratios of tokens
    weight: Float64Array
    divergences: list[Float64Array]


def _part_of(
    rule: ReplayedRule,
    solvers: Sequence[Divergence],
    by: Strength,
    piece: Piece,
    dtype: torch.dtype,
) -> _Part:
    chunk = chunk_of(piece, dtype)
    action = action_of(rule, chunk, exact=False)
    if by == "clip-fraction":
        weight = chunk.weight
        acted, of_rule = weight[action.clipped].sum(), weight.sum()
    else:
        weight = chunk.weight * np.abs(chunk.unclipped)
        acted = chunk.weight @ np.abs(action.unclipped - action.slope)
        of_rule = chunk.weight @ np.abs(action.unclipped)
    outwards = (chunk.tokens.advantages[0] * chunk.log_ratio > 0.0).numpy()
    divergences = [_divergences(solver, chunk, outwards) for solver in solvers]
    return _Part(float(acted), float(of_rule), float(weight.sum()), weight[outwards], divergences)


def _divergences(solver: Divergence, chunk: Chunk, chosen: np.ndarray) -> Float64Array:
    found = solver.solver.divergences(chunk.old[chosen], chunk.moved[chosen])
    # A log-prob that rounding puts above 0 is in no band.
    return np.where((chunk.tokens.log_prob[0] > 0.0).numpy()[chosen], math.inf, found)


def _radius(histogram: Float64Array, acted: float) -> float:
    """The divergence above which the histogram has the sum that the rule acted on."""
    if acted == 0.0:
        return math.inf
    above = np.cumsum(histogram[::-1])[::-1]  # from the lower edge of each bin on
    if above[0] < acted * (1.0 - _ROUNDING):
        return math.nan
    acted = min(acted, float(above[0]))
    index = int(np.flatnonzero(above >= acted)[-1])
    low, high = edges_of(index)
    return float(low + (above[index] - acted) / histogram[index] * (high - low))
