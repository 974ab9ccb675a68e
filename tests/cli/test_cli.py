"""The command line from outside: output, JSON, exit codes, one-line errors."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bandpo
from bandpo import Band, Divergence, region_from_spec
from bandpo.cli import main
from bandpo.cli.parser import parse
from bandpo.presets import PRESETS


def run(
    *arguments: str, stdin: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bandpo", *arguments],
        capture_output=True,
        text=True,
        check=False,
        input=stdin,
        env={**os.environ, **environment},
    )


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON that a command prints."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_bounds_prints_a_row_for_each_probability(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bounds", "0.01", "0.5"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["p", "lower", "upper", "log_lower", "log_upper"]
    assert [float(value) for value in first.split()][:3] == [0.01, 0.00249738572, 7.80984629]
    assert float(second.split()[2]) == pytest.approx(1.308484, rel=4e-7)


def test_bounds_as_json_reads_back_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bounds", "--logp", "-1", "-inf", "-1e-5", "--delta", "0.01"]
    command += ["--delta-high", "0.2", "--json"]
    assert main(command) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["delta_low"], content["delta_high"]) == (0.01, 0.2)
    log_lower, log_upper = bandpo.Band("kl", (0.01, 0.2)).log_bounds(-1.0)
    assert content["bounds"][0]["log_lower"] == float(log_lower)
    assert content["bounds"][0]["log_upper"] == float(log_upper)
    assert content["bounds"][1]["log_upper"] == "inf"


@pytest.mark.parametrize(
    "spec", ["kl@0.05", "dapo", "kl@0.01/0.1|clip@0.2", "(tv@0.1).cap(10)", "'-ln(u)'@0.1", "bapo"]
)
def test_bounds_takes_any_region_before_or_after_the_numbers(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [printed(capsys, "bounds", *words) for words in (["0.5", spec], [spec, "0.5"])]
    assert found[0] == found[1]
    region = region_from_spec("clip@0.4,0.2" if spec == "bapo" else spec)
    lower, upper = region.bounds(math.log(0.5))
    [row] = found[0]["bounds"]
    assert (row["lower"], row["upper"]) == (lower, pytest.approx(float(upper), rel=1e-15))
    assert found[0]["region"] == bandpo.region_from_spec(found[0]["spec"]).describe()


@pytest.mark.parametrize(
    ("arguments", "region"),
    [
        (["--preset", "dppo-tv"], Band("tv", 0.15)),
        (["--divergence", "tv"], Band("tv", 0.05)),
        (["--delta", "0.2", "--delta-high", "0.3"], Band("kl", (0.2, 0.3))),
        (["--expression", "-ln(u)"], Band(Divergence.from_expression("-ln(u)"), 0.05)),
        (["--expression=-ln(u)"], Band(Divergence.from_expression("-ln(u)"), 0.05)),
        (["--expression", "1/u - u"], Band(Divergence.from_expression("1/u - u"), 0.05)),
        (["--expression", "-u+1/u"], Band(Divergence.from_expression("-u+1/u"), 0.05)),
    ],
)
def test_a_region_can_be_given_by_options(
    arguments: list[str], region: Band, capsys: pytest.CaptureFixture[str]
) -> None:
    content = printed(capsys, "bounds", "0.5", *arguments)
    assert region_from_spec(content["spec"]) == region
    assert content["divergence"] == region.divergence.spec
    assert (content["delta_low"], content["delta_high"]) == (region.delta_low, region.delta_high)


def test_numbers_may_follow_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    logp = [-1.0, -2.3, -3.0]
    for arguments in (
        ["bounds", "kl@0.05", "--logp", "-1", "-2.3", "-3"],
        ["bounds", "-1", "--logp=-2.3", "-3", "kl@0.05"],
    ):
        assert [row["logp"] for row in printed(capsys, *arguments)["bounds"]] == logp


def test_a_dash_reads_numbers_from_standard_input() -> None:
    outcome = run("bounds", "0.5", "-", "kl@0.05", "--json", stdin="0.1 0.2\n\n0.3,1\n")
    assert [row["p"] for row in json.loads(outcome.stdout)["bounds"]] == [0.5, 0.1, 0.2, 0.3, 1.0]
    outcome = run("bounds", "-", stdin="0.1\nx\n")
    assert outcome.returncode == 2
    assert outcome.stderr == (
        "bandpo: error: standard input must hold numbers, got 'x' in line 2\n"
    )
    assert "give at least one probability" in run("bounds", "-", stdin="").stderr


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_no_number_is_cut_however_narrow_the_terminal(columns: int) -> None:
    arguments = ("bounds", "0.001", "0.5", "kl@0.05")
    narrow = run(*arguments, COLUMNS=str(columns), TERM="dumb", NO_COLOR="1")
    piped = run(*arguments, COLUMNS="")
    header, *rows = (line.split() for line in piped.stdout.splitlines())
    lines = [line.split() for line in narrow.stdout.splitlines()]
    if columns < 80:
        blocks = [list(zip(header, row, strict=True)) for row in rows]
        assert lines == [list(pair) for pair in blocks[0]] + [[]] + [
            list(pair) for pair in blocks[1]
        ]
    else:
        assert lines == [header, *rows]


def test_presets_are_listed_with_their_sources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    rules = printed(capsys, "presets")
    assert [rule["name"] for rule in rules] == list(PRESETS)
    for rule in rules:
        preset = PRESETS[rule["name"]]
        assert rule["source"] == preset.source
        assert rule["name"] in text
        if rule["region"] is not None:
            assert region_from_spec(rule["region"]) == preset.region
            assert rule["region"] in text
    by_name = {rule["name"]: rule for rule in rules}
    assert by_name["bapo"]["region"] is None
    assert by_name["bandpo-kl"]["surrogate"] == {"name": "min-clip", "dual_clip": 10.0}
    assert by_name["gspo"]["ratio_level"] == "sequence"
    lines = {line.split()[0]: line for line in text.splitlines()}
    for name, allowed in (("icepop", "clip@0.5,4"), ("tis", "clip@1"), ("opsm", "k1 0.0001")):
        assert f"min-clip, corrected: {allowed} " in lines[name]
    assert text.count("(") == text.count(")")  # no source is cut within them
    stacked = run("presets", COLUMNS="40").stdout
    assert max(map(len, stacked.splitlines())) <= 40
    assert "region     (pearson-chi2@0.05).cap(10)\n" in stacked


def test_a_table_is_built_inspected_and_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "tv.safetensors")
    assert main(["table", "build", "--divergence", "tv", "--delta", "0.1", "-o", path]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["path", path]
    assert main(["table", "inspect", path, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["region"] == {"band": {"divergence": "tv", "delta": [0.1, 0.1]}}
    assert content["spec"] == "tv@0.1"
    assert content["format_version"] == 2
    assert content["path"] == path
    assert main(["table", "verify", path, "--samples", "20000", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["passed"] is True
    assert 0.0 <= content["max_error_log_upper"] <= content["target"]
    assert 0.0 <= content["max_error_lower"] <= content["target"]
    assert bandpo.BandTable.load(path).region == bandpo.Band("tv", 0.1)


def test_plot_draws_presets_and_bands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.svg"
    assert main(["plot", "ppo", "dcpo", "kl@0.01", "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"ppo, dcpo, kl@0.01: {path}\n"
    assert "<svg" in path.read_text()


@pytest.mark.parametrize(
    ("options", "panels"),
    [
        ((), 2),
        (("--axes", "ratio"), 1),
        (("--axes", "linear", "--axes", "logit", "--dark"), 2),
        (("kl@0.1", "kl@0.2"), 4),
        (("--p-range", "1e-6", "0.5"), 2),
    ],
)
def test_plot_draws_the_panels_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], panels: int
) -> None:
    pytest.importorskip("matplotlib")
    from bandpo import plot

    figures: list[Any] = []
    monkeypatch.setattr(plot, "save", lambda figure, _: figures.append(figure))
    assert main(["plot", "preset:dapo", "bandpo-kl", *options, "-o", str(tmp_path / "p.svg")]) == 0
    (figure,) = figures
    assert len(figure.axes) == panels
    assert ("--dark" in options) == (figure.get_facecolor()[0] < 0.5)
    if "--p-range" in options:
        assert figure.axes[0].get_xlim() == (1e-6, 0.5)


def test_plot_prints_the_numbers_it_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "cispo", "kl@0.05", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content) == ["cispo", "kl@0.05"]
    p = content["kl@0.05"]["p"]
    lower, upper = bandpo.Band("kl", 0.05).bounds([math.log(each) for each in p])
    assert content["kl@0.05"]["upper"] == pytest.approx(upper.tolist(), rel=1e-13, abs=0)
    assert content["kl@0.05"]["fall"] == pytest.approx((p * (1 - lower)).tolist(), rel=1e-13, abs=0)
    assert content["cispo"]["lower"] == [0.0] * len(p)
    assert list(tmp_path.iterdir()) == [], "no picture was asked for"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bounds", "1.5"], "p must be in [0, 1], got 1.5"),
        (["bounds", "nan"], "p must be in [0, 1], got nan"),
        (["bounds", "0.5", "--delta", "0"], "delta must be finite and above 0, got 0.0"),
        (["bounds", "0.5", "--delta-high", "-1"], "delta must be finite and above 0, got -1.0"),
        (["bounds", "--delta", "nan", "0.5"], "delta must be finite and above 0, got nan"),
        (["bounds", "0.5", "--divergence", "kll"], 'divergence "kll" is not known; known are: kl'),
        (["bounds", "0.5", "--expression", "u*ln(v)"], 'column 6: "v" is not known'),
        (["bounds", "0.5", "--expression", "u-1", "--divergence", "kl"], "not both"),
        (["plot", "ppo", "nobody"], "'nobody' is neither a preset (ppo, dapo, "),
        (["bounds", "0.5", "--divergence", "chi2"], "did you mean 'pearson-chi2'?"),
        (["bounds", "0.5", "--divergence", ""], 'divergence "" is not known'),
        (["bounds", "0.5", "--expression", ""], "column 1: empty"),
        (["bounds", "0.5", "--preset", ""], "preset must be one of ppo, "),
        (["bounds", "0.5", "--preset", "dapoo"], "did you mean 'dapo'?"),
        (["bounds", "0.5", ""], "column 1: empty; write a region"),
        (["bounds", "0.5", "a-half"], "'a-half' is neither a preset (ppo, "),
        (["bounds", "0.5", "kl@0.05", "dapo"], "give one region, got 'kl@0.05' and 'dapo'"),
        (["bounds", "kl@0.05"], "give at least one probability"),
        (["bounds", "0.5", "kl@0.05", "--delta", "1"], "give a region or --delta, not both"),
        (
            ["bounds", "0.5", "--preset", "ppo", "--delta-high", "1"],
            "give --preset or --delta-high, not both",
        ),
        (["table", "build", "bapo", "-o", "t"], "the region of bapo changes with the batch"),
        (["plot", "DAPO"], "did you mean 'dapo'?"),
        (["plot", ""], "column 1: empty; write a region"),
        (["plot", "kll@0.05"], 'divergence "kll" is not known'),
        (["plot", "--p-range", "0", "1"], "p must be above 0 on logit axes, got 0"),
        (["plot", "kl@0.1", "--p-range", "0.5", "0.1"], "p must be in 0 <= first < last <= 1"),
        (["plot", "kl@0.1", "--p-range", "0", "1", "--json"], "p must be in 0 < first < last"),
        (["plot", "kl@-1"], "delta must be finite and above 0, got -1.0"),
        (["plot", "ppo", "-o", "p.txt"], "cannot write p.txt: use one of .png, .svg, .pdf"),
        (
            ["table", "inspect", "no-such-file"],
            "cannot read no-such-file: No such file or directory\n",
        ),
        (
            ["table", "build", "-o", "no-such-folder/t"],
            "cannot write no-such-folder/t: No such file or directory\n",
        ),
        (
            ["plot", "ppo", "-o", "no-such-folder/p.png"],
            "cannot write no-such-folder/p.png: No such file or directory\n",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    outcome = run(*arguments)
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("bandpo: error: ")
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_an_altered_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    bandpo.Band("kl", 0.05).table().save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    outcome = run("table", "verify", str(path))
    assert outcome.returncode == 2
    assert "altered" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["bounds"], "the following arguments are required: P|REGION"),
        (["bounds", "0.5", "--delta", "x"], "argument --delta: 'x' is not a number"),
        (["bounds", "0.5", "--nothing"], "unrecognized arguments: --nothing"),
        (["doctor", "0.5"], "unrecognized arguments: 0.5"),
        (["plots"], "'plots' is none of help, bounds, .*; did you mean 'plot'\\?"),
        (["table", "biuld"], "'biuld' is none of build, .*; did you mean 'build'\\?"),
        (["help", "bound"], "'bound' is none of .*; did you mean 'bounds'\\?"),
        (["plot", "-o", ""], "argument -o/--output: a path must not be empty"),
        (["table", "build", "-o", ""], "argument -o/--output: a path must not be empty"),
        (["table", "inspect", ""], "argument path: a path must not be empty"),
        (["demo", "-o", ""], "argument -o/--output: a path must not be empty"),
    ],
)
def test_usage_errors_exit_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_version_is_printed() -> None:
    for option in ("-V", "--version"):
        assert run(option).stdout == f"bandpo {bandpo.__version__}\n"


COMMANDS = [
    *[("bounds",), ("plot",), ("presets",), ("demo",), ("doctor",)],
    *[("table", action) for action in ("build", "inspect", "verify")],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("columns", ["40", "100"])
def test_the_help_of_a_command_has_examples_that_are_read(
    command: tuple[str, ...],
    columns: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    texts = []
    for arguments in (["help", *command], [*command, "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    _, _, text = texts[0].partition("\n\n")  # argparse lets the first lines run on
    before, _, after = text.partition("examples:\n")
    assert max(map(len, before.splitlines())) <= int(columns)
    examples = [line.partition(" | ")[2] or line for line in after.splitlines()]
    assert len(examples) == 2
    for example in examples:
        program, *words = shlex.split(example)
        assert program == "bandpo"
        assert words[: len(command)] == list(command)
        parse(words)


def test_help_lists_the_regions_and_divergences(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["help", "bounds"])
    text = capsys.readouterr().out
    for word in ("kl@0.05", "sides(a,b)", "hockey-stick", '"inf"'):
        assert word in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_reported_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        outcome = subprocess.run(
            [sys.executable, "-m", "bandpo", "bounds", "0.5"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert outcome.returncode == 2
    assert outcome.stderr == (
        "bandpo: error: cannot write standard output: No space left on device\n"
    )


def test_a_closed_pipe_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bandpo", "plot", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


def test_a_table_above_the_target_warns_in_one_line(tmp_path: Path) -> None:
    kinks = "+".join(f"max(u-{k}, 0)" for k in (1.1, 1.5, 2, 3, 5, 9, 20, 50))
    path = str(tmp_path / "kinked.safetensors")
    found = run("table", "build", "--expression", f"abs(u-1)+{kinks}", "-o", path)
    assert found.returncode == 0
    assert len(found.stderr.splitlines()) == 1
    assert found.stderr.startswith("bandpo: warning: the table of Band(")
    assert main(["table", "verify", path, "--samples", "1000"]) == 1
