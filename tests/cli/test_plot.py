"""The comparison of regions: what is drawn, and the numbers of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bandpo import Band, BandpoError, Clip
from bandpo.curve import POINTS, curve_of, named_region
from bandpo.presets import PRESETS

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from bandpo import plot

CLOSED_FORM = 1e-13
"""Relative tolerance of differences from closed forms of total variation."""


def test_a_curve_holds_bounds_and_changes_of_probability() -> None:
    curve = curve_of(Band("tv", 0.05))
    assert curve.p.shape == (POINTS,)
    assert (curve.p[0], curve.p[-1]) == (pytest.approx(1e-4, rel=CLOSED_FORM, abs=0), 1.0)
    # A token moves by delta, unless there is less to lose or to gain.
    rise, fall = np.minimum(0.05, 1 - curve.p), np.minimum(0.05, curve.p)
    np.testing.assert_allclose(curve.rise[:-1], rise[:-1], rtol=1e-9, atol=0)
    np.testing.assert_allclose(curve.fall, fall, rtol=CLOSED_FORM, atol=0)
    assert curve.rise[-1] == 0.0
    np.testing.assert_allclose(curve.lower, 1 - fall / curve.p, rtol=0, atol=CLOSED_FORM)


def test_regions_have_names() -> None:
    assert named_region("dapo") == Clip(0.2, 0.28)
    assert named_region("bapo") == Clip(0.4, 1.2 - 1)
    assert named_region("alpha:0.5@0.1") == Band("alpha:0.5", 0.1)
    assert named_region("kl@0.1|dapo") == Band("kl", 0.1) | Clip(0.2, 0.28)
    with pytest.raises(BandpoError, match=r"'x' is neither a preset \(ppo, .*kl@0.05"):
        named_region("x")


def drawn(figure: Figure, axes: int) -> list[str]:
    labels = figure.axes[axes].get_legend_handles_labels()[1]
    return [str(label) for label in labels]


def test_all_presets_are_drawn_together(tmp_path: Path) -> None:
    figure = plot.comparison_figure({name: named_region(name) for name in PRESETS})
    labels = drawn(figure, 0)
    assert labels[0] == "ppo, dual-clip, ce-gppo"
    assert {name for label in labels for name in label.split(", ")} >= set(PRESETS)
    styles = {
        (line.get_color(), line.get_linestyle())
        for line in figure.axes[0].lines
        if not str(line.get_label()).startswith("1/p")
    }
    assert len(styles) == len(labels) - 1, "no two regions look the same"
    plot.save(figure, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_lines_go_through_the_bounds_and_leave_at_the_edge() -> None:
    figure = plot.comparison_figure({"tv": Band("tv", 0.05), "none": Clip(1, np.inf)})
    ratio, rise, fall = figure.axes
    for axes in (ratio, rise, fall):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_xlim() == pytest.approx((1e-4, 1.0), rel=CLOSED_FORM, abs=0)
    upper, lower, _ = ratio.lines
    p, values = upper.get_data()
    seen = np.asarray(values) < 100
    np.testing.assert_allclose(
        np.asarray(values)[seen],
        np.minimum(1 + 0.05 / np.asarray(p), 1 / np.asarray(p))[seen],
        rtol=CLOSED_FORM,
        atol=0,
    )
    # Where nothing is left of p the line goes out of the picture.
    assert np.min(np.asarray(lower.get_ydata())) < ratio.get_ylim()[0]
    assert drawn(figure, 0) == ["tv", "1/p, new probability 1"]
