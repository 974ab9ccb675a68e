"""Rules of trainers whose workers install a loss, checked without the trainer, in the driver too.

`bandpo.integrations.ray_workers` checks a rule before a job begins, where the trainer may not be
installed; the adapters check it where the loss is made.
"""

from __future__ import annotations

from collections.abc import Callable

from bandpo.integrations.settings import LossSettings
from bandpo.rule import AnyRegion


def openrlhf_region(settings: LossSettings) -> AnyRegion:
    """Returns the region of a rule for OpenRLHF.

    Raises:
        InvalidValueError: If the rule is more than a clamp, or its region changes.
    """
    settings.refuse_correction("OpenRLHF", "algo.advantage.is_correction_level has its own")
    settings.refuse_changes("OpenRLHF")
    return settings.clamp_region("OpenRLHF")


def open_instruct_region(settings: LossSettings) -> AnyRegion:
    """Returns the region of a rule for Open-Instruct.

    Raises:
        InvalidValueError: If the rule is more than a clamp, its region changes, or it needs the
            log-probabilities of a third policy.
    """
    settings.refuse_rollout("Open-Instruct")
    settings.refuse_changes("Open-Instruct")
    return settings.clamp_region("Open-Instruct")


REGIONS: dict[str, Callable[[LossSettings], AnyRegion]] = {
    "openrlhf": openrlhf_region,
    "open_instruct": open_instruct_region,
}
"""The checks by the name of the adapter."""
