"""The squared log-ratio as a penalty beside the surrogate."""

from __future__ import annotations

import torch

from bandpo.backends.contract import TokenLosses, Totals
from bandpo.batch.tokens import Tokens
from bandpo.surrogate import LOG_RATIO_LIMIT


def log_ratio_penalty(coefficient: float, tokens: Tokens, totals: Totals) -> TokenLosses:
    """Returns ``coefficient (ln r)^2`` of every token that counts, with its gradient.

    It has no advantage, so weights of a correction leave it alone, and it acts on tokens that a
    mask drops as well (prime-rl; Kimi k1.5, arXiv 2501.12599). Its gradient is 0 where the clamp
    acts on ln r.

    Args:
        coefficient: Factor, finite and at least 0.
        tokens: The batch.
        totals: Those of the loss, for its count of tokens.
    """
    old_log_prob = tokens.old_log_prob.reshape(tokens.log_prob.shape)
    # Not multiplied by the mask: a masked token may hold anything.
    log_ratio = torch.where(tokens.valid, tokens.log_prob - old_log_prob, 0.0)
    limit = torch.where(log_ratio > 0.0, LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT)
    log_ratio = torch.where(log_ratio.detach().abs() > LOG_RATIO_LIMIT, limit, log_ratio)
    per_token = coefficient * log_ratio.square()
    return TokenLosses(per_token, per_token.sum(), lambda: totals)
