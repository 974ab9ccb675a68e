"""Radii that act as strongly as a rule: a band of the radius is replayed, and does."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch")

from bandpo.error import InvalidValueError
from bandpo.replay import compare, match, rows_of
from bandpo.replay.matching import Match
from support.logs import random_log

DIVERGENCES = ("kl", "reverse-kl", "tv", "pearson-chi2", "hellinger", "alpha:0.5", "renyi:2")
FIELDS = {"clip-fraction": "clip_fraction", "gradient-removed": "gradient_removed"}


@pytest.mark.parametrize("by", FIELDS)
@pytest.mark.parametrize("rule", ["ppo", "kl@0.01", "mask:tv@0.1"])
def test_a_band_of_the_radius_acts_as_strongly(rule: str, by: str) -> None:
    log = random_log(40_000, 1, step=0.6)
    strength, matches = match([log], rule, DIVERGENCES, by=by)  # type: ignore[arg-type]
    [row] = rows_of(compare([log], [rule]))
    assert strength == pytest.approx(row[FIELDS[by]]["value"], rel=1e-5)
    assert [found.divergence for found in matches] == list(DIVERGENCES)
    for found, row in zip(matches, rows_of(compare([log], _specs(matches))), strict=True):
        # A bin of radii, 2^-11 wide, has some tokens; the spec has four digits.
        assert row[FIELDS[by]]["value"] == pytest.approx(strength, rel=5e-3), found


def _specs(matches: list[Match]) -> list[str]:
    return [found.spec for found in matches]


def test_the_radius_of_a_band_is_found_again() -> None:
    log = random_log(200_000, 2, step=0.6)
    _, [found] = match([log], "kl@0.0123", ["kl"])
    assert found.delta == pytest.approx(0.0123, rel=2e-3)
    assert found.spec.startswith("kl@0.0123") or found.spec.startswith("kl@0.0122")


def test_tokens_that_rounding_makes_certain_are_inside_a_band() -> None:
    log = random_log(40_000, 5, step=0.6)
    sure = np.arange(40_000) % 2 == 0
    log = log._replace(
        old_log_prob=np.where(sure, -1.2e-7, log.old_log_prob),
        log_prob=np.where(sure, 0.0, log.log_prob),
    )
    strength, [found] = match([log], "ppo", ["kl"])
    [row] = rows_of(compare([log], [found.spec]))
    assert 0.0 < strength < 0.1
    assert row["clip_fraction"]["value"] == pytest.approx(strength, rel=5e-3)


def test_a_rule_that_does_nothing_has_no_limit() -> None:
    log = random_log(500, 3, step=0.01)
    strength, [found] = match([log], "clip@0.9", ["kl"])
    assert (strength, found.delta, found.spec, found.is_a_region) == (
        0.0,
        math.inf,
        "no limit",
        False,
    )


def test_no_radius_clips_tokens_that_move_inwards() -> None:
    """A symmetric mask may clip more tokens than move in the direction of their advantage."""
    log = random_log(4000, 4, step=2.0)
    log = log._replace(advantages=-(log.log_prob - log.old_log_prob))
    strength, [found] = match([log], "ipo", ["kl"])
    assert strength > 0.1
    assert math.isnan(found.delta)
    assert found.spec == "none"


def test_bad_arguments_are_refused() -> None:
    log = random_log(10)
    with pytest.raises(
        InvalidValueError, match="by must be one of clip-fraction, gradient-removed"
    ):
        match([log], "ppo", ["kl"], by="strength")  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="did you mean 'kl'"):
        match([log], "ppo", ["kll"])
    with pytest.raises(InvalidValueError, match="the log must have at least one token with a"):
        match([], "ppo", ["kl"])
