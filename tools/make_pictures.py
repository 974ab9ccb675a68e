"""Draws the pictures of the README into docs/pictures.

    python tools/make_pictures.py

The pictures are those of `bandpo plot dapo bandpo-kl`, in a file for each panel, so that a narrow
screen shows one below the other.
"""

from __future__ import annotations

from pathlib import Path

from bandpo import plot
from bandpo.curve import named_region

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
RULES = ("dapo", "bandpo-kl")


def pictures() -> dict[str, plot.Picture]:
    """Returns the pictures by file name."""
    regions = {name: named_region(name) for name in RULES}
    return {
        f"update-{view}-{page}.svg": plot.update_figure(regions, views=[view], dark=page == "dark")
        for view in ("linear", "log")
        for page in ("light", "dark")
    }


def main() -> None:
    """Writes all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, picture in pictures().items():
        plot.save(picture, FOLDER / name)


if __name__ == "__main__":
    main()
