"""Specs of regions: each form against the API, errors with their column, and texts at random."""

from __future__ import annotations

import doctest
import math
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bandpo
from bandpo import Band, Clip, Dcpo, Divergence, Region, region_from_spec, sides, spec
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.presets import PRESETS, preset
from bandpo.schedule import Bapo, Constant, Cosine, EntropyTargeted, Linear, Schedule
from bandpo.spec import region_or_source_from_spec, schedule_from_spec, spec_from_region

REVERSE_KL = "u*ln(u) - u + 1"


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("kl@0.01", Band("kl", 0.01)),
        ("tv@0.15", Band("tv", 0.15)),
        ("kl@0.01/0.1", Band("kl", (0.01, 0.1))),
        ("alpha:0.5@0.01", Band("alpha:0.5", 0.01)),
        ("alpha:-1@1e-3", Band("alpha:-1", 1e-3)),
        ("hockey-stick:1.2@.05", Band("hockey-stick:1.2", 0.05)),
        ("clip@0.2", Clip(0.2)),
        ("clip@0.2,0.28", Clip(0.2, 0.28)),
        ("clip@1,inf", Clip(1, math.inf)),
        ("log-clip@0.4", Clip.from_log_ratio(0.4)),
        ("log-clip@40,inf", Clip.from_log_ratio(40, math.inf)),
        ("kl3@0.05", Clip.kl3(0.05)),
        ("dcpo@0.16,0.2", Dcpo(0.16, 0.2)),
        (f'"{REVERSE_KL}"@0.01', Band(Divergence.from_expression(REVERSE_KL), 0.01)),
        (f"'{REVERSE_KL}' @ 0.01", Band(Divergence.from_expression(REVERSE_KL), 0.01)),
        ("dapo", Clip(0.2, 0.28)),
        ("dcpo", Dcpo(0.16, 0.2).cap(10)),
        ("preset:dppo-kl", Band("kl", 0.05)),
        ("kl@0.01|clip@0.2,0.28", Band("kl", 0.01) | Clip(0.2, 0.28)),
        ("kl@0.01 & clip@0.2", Band("kl", 0.01) & Clip(0.2)),
        ("kl@1|tv@1&ppo", Band("kl", 1) | (Band("tv", 1) & Clip(0.2))),
        ("(kl@1|tv@1)&ppo", (Band("kl", 1) | Band("tv", 1)) & Clip(0.2)),
        ("kl@1|tv@1|ppo", (Band("kl", 1) | Band("tv", 1)) | Clip(0.2)),
        ("(kl@0.05).cap(10)", Band("kl", 0.05).cap(10)),
        ("kl@0.05.cap(10)", Band("kl", 0.05).cap(10)),
        ("(kl@0.001).at_least(0.1)", Band("kl", 0.001).at_least(0.1)),
        ("kl@0.001.at_least(0.1, 0.2).cap(2)", Band("kl", 0.001).at_least(0.1, 0.2).cap(2)),
        ("sides(clip@0.2,kl@0.01)", sides(lower=Clip(0.2), upper=Band("kl", 0.01))),
        ("sides(clip@0.2,0.3, ppo).cap(3)", sides(lower=Clip(0.2, 0.3), upper=Clip(0.2)).cap(3)),
    ],
)
def test_each_form_makes_the_region_of_the_api(text: str, region: Region) -> None:
    assert region_from_spec(text) == region
    assert region_from_spec(f"\n ( {text} )\t") == region


WITHOUT_REGION = ("cppo", "topr")
"""Presets whose rule depends on more than a log-probability."""


@pytest.mark.parametrize("name", WITHOUT_REGION)
def test_a_preset_without_a_region_is_refused_with_the_way_to_it(name: str) -> None:
    with pytest.raises(InvalidValueError, match=rf"PolicyLoss.from_preset\('{name}'\) takes it"):
        region_or_source_from_spec(name)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in WITHOUT_REGION])
def test_every_other_preset_is_a_spec(name: str) -> None:
    found = region_or_source_from_spec(name)
    expected = preset(name).region
    if isinstance(expected, Region):
        assert found == region_from_spec(f"preset:{name}") == expected
    else:
        assert type(found) is type(expected)


