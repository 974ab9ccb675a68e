"""Displays in a notebook: pictures of figures and regions; tables of presets and results."""

from __future__ import annotations

import pytest

from bandpo.notebook import html_table
from bandpo.presets import PRESETS

NOTEBOOK = """
from bandpo import Band, policy_loss, plot
from bandpo.presets import PRESETS
import torch
old = torch.tensor([[-7.0, -1.0]])
result = policy_loss(old, old + 0.5, torch.ones(1), torch.ones(1, 2), region=Band("kl", 0.05),
                     metrics_by_probability=True)
"""


def test_a_table_escapes_its_cells() -> None:
    text = html_table(("a", "b"), [("<script>", 1)])
    assert "&lt;script&gt;" in text
    assert text.count("<tr>") == 2


def test_presets_are_a_table() -> None:
    text = PRESETS._repr_html_()  # type: ignore[attr-defined]
    assert text.count("<tr>") == len(PRESETS) + 1
    assert "arXiv 2503.14476" in text
    assert repr(PRESETS).startswith("<presets: ppo, dapo, ")


def test_results_and_metrics_are_tables() -> None:
    torch = pytest.importorskip("torch")
    from bandpo.loss import policy_loss

    old = torch.tensor([[-7.0, -1.0]])
    result = policy_loss(
        old,
        old + 0.5,
        torch.ones(1),
        torch.ones(1, 2),
        region="clip@0.2",
        metrics_by_probability=True,
    )
    text = result.metrics._repr_html_()
    assert "clip_fraction_high</td>" in text
    assert "p in 0.1..0.5" in text
    assert result._repr_html_().endswith(text)
    assert (
        "shape (1, 2)"
        in policy_loss(
            old, old, torch.ones(1), torch.ones(1, 2), region="clip@0.2", loss_agg_mode="none"
        )._repr_html_()
    )


def test_a_notebook_kernel_displays_them() -> None:
    for package in ("torch", "matplotlib", "ipykernel"):
        pytest.importorskip(package)
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    shown = {
        "plot.band_figure({'clip': Band('kl', 0.05)})": "image/png",
        "Band('kl', 0.05).cap(10)": "image/png",
        "PRESETS": "text/html",
        "result": "text/html",
        "result.metrics": "text/html",
    }
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(code) for code in (NOTEBOOK, *shown)]
    nbclient.NotebookClient(book, timeout=120).execute()
    for cell, kind in zip(book.cells[1:], shown.values(), strict=True):
        assert kind in cell.outputs[0].data, cell.source
