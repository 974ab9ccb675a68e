"""Rules of trainers' configurations: what they make, and what they refuse before a run begins."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest

from bandpo import Band, Clip, Mask, preset
from bandpo.correction import Correction
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.settings import LossSettings
from bandpo.presets import PRESETS
from bandpo.region import Region
from bandpo.schedule import Bapo, Constant, Linear, ScheduledBand
from bandpo.surrogate import GradientPreserving, MinClip

DEFAULT = {"preset": "bandpo-kl", "region": "(kl@0.01).cap(10)"}


def test_settings_without_a_field_are_the_rule_of_the_paper_at_the_radius_of_the_study() -> None:
    expected = preset("bandpo-kl").arguments()
    del expected["loss_agg_mode"]
    expected["region"] = Band("kl", 0.01).cap(10)
    assert LossSettings().arguments() == expected


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_own_arguments(name: str) -> None:
    found, expected = LossSettings(preset=name).arguments(), preset(name).arguments()
    assert repr(found.pop("region")) == repr(expected.pop("region"))  # a source equals itself alone
    del expected["loss_agg_mode"]
    given = expected.pop("correction")
    assert found.pop("correction") == (None if given is None else Correction(**given))
    assert found == expected


def test_fields_replace_parts_of_a_preset() -> None:
    settings = LossSettings(preset="bandpo-kl", region="kl@0.01", dual_clip=3)
    assert settings.arguments() == {
        "region": Band("kl", 0.01),
        "surrogate": "min-clip",
        "dual_clip": 3,
        "ratio_level": "token",
        "log_ratio_penalty": 0.0,
        "correction": None,
    }
    masked = LossSettings(surrogate="mask", log_ratio_penalty=1e-3).arguments()
    assert masked["dual_clip"] is None  # it belongs to the preset's min-clip
    assert (masked["surrogate"], masked["log_ratio_penalty"]) == ("mask", 1e-3)


def test_a_region_alone_has_the_defaults_of_the_loss() -> None:
    found = LossSettings(region="kl@0.01|clip@0.2,0.28").arguments()
    assert found["region"] == Band("kl", 0.01) | Clip(0.2, 0.28)
    assert (found["surrogate"], found["dual_clip"]) == ("min-clip", None)
    assert LossSettings(region="preset:dppo-kl").region_or_source() == Band("kl", 0.05)
    region = Clip(0.2)
    assert LossSettings(region=region).region_or_source() is region


def test_plain_data_make_the_objects() -> None:
    settings = LossSettings(
        surrogate={"name": "mask", "truncation": 3.0},
        correction={"region": "clip@0.5,4", "action": "truncate"},
    )
    found = settings.arguments()
    assert found["surrogate"] == Mask(truncation=3.0)
    assert found["correction"] == Correction(Clip(0.5, 4), action="truncate")
    assert LossSettings(surrogate={"name": "weight"}).arguments()["surrogate"] == "weight"
    named = LossSettings(correction="icepop").arguments()["correction"]
    assert named == Correction(Clip.between(0.5, 5.0))
    objects = {"surrogate": GradientPreserving(0.5, 1.0), "correction": named}
    assert LossSettings(**objects).arguments().items() >= objects.items()


def test_the_one_band_of_a_region_follows_the_schedule() -> None:
    settings = LossSettings(region="(kl@0.3).cap(10) | clip@0.2", schedule="linear(0.5, 0.25, 2)")
    source = settings.region_or_source()
    assert isinstance(source, ScheduledBand)
    seen = [source.region]
    for _ in range(3):
        source.step()
        seen.append(source.region)
    assert seen == [Band("kl", delta).cap(10) | Clip(0.2) for delta in (0.5, 0.375, 0.25, 0.25)]
    again = settings.region_or_source()
    assert isinstance(again, ScheduledBand)
    assert again.region == seen[0]


def test_each_region_has_a_copy_of_a_schedule_that_is_an_object() -> None:
    settings = LossSettings(schedule=Linear(0.1, 0.05, 10))
    first, second = settings.region_or_source(), settings.region_or_source()
    assert isinstance(first, ScheduledBand)
    assert isinstance(second, ScheduledBand)
    first.step()
    assert second.schedule.value == 0.1


@pytest.mark.parametrize(
    ("fields", "changes", "entropy"),
    [
        ({}, "never", False),
        ({"schedule": "constant(0.1)"}, "by step", False),
        (
            {"schedule": "entropy(0.05, target=0.3, rate=0.1, min_value=0.01, max_value=0.2)"},
            "by step",
            True,
        ),
        ({"preset": "bapo"}, "by batch", False),
        ({"region": "preset:m2po"}, "by batch", False),
        ({"region": Bapo()}, "by batch", False),
        ({"preset": "cppo"}, "never", False),
        ({"preset": "topr"}, "never", False),
    ],
)
def test_settings_state_when_their_region_changes(
    fields: dict[str, Any], changes: str, entropy: bool
) -> None:
    settings = LossSettings(**fields)
    assert (settings.changes, settings.needs_entropy) == (changes, entropy)
    for but_steps in (False, True):
        if changes == "never" or (changes == "by step" and but_steps):
            settings.refuse_changes("a trainer", but_steps=but_steps)
        else:
            with pytest.raises(InvalidValueError, match=r"with a trainer.*got"):
                settings.refuse_changes("a trainer", but_steps=but_steps)


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, False),
        ({"anchor": "rollout"}, True),
        ({"correction": "tis"}, True),
        ({"preset": "icepop"}, True),
    ],
)
def test_settings_state_whether_they_read_rollout_log_probs(
    fields: dict[str, Any], needs: bool
) -> None:
    assert LossSettings(**fields).needs_rollout_log_prob is needs


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"region": "kl@"}, InvalidValueError, r"^region \"kl@\", column 4: a number is missing"),
    (
        {"region": " dapo"},
        InvalidValueError,
        r"^region must be .*preset 'dapo'.*'preset:dapo' is its region alone",
    ),
    *(
        ({"region": region}, InvalidTypeError, rf"^region must be a spec, such as .*got {shown}$")
        for region, shown in ((3, "3"), (0.2, "0.2"), (True, "True"), ([], r"\[\]"))
    ),
    ({"preset": "bandpo"}, InvalidValueError, r"^preset must be one of .*did you mean"),
    ({"surrogate": "masc"}, InvalidValueError, r"^surrogate must be .*did you mean 'mask'"),
    ({"surrogate": {"truncation": 3.0}}, InvalidValueError, r"^surrogate, its name, .*got None"),
    (
        {"surrogate": {"name": "mask", "truncate": 3.0}},
        InvalidValueError,
        r"^argument of surrogate 'mask' must be one of truncation, whole_sequence, symmetric, got",
    ),
    (
        {"surrogate": {"name": "mask", "truncation": 0.5}},
        InvalidValueError,
        r"^surrogate 'mask': truncation must be above 1, got 0.5",
    ),
    ({"surrogate": {"name": "weight", "x": 1}}, InvalidValueError, r"takes no arguments, got x"),
    (
        {"surrogate": {"name": "min-clip", "dual_clip": 3.0}},
        InvalidValueError,
        r"dual_clip is a field",
    ),
    ({"surrogate": "mask", "dual_clip": 3.0}, InvalidValueError, r"^dual_clip must be left out"),
    ({"dual_clip": 0.5}, InvalidValueError, r"^dual_clip must be above 1, got 0.5"),
    ({"dual_clip": "3"}, InvalidTypeError, r"^dual_clip must be a real number, got str"),
    ({"ratio_level": "words"}, InvalidValueError, r"^ratio_level must be one of"),
    ({"ratio_level": "sequence"}, InvalidValueError, r"^region must be a Clip with ratio_level"),
    ({"schedule": "lin(1)"}, InvalidValueError, r"^schedule 'lin\(1\)', column 1: .*'linear'\?"),
    ({"schedule": 0.1}, InvalidTypeError, r"^schedule must be a spec, such as .*got 0.1$"),
    (
        {"schedule": "constant(0.1)", "region": "clip@0.2"},
        InvalidValueError,
        r"^schedule must be left out: region must have one band.* got 0 in Clip",
    ),
    (
        {"schedule": "constant(0.1)", "region": "sides(kl@0.1, kl@0.1)"},
        InvalidValueError,
        r"^schedule must be left out: region must have one band.* got 2 in sides",
    ),
    (
        {"schedule": "constant(0.1)", "region": "kl@0.1/0.2"},
        InvalidValueError,
        r"^schedule must be left out: region must have a band of one delta",
    ),
    (
        {"schedule": "constant(0.1)", "preset": "bapo"},
        InvalidValueError,
        r"^schedule must be left out with region Bapo",
    ),
    ({"anchor": None}, InvalidValueError, r"^anchor must be one of old, rollout, got None"),
    ({"correction": "ppo"}, InvalidValueError, r"^correction must be one of icepop, tis"),
    ({"correction": 2.0}, InvalidTypeError, r"^correction must be the name .*got float"),
    (
        {"correction": {"regio": "clip@0.5"}},
        InvalidValueError,
        r"^argument of a correction .*did you mean 'region'",
    ),
    (
        {"correction": {"region": "clip@0.5", "action": "drop"}},
        InvalidValueError,
        r"^correction: action must be one of",
    ),
    ({"log_ratio_penalty": -1e-3}, InvalidValueError, r"^log_ratio_penalty must be .*got -0.001"),
    ({"log_ratio_penalty": math.nan}, InvalidValueError, r"^log_ratio_penalty must be .*got nan"),
]


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_a_wrong_field_is_refused_by_its_name(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LossSettings(**fields)


def test_a_clamp_has_the_region_alone() -> None:
    assert LossSettings(region="kl@0.05").clamp_region("t") == Band("kl", 0.05)
    assert isinstance(
        LossSettings(preset="bandpo-kl", dual_clip=math.inf).clamp_region("t"), Region
    )
    scheduled = LossSettings(region="kl@0.05", schedule=Constant(0.1))
    assert isinstance(scheduled.clamp_region("t"), ScheduledBand)
    for fields, message in (
        (
            {},
            r"^dual_clip must be None with t, .* got 10.0 of the preset 'bandpo-kl', which is "
            r"taken where no rule is given; give region='\(kl@0.01\).cap\(10\)' for the region "
            r"alone$",
        ),
        (
            {"preset": "dppo-kl"},
            r"^surrogate must be 'min-clip' with t, .* got 'mask' of the preset 'dppo-kl'; give "
            r"region='preset:dppo-kl' for the region alone$",
        ),
        (
            {"preset": "dppo-kl", "region": "kl@0.05"},
            r"got 'mask' of the preset 'dppo-kl'; leave preset out for the region alone$",
        ),
        ({"preset": "gspo"}, r"^ratio_level must be 'token' with t, .* got 'sequence'"),
        ({"region": "kl@0.05", "dual_clip": 3.0}, r"^dual_clip must be None .* got 3.0$"),
        ({"region": "kl@0.05", "surrogate": MinClip(3.0)}, r"^dual_clip must be .* got 3.0$"),
        (
            {"region": "kl@0.05", "log_ratio_penalty": 1e-3},
            r"^log_ratio_penalty must be 0.0 with t, .* got 0.001",
        ),
    ):
        with pytest.raises(InvalidValueError, match=message):
            LossSettings(**fields).clamp_region("t")


def test_a_field_that_a_trainer_cannot_take_is_refused_with_another_way() -> None:
    names = ("anchor", "correction")
    LossSettings(preset="dapo").refuse("a trainer", "use its own", *names)
    for name, value in (("anchor", "rollout"), ("correction", "tis")):
        settings = replace(LossSettings(), **{name: value})  # type: ignore[arg-type]
        with pytest.raises(InvalidValueError, match=f"{name} must be left out .*'{value}'; use"):
            settings.refuse("a trainer", "use its own", *names)


@pytest.mark.parametrize(
    "fields",
    [
        {"region": "kl@0.05", "dual_clip": 3.0, "schedule": "linear(0.1, 0.02, 9)"},
        {"preset": "dapo", "ratio_level": "geometric-mean", "log_ratio_penalty": 0.01},
        {"surrogate": {"name": "mask", "truncation": None}, "anchor": "rollout"},
        {"surrogate": "weight", "correction": "tis"},
        {"correction": {"region": "clip@0.5,4", "action": "truncate"}},
    ],
)
def test_settings_as_json_are_all_fields_that_are_given(fields: dict[str, Any]) -> None:
    default = {} if "region" in fields or "preset" in fields else DEFAULT
    assert json.loads(json.dumps(LossSettings(**fields).as_json())) == {**fields, **default}
    assert LossSettings().as_json() == DEFAULT


def test_objects_in_settings_have_text_that_makes_an_equal_rule() -> None:
    settings = LossSettings(
        region=Band("kl", 0.05).cap(10) | Clip(0.2, 0.28),
        surrogate=Mask(truncation=None, symmetric=True),
        correction=Correction(statistic="k3", threshold=0.5, level="sequence-mean"),
    )
    found = json.loads(json.dumps(settings.as_json()))
    assert found["region"] == "(kl@0.05).cap(10)|clip@0.2,0.28"
    assert LossSettings.of(found).arguments() == settings.arguments()
    without = LossSettings(Band("kl", 0.05).table(), schedule=None).as_json()
    assert without["region"].startswith("BandTable(")
    assert LossSettings(schedule=Linear(0.1, 0.05, 10)).as_json() == {
        **DEFAULT,
        "schedule": "Linear(0.1, 0.05, 10)",
    }


def test_settings_and_their_regions_have_pickles() -> None:
    settings = LossSettings(schedule="cosine(0.1, 0.05, 10)", correction="tis")
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 -- our own bytes
    source = settings.region_or_source()
    assert isinstance(source, ScheduledBand)
    copied = pickle.loads(pickle.dumps(source))  # noqa: S301 -- our own bytes
    copied.step()
    source.step()
    assert copied.region == source.region
    assert len(pickle.dumps(source)) < 2000


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ({"anchor": "rollout"}, "anchor"),
        ({"correction": "tis"}, "correction"),
        ({"preset": "icepop"}, "preset"),
    ],
)
def test_a_rule_that_needs_a_third_policy_is_refused_where_there_is_none(
    rule: dict[str, Any], name: str
) -> None:
    settings = LossSettings(**rule)
    with pytest.raises(InvalidValueError, match=f"{name} must be left out with Frame"):
        settings.refuse_rollout("Frame")
    if name != "anchor":
        with pytest.raises(
            InvalidValueError, match=f"{name} must be left out with Frame.* its own"
        ):
            settings.refuse_correction("Frame", "it has its own")


def test_a_rule_without_a_third_policy_is_refused_nowhere() -> None:
    settings = LossSettings(preset="dppo-kl")
    settings.refuse_rollout("Frame")
    settings.refuse_correction("Frame", "it has its own")


def test_settings_of_a_mapping_have_its_fields() -> None:
    assert LossSettings.of({"region": "kl@0.05"}) == LossSettings("kl@0.05")
    with pytest.raises(InvalidValueError, match=r"regoin.*did you mean 'region'"):
        LossSettings.of({"regoin": "kl@0.05"})
    with pytest.raises(InvalidTypeError, match=r"fields by name.* got str"):
        LossSettings.of("kl@0.05")  # type: ignore[arg-type]
