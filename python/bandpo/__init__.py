"""Probability-aware clip bounds from f-divergence trust regions, for PPO and GRPO.

The band replaces a fixed clip interval by every ratio for which an f-divergence trust region of
radius delta still holds, given the token's old probability (BandPO, arXiv 2603.04918):

>>> import bandpo
>>> import numpy as np
>>> lower, upper = bandpo.Band("kl", 0.05).bounds(np.log([0.01, 0.5]))
>>> upper.round(4).tolist()
[7.8098, 1.3085]
"""

from bandpo import error, presets, schedule
from bandpo._core import __version__
from bandpo.divergence import Divergence
from bandpo.error import BandpoError
from bandpo.region import Band, Clip, Dcpo, Region, sides
from bandpo.spec import region_from_spec
from bandpo.surrogate import GradientPreserving, Mask
from bandpo.table import BandTable, TableAccuracyWarning

__all__ = [
    "Band",
    "BandTable",
    "BandpoError",
    "Clip",
    "Dcpo",
    "Divergence",
    "GradientPreserving",
    "Mask",
    "Region",
    "TableAccuracyWarning",
    "__version__",
    "error",
    "presets",
    "region_from_spec",
    "schedule",
    "sides",
]
