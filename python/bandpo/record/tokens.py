"""Tokens of a run that were logged, and the data of the log that they are in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bandpo.check import Float64Array

Int64Array: TypeAlias = NDArray[np.int64]

UNKNOWN = -1
"""Sequence or position of a token whose log has none."""


class LoggedTokens(NamedTuple):
    """Tokens that counted in the loss of a run, [N] in every field; masked tokens are never there.

    Attributes:
        step: Step of the training run, int64; 0 if the log has none.
        sequence: Sequence of the token, int64. A recorder's own numbers are unique over the ranks
            of a run. Rows of a log with one row a sequence are counted over all files. -1 if
            unknown.
        position: Place in the row of the batch, or since the offset of the sequence if tokens
            were packed, int64, from 0; -1 if unknown.
        old_log_prob: Natural log-probability in the denominator of the ratio, float64.
        log_prob: The same in the numerator, float64.
        advantages: Advantage, float64.
        rollout_log_prob: Log-probability that the rollout engine returned, float64, or None.
        reward: Reward, float64, or None.
        weight: Tokens of the recorded steps that this one stands for, float64: the inverse of the
            probability that it was kept, 1 where everything is.
    """

    step: Int64Array
    sequence: Int64Array
    position: Int64Array
    old_log_prob: Float64Array
    log_prob: Float64Array
    advantages: Float64Array
    rollout_log_prob: Float64Array | None
    reward: Float64Array | None
    weight: Float64Array


@dataclass(frozen=True)
class LogMetadata:
    """Data of a whole log; None if the log has none.

    Attributes:
        temperature: Temperature of the log-probs.
        dtype: Coarser dtype of the run's old and new log-probs, such as ``"bfloat16"``.
        old_policy: Policy of ``old_log_prob``: ``"trainer"`` or ``"rollout"``.
        rule: Rule of the run, as the user gave it: JSON.
        format_version: Version of the format of a recorder's file.
        rank: Rank whose tokens these are; None for those of several.
        world_size: Number of ranks.
    """

    temperature: float | None = None
    dtype: str | None = None
    old_policy: str | None = None
    rule: Mapping[str, Any] | None = None
    format_version: int | None = None
    rank: int | None = None
    world_size: int | None = None
