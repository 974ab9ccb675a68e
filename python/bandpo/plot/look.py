"""Colours of a page, and the look of each rule, which is the same in every picture."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any, Final, NamedTuple

from matplotlib import rc_context

DOTS_PER_INCH = 200
DOTS: Final = (0, (1.0, 1.5))
"""The dashes of a line that is no rule's."""


class Theme(NamedTuple):
    """The colours of a page."""

    paper: str
    ink: str
    muted: str
    grid: str


LIGHT: Final = Theme(paper="#ffffff", ink="#1f2328", muted="#59636e", grid="#e6e9ec")
DARK: Final = Theme(paper="#0d1117", ink="#e6edf3", muted="#9198a1", grid="#242a31")

# Each for a light and a dark page, the first ones after Okabe and Ito for colour-blind readers.
_BLUE = ("#0072b2", "#58b4ec")
_RED = ("#c2500a", "#ff9055")
_GREEN = ("#00805e", "#2cc99b")
_PURPLE = ("#a8428a", "#e697c6")
_AMBER = ("#8a6100", "#e5a91a")
_WINE = ("#8c2252", "#f0829f")
_INDIGO = ("#4a3fb0", "#a79ef5")
_SLATE = ("#4b5563", "#c3cad3")
_COLOURS = (_BLUE, _RED, _GREEN, _PURPLE, _AMBER, _WINE, _INDIGO, _SLATE)
_SOLID, _DASHED, _DOTTED = "-", (0, (4.5, 1.6)), (0, (1.2, 1.2))

_PRESETS: Final[Mapping[str, tuple[tuple[str, str], Any]]] = {
    "ppo": (_RED, _DASHED),
    "dapo": (_RED, _SOLID),
    "dual-clip": (_RED, _DOTTED),
    "bandpo-kl": (_BLUE, _SOLID),
    "bandpo-tv": (_GREEN, _SOLID),
    "bandpo-chi2": (_PURPLE, _SOLID),
    "trgppo": (_BLUE, _DASHED),
    "dppo-tv": (_GREEN, _DASHED),
    "dppo-kl": (_INDIGO, _SOLID),
    "prime-rl": (_GREEN, _DOTTED),
    "prime-rl-2026-04": (_SLATE, _DOTTED),
    "prime-rl-2026-09": (_WINE, _DOTTED),
    "kpop": (_INDIGO, _DASHED),
    "prime-rl-icepop": (_AMBER, _DOTTED),
    "sapo": (_PURPLE, _DOTTED),
    "luspo": (_WINE, _DASHED),
    "dcpo": (_WINE, _SOLID),
    "cispo": (_AMBER, _SOLID),
    "ce-gppo": (_AMBER, _DASHED),
    "gmpo": (_SLATE, _SOLID),
    "gspo": (_SLATE, _DASHED),
    "bapo": (_PURPLE, _DASHED),
}
_OTHERS: Final = tuple(product(_COLOURS, (_SOLID, _DASHED, _DOTTED)))


def look_of(name: str, *, dark: bool = False) -> dict[str, Any]:
    """Returns the colour and dashes of a rule, which depend on its name alone."""
    colours, dashes = _PRESETS.get(name) or _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]
    return {"color": colours[dark], "linestyle": dashes}


@contextmanager
def drawing(*, dark: bool = False) -> Iterator[Theme]:
    """Sets matplotlib's defaults for a picture, and gives the colours of its page."""
    theme = DARK if dark else LIGHT
    with rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 8.5,
            "axes.titlesize": 10.0,
            "axes.labelsize": 8.5,
            "axes.linewidth": 0.6,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.facecolor": theme.paper,
            "axes.edgecolor": theme.muted,
            "axes.labelcolor": theme.muted,
            "axes.titlecolor": theme.ink,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "xtick.labelsize": 8.0,
            "ytick.labelsize": 8.0,
            "grid.color": theme.grid,
            "grid.linewidth": 0.6,
            "text.color": theme.ink,
            "figure.facecolor": theme.paper,
            "savefig.facecolor": "auto",
        }
    ):
        yield theme
