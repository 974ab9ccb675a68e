"""Presets as arguments of a loss; tests/loss/test_rules.py holds their numbers to the papers."""

from __future__ import annotations

import pytest

from bandpo.error import InvalidValueError, UnknownNameError
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
    with pytest.raises(
        InvalidValueError, match="correction, got 'loss_agg'; did you mean 'loss_agg_m"
    ):
        preset("dapo").arguments(loss_agg="token-mean")


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidValueError, match="got 'bandpo_kl'; did you mean 'bandpo-kl'"):
        preset("bandpo_kl")


def test_the_mapping_refuses_an_unknown_name_as_a_key_and_as_a_value() -> None:
    with pytest.raises(
        UnknownNameError, match=r"^preset must be one of ppo, .* got 'gpso'"
    ) as seen:
        PRESETS["gpso"]
    assert isinstance(seen.value, KeyError)
    assert isinstance(seen.value, InvalidValueError)
    assert "gpso" not in PRESETS
    assert PRESETS.get("gpso") is None
