"""A small part of each long check of `reliability`, which `make reliability` runs in full."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bandpo import Band
from reliability import fuzz, result
from reliability.expressions import TEXTS

ROOT = Path(__file__).parents[2]

CASES = 400
"""Cases of a target of share 1."""


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_random_input_gives_a_result_or_an_error_of_bandpo(name: str) -> None:
    if name == "tensors":
        pytest.importorskip("torch")
    target, share = fuzz.TARGETS[name]
    assert target.__doc__
    fuzz.run(name, max(20, int(CASES * min(share, 1.0))))


def test_accepted_formulas_are_not_proven_to_be_no_generators() -> None:
    pytest.importorskip("flint")
    from reliability import convexity

    found = convexity.run(60)
    assert found.accepted > 10
    assert not found.missed
    assert found.disproved > 10
    # Every f that is refused as not convex is not.
    assert not [text for text, message in found.unexplained if "slope falls" in message]


def test_a_formula_that_is_not_convex_has_a_counterexample() -> None:
    flint = pytest.importorskip("flint")
    from reliability import convexity

    flint.ctx.prec = convexity.BITS
    arb = flint.arb
    dent = convexity.Formula("", lambda u: (u - 1) ** 2 - abs(u - 2) * arb(2) ** -40)
    points = [arb(u) for u in (1.5, 2.0 - 2e-14, 2.0, 2.0 + 2e-14, 3.0)]
    assert convexity.counterexample(dent, points)
    whole = convexity.Formula("", lambda u: (u - 1) ** 2 + abs(u - 2))
    assert convexity.counterexample(whole, points) is None


def test_bounds_are_inside_and_next_to_the_edge_of_ball_arithmetic() -> None:
    pytest.importorskip("flint")
    from reliability.bounds import bounds
    from reliability.intervals import excess

    list(bounds(300))
    # A bound that was moved outwards is found to be outside.
    _, upper = Band("kl", 0.05).log_bounds(-1.0)
    assert excess("kl", -1.0, float(upper), 0.05) == -1
    assert excess("kl", -1.0, float(upper) * (1.0 + 1e-14), 0.05) == 1


@pytest.mark.parametrize(
    ("spec", "logp", "delta"),
    [
        ("vajda:2.0", -1.0174543191070628e-265, 1.0174543191070628e-265),  # D - delta is delta^2
        ("hockey-stick:1.0", -84.98745253680839, 1.2314543927258161e-37),
        ("hellinger", -357.21742992066953, 3.6425988833951764e-156),
        ("renyi:4.590765259718671", -9.01424254084954e-193, 78.60574322720862),
        ("renyi:3.5742071687211734", -1.0795820771388496e-117, 269.3258818796698),
        ("jensen-shannon", -3.16e-322, 2e-323),
        ("kl", -0.5, 5e-324),
        ("alpha:0.5", -2.78, 1e-150),
        ("renyi:0.5", -0.003411789897797546, 1.5675307845615559e-46),
        ("vajda:1000", -2.340345295380759, 0.08938714708756962),
        ("bhattacharyya", -25e-324, 1e-323),
    ],
)
def test_bounds_of_extreme_radii_are_inside_and_next_to_the_edge(
    spec: str, logp: float, delta: float
) -> None:
    pytest.importorskip("flint")
    from reliability.bounds import is_far, is_inside

    band = Band(spec, delta)
    lower, upper = band.log_bounds(logp)
    for side, bound in (("lower", float(lower)), ("upper", float(upper))):
        assert is_inside((spec, logp, delta), side, bound)
        assert not is_far((spec, logp, delta), side, bound)
        assert band.contains(logp, bound)


@pytest.mark.parametrize(
    ("spec", "logp", "delta"),
    [
        ("bhattacharyya", -2.65249474e-315, 66.48559113529443),
        ("alpha:2.0860509730213526", -1.0799840112144413e-183, 2.2691333470533086e198),
    ],
)
def test_bounds_of_large_radii_next_to_saturation_are_inside(
    spec: str, logp: float, delta: float
) -> None:
    pytest.importorskip("flint")
    from reliability.bounds import is_inside

    lower, _ = Band(spec, delta).log_bounds(logp)
    assert is_inside((spec, logp, delta), "lower", float(lower))
    assert float(lower) < -30.0


def test_bounds_of_random_formulas_are_inside() -> None:
    pytest.importorskip("flint")
    from flint import arb

    from bandpo import Divergence
    from reliability.convexity import Formula
    from reliability.texts import _is_inside, texts

    [row] = texts(12)
    assert row.cases > 500
    assert row.found["undecided"] == 0
    law = Formula("(u-1)^2 + abs(u-1)", lambda u: (u - 1) ** 2 + abs(u - arb(1)))
    _, upper = Band(Divergence.from_expression(law.text), 0.05).log_bounds(-1.0)
    assert _is_inside(law, -1.0, float(upper), 0.05)
    assert _is_inside(law, -1.0, float(upper) * (1.0 + 1e-14), 0.05) is False
    # The rounding errors of a large factor are large.
    law = Formula("1e20*(u*ln(u)-u+1)", lambda u: arb(10) ** 20 * (u * u.log() - u + 1))
    for bound in Band(Divergence.from_expression(law.text), 0.05).log_bounds(-20.0):
        assert _is_inside(law, -20.0, float(bound), 0.05)
        assert _is_inside(law, -20.0, float(bound) * (1.0 + 1e-7), 0.05) is False


def test_losses_of_the_backends_agree_on_random_batches() -> None:
    pytest.importorskip("torch")
    from reliability import losses

    list(losses.losses(60))


def test_levels_of_instructions_give_the_same_bits() -> None:
    from reliability import levels

    list(levels.levels(500))


def test_memory_stays_and_nothing_compiles_again() -> None:
    pytest.importorskip("torch")
    from reliability import long_run

    long_run.losses(100)
    long_run.bands(40)
    long_run.steps(40)
    long_run.compiled(20)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of Unix")
def test_a_killed_command_leaves_a_whole_file() -> None:
    from reliability import faults

    faults.killed("table build", 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of Unix")
def test_a_resumed_verification_and_a_shared_table_are_whole() -> None:
    from reliability import faults

    faults.resumed(3, 300_000)
    faults.shared(40)


def test_texts_that_take_too_long_are_refused_by_their_work() -> None:
    """Time is measured by the long run; the work, which is counted, is the same everywhere."""
    from bandpo import Divergence
    from bandpo.error import InvalidValueError

    for name in ("squares", "kinks of oscillations", "powers"):
        with pytest.raises(InvalidValueError, match="too long to judge"):
            Divergence.from_expression(TEXTS[name])
    assert Divergence.from_expression("(u-1)^2" + "+max(u-1.5,0)" * 5).curvature


def _shard(folder: Path, number: int, found: dict[str, float], command: str = "x") -> None:
    row = result.Row("a check", 10, found, [f"case of {number}"])
    content = {"command": command, "shards": 2, "failed": [], "rows": [row._asdict()]}
    (folder / f"part.{number}-2.json").write_text(json.dumps(content), encoding="utf-8")


def test_shards_are_merged_by_their_sums_and_maxima(tmp_path: Path) -> None:
    _shard(tmp_path, 1, {"accepted": 3, "MiB": 0.5})
    with pytest.raises(SystemExit, match="2-2 are missing"):
        result.merge(tmp_path, tmp_path / "results")
    _shard(tmp_path, 2, {"accepted": 4, "MiB": 2.5, "of one shard alone": 1})
    result.merge(tmp_path, tmp_path / "results")
    content = json.loads((tmp_path / "results" / "part.json").read_text(encoding="utf-8"))
    (row,) = result.rows_of(content)
    assert (row.cases, content["shards"]) == (20, 2)
    assert row.words() == (
        "7 accepted, at most 2.5 MiB, 1 of one shard alone, `case of 1`, `case of 2`"
    )
    _shard(tmp_path, 2, {"accepted": 4}, command="y")
    with pytest.raises(SystemExit, match="several commands"):
        result.merge(tmp_path, tmp_path / "results")


def test_a_shard_has_its_share_of_the_cases_and_keeps_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(cases: int, seed: int) -> Iterator[result.Row]:
        yield result.Row("a check", cases, {"of the seed": seed})
        if seed == 12:
            raise AssertionError("case 5")

    def started(shard: str) -> None:
        words = ["--cases", "10", "--seed", "10", "--shard", shard, "--into", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["part", *words])
        result.run_cases("part", "A part.", run, cases=1, seed=1, of="cases")

    cases = []
    for shard in ("1/3", "2/3", "3/3"):
        with pytest.raises(SystemExit) as ended:
            started(shard)
        path = tmp_path / f"part.{shard.replace('/', '-')}.json"
        cases.append(json.loads(path.read_text(encoding="utf-8"))["rows"][0]["cases"])
        assert ended.value.code == ("seed 12: case 5" if shard == "3/3" else None)
    assert sum(cases) == 10
    with pytest.raises(SystemExit, match="1 cases failed\nseed 12: case 5"):
        result.merge(tmp_path, tmp_path / "results")


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs a checkout")
def test_the_page_has_the_counts_of_the_last_long_run() -> None:
    from make_reliability import page

    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert page() == text
    assert re.findall(r"^\| .+ \| [\d,]+ \| .+ \|$", text, re.MULTILINE)


def test_suites_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reliability import suites

    for files in suites.SUITES.values():
        assert all((ROOT / "tests" / name).is_file() for name in files if name.endswith(".py"))
    file = tmp_path / "test_three.py"
    file.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False\n"
        "@pytest.mark.skip\ndef test_c(): pass\n",
        encoding="utf-8",
    )
    monkeypatch.setitem(suites.SUITES, "three", (str(file),))
    assert suites.count("three") == result.Row("three", 3, {"failed": 1, "skipped": 1})


def test_changes_of_python_are_of_one_line_and_of_no_annotation() -> None:
    pytest.importorskip("cosmic_ray")
    from reliability import mutation

    changes = mutation.changes("schedule")
    assert len(changes) > 100
    for change in changes[::60]:
        before = (ROOT / change.file).read_text(encoding="utf-8").splitlines()
        after = change.source.splitlines()
        assert change.text == before[change.line - 1].strip()
        different = [number for number, lines in enumerate(zip(before, after, strict=True), 1)
                     if lines[0] != lines[1]]  # fmt: skip
        assert different == [change.line]
        compile(change.source, change.file, "exec")
    # The `*` before keywords and the `|` of an annotation are no operators.
    some = [one for one in changes if one.operator.endswith(("Mul_Div", "BitOr_BitAnd"))]
    assert some
    assert not [one for one in some if re.search(r", \*,|: .* \| ", one.text)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of Unix")
def test_a_change_is_killed_by_its_test_alone(tmp_path: Path) -> None:
    pytest.importorskip("cosmic_ray")
    pytest.importorskip("torch")
    from reliability import mutation

    copy = mutation.Copy(str(tmp_path))
    path = "tests/schedule/test_schedule.py"
    formula = f"{path}::test_constant_linear_and_cosine_equal_their_formulas"
    (change, *_) = (
        one for one in mutation.changes("schedule")
        if one.text.startswith("return (1.0 - share)") and one.operator.endswith("Add_Sub")
    )  # fmt: skip
    assert copy.kills([formula], change)
    assert not copy.kills([f"{path}::test_bapo_updates_by_either_name"], change)


def test_changes_without_an_effect_are_still_in_their_files() -> None:
    from reliability import survivors

    for one in survivors.survivors():
        lines = (ROOT / one.file).read_text(encoding="utf-8").splitlines()
        assert one.before in [line.strip() for line in lines], one
        assert one.reason
        assert survivors.reason(*one[:3]) == one.reason


def test_lines_and_branches_are_added_up_by_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reliability import coverage

    def summary(*numbers: int) -> dict[str, dict[str, int]]:
        names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
        return {"summary": dict(zip(names, numbers, strict=True))}

    files = {
        "python/bandpo/loss/a.py": summary(10, 9, 0, 0),
        "python/bandpo/loss/b/c.py": summary(30, 30, 8, 6),
        "python/bandpo/check.py": summary(4, 4, 0, 0),
    }
    (tmp_path / "python.json").write_text(json.dumps({"files": files}), encoding="utf-8")
    monkeypatch.setattr(coverage, "PLACE", tmp_path)
    monkeypatch.setattr(coverage, "_run", lambda *words, **environment: "")
    assert [(row.check, row.words()) for row in coverage.python()] == [
        ("python/bandpo", "4 of 4 lines run (100.0 %), 0 of 0 branches run (none)"),
        ("python/bandpo/loss", "39 of 40 lines run (97.5 %), 6 of 8 branches run (75.0 %)"),
    ]


def test_tests_have_the_names_of_coverage_and_of_pytest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reliability import coverage

    cases = (
        '<testcase classname="tests.loss.test_loss.TestMask" name="test_a[x.y]" time="0.5"/>'
        '<testcase classname="tests.loss.test_loss.TestMask" name="test_a[z]" time="0.25"/>'
        '<testcase classname="tests.test_check" name="test_b" time="1.0"/>'
    )
    (tmp_path / "loss.xml").write_text(f"<testsuite>{cases}</testsuite>", encoding="utf-8")
    monkeypatch.setattr(coverage, "PLACE", tmp_path)
    assert coverage.tests() == {
        "test_loss.TestMask.test_a": (0.75, "tests/loss/test_loss.py::TestMask::test_a"),
        "test_check.test_b": (1.0, "tests/test_check.py::test_b"),
    }
