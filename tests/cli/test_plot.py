"""Pictures of regions: their lines, looks and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bandpo import Band, BandpoError, Clip, Divergence, sides
from bandpo.caption import caption_of, label_of
from bandpo.curve import POINTS, curve_of, drawn_presets, named_region
from bandpo.presets import PRESETS

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from bandpo import plot
from bandpo.plot.look import DARK, LIGHT, look_of
from bandpo.plot.view import LINEAR, LOG, LOGIT

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
    assert named_region("bapo") == Clip(0.4, 0.2)
    assert named_region("alpha:0.5@0.1") == Band("alpha:0.5", 0.1)
    assert named_region("kl@0.1|dapo") == Band("kl", 0.1) | Clip(0.2, 0.28)
    with pytest.raises(BandpoError, match=r"'x' is neither a preset \(ppo, .*kl@0.05"):
        named_region("x")


@pytest.mark.parametrize(
    ("region", "caption"),
    [
        (Clip(0.2, 0.28), "clip 0.2/0.28"),
        (Clip(0.2), "clip 0.2"),
        (Clip(1.0, 4.0), "at most 5"),
        (Clip(1.0, np.inf), "no clip"),
        (Clip.from_log_ratio(0.4), "log-clip 0.4"),
        (Band("kl", 0.05), "kl band 0.05"),
        (Band("alpha:0.5", (0.01, 0.1)), "alpha:0.5 band 0.01/0.1"),
        (Band("kl", np.array([0.05, 0.1])), "kl band, a delta for each token"),
        (Band("kl", 0.05).cap(10), "kl band 0.05, cap 10"),
        (Band("kl", 0.001).at_least(0.1), "kl band 0.001, at least 0.1"),
        (Band("kl", 0.05) | Band("tv", 0.1), "kl band 0.05 or tv band 0.1"),
        (Band("kl", 0.05) & Clip(0.2), "kl band 0.05 and clip 0.2"),
        (sides(lower=Clip(0.2), upper=Band("kl", 0.05)), "clip 0.2 below, kl band 0.05 above"),
        (Band("kl", 0.05).table(), "table of kl band 0.05"),
        (
            Band(Divergence.from_callable(lambda u: (u - 1) ** 2), 0.1).table(),
            "table of a Python function",
        ),
    ],
)
def test_a_caption_holds_the_numbers_of_a_region(region: Clip, caption: str) -> None:
    assert caption_of(region) == caption


def test_a_label_names_a_rule_and_its_level() -> None:
    assert label_of("dapo", Clip(0.2, 0.28)) == "dapo\nclip 0.2/0.28"
    assert label_of("mine", Clip(0.2)) == "mine\nclip 0.2"
    assert label_of("kl@0.05", Band("kl", 0.05)) == "kl band 0.05"
    assert label_of("gspo", named_region("gspo")) == "gspo\nclip 0.0003/0.0004, sequence"


def test_every_drawn_preset_has_a_look_of_its_own_in_light_and_dark() -> None:
    for dark in (False, True):
        looks = {str(look_of(name, dark=dark)) for name in drawn_presets()}
        assert len(looks) == len(drawn_presets())


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    channels = np.array([int(colour[k : k + 2], 16) / 255.0 for k in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize(("dark", "theme"), [(False, LIGHT), (True, DARK)])
def test_labels_can_be_read_on_their_page(dark: bool, theme: plot.look.Theme) -> None:
    names = [*PRESETS, *(f"kl@{k}" for k in range(100))]
    for colour in {look_of(name, dark=dark)["color"] for name in names} | {theme.muted}:
        dim, bright = sorted([luminance(colour), luminance(theme.paper)])
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, colour  # WCAG 2, level AA


def panel(figure: Figure, k: int = 0) -> Axes:
    return figure.axes[k]


def line(axes: Axes, gid: str) -> tuple[np.ndarray, np.ndarray]:
    found = next(each for each in axes.lines if each.get_gid() == gid)
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


@pytest.mark.parametrize("name", ["linear", "log", "logit"])
def test_edges_are_the_probabilities_that_the_bounds_allow(name: str) -> None:
    figure = plot.update_figure({"tv": Band("tv", 0.05)}, views=[name])
    axes = panel(figure)
    assert (axes.get_xscale(), axes.get_yscale()) == (name, name)
    p, upper = line(axes, "tv:upper")
    seen = (upper > axes.get_ylim()[0]) & (upper < axes.get_ylim()[1])
    assert seen.any()
    allowed = np.minimum(p + 0.05, 1.0)
    np.testing.assert_allclose(upper[seen], allowed[seen], rtol=CLOSED_FORM, atol=0)
    p, lower = line(axes, "tv:lower")
    seen = (lower > axes.get_ylim()[0]) & (lower < axes.get_ylim()[1])
    np.testing.assert_allclose(lower[seen], (p - 0.05)[seen], rtol=0, atol=CLOSED_FORM)


def test_an_edge_at_zero_leaves_the_picture() -> None:
    figure = plot.update_figure({"cispo": Clip(1.0, 4.0)})
    for axes in figure.axes:
        assert np.all(line(axes, "cispo:lower")[1] <= axes.get_ylim()[0])


def test_labels_cover_no_line_and_no_label() -> None:
    names = ("dapo", "bandpo-kl", "dppo-tv")
    figure = plot.update_figure({name: named_region(name) for name in names})
    for axes in figure.axes:
        boxes = [
            text.get_window_extent().padded(-1.0)
            for text in axes.texts
            if text.get_text().startswith(names)
        ]
        assert len(boxes) == len(names)
        for k, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:k])
            for each in axes.lines:
                corners = axes.transData.transform(np.stack(each.get_data(), -1))
                at = np.linspace(0, len(corners) - 1, 4000)
                steps = np.arange(len(corners))
                dots = np.stack([np.interp(at, steps, corners[:, k]) for k in (0, 1)], -1)
                assert not np.any([box.contains(*dot) for dot in dots]), each.get_gid()


def test_all_presets_are_small_pictures_with_name_and_numbers(tmp_path: Path) -> None:
    figure = plot.comparison_figure({name: named_region(name) for name in drawn_presets()})
    assert len(figure.axes) == len(drawn_presets())
    for axes, name in zip(figure.axes, drawn_presets(), strict=True):
        heading, caption = label_of(name, named_region(name)).split("\n")
        assert [text.get_text() for text in axes.texts] == [heading, caption]
        assert {str(each.get_gid()) for each in axes.lines} >= {
            f"{name}:upper",
            f"{name}:lower",
            f"{name}:dapo:upper",
        }
        assert axes.get_xlim() == pytest.approx((1e-4, 1 - 1e-4), rel=CLOSED_FORM, abs=0)
    plot.save(figure, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_texts_of_small_pictures_do_not_overlap() -> None:
    figure = plot.comparison_figure({name: named_region(name) for name in drawn_presets()})
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent().padded(-1.0) for text in texts]
    for k, box in enumerate(boxes):
        over = [texts[j].get_text() for j in range(k) if box.overlaps(boxes[j])]
        assert not over, texts[k].get_text()


def test_the_range_of_probabilities_is_that_of_the_axes() -> None:
    assert LINEAR.range(None) == (0.0, 1.0)
    assert LOG.range((1e-6, 0.5)) == (1e-6, 0.5)
    assert LOGIT.range((1e-6, 1.0)) == (1e-6, 1 - 1e-6)
    for view, given in ((LOG, (0.0, 1.0)), (LINEAR, (0.5, 0.5)), (LOGIT, (0.1, 1.5))):
        with pytest.raises(BandpoError, match="p must be"):
            view.range(given)


def test_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    for suffix in plot.SUFFIXES:
        for name in ("one", "two"):
            plot.save(plot.update_figure({"dapo": Clip(0.2, 0.28)}), tmp_path / (name + suffix))
        one, two = (tmp_path / (name + suffix) for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_ratios_are_drawn_against_the_old_probability() -> None:
    figure = plot.band_figure({"band": Band("kl", 0.05), "one-sided": Clip(0.2, np.inf)})
    (axes,) = figure.axes
    assert [text.get_text().split("\n")[0] for text in axes.texts] == ["band", "one-sided"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    _, upper = line(axes, "one-sided:upper")
    assert np.all(upper > axes.get_ylim()[1]), "no bound is no line in the picture"


def test_a_notebook_shows_pictures_and_regions() -> None:
    assert plot.band_figure({"clip": Clip(0.2)})._repr_png_().startswith(b"\x89PNG")
    shown = Band("kl", 0.05).cap(10)._repr_png_()
    assert shown is not None
    assert shown.startswith(b"\x89PNG")
    assert Band("kl", np.array([0.05, 0.1]))._repr_png_() is None
