"""Presets as arguments of a loss; tests/loss/test_rules.py holds their numbers to the papers."""

from __future__ import annotations

import pytest

from bandpo.error import InvalidValueError
from bandpo.presets import PRESETS, preset


@pytest.mark.parametrize("name", list(PRESETS))
def test_arguments_take_changes(name: str) -> None:
    plain = preset(name).arguments()
    changed = preset(name).arguments(loss_agg_mode="seq-mean-token-sum", dual_clip=None)
    assert changed["loss_agg_mode"] == "seq-mean-token-sum"
    assert changed["dual_clip"] is None
    assert changed["surrogate"] == plain["surrogate"]
    assert set(changed) == set(plain)


def test_an_unknown_argument_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidValueError, match="loss_agg_mode, got 'loss_agg'; did you mean"):
        preset("dapo").arguments(loss_agg="token-mean")


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidValueError, match="got 'bandpo_kl'; did you mean 'bandpo-kl'"):
        preset("bandpo_kl")
