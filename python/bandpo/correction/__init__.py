"""Corrections for a rollout engine that draws tokens from another policy than the trained one.

B = old/rollout is the ratio of a token's probability in the trainer, when the batch was sampled, to
that in the engine. A `Correction` turns it into weights and drops what has drifted too far. Each
published method is one line:

================= ==================================================================================
method            correction
================= ==================================================================================
TIS               ``Correction(Clip.between(0, 2), action="truncate")``
sequence TIS      ``Correction(Clip.between(0, 2), level="sequence-product", action="truncate")``
MIS               ``Correction(Clip.between(0, 3))``
sequence MIS      ``Correction(Clip.between(0, 3), level="sequence-product")``
IcePop            ``Correction(Clip.between(0.5, 5))``
KPop              ``Correction(Band("kl", 0.1) & Band("reverse-kl", 0.1))``
geometric mask    ``Correction(Clip.between(0.99, 1.01), level="geometric-mean",
                  action="mask-only")``
seq-mask-TIS      ``Correction(Clip.between(0.999, 1.002), level="geometric-mean")``
OPSM              ``Correction(statistic="k1", threshold=1e-4, level="sequence-mean",
                  action="mask-only", negative_only=True)``
VACO, filter      ``Correction(statistic="ratio-distance", threshold=0.1, level="sequence-mean",
                  action="mask-only", outward_only=True)``
FlashREINFORCE    ``Correction(statistic="bernoulli-kl", threshold=3e-3, level="sequence-mean")``
verl token_k1     ``Correction(Clip.between(0.5, 2), action="mask-only")``
verl token_k2     ``Correction(statistic="k2", threshold=0.01, action="mask-only")``
verl token_k3     ``Correction(statistic="k3", threshold=0.01, action="mask-only")``
verl seq_sum_k1   ``Correction(Clip.between(0.5, 2), level="sequence-product", action="mask-only")``
verl seq_sum_k2   ``Correction(statistic="k2", threshold=0.1, level="sequence-sum",
                  action="mask-only")``
verl seq_sum_k3   ``Correction(statistic="k3", threshold=0.1, level="sequence-sum",
                  action="mask-only")``
verl seq_mean_k1  ``Correction(Clip.between(0.999, 1.001), level="geometric-mean",
                  action="mask-only")``
verl seq_mean_k2  ``Correction(statistic="k2", threshold=0.01, level="sequence-mean",
                  action="mask-only")``
verl seq_mean_k3  ``Correction(statistic="k3", threshold=0.01, level="sequence-mean",
                  action="mask-only")``
verl seq_max_k2   ``Correction(statistic="k2", threshold=0.05, level="sequence-max",
                  action="mask-only")``
verl seq_max_k3   ``Correction(statistic="k3", threshold=0.05, level="sequence-max",
                  action="mask-only")``
================= ==================================================================================

Thresholds differ between code bases, and no paper gives those of OPSM and VACO; docs/mismatch.md
names sources. The lines of k1 have bounds of the ratio; verl 0.9.1 compares ``-ln B`` with the
logarithms of its bounds, and so allows the reciprocals. This module imports torch at the first
call, so that a correction is data without it.

>>> from bandpo import Clip
>>> Correction(Clip.between(0.5, 5))  # doctest: +ELLIPSIS
Correction(region=Clip(0.5, 4.0), ...level='token', action='mask', ...)
"""

from bandpo.correction.rule import (
    MISMATCH_LIMIT,
    Action,
    Correction,
    Level,
    RolloutCorrection,
    Statistic,
    rollout_correction,
)

__all__ = [
    "MISMATCH_LIMIT",
    "Action",
    "Correction",
    "Level",
    "RolloutCorrection",
    "Statistic",
    "rollout_correction",
]


def __dir__() -> list[str]:
    return __all__
