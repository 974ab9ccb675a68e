"""Regions: maps from a token's old log-probability to the ratios it may take."""

from bandpo.region.band import Band, Diagnosis, SideDiagnosis, Status
from bandpo.region.base import Curve, Region, Stretches
from bandpo.region.clip import Clip
from bandpo.region.combined import Combined, sides
from bandpo.region.dcpo import Dcpo
from bandpo.region.description import from_description

__all__ = [
    "Band",
    "Clip",
    "Combined",
    "Curve",
    "Dcpo",
    "Diagnosis",
    "Region",
    "SideDiagnosis",
    "Status",
    "Stretches",
    "from_description",
    "sides",
]


def __dir__() -> list[str]:
    return __all__
