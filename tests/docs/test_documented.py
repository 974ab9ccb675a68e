"""Statements of docs/numerics.md on the solver, evaluated."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from mpmath import mp, mpf

from bandpo import Band
from conftest import Reference
from support.contract import BACKWARD, ILL_CONDITIONED
from support.reference import bound as reference_bound
from support.reference import condition, divergence

ROOT = Path(__file__).parents[2]
NUMERICS = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")

EVERY = 25
"""Step through the reference points: one in so many is evaluated."""

BEYOND = mpf("1.5e-14")
"""Relative distance from a bound at which D is greater than delta, as documented."""

# Points with log_lower just below saturation: spec, logp, delta. Their condition numbers are above
# 1e14, and their relative errors were the max of ten thousand points of each divergence.
NEAR_SATURATION = [
    ("alpha:0.5", "-0x1.19df327c3b65bp+3", "0x1.39729a1cde623p-12"),
    ("alpha:1.5", "-0x1.74d348fe12779p-6", "0x1.e39313d8e5b8ep+2"),
    ("alpha:3", "-0x1.1691a262f26e9p+2", "0x1.1ebc398b9a244p-8"),
    ("alpha:4", "-0x1.f36ed87c56c23p+3", "0x1.65e8ff5ef1395p-25"),
    ("bhattacharyya", "-0x1.0015af0d6a22bp-18", "0x1.8f3e0429a2cb1p+2"),
    ("bhattacharyya", "-0x1.02917f604d77dp-25", "0x1.151961ed06ed6p+3"),
    ("bwcs:0.3", "-0x1.5c3368a6beee6p+2", "0x1.974089ba81c4ap-8"),
    ("hockey-stick:1.2", "-0x1.d49085cd3bd81p-22", "0x1.ffffee6dc808ap-1"),
    ("jensen-shannon", "-0x1.1641dfe3657eap-12", "0x1.62439b97397e1p-1"),
    ("pearson-chi2", "-0x1.4fe00882910f2p+0", "0x1.795a63b6294f1p-2"),
    ("renyi:0.5", "-0x1.d36a1815e4056p-8", "0x1.3c96c659d5d63p+2"),
    ("renyi:2", "-0x1.c23672daf6d59p+1", "0x1.eda31a4ee299dp-6"),
    ("reverse-kl", "-0x1.fed5af1f8b483p+3", "0x1.f5429d59eb3b1p-24"),
    ("vajda:3", "-0x1.cb91354e3bd3dp+1", "0x1.c45e3b1e42d76p-6"),
]


def check(spec: str, logp: float, delta: float) -> None:
    log_lower, log_upper = Band(spec, delta).log_bounds(logp)
    for bound, edge in ((float(log_lower), -np.inf), (float(log_upper), -logp)):
        place = (spec, logp.hex(), delta.hex(), bound.hex())
        value = divergence(spec, logp, bound)
        assert value <= delta, place
        if bound == edge:
            continue
        assert divergence(spec, logp, edge) > delta, place
        with mp.workdps(60):
            beyond = mpf(bound) * (1 + BEYOND)
        if divergence(spec, logp, beyond) <= delta:
            assert delta - value <= BACKWARD * np.spacing(delta), place
            kappa = condition(
                spec, logp, delta, False, reference_bound(spec, logp, delta, False)[1]
            )
            assert kappa > ILL_CONDITIONED, place
            assert bound < 0, place


def test_bounds_are_inside_and_next_to_the_edge(reference: Reference) -> None:
    assert f"times 1 + {mp.nstr(BEYOND, 2)} is greater" in NUMERICS
    promised = (reference.logp >= np.log(1e-300)) & (reference.logp <= -1e-16)
    logps, deltas = reference.logp[promised], reference.delta[promised]
    for logp, delta in zip(logps[::EVERY], deltas[::EVERY], strict=True):
        check(reference.spec, float(logp), float(delta))


@pytest.mark.parametrize(("spec", "logp", "delta"), NEAR_SATURATION)
def test_ill_conditioned_bounds_are_inside_and_next_to_delta(
    spec: str, logp: str, delta: str
) -> None:
    assert f"within {BACKWARD:.0f} ULP of delta" in NUMERICS
    assert f"exceeds {ILL_CONDITIONED:.0f}, D at" in NUMERICS
    check(spec, float.fromhex(logp), float.fromhex(delta))


def test_constants_of_the_document_are_those_of_the_source() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| `(.+?)` \|", NUMERICS, re.MULTILINE)
    assert len(rows) == 46
    for name, value, file in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"const {name}: \w+ = {re.escape(value)};", source), name
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)*)`", NUMERICS))
    assert named == {name for name, _, _ in rows}
