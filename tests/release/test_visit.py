"""The script of a visit to a GPU, without one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from support.emulated import missing_compiler

SCRIPT = Path(__file__).parents[2] / "tools" / "visit_gpu.py"


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_a_dry_run_writes_every_part(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), "--dry"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "visit.json").read_text())
    codes = {name: part["returncode"] for name, part in parts.items()}
    assert codes == {
        "correctness": 0,
        "cases": 0,
        "calls": 0,
        "counters": codes["counters"] if shutil.which("ncu") else None,
        "a failure": 1,
        "too long": None,
        "the next": 0,
    }
    outputs = {name: part["output"].strip() for name, part in parts.items()}
    assert (outputs["too long"], outputs["the next"]) == ("begins", "runs")
    cases = json.loads((tmp_path / "cases.json").read_text())["cases"]
    assert len({case["case"] for case in cases}) == 8
    calls = json.loads((tmp_path / "calls.json").read_text())["calls"]
    assert all(len(call["host seconds"]) > 1 for call in calls)


def test_parts_fit_in_a_visit() -> None:
    listed = subprocess.run(
        [sys.executable, str(SCRIPT), "--list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert listed[0].startswith("machine")
    assert len(listed) == len(set(listed))


def test_the_second_call_keeps_the_parts_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    for call, part in (("1", "machine"), ("2", "counters near float32")):
        command = [sys.executable, str(SCRIPT), str(folder), "--call", call, "--only", part]
        subprocess.run([*command, "--seconds", "5"], capture_output=True, check=True)
    assert list(json.loads((folder / "visit.json").read_text())) == [
        "machine",
        "counters near float32",
    ]
