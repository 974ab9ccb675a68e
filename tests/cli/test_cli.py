"""The command line as a shell sees it: output, JSON, exit codes, one-line errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import bandpo
from bandpo.cli import main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bandpo.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


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
    assert float(content["bounds"][1]["log_upper"]) == float("inf")


def test_a_table_is_built_inspected_and_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "tv.safetensors")
    assert main(["table", "build", "--divergence", "tv", "--delta", "0.1", "-o", path]) == 0
    capsys.readouterr()
    assert main(["table", "inspect", path, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert json.loads(content["region"]) == {"band": {"divergence": "tv", "delta": [0.1, 0.1]}}
    assert main(["table", "verify", path, "--samples", "20000", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["passed"] is True
    assert float(content["max_error_log_upper"]) <= content["target"]
    assert bandpo.BandTable.load(path).region == bandpo.Band("tv", 0.1)


def test_plot_draws_presets_and_bands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.svg"
    assert main(["plot", "ppo", "dcpo", "kl@0.01", "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"ppo, dcpo, kl@0.01: {path}\n"
    assert "<svg" in path.read_text()


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


def test_doctor_reports_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    torch = pytest.importorskip("torch")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bandpo"] == bandpo.__version__
    assert report["numpy"] == np.__version__
    assert report["torch"] == torch.__version__
    assert report["backend on a CPU"] == "native"
    assert report["backend on a GPU"].startswith(("cuda", "torch (not cuda: "))
    assert report["GPU"].startswith("usable") == torch.cuda.is_available()
    if torch.version.cuda is None and torch.version.hip is None:
        assert "built without CUDA" in report["GPU"]


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
        (["plot", "kll@0.05"], 'divergence "kll" is not known'),
        (["plot", "kl@-1"], "delta must be finite and above 0, got -1.0"),
        (["plot", "ppo", "-o", "no-such-folder/p.png"], "cannot write no-such-folder/p.png"),
        (["plot", "ppo", "-o", "p.txt"], "cannot write p.txt: use one of .png, .svg, .pdf"),
        (["table", "inspect", "no-such-file"], "cannot read no-such-file"),
        (["table", "build", "-o", "no-such-folder/t"], "cannot write no-such-folder/t"),
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


def test_usage_errors_and_version() -> None:
    assert run().returncode == 2
    assert run("bounds", "a-half").returncode == 2
    assert run("--version").stdout == f"bandpo {bandpo.__version__}\n"


def test_a_table_above_the_target_warns_in_one_line(tmp_path: Path) -> None:
    kinks = "+".join(f"max(u-{k}, 0)" for k in (1.1, 1.5, 2, 3, 5, 9, 20, 50))
    path = str(tmp_path / "kinked.safetensors")
    found = run("table", "build", "--expression", f"abs(u-1)+{kinks}", "-o", path)
    assert found.returncode == 0
    assert len(found.stderr.splitlines()) == 1
    assert found.stderr.startswith("bandpo: warning: the table of Band(")
    assert main(["table", "verify", path, "--samples", "1000"]) == 1
