"""The warning of two policies that are too far apart for one engine's rounding."""

from __future__ import annotations

import warnings

from bandpo.backends.internals import needs_no_dispatcher
from bandpo.correction.rule import MISMATCH_LIMIT
from bandpo.correction.tokens import Batch
from bandpo.error import MismatchWarning
from bandpo.surrogate import LOG_RATIO_LIMIT


def warn_of_mismatch(batch: Batch) -> None:
    """Gives a `MismatchWarning` once, for tensors on a CPU, if the two policies are far apart."""
    x = batch.log_ratio
    if not needs_no_dispatcher(x) or x.numel() == 0:
        return
    count = int(batch.valid.sum())
    mean = float(x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).abs().sum()) / max(count, 1)
    if mean > MISMATCH_LIMIT:
        _warn_once(round(mean, 2))


_WARNED: list[float] = []


def _warn_once(mean: float) -> None:
    if _WARNED:
        return
    _WARNED.append(mean)
    warnings.warn(
        f"old_log_prob and rollout_log_prob differ by {mean} on average, above {MISMATCH_LIMIT}: "
        f"check that both are of the same tokens, shifted alike, and of the same temperature",
        MismatchWarning,
        stacklevel=5,
    )
