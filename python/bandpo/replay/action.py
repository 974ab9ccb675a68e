"""What a rule does to each token of a chunk."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from bandpo.backends.native import all_in_rust
from bandpo.backends.select import select
from bandpo.batch.tokens import Tokens, clamped
from bandpo.check import BoolArray, Float64Array
from bandpo.error import InvalidValueError
from bandpo.loss.levels import inputs_of, token_losses
from bandpo.replay.chunk import Chunk, Sequences
from bandpo.replay.rule import ReplayedRule
from bandpo.surrogate import GammaWeight, Mask


class Action(NamedTuple):
    """Columns of a chunk, each [N]."""

    clipped: BoolArray
    below: BoolArray
    """Ratios below 1, of what the bounds limit."""
    loss: Float64Array
    slope: Float64Array
    """Gradient of the loss with respect to the log-prob."""
    unclipped: Float64Array
    """The same without the clip."""
    log_ratio: Float64Array
    """Of the token, or of its sequence if the rule takes that."""


def action_of(rule: ReplayedRule, chunk: Chunk, *, exact: bool) -> Action:
    """Returns what a rule does.

    Raises:
        InvalidValueError: If the rule has a correction and the log no rollout log-probs.
    """
    if chunk.sequences is not None and rule.takes_sequences:
        return _of_sequences(rule, chunk, chunk.sequences, exact=exact)
    tokens = _corrected(rule, chunk.tokens, chunk.rollout_log_prob)
    if isinstance(rule.rule.surrogate, GammaWeight):
        loss, slope = _by_autograd(rule, tokens, exact=exact)
    else:
        loss, slope, *_ = all_in_rust(
            inputs_of(rule.rule, tokens, exact=exact, by_probability=False)
        )
    return Action(
        _beyond(rule, tokens, exact=exact),
        chunk.below,
        _column(loss),
        _column(slope),
        chunk.unclipped,
        chunk.log_ratio.numpy(),
    )


def _of_sequences(rule: ReplayedRule, chunk: Chunk, sequences: Sequences, *, exact: bool) -> Action:
    """What a rule does that decides by sequences, which are in the order of the log."""
    tokens = _corrected(rule, sequences.tokens, sequences.rollout_log_prob)
    order = sequences.order
    loss, slope = (_column(each)[order] for each in _by_autograd(rule, tokens, exact=exact))
    beyond = _beyond(rule, tokens, exact=exact)[order]
    below, unclipped, log_ratio = chunk.below, chunk.unclipped, chunk.log_ratio.numpy()
    advantages = chunk.tokens.advantages[0].double().numpy()
    if rule.rule.ratio_level == "geometric-mean":
        # The bounds limit the ratios of tokens, and the loss has no clip beside that.
        unclipped = loss
        with np.errstate(divide="ignore", invalid="ignore"):
            log_ratio = np.log(loss / -advantages)
    elif (given := _ratio_of_sequence(rule, tokens, exact=exact)) is not None:
        log_ratio = _column(given)[order]
        below = log_ratio < 0.0
        unclipped = -advantages * _column(clamped(given).exp())[order]
    return Action(beyond, below, loss, slope, unclipped, log_ratio)


def _ratio_of_sequence(rule: ReplayedRule, tokens: Tokens, *, exact: bool) -> torch.Tensor | None:
    """Logarithms, [1, N], or None if the rule takes the ratio of the token."""
    return inputs_of(rule.rule, tokens, exact=exact, by_probability=False).log_ratio


def _corrected(rule: ReplayedRule, tokens: Tokens, rollout_log_prob: torch.Tensor | None) -> Tokens:
    """The tokens with the weights of the rule's correction, if it has one."""
    if rule.correction is None:
        return tokens
    if rollout_log_prob is None:
        raise InvalidValueError(
            f"rule {rule.name!r} corrects for a rollout engine, and the log has no rollout_log_prob"
        )
    old, rollout, valid, advantages = (
        column[0]
        for column in (tokens.old_log_prob, rollout_log_prob, tokens.valid, tokens.advantages)
    )
    found = rule.correction(
        old, rollout, valid, advantages=advantages, cu_seqlens=tokens.cu_seqlens
    )
    return tokens._replace(advantages=tokens.advantages * found.weights)


def _by_autograd(
    rule: ReplayedRule, tokens: Tokens, *, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of tokens and their gradient, [1, N]."""
    with torch.enable_grad():
        log_prob = tokens.log_prob.clone().requires_grad_()
        losses, _ = token_losses(
            rule.rule,
            tokens._replace(log_prob=log_prob),
            select("native", log_prob.device),
            exact=exact,
            by_probability=False,
        )
        [slope] = torch.autograd.grad(losses.per_token.sum(), log_prob)
    return losses.per_token.detach(), slope


def _beyond(rule: ReplayedRule, tokens: Tokens, *, exact: bool) -> BoolArray:
    """The tokens beyond their bounds: a mask leaves them, and no other, without a gradient."""
    limited = rule.rule
    if limited.ratio_level == "geometric-mean":  # of clipped ratios of tokens
        limited = limited._replace(ratio_level="token")
    surrogate = limited.surrogate
    symmetric = isinstance(surrogate, GammaWeight) or surrogate.by_log_ratio(surrogate.parameters)
    mask = Mask(truncation=None, symmetric=symmetric)
    inputs = inputs_of(limited._replace(surrogate=mask), tokens, exact=exact, by_probability=False)
    sign = torch.ones_like(inputs.advantages) if symmetric else inputs.advantages.sign()
    _, slope, *_ = all_in_rust(inputs._replace(advantages=sign))
    return ((slope == 0.0) & (sign != 0.0))[0].numpy()


def _column(tensor: torch.Tensor) -> Float64Array:
    return np.asarray(tensor[0].double().numpy())
