"""A region in a few words, as pictures label it."""

from __future__ import annotations

import math
import re

from bandpo.error import InvalidValueError
from bandpo.presets import PRESETS
from bandpo.region import Band, Clip, Combined, Dcpo, PriceBand, Region
from bandpo.table import BandTable

_SPEC = re.compile("[@|&(]")
_LEVELS = {
    "sequence": ", sequence",
    "sequence-product": ", product",
    "geometric-mean": ", geometric mean",
}


def caption_of(region: Region) -> str:
    """Returns the kind of a region with its numbers, such as ``kl band 0.05, cap 10``."""
    if isinstance(region, Clip):
        return _clip(region)
    if isinstance(region, Dcpo):
        return _pair("dcpo", region.eps_low, region.eps_high)
    if isinstance(region, Band):
        return _band(region)
    if isinstance(region, PriceBand):
        kind = f"{region.divergence.spec} price"
        return _pair(kind, region.price_low, region.price_high)
    if isinstance(region, Combined):
        return _combined(region)
    if isinstance(region, BandTable):
        return _table(region)
    return repr(region)


def label_of(name: str, region: Region) -> str:
    """Returns a rule's name and below it the caption of its region and its ratio level.

    A name that is the text of a region, such as ``kl@0.05``, is left out.
    """
    level = _LEVELS.get(PRESETS[name].ratio_level, "") if name in PRESETS else ""
    caption = caption_of(region) + level
    return caption if _SPEC.search(name) else f"{name}\n{caption}"


def _clip(clip: Clip) -> str:
    if clip.eps_low == 1.0:
        upper = 1.0 + clip.eps_high
        return "no clip" if math.isinf(upper) else f"at most {upper:g}"
    log_clip = _pair("log-clip", -clip.log_lower, clip.log_upper)
    return min(_pair("clip", clip.eps_low, clip.eps_high), log_clip, key=len)


def _band(band: Band) -> str:
    name = band.divergence.spec
    if band.per_token:
        return f"{name} band, a delta for each token"
    return _pair(f"{name} band", float(band.delta_low), float(band.delta_high))


def _pair(kind: str, low: float, high: float) -> str:
    return f"{kind} {low:g}" if low == high else f"{kind} {low:g}/{high:g}"


def _table(table: BandTable) -> str:
    try:
        return f"table of {caption_of(table.region)}"
    except InvalidValueError:
        return "table of a Python function"


def _combined(region: Combined) -> str:
    left, right = region.parts
    if region.kind == "sides":
        return f"{caption_of(left)} below, {caption_of(right)} above"
    if isinstance(right, Clip):
        if region.kind == "intersection" and right.eps_low == 1.0:
            return f"{caption_of(left)}, cap {1.0 + right.eps_high:g}"
        if region.kind == "union":
            return f"{caption_of(left)}, " + _pair("at least", right.eps_low, right.eps_high)
    word = "or" if region.kind == "union" else "and"
    return f"{caption_of(left)} {word} {caption_of(right)}"
