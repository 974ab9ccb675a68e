"""The clip rules that the demo compares."""

from __future__ import annotations

from bandpo import Band, Clip, Region, region_from_spec

FIXED = "clip [0.5, 2]"
FIXED_SPEC = "clip@0.5,1"
"""A constant interval of the ratio, among the best of those that docs/evidence.md compares."""

NO_CLIP = "no clipping"

PAPER_DELTA = 0.05
"""Radius of the published runs (arXiv 2603.04918)."""

CAP = 10.0
"""Upper bound of every ratio of a band, as in the published runs."""


def band_name(delta: float) -> str:
    """Returns the name of the KL band of that radius."""
    return f"KL band {delta}"


def regions(delta: float) -> dict[str, Region]:
    """Returns the region of every rule by its name, in the order in which they are run.

    Args:
        delta: Radius of the first band. The second has `PAPER_DELTA`, and is left out if they are
            equal.
    """
    bands = {
        band_name(radius): Band("kl", radius).cap(CAP).table() for radius in (delta, PAPER_DELTA)
    }
    return {
        **bands,
        FIXED: region_from_spec(FIXED_SPEC),
        NO_CLIP: Clip(1.0, float("inf")),
    }
