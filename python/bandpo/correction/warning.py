"""The warning of two policies that are too far apart for one engine's rounding."""

from __future__ import annotations

import warnings

import torch

from bandpo.backends.internals import needs_no_dispatcher
from bandpo.correction.rule import MISMATCH_LIMIT
from bandpo.error import MismatchWarning
from bandpo.surrogate import LOG_RATIO_LIMIT


def warn_of_mismatch(
    log_ratio: torch.Tensor, valid: torch.Tensor, argument: str, *, stacklevel: int
) -> None:
    """Gives a `MismatchWarning` once, for tensors on a CPU, if the two policies are far apart.

    Args:
        log_ratio: ``old_log_prob`` less the log-probs of the argument, 0 where masked.
        valid: Which tokens count, bool.
        argument: Name of the other log-probs.
        stacklevel: Frames from here to the user's call.
    """
    if not needs_no_dispatcher(log_ratio) or log_ratio.numel() == 0:
        return
    size = log_ratio.nan_to_num(0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).abs()
    mean = float(size.sum()) / max(int(valid.sum()), 1)
    if mean > MISMATCH_LIMIT and argument not in _WARNED:
        _WARNED.add(argument)
        warnings.warn(
            f"old_log_prob and {argument} differ by {mean:.2f} on average, above {MISMATCH_LIMIT}: "
            f"check that both are of the same tokens, shifted alike, and of the same temperature",
            MismatchWarning,
            stacklevel=stacklevel + 1,
        )


_WARNED: set[str] = set()
"""Arguments that a warning has been given of."""
