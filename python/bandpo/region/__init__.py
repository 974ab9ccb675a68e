"""Regions: maps from a token's old log-probability to the ratios it may take."""

from bandpo.region.band import Band, Diagnosis, SideDiagnosis, Status
from bandpo.region.base import Curve, Curves, Region
from bandpo.region.budget import PrefixBudget, TensorBand
from bandpo.region.clip import Clip
from bandpo.region.combined import Combined, sides
from bandpo.region.dcpo import Dcpo
from bandpo.region.description import from_description
from bandpo.region.price import PriceBand
from bandpo.region.signed import BySign, by_sign

__all__ = [
    "Band",
    "BySign",
    "Clip",
    "Combined",
    "Curve",
    "Curves",
    "Dcpo",
    "Diagnosis",
    "PrefixBudget",
    "PriceBand",
    "Region",
    "SideDiagnosis",
    "Status",
    "TensorBand",
    "by_sign",
    "from_description",
    "sides",
]


def __dir__() -> list[str]:
    return __all__
