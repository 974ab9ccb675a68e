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

from typing import TYPE_CHECKING, Any

from bandpo import error
from bandpo._core import __version__
from bandpo.divergence import Divergence
from bandpo.error import BandpoError
from bandpo.region import Band, Clip, Dcpo, PriceBand, Region, by_sign, sides
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
    "Quadratic",
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

_NEED_TORCH = ("correction", "loss", "policy_loss", "torch")
"""Names that are not in `__all__`, because torch is optional."""

if TYPE_CHECKING:
    from bandpo import correction as correction
    from bandpo import loss as loss
    from bandpo import presets as presets
    from bandpo import schedule as schedule
    from bandpo import torch as torch
    from bandpo.loss import policy_loss as policy_loss
    from bandpo.presets import preset as preset
    from bandpo.spec import region_from_spec as region_from_spec
    from bandpo.surrogate import GammaWeight as GammaWeight
    from bandpo.surrogate import GradientPreserving as GradientPreserving
    from bandpo.surrogate import Mask as Mask
    from bandpo.surrogate import Quadratic as Quadratic
    from bandpo.surrogate import SoftGate as SoftGate
else:  # hidden from type checkers, for which every name would exist

    def __getattr__(name: str) -> Any:
        """Imports what regions do not need at its first use, because an import takes time."""
        if name in ("policy_loss", "preset", "region_from_spec"):
            return _function(name)
        if name == "correction":
            import bandpo.correction as module
        elif name == "loss":
            import bandpo.loss as module
        elif name == "presets":
            import bandpo.presets as module
        elif name == "schedule":
            import bandpo.schedule as module
        elif name == "torch":
            import bandpo.torch as module
        elif name in ("GammaWeight", "GradientPreserving", "Mask", "Quadratic", "SoftGate"):
            import bandpo.surrogate as surrogates

            return getattr(surrogates, name)
        else:
            raise AttributeError(f"module 'bandpo' has no attribute {name!r}")
        return module


def _function(name: str) -> Any:
    if name == "policy_loss":
        from bandpo.loss import policy_loss

        return policy_loss
    if name == "preset":
        from bandpo.presets import preset

        return preset
    from bandpo.spec import region_from_spec

    return region_from_spec


def __dir__() -> list[str]:
    return [*__all__, *_NEED_TORCH]
