"""Constants in the sources, against what tools/make_constants.py computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from make_constants import CONSTANTS, DIGITS, EXACT, POLYNOMIALS, STARTS, Digits, Polynomial, Start
from mpmath import mp

NUMERICS = Path(__file__).parents[2] / "docs" / "numerics.md"


@pytest.mark.parametrize(
    "part", CONSTANTS, ids=lambda part: getattr(part, "name", None) or part.divergence
)
def test_constants_are_those_of_the_script(part: Polynomial | Digits | Start) -> None:
    with mp.workdps(DIGITS):
        assert list(part.faults()) == []


def test_changed_constants_are_reported() -> None:
    gap, exp_gap, *_ = POLYNOMIALS
    with mp.workdps(DIGITS):
        assert len(list(replace(exp_gap, high="0.71", error=1.0).faults())) == 1
        assert len(list(replace(exp_gap, error=1e-18).faults())) == 1
        assert len(list(replace(gap, copy="cuda/lookup.cuh").faults())) == 1
        assert len(list(replace(EXACT[0], values=EXACT[1].values).faults())) == 1
        assert len(list(replace(STARTS[0], error=1e-3, settled=1.01).faults())) == 2


def test_the_document_states_the_starts() -> None:
    text = " ".join(NUMERICS.read_text(encoding="utf-8").split())
    for start in STARTS:
        assert f"{100 * start.error:.2g} %" in text
        assert f"{100 * start.settled:.0f} %" in text
