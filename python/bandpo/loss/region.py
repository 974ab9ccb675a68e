"""The argument ``region``: a region, or its spec."""

from __future__ import annotations

from functools import lru_cache

import torch

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.presets import PRESETS, Preset
from bandpo.region import Region
from bandpo.rule import RuleRegion
from bandpo.spec import region_from_spec


def resolved(region: RuleRegion | str) -> RuleRegion:
    """Returns the region, read from its spec if it is text.

    Raises:
        InvalidTypeError: If it is a preset, or text in a function that is compiled.
        InvalidValueError: If the text names a preset alone, or cannot be read.
    """
    if isinstance(region, Preset):
        raise InvalidTypeError(_has_a_preset(region.name))
    if not isinstance(region, str):
        return region
    if torch.compiler.is_compiling():  # which cannot trace the parser
        raise InvalidTypeError(
            f"region must be an object in a compiled function, got the text {region!r}; "
            f"PolicyLoss or bandpo.region_from_spec reads it outside of it"
        )
    return _from_spec(region)


@lru_cache(64)
def _from_spec(text: str) -> Region:
    """One object a text, so that its table is made and copied to a device once."""
    if text.strip() in PRESETS:
        raise InvalidValueError(_has_a_preset(text.strip()))
    return region_from_spec(text)


def _has_a_preset(name: str) -> str:
    return (
        f"region must be a region, got the preset {name!r}, which has a surrogate as well: use "
        f"PolicyLoss.from_preset({name!r}) or **preset({name!r}).arguments(), or "
        f"'preset:{name}' for its region alone"
    )
