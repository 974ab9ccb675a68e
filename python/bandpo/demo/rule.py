"""The clip rules that the demo compares."""

from __future__ import annotations

from bandpo import Band, BandTable, Clip, Region

FIXED = "fixed clip 0.2/0.28"
BAND = "KL band"

# The baselines: without them, any rule looser than the fixed clip would look like a gain.
NO_CLIP = "no clipping"
CONSTANT = "constant [0.1, 10]"

CAP = 10.0
"""Upper bound of every ratio of the band, as in the published runs (arXiv 2603.04918)."""


def band_table(delta: float) -> BandTable:
    """Returns the table of the KL band of that radius, capped as published."""
    return Band("kl", delta).cap(CAP).table()


def regions(table: BandTable) -> dict[str, Region]:
    """Returns the region of every rule by its name, in the order in which they are run.

    Args:
        table: The band's, from `band_table`.
    """
    return {
        FIXED: Clip(0.2, 0.28),
        BAND: table,
        NO_CLIP: Clip(1.0, float("inf")),
        CONSTANT: Clip(0.9, 9.0),
    }
