"""The pictures of the documentation are those that tools/make_pictures.py draws."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("matplotlib")

from make_pictures import FOLDER, pictures, replay_pictures

from bandpo import plot

PLACES = 0.01
"""Tolerance in points of 1/72 inch, because releases of matplotlib round differently."""

MAX_BYTES = 60_000


def parts(svg: str) -> dict[str, NDArray[np.float64]]:
    """The coordinates of each area and line that has a name."""
    found = re.findall(r'<g id="([\w-]+:\w+)">\s*(?:<defs>\s*)?<path [^>]*?\bd="([^"]*)"', svg)
    numbers = {name: re.findall(r"-?\d+(?:\.\d+)?", path) for name, path in found}
    return {name: np.array(list(map(float, values))) for name, values in numbers.items()}


def texts(svg: str) -> list[str]:
    """The texts, which matplotlib repeats in comments beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", svg)


@pytest.mark.parametrize("name", pictures())
def test_a_picture_is_what_the_tool_draws(tmp_path: Path, name: str) -> None:
    committed = (FOLDER / name).read_text(encoding="utf-8")
    plot.save(pictures()[name], tmp_path / name)
    drawn = (tmp_path / name).read_text(encoding="utf-8")
    assert texts(committed) == texts(drawn)
    assert any("kl band 0.05, cap 10" in text for text in texts(drawn))
    ours, new = parts(committed), parts(drawn)
    names = {
        f"{rule}:{part}" for rule in ("dapo", "bandpo-kl") for part in ("area", "upper", "lower")
    }
    assert set(ours) == set(new) == names
    for part in names:
        np.testing.assert_allclose(ours[part], new[part], rtol=0, atol=PLACES)
    assert len(committed) < MAX_BYTES


@pytest.mark.parametrize("page", ["light", "dark"])
def test_the_picture_of_a_replay_has_what_the_tool_draws(page: str) -> None:
    """Its tokens are those of a long training, so a short one has the same rules and labels."""
    pytest.importorskip("torch")
    pytest.importorskip("pyarrow")
    committed = (FOLDER / f"replay-{page}.svg").read_text(encoding="utf-8")
    drawn = replay_pictures(batches=2, pretrain_steps=5)[f"replay-{page}.svg"]
    labels = {"dapo", "bandpo-kl", "old probability", "ln(new/old)"}
    assert labels <= set(texts(committed)) & set(texts(drawn))
    assert "data:image/png" in committed
    assert len(committed) < 3 * MAX_BYTES
