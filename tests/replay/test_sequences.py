"""Rules that decide by whole sequences, against `policy_loss` on the batch that was recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pyarrow")

import torch

from bandpo import Clip
from bandpo.error import InvalidValueError
from bandpo.loss import policy_loss
from bandpo.presets import preset
from bandpo.record import LoggedTokens, Recorder, read_tokens
from bandpo.record.layout import concatenate, select
from bandpo.replay import compare, match, rows_of
from bandpo.replay.chunk import SIZE
from bandpo.replay.sequences import pieces_of_sequences
from bandpo.surrogate import Mask
from support.logs import random_log

ROWS, WIDTH = 40, 24

OF_SEQUENCES = (
    *("gspo", "luspo", "gmpo", "vespo", "cppo"),
    *("mis", "geo-mask", "seq-mask-tis", "opsm", "flash-reinforce"),
)
"""Presets that decide by sequences, each of which must be replayed."""


def batch(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    logit = rng.normal(1.0, 2.5, (ROWS, WIDTH))
    step = rng.normal(0.0, 0.3, (ROWS, WIDTH)) + rng.normal(0.0, 0.2, (ROWS, 1))
    rollout = logit + rng.normal(0.0, 0.15, (ROWS, WIDTH))
    columns = [-np.logaddexp(0.0, -each) for each in (logit, logit + step, rollout)]
    old, new, engine = (torch.tensor(each, dtype=torch.float32) for each in columns)
    return {
        "old_log_prob": old,
        "log_prob": new,
        "advantages": torch.tensor(rng.normal(0.0, 1.0, ROWS), dtype=torch.float32),
        "response_mask": torch.tensor(rng.random((ROWS, WIDTH)) < 0.8),
        "rollout_log_prob": engine,
    }


@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_replay_of_a_recorded_run_has_the_metrics_of_its_loss(name: str, tmp_path: Path) -> None:
    given = batch(1)
    rule = preset(name).arguments(loss_agg_mode="token-mean", log_ratio_penalty=0.0)
    with Recorder(tmp_path, every=1) as record:
        record(**given)
    [row] = rows_of(compare(read_tokens(tmp_path), [name]))
    if rule["correction"] is None:
        del given["rollout_log_prob"]
    check(row, policy_loss(**given, **rule, metrics_by_probability=True), rule)


def test_a_mask_of_sequences_is_replayed(tmp_path: Path) -> None:
    given = batch(2)
    del given["rollout_log_prob"]
    rule: dict[str, Any] = {
        "region": Clip(0.5, 0.6),
        "surrogate": Mask(None, whole_sequence=True),
    }
    with Recorder(tmp_path, every=1) as record:
        record(**given)
    [row] = rows_of(compare(read_tokens(tmp_path), [replace(preset("ppo"), name="trm", **rule)]))
    loss = policy_loss(**given, **rule, loss_agg_mode="token-mean", metrics_by_probability=True)
    assert 0.1 < row["gradient_removed"]["value"] < 0.9
    check(row, loss, {"correction": None})


def check(row: dict[str, Any], loss: Any, rule: dict[str, Any]) -> None:
    metrics = loss.metrics
    valid = metrics["valid_tokens"].item()
    for side in ("low", "high"):
        count = row[f"clip_fraction_{side}"]["value"] * valid
        assert count == pytest.approx(metrics[f"clip_fraction_{side}"].item() * valid, abs=1e-3)
    for place, by in enumerate(row["by_probability"]):
        ends = [metrics[f"clip_fraction_{end}_by_probability"][place] for end in ("low", "high")]
        tokens = metrics["tokens_by_probability"][place].item()
        expected = sum(end.item() for end in ends) * tokens if tokens else math.nan
        count = by["clip_fraction"]["value"] * tokens
        assert count == pytest.approx(expected, abs=1e-3, nan_ok=True)
    assert row["loss"] == pytest.approx(loss.loss.item(), rel=1e-5)
    if rule["correction"] is None:
        removed = metrics["gradient_removed"].item()
        assert row["gradient_removed"]["value"] == pytest.approx(removed, rel=1e-5, abs=1e-12)
        assert row["ratio_max"] <= metrics["ratio_max"].item() * (1.0 + 1e-6)


def test_gspo_clips_what_a_loop_over_sequences_clips() -> None:
    log = random_log(3000, 1, step=0.6, length=30)
    clip = preset("gspo").region
    assert isinstance(clip, Clip)
    lower, upper = (float(side) for side in clip.log_bounds(np.array(-1.0)))
    clipped, removed, whole = 0, 0.0, 0.0
    for sequence in range(100):
        own = log.sequence == sequence
        x = float((log.log_prob - log.old_log_prob)[own].mean())
        a = float(log.advantages[own][0])
        gradient = own.sum() * abs(a) * math.exp(x)
        whole += gradient
        if (a > 0.0 and x > upper) or (a < 0.0 and x < lower):
            clipped, removed = clipped + int(own.sum()), removed + gradient
    [row] = rows_of(compare([log], ["gspo"], dtype="float64"))
    assert clipped > 500
    assert row["clip_fraction"]["value"] == pytest.approx(clipped / 3000, rel=1e-12)
    assert row["gradient_removed"]["value"] == pytest.approx(removed / whole, rel=1e-9)
    assert math.isnan(row["gradient_kept_optimum"])


def test_other_rules_are_the_same_beside_one_of_sequences() -> None:
    log = random_log(SIZE + 3000, 2, length=70)
    alone, beside = (rows_of(compare([log], ["ppo", *more]))[0] for more in ([], ["gspo"]))
    assert beside["clip_fraction"] == pytest.approx(alone["clip_fraction"], rel=1e-9)
    assert beside["gradient_kept"] == pytest.approx(alone["gradient_kept"], rel=1e-12)


@pytest.mark.parametrize("cut", [1, 35, 69, 70, 12_345])
def test_a_sequence_in_two_parts_is_whole(cut: int) -> None:
    log = random_log(20_000, 3, length=70)
    parts = [select(log, slice(0, cut)), select(log, slice(cut, None))]
    whole, split = (rows_of(compare(each, ["gspo", "cppo"])) for each in ([log], parts))
    for one, other in zip(whole, split, strict=True):
        assert one["clip_fraction"]["value"] == other["clip_fraction"]["value"]
        assert one["gradient_kept"] == pytest.approx(other["gradient_kept"], rel=1e-9)


@pytest.mark.parametrize("length", [1, 7, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE])
def test_pieces_have_all_tokens_once_in_order_and_whole_sequences(length: int) -> None:
    log = random_log(3 * SIZE + 11, 4, length=length)

    def parts() -> Iterator[LoggedTokens]:
        for start in range(0, len(log.step), 50_000):
            yield select(log, slice(start, start + 50_000))

    pieces = list(pieces_of_sequences(parts(), "gspo"))
    joined = concatenate([piece.part for piece in pieces])
    np.testing.assert_array_equal(joined.log_prob, log.log_prob)
    ends = np.cumsum([len(piece.part.step) for piece in pieces])
    assert [piece.start for piece in pieces] == [0, *ends[:-1]]
    seen = [set(piece.part.sequence.tolist()) for piece in pieces]
    assert sum(map(len, seen)) == len(set().union(*seen))
    for piece in pieces:
        assert piece.sequences is not None
        firsts = np.flatnonzero(np.diff(piece.part.sequence, prepend=-1))
        np.testing.assert_array_equal(piece.sequences, firsts)
        assert len(piece.part.step) <= max(SIZE, length)


def test_a_nan_token_is_left_out_of_its_sequence() -> None:
    log = random_log(300, 5, step=0.6, length=30)
    wrong = np.arange(300) % 30 == 4
    nan = log._replace(log_prob=np.where(wrong, math.nan, log.log_prob))
    kept = LoggedTokens(*(None if c is None else c[~wrong] for c in log))  # type: ignore[arg-type]
    one, other = (rows_of(compare([each], ["gspo"]))[0] for each in (nan, kept))
    assert one["clip_fraction"]["value"] == other["clip_fraction"]["value"]
    assert one["loss"] == other["loss"]


def test_a_radius_that_acts_as_gspo_does() -> None:
    log = random_log(40_000, 6, step=0.6)
    strength, [found] = match([log], "gspo", ["kl"], by="gradient-removed")
    [row] = rows_of(compare([log], ["gspo"]))
    assert strength == pytest.approx(row["gradient_removed"]["value"], rel=1e-5)
    [band] = rows_of(compare([log], [found.spec]))
    assert band["gradient_removed"]["value"] == pytest.approx(strength, rel=5e-3)


LOG = random_log(100, 7, length=10)
REFUSED: dict[str, LoggedTokens] = {
    "the log has tokens without one": LOG._replace(sequence=np.full(100, -1)),
    "the log is a sample of single tokens: 50.0% of them": LOG._replace(
        weight=np.where(np.arange(100) < 50, 2.0, 1.0)
    ),
    "sequence 0 of step 0 is in the log at more than one place": concatenate([LOG, LOG]),
    "sequence 3 of step 0 is in the log at more than one place": concatenate(
        [select(LOG, slice(30, 40))] * 2
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_log_without_whole_sequences_is_refused_with_the_reason(reason: str) -> None:
    with pytest.raises(InvalidValueError, match=f"'gspo' takes whole sequences, and {reason}"):
        compare([REFUSED[reason]], ["ppo", "gspo"])
    compare([REFUSED[reason]], ["ppo"])  # takes none


def test_a_sample_of_a_recorder_is_refused_with_what_to_record(tmp_path: Path) -> None:
    with Recorder(tmp_path, every=1, tokens_per_step=100) as record:
        record(**batch(3))
    with pytest.raises(InvalidValueError, match=r"Record with tokens_per_step of at least the"):
        compare(read_tokens(tmp_path), ["gspo"])


def test_inner_steps_on_the_same_sequences_are_different_sequences(tmp_path: Path) -> None:
    given = batch(4)
    del given["rollout_log_prob"]
    numbers = torch.arange(ROWS)
    with Recorder(tmp_path, every=1) as record:
        for step in range(2):
            record(**given, step=step, sequence=numbers)
    [row] = rows_of(compare(read_tokens(tmp_path), ["gspo"]))
    loss = policy_loss(**given, **preset("gspo").arguments(loss_agg_mode="token-mean"))
    found = row["clip_fraction_low"]["value"] + row["clip_fraction_high"]["value"]
    expected = sum(loss.metrics[f"clip_fraction_{side}"].item() for side in ("low", "high"))
    assert found == pytest.approx(expected, rel=1e-6)


def test_steps_part_sequences_that_have_no_positions() -> None:
    log = random_log(60, 8, step=0.6, length=30)
    unplaced = log._replace(position=np.full(60, -1))
    same = unplaced._replace(sequence=np.zeros(60, np.int64), step=log.sequence)
    one, other = (rows_of(compare([each], ["gspo"]))[0] for each in (unplaced, same))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-12)