def test_a_preset_whose_region_changes_is_a_new_source() -> None:
    first, second = (region_or_source_from_spec("preset:bapo") for _ in range(2))
    assert isinstance(first, Bapo)
    assert first is not second
    for text in ("bapo", "ppo|bapo", "(bapo).cap(2)"):
        with pytest.raises(InvalidValueError, match=r"column \d: the region of bapo changes with"):
            region_from_spec(text)


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("", 1, "empty; write a region, as in kl@0.05"),
        ("nobody", 1, r"'nobody' is neither a preset \(ppo, dapo, .* nor a region such as kl@0.05"),
        ("DAPO", 1, r"did you mean 'dapo'\?$"),
        ("preset:dapoo", 1, r"got 'dapoo'; did you mean 'dapo'\?$"),
        ("preset:", 7, ""),
        ("ppo | kll@0.05", 7, r"did you mean 'kl'\?"),
        ("chi2@0.05", 1, r"did you mean 'pearson-chi2'\?"),
        ("KL@0.05", 1, r"did you mean 'kl'\?"),
        ("alpha@0.05", 1, "alpha:a takes any finite number"),
        ("kl:2@0.05", 1, "takes no parameter"),
        ("kl", 1, "a divergence needs a radius, as in kl@0.05"),
        ("alpha:2", 1, "a divergence needs a radius, as in alpha:2@0.05"),
        ("clip", 1, "clip is written clip@0.2 or clip@0.2,0.28"),
        ("clip@0.2/0.3", 1, "widths are separated by a comma: clip@0.2"),
        ("clip@1.5", 1, r"eps_low must be in \[0, 1\], got 1.5"),
        ("dcpo@0.16", 1, "dcpo is written dcpo@0.16,0.2"),
        ("kl3@0.1,0.2", 1, "kl3 is written kl3@0.05"),
        ("kl@0.01,0.1", 1, "radii below and above 1 are written kl@0.01/0.1"),
        ("ppo|kl@0", 5, "delta must be finite and above 0, got 0.0"),
        ("ppo|kl@-1", 5, "delta must be finite and above 0, got -1.0"),
        ("kl@1e999", 1, "delta must be finite and above 0, got inf"),
        ("kl@nan", 1, "delta must be finite and above 0, got nan"),
        ("'u*ln(v)'@1", 1, 'expression "u.*", column 6: "v" is not known'),
        ("'u-1'@1", 1, "f is linear"),
        ("'u-1'", 1, "an expression needs a radius"),
        ("'dapo'", 1, "an expression needs a radius"),
        ("'dapo'@1", 1, 'expression "dapo", column 1: "dapo" is not known'),
        ("ppo|dapo@0.1", 5, "the preset dapo takes no numbers"),
        ("preset:dcpo@0.1,0.2", 1, "the preset dcpo takes no numbers"),
        ("'u-1", 1, "this ' is not closed"),
        ("ppo.cap()", 9, "a region or number is missing before"),
        ("ppo.cap(0.5)", 4, "upper must be at least 1, got 0.5"),
        ("ppo.cap(1, 2)", 4, r"cap is written cap\(10\)"),
        ("ppo.floor(1)", 4, "'floor' is not known, only cap and at_least"),
        ("kl@0.05 cap 10", 9, r"a point is missing, as in \(kl@0.05\).cap\(10\)"),
        ("ppo ppo", 5, r"\| .* or & .* is missing before 'p'"),
        ("é", 1, "a region is missing before 'é'"),
        ("ppo|" * 70 + "ppo", 257, "more than 64 regions"),
        ("(" * 40, 33, "more than 32 parentheses"),
        (" " * 5000, 4097, "longer than 4096 bytes"),
    ],
)
def test_errors_name_the_column_and_the_reason(text: str, column: int, reason: str) -> None:
    with pytest.raises(InvalidValueError, match=f"column {column}: .*{reason}"):
        region_from_spec(text)


def test_errors_in_several_lines_name_the_line() -> None:
    with pytest.raises(InvalidValueError, match="line 2, column 3: eps_low must be in"):
        region_from_spec("kl@0.05\n| clip@2")


@pytest.mark.parametrize("text", [None, 0.2, b"ppo", Clip(0.2)])
def test_a_spec_is_a_str(text: object) -> None:
    with pytest.raises(InvalidTypeError, match="a region's spec must be a str, got "):
        region_from_spec(text)  # type: ignore[arg-type]


