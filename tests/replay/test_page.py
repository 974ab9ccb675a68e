"""The command and its page: one file, without a network, with every rule in it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from bandpo.cli import main
from bandpo.cli.commands import MATCHED, REPLAYED
from support.logs import random_log


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    log = random_log(4000, 1, step=0.6)
    path = tmp_path / "tokens.npz"
    columns = {name: column for name, column in log._asdict().items() if column is not None}
    np.savez(path, **columns)
    return path


def test_the_command_prints_a_row_for_each_rule(
    log_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["replay", str(log_file)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split("  ")[-1].strip() == "alone"
    assert [row.split()[0] for row in rows] == list(REPLAYED)


def test_json_has_every_number(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["replay", str(log_file), "--rule", "ppo", "--rule", "mask:kl@0.05", "--json"]
    assert main([*command, "--match", "gradient-removed", "--divergence", "tv"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["left_out"], found["complaints"]) == (4000, 0, {})
    assert [row["rule"] for row in found["rules"]] == ["ppo", "mask:kl@0.05"]
    row = found["rules"][0]
    assert (
        row["clip_fraction"]["low"] < row["clip_fraction"]["value"] < row["clip_fraction"]["high"]
    )
    assert found["match"]["strength"] == pytest.approx(row["gradient_removed"]["value"], rel=1e-5)
    assert list(found["match"]["radii"]) == ["tv"]


def test_columns_of_other_names_are_read(
    log_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.npz"
    with np.load(log_file) as columns:
        np.savez(other, **{f"my_{name}": columns[name] for name in columns})
    names = ("old_log_prob", "log_prob", "advantages")
    options = [word for name in names for word in ("--column", f"{name}=my_{name}")]
    assert main(["replay", str(other), "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 4000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "bapo"], "rule 'bapo' has a region that changes with the batch"),
        (["--rule", "kll@1"], "did you mean 'kl'"),
        (["--column", "old"], "--column must be NAME=OTHER, as in old_log_prob=old_logprobs"),
        (["--divergence", "kl"], "--divergence is for --match, which is left out"),
    ],
)
def test_errors_are_one_line(
    options: list[str], message: str, log_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(log_file), *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_missing_log_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "nowhere.npz"]) == 2
    assert "nowhere.npz" in capsys.readouterr().err


def test_the_page_stands_alone(log_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main(["replay", str(log_file), "--match", "clip-fraction", "--html", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    addresses = set(re.findall(r'(?:src|href)="([^"#]*)"', text))
    assert all(address.startswith("data:image/png") for address in addresses)
    assert not re.search(r"<script|@import|url\((?!#)", text)
    assert "tokens.npz" in text
    shown = unescape(text)
    for rule in REPLAYED:
        assert f'<td style="text-align:left">{rule}</td>' in shown
    for divergence in MATCHED:
        assert re.search(rf"{divergence}@0\.\d+", shown)
    assert "BandPOConfig(..., region=" in shown
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(pictures) == 4  # tokens and frontier, each for a light and a dark page
    for picture in pictures:
        ElementTree.fromstring(picture)  # noqa: S314 -- our own
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for used in re.findall(r"url\(#([^)]+)\)", text):
        assert used in ids


@pytest.mark.parametrize("name", ["missing/r.html", "folder.html", "file/r.html", "r.txt"])
def test_a_page_that_cannot_be_written_is_refused_before_the_log_is_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(["replay", "nowhere.npz", "--html", str(tmp_path / name)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"cannot write {tmp_path / name}: " in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_write_leaves_the_page_that_was_there(
    log_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "report.html"
    page.write_text("before")
    before = sorted(tmp_path.iterdir())

    def fail(self: Path, target: Path) -> Path:
        assert self.stat().st_size > 10_000
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    assert main(["replay", str(log_file), "--html", str(page)]) == 2
    assert "report.html: No space left on device" in capsys.readouterr().err
    assert page.read_text() == "before"
    assert sorted(tmp_path.iterdir()) == before


def test_json_of_a_log_without_gradients_is_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = random_log(200)
    path = tmp_path / "zero.npz"
    np.savez(path, old_log_prob=log.old_log_prob, log_prob=log.log_prob, advantages=np.zeros(200))
    assert main(["replay", str(path), "--json"]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["complaints"]["no-advantage"].startswith("All advantages are 0")
    assert found["rules"][0]["gradient_removed"]["value"] == "nan"


def test_the_page_shows_what_is_wrong(tmp_path: Path) -> None:
    log = random_log(500)
    path, page = tmp_path / "idle.npz", tmp_path / "report.html"
    np.savez(
        path, old_log_prob=log.old_log_prob, log_prob=log.old_log_prob, advantages=log.advantages
    )
    assert main(["replay", str(path), "--html", str(page)]) == 0
    assert "All ratios are 1, so no rule can act." in page.read_text()
