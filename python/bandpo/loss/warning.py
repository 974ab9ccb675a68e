"""Warnings, each once, of a use that gives plausible numbers and is a mistake."""

from __future__ import annotations

import warnings
import weakref

import torch

from bandpo.check import MAX_LOG_PROB
from bandpo.error import LogProbWarning, StepWarning, caller_level
from bandpo.schedule import RegionSource
from bandpo.tensors.internals import needs_no_dispatcher

LOSSES_WITHOUT_STEP = 50
"""Losses of a source after which it should have been stepped."""

_CHECKED: set[str] = set()
"""Arguments whose first batch was read."""

_LOSSES: weakref.WeakKeyDictionary[RegionSource, int] = weakref.WeakKeyDictionary()
"""Losses of each source that was not stepped yet."""


def warn_of_positive(argument: str, log_prob: torch.Tensor, valid: torch.Tensor) -> None:
    """Gives a `LogProbWarning` at the caller's line if log-probs are above 0 by more than rounding.

    The first batch of a process alone is read, on a CPU, because that takes a pass over the tokens.

    Args:
        argument: Name of the log-probs.
        log_prob: As many as ``valid`` has elements.
        valid: Which tokens count, bool.
    """
    # First, because a compiler would guard on what the others read.
    if not needs_no_dispatcher(log_prob) or argument in _CHECKED or not valid.any():
        return
    _CHECKED.add(argument)
    above = valid & (log_prob.detach().reshape(valid.shape) > MAX_LOG_PROB)
    count = int(above.sum())
    if count:
        warnings.warn(
            f"{argument} must be natural logarithms of probabilities, at most 0 but for rounding; "
            f"{count} of {int(valid.sum())} tokens are above {MAX_LOG_PROB}: are they "
            f"probabilities, negative log-probabilities, or fillers of an engine?",
            LogProbWarning,
            stacklevel=caller_level(),
        )


def warn_of_no_step(source: RegionSource) -> None:
    """Gives a `StepWarning` at the caller's line at the 50th loss of a source without a step."""
    if torch.compiler.is_compiling() or source.is_stepped:
        return
    count = _LOSSES[source] = _LOSSES.get(source, 0) + 1
    if count == LOSSES_WITHOUT_STEP:
        warnings.warn(
            f"region {source!r} served {count} losses without a step and is still {source.region}: "
            f"call its step after each optimiser step",
            StepWarning,
            stacklevel=caller_level(),
        )
