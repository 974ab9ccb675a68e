"""What a rule does to each token of a chunk."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bandpo.backends.contract import LossInputs
from bandpo.backends.native import all_in_rust
from bandpo.check import BoolArray, Float64Array
from bandpo.error import InvalidValueError
from bandpo.loss.levels import inputs_of
from bandpo.replay.chunk import Chunk
from bandpo.replay.rule import ReplayedRule
from bandpo.surrogate import Mask


class Action(NamedTuple):
    """Columns of a chunk, each [N]."""

    clipped_low: BoolArray
    clipped_high: BoolArray
    loss: Float64Array
    slope: Float64Array
    """Gradient of the loss with respect to the log-prob."""


def action_of(rule: ReplayedRule, chunk: Chunk, *, exact: bool) -> Action:
    """Returns what a rule does.

    Raises:
        InvalidValueError: If the rule has a correction and the log no rollout log-probs.
    """
    tokens = chunk.tokens
    if rule.correction is not None:
        if chunk.rollout_log_prob is None:
            raise InvalidValueError(
                f"rule {rule.name!r} corrects for a rollout engine, and the log has no "
                f"rollout_log_prob"
            )
        weights = rule.correction(
            tokens.old_log_prob, chunk.rollout_log_prob, tokens.valid, advantages=tokens.advantages
        ).weights
        tokens = tokens._replace(advantages=tokens.advantages * weights)
    inputs = inputs_of(rule.rule, tokens, exact=exact, by_probability=False)
    loss, slope, *_ = all_in_rust(inputs)
    low, high = _clipped(rule, inputs, chunk)
    return Action(low, high, loss[0].double().numpy(), slope[0].double().numpy())


def _clipped(rule: ReplayedRule, inputs: LossInputs, chunk: Chunk) -> tuple[BoolArray, BoolArray]:
    """The tokens beyond their bounds: a mask leaves them, and no other, without a gradient."""
    surrogate = rule.rule.surrogate
    symmetric = surrogate.by_log_ratio(surrogate.parameters)
    mask = Mask(truncation=None, symmetric=symmetric)
    sign = torch.ones_like(inputs.advantages) if symmetric else inputs.advantages.sign()
    masked = inputs._replace(surrogate=mask.name, parameters=mask.parameters, advantages=sign)
    _, slope, *_ = all_in_rust(masked)
    beyond = ((slope == 0.0) & (sign != 0.0))[0].numpy()
    return beyond & chunk.below, beyond & ~chunk.below
