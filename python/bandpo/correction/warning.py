"""The warning of two policies that are too far apart for one engine's rounding."""

from __future__ import annotations

import warnings

import torch

from bandpo.correction.rule import MISMATCH_LIMIT
from bandpo.error import MismatchWarning, caller_level
from bandpo.surrogate import LOG_RATIO_LIMIT
from bandpo.tensors.internals import needs_no_dispatcher

_WARNED: set[str] = set()
"""Arguments that a warning has been given of."""

_COMPARED: set[str] = set()
"""Arguments whose first batch has been compared."""


def warn_of_mismatch(argument: str, log_ratio: torch.Tensor, valid: torch.Tensor) -> None:
    """Gives a `MismatchWarning` at the caller's line, once, if the two policies are far apart.

    Tensors on a CPU alone are compared, because the host has to read the mean.

    Args:
        argument: Name of the other log-probs.
        log_ratio: ``old_log_prob`` less the log-probs of the argument, 0 where masked.
        valid: Which tokens count, bool.
    """
    if not needs_no_dispatcher(log_ratio) or log_ratio.numel() == 0 or argument in _WARNED:
        return
    size = log_ratio.nan_to_num(0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).abs()
    mean = float(size.sum()) / max(int(valid.sum()), 1)
    if mean > MISMATCH_LIMIT:
        _WARNED.add(argument)
        warnings.warn(
            f"old_log_prob and {argument} differ by {mean:.2f} on average, above {MISMATCH_LIMIT}: "
            f"check that both are of the same tokens, shifted alike, and of the same temperature",
            MismatchWarning,
            stacklevel=caller_level(),
        )


def warn_of_first_mismatch(
    argument: str, old_log_prob: torch.Tensor, log_prob: torch.Tensor, valid: torch.Tensor
) -> None:
    """Calls `warn_of_mismatch` on the first batch of a process alone.

    Others are not compared, because that takes a pass over the tokens.

    Args:
        argument: Name of the other log-probs.
        old_log_prob: Those of the old policy, as many as ``valid`` has elements.
        log_prob: The other ones, likewise.
        valid: Which tokens count, bool.
    """
    if not needs_no_dispatcher(old_log_prob) or argument in _COMPARED:
        return
    _COMPARED.add(argument)
    log_ratio = (old_log_prob - log_prob).reshape(valid.shape)
    warn_of_mismatch(argument, torch.where(valid, log_ratio, 0.0), valid)
