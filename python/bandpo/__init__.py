"""Probability-aware clip bounds from f-divergence trust regions, for PPO and GRPO.

The band replaces a fixed clip interval by every ratio for which an f-divergence trust region of
radius delta still holds, given the token's old probability (BandPO, arXiv 2603.04918):

>>> import bandpo
>>> import numpy as np
>>> lower, upper = bandpo.Band("kl", 0.05).bounds(np.log([0.01, 0.5]))
>>> upper.round(4).tolist()
[7.8098, 1.3085]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bandpo import error, presets, schedule
from bandpo._core import __version__
from bandpo.divergence import Divergence
from bandpo.error import BandpoError
from bandpo.presets import preset
from bandpo.region import Band, Clip, Dcpo, PriceBand, Region, by_sign, sides
from bandpo.surrogate import GammaWeight, GradientPreserving, Mask, SoftGate
from bandpo.table import BandTable, TableAccuracyWarning

__all__ = [
    "Band",
    "BandTable",
    "BandpoError",
    "Clip",
    "Dcpo",
    "Divergence",
    "GammaWeight",
    "GradientPreserving",
    "Mask",
    "PriceBand",
    "Region",
    "SoftGate",
    "TableAccuracyWarning",
    "__version__",
    "by_sign",
    "error",
    "preset",
    "presets",
    "region_from_spec",
    "schedule",
    "sides",
]

_LATER = ("correction", "loss", "policy_loss", "region_from_spec", "torch")
"""Names that are imported at their first use: torch is optional, and a parser costs time."""

if TYPE_CHECKING:
    from bandpo import correction as correction
    from bandpo import loss as loss
    from bandpo import torch as torch
    from bandpo.loss import policy_loss as policy_loss
    from bandpo.spec import region_from_spec as region_from_spec
else:  # hidden from type checkers, for which every name would exist

    def __getattr__(name: str) -> Any:
        if name == "policy_loss":
            from bandpo.loss import policy_loss

            return policy_loss
        if name == "region_from_spec":
            from bandpo.spec import region_from_spec

            return region_from_spec
        if name in _LATER:
            return import_module(f"bandpo.{name}")
        raise AttributeError(f"module 'bandpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_LATER})