radii = st.floats(1e-12, 1e3)
widths = st.floats(0, 1)
names = st.sampled_from(["kl", "tv", "alpha:0.5", "renyi:2", "hockey-stick:1.2", "bwcs:0.25"])
leaves = st.one_of(
    st.builds(Band, names, st.one_of(radii, st.tuples(radii, radii))),
    st.builds(Clip, widths, st.floats(0, allow_nan=False)),
    st.builds(Clip.from_log_ratio, st.floats(0, 1e3), st.floats(0, allow_nan=False)),
    st.builds(Clip.kl3, radii),
    st.builds(Dcpo, radii, radii),
)
regions = st.recursive(
    leaves,
    lambda parts: st.one_of(
        st.builds(lambda a, b: a | b, parts, parts),
        st.builds(lambda a, b: a & b, parts, parts),
        st.builds(lambda a, b: sides(lower=a, upper=b), parts, parts),
        st.builds(lambda a, upper: a.cap(upper), parts, st.floats(1, allow_nan=False)),
        st.builds(lambda a, width: a.at_least(width), parts, widths),
    ),
    max_leaves=8,
)


@pytest.mark.filterwarnings("ignore::bandpo.error.ClipWarning")  # of the arguments alone
@settings(max_examples=200, deadline=None)
@given(regions)
def test_a_region_is_its_spec_read_back(region: Region) -> None:
    assert region_from_spec(spec_from_region(region)) == region


@pytest.mark.parametrize(
    ("region", "text"),
    [
        (Band("kl", 0.05), "kl@0.05"),
        (Band(Divergence.from_expression("(u-1)^2"), (0.1, 2)), '"(u-1)^2"@0.1/2'),
        (Clip.from_log_ratio(0.4), "log-clip@0.4"),
        (Clip(0.2), "clip@0.2"),
        (Dcpo(0.2, 0.2), "dcpo@0.2,0.2"),
        (Band("kl", 0.05).cap(10), "(kl@0.05).cap(10)"),
        (Band("tv", 0.05) | (Clip(0.2) | Clip(0.3)), "tv@0.05|(clip@0.2|clip@0.3)"),
        ((Band("tv", 0.05) | Clip(0.2)) & Clip(0.3), "(tv@0.05|clip@0.2)&clip@0.3"),
    ],
)
def test_specs_are_short(region: Region, text: str) -> None:
    assert spec_from_region(region) == text
    assert region_from_spec(text) == region


def test_regions_without_a_spec_are_refused() -> None:
    def square(u: np.ndarray) -> np.ndarray:
        return np.asarray((u - 1) ** 2)

    for region in (
        Band("kl", np.array([0.1, 0.2])),
        Band(Divergence.from_callable(square), 0.1),
        Band(Divergence.from_expression("(u-1)^2", at_zero=1.0), 0.1),
        Band("kl", 0.05).table(),
    ):
        with pytest.raises(InvalidValueError, match="has no spec"):
            spec_from_region(region)
    with pytest.raises(InvalidTypeError, match="region must be a Region, got str"):
        spec_from_region("ppo")  # type: ignore[arg-type]


PIECES = (
    "kl@0.05|clip@|0.2|,|/|&|(|)|sides(|.cap(|.at_least(|ppo|bapo|preset:|'u-1'|'u'@|tv@1|@|inf|nan"
)
pieces = st.lists(st.sampled_from([*PIECES.split("|"), "|", "-", " ", "1e9", "é"]), max_size=12)


@settings(max_examples=500, deadline=None)
@given(st.one_of(pieces.map("".join), st.text(max_size=80)))
def test_any_text_is_a_region_or_a_typed_error(text: str) -> None:
    try:
        region = region_from_spec(text)
    except InvalidValueError as error:
        message = str(error)
        region = Clip(0.2)
    else:
        message = "column"
    assert "column" in message
    lower, upper = region.bounds([-1.0])
    assert lower[0] <= 1 <= upper[0]


