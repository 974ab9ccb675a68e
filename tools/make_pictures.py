"""Draws the pictures of the README into docs/pictures.

    python tools/make_pictures.py

Some are those of `bandpo plot dapo bandpo-kl`, in a file for each panel, so that a narrow screen
shows one below the other. That of a replay has the tokens of `bandpo demo --seeds 1`, which takes a
minute.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

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


def replay_pictures(seeds: int = 1, **settings: Any) -> dict[str, str]:
    """Returns the pictures of a replayed demo, as SVG, by file name."""
    # These need torch, and the other pictures do not.
    from bandpo import demo
    from bandpo.record import read_tokens
    from bandpo.replay import cloud_of
    from bandpo.replay.figure import draw_cloud
    from bandpo.replay.rule import replayed_rule

    with tempfile.TemporaryDirectory() as folder:
        demo.run(None, tokens=folder, seeds=seeds, quiet=True, **settings)
        cloud = cloud_of(read_tokens(folder))
    rules = [replayed_rule(name) for name in RULES]
    return {
        f"replay-{page}.svg": draw_cloud(cloud, rules, dark=page == "dark")
        for page in ("light", "dark")
    }


def main() -> None:
    """Writes all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, picture in pictures().items():
        plot.save(picture, FOLDER / name)
    for name, text in replay_pictures().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