@pytest.mark.parametrize(
    "text",
    [
        "ppo|" * 63 + "ppo",
        "(" * 32 + "ppo" + ")" * 32,
        "sides(" * 32,
        "(((sides(" * 8 + "x" + ")" * 30,
        "'" + "(" * 4000 + "'@1",
        "'u*ln(u) - u + 1'@1|" * 60 + "ppo",
    ],
)
def test_reading_takes_bounded_time(text: str) -> None:
    start = time.perf_counter()
    with suppress(InvalidValueError):
        region_from_spec(text)
    assert time.perf_counter() - start < 5.0


ENTROPY = "entropy(0.05, target=0.3, rate=0.1, min_value=0.01, max_value=0.2)"


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("linear(0.1, 0.02, 1000)", Linear(0.1, 0.02, 1000, hold=True)),
        ("linear(1,2,3)", Linear(1, 2, 3, hold=True)),
        (" cosine ( .1 ,\n2.e-2, +5 ) ", Cosine(0.1, 0.02, 5, hold=True)),
        ("cosine(steps=5, end=0.02, start=0.1)", Cosine(0.1, 0.02, 5, hold=True)),
        ("linear(0.1, steps=5, end=1E-2)", Linear(0.1, 0.01, 5, hold=True)),
        ("constant(0.05)", Constant(0.05)),
        (ENTROPY, EntropyTargeted(0.05, target=0.3, rate=0.1, min_value=0.01, max_value=0.2)),
        (
            "entropy(0.05, 0.3, 0.1, 0.01, 0.2)",
            EntropyTargeted(0.05, target=0.3, rate=0.1, min_value=0.01, max_value=0.2),
        ),
    ],
)
def test_each_form_makes_the_schedule_of_the_api(text: str, schedule: Schedule) -> None:
    found = schedule_from_spec(text)
    assert (type(found), vars(found)) == (type(schedule), vars(schedule))


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("", 1, "'' is no schedule"),
        (" liner(0.1)", 2, "'liner' is no schedule (linear, cosine, constant, entropy); did you"),
        ("linear", 1, "linear is written linear(0.1, 0.02, 1000)"),
        ("linear(0.1, 0.02, 10", 1, "linear is written"),
        ("linear(0.1, 0.02, 10))", 19, "'10)' is not a number"),
        ("linear(0.1, x, 10)", 13, "'x' is not a number"),
        ("linear(0.1, 0.02, )", 19, "'' is not a number"),
        ("linear(0.1, 0.02, 10, 4)", 23, "too many numbers"),
        ("linear(0.1, 0.02)", 17, "steps is missing"),
        ("linear(0.1)", 11, "end, steps is missing"),
        ("linear()", 8, "'' is not a number"),
        ("linear(0.1, 0.02, stops=10)", 19, "'stops' is not known"),
        ("linear(0.1, start=0.1, steps=3)", 13, "'start' is given twice"),
        ("linear(end=0.1, 0.2, 3)", 17, "a name is missing"),
        ("linear(0.1, 0.02, 10.5)", 1, "steps must be an int, got float"),
        ("linear(0.1, -1, 10)", 1, "end must be finite and above 0"),
        ("linear(0.1, nan, 10)", 13, "'nan' is not a number"),
        ("constant(1e999)", 1, "value must be finite"),
        ("__import__('os')", 1, "is no schedule"),
    ],
)
def test_errors_of_a_schedule_name_the_column_and_the_reason(
    text: str, column: int, reason: str
) -> None:
    with pytest.raises(InvalidValueError) as raised:
        schedule_from_spec(text)
    assert str(raised.value).startswith(f"schedule {text!r}, column {column}: "), raised.value
    assert reason in str(raised.value)


@settings(max_examples=300)
@given(st.text() | st.from_regex(r"(linear|cosine|entropy)\([0-9a-z.,= ]{0,20}\)?"))
def test_any_text_is_a_schedule_or_a_typed_error(text: str) -> None:
    with suppress(InvalidValueError):
        schedule_from_spec(text)


def test_a_spec_of_a_schedule_is_a_str() -> None:
    with pytest.raises(InvalidTypeError, match="must be a str, got float"):
        schedule_from_spec(0.1)  # type: ignore[arg-type]


def test_the_docstring_runs() -> None:
    failed, tried = doctest.testmod(spec)
    assert (failed, tried > 0) == (0, True)
    assert bandpo.region_from_spec is region_from_spec
