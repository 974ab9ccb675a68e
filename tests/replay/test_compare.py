"""What a replayed rule did: against `policy_loss` on the same tokens, and against loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from bandpo import Band, Clip
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.loss import policy_loss
from bandpo.presets import preset
from bandpo.record import LoggedTokens
from bandpo.record.layout import select
from bandpo.replay import compare, rows_of
from bandpo.replay.chunk import SIZE, Piece, chunk_of
from bandpo.replay.estimate import T_95, quotient
from bandpo.replay.rule import replayed_rule
from bandpo.replay.table import texts_of
from support.logs import random_log

OF_TOKENS = (
    *("ppo", "dapo", "dual-clip", "bandpo-kl", "bandpo-tv", "bandpo-chi2", "trgppo", "dppo-tv"),
    *("dppo-kl", "ipo", "prime-rl", "kpop", "cispo", "ce-gppo", "dcpo", "sapo", "spo", "topr"),
    *("gpg", "icepop", "tis"),
)
"""Presets of single tokens, each of which must be replayed."""


def tensors(log: LoggedTokens, dtype: torch.dtype) -> dict[str, Any]:
    names = ("old_log_prob", "log_prob", "advantages")
    found = {name: torch.from_numpy(getattr(log, name)).to(dtype)[None] for name in names}
    found["response_mask"] = torch.ones_like(found["log_prob"], dtype=torch.bool)
    if log.rollout_log_prob is not None:
        found["rollout_log_prob"] = torch.from_numpy(log.rollout_log_prob).to(dtype)[None]
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OF_TOKENS)
def test_replay_has_the_metrics_of_the_loss(name: str, dtype: str) -> None:
    noise = np.random.default_rng(5).normal(0.0, 0.3, 3000)
    log = random_log(3000, 1, step=0.8)
    log = log._replace(rollout_log_prob=np.minimum(log.old_log_prob + noise, 0.0))
    given = tensors(log, getattr(torch, dtype))
    rule = preset(name).arguments(loss_agg_mode="token-mean", log_ratio_penalty=0.0)
    if rule["correction"] is None:
        del given["rollout_log_prob"]
    loss = policy_loss(**given, **rule, metrics_by_probability=True)
    metrics = loss.metrics
    [row] = rows_of(compare([log], [name], dtype=dtype))
    valid = metrics["valid_tokens"].item()
    for side in ("low", "high"):
        count = round(row[f"clip_fraction_{side}"]["value"] * valid)
        assert count == round(metrics[f"clip_fraction_{side}"].item() * valid)
        for place, by in enumerate(row["by_probability"]):
            tokens = metrics["tokens_by_probability"][place].item()
            clipped = sum(
                metrics[f"clip_fraction_{end}_by_probability"][place].item()
                for end in ("low", "high")
            )
            assert by["clip_fraction"]["value"] * tokens == pytest.approx(
                clipped * tokens, abs=0.01
            )
    assert row["loss"] == pytest.approx(loss.loss.item(), rel=1e-5)
    if rule["correction"] is None:
        removed = metrics["gradient_removed"].item()
        assert row["gradient_removed"]["value"] == pytest.approx(removed, rel=1e-5, abs=1e-12)


def test_sums_are_those_of_a_loop() -> None:
    log = random_log(400, 2, step=1.0, weight=np.random.default_rng(0).uniform(1.0, 5.0, 400))
    region = Band("kl", 0.02)
    lower, upper = region.log_bounds(log.old_log_prob)
    sums = dict.fromkeys(("tokens", "clipped", "removed", "whole", "kl", "tv", "norm", "all"), 0.0)
    largest = 0.0
    for place in range(400):
        old, new, a, w = (
            float(column[place])
            for column in (log.old_log_prob, log.log_prob, log.advantages, log.weight)
        )
        x, p, q = new - old, math.exp(old), math.exp(new)
        gradient = abs(a) * math.exp(x)
        clipped = (a > 0 and x > upper[place]) or (a < 0 and x < lower[place])
        sums["tokens"] += w
        sums["whole"] += w * gradient
        sums["all"] += w * gradient**2
        if clipped:
            sums["clipped"] += w
            sums["removed"] += w * gradient
            continue
        largest = max(largest, math.exp(x))
        sums["norm"] += w * gradient**2
        sums["kl"] += w * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
        sums["tv"] += w * abs(p - q)
    [row] = rows_of(compare([log], [region], exact=True, dtype="float64"))
    assert row["rule"] == "kl@0.02"
    for name, part, of in (
        ("clip_fraction", "clipped", "tokens"),
        ("gradient_removed", "removed", "whole"),
        ("kl", "kl", "tokens"),
        ("tv", "tv", "tokens"),
    ):
        assert row[name]["value"] == pytest.approx(sums[part] / sums[of], rel=1e-9)
    assert row["gradient_norm"] == pytest.approx(math.sqrt(sums["norm"] / sums["all"]), rel=1e-9)
    assert row["ratio_max"] == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize(("dtype", "certain"), [("float32", 2.0**-25), ("float64", 2.0**-40)])
def test_a_token_that_rounding_makes_certain_has_a_finite_divergence(
    dtype: str, certain: float
) -> None:
    """A float32 softmax returns exactly 0 for most tokens of a sure policy."""
    at = np.full(100, -1.25e-7)
    log = random_log(100)._replace(old_log_prob=at, log_prob=np.zeros(100))
    [row] = rows_of(compare([log], ["ppo"], dtype=dtype))
    p, rest = math.exp(-1.25e-7), -math.expm1(-1.25e-7)
    expected = p * (-1.25e-7 - math.log1p(-certain)) + rest * math.log(rest / certain)
    assert row["kl"]["value"] == pytest.approx(expected, rel=1e-6)
    assert row["tv"]["value"] == pytest.approx(rest - certain, rel=1e-6)
    assert row["gradient_kept"] == 1.0
    assert row["gradient_kept_optimum"] == pytest.approx(1.0, rel=1e-12)


def test_infinite_log_probs_give_the_limits_of_the_divergences() -> None:
    from bandpo.tensors.divergence import bernoulli_divergence

    old = np.array([-math.inf, -math.inf, -800.0, -1.0, -1.0])
    new = np.array([-1.0, -700.0, -1.0, -math.inf, -1.0])
    log = random_log(5, length=1)._replace(old_log_prob=old, log_prob=new)
    for place in range(5):
        chunk = chunk_of(Piece(select(log, slice(place, place + 1)), 0), torch.float64)
        both = (torch.from_numpy(column[place : place + 1]) for column in (old, new))
        at, to = (tensor.clamp(min=-700.0) for tensor in both) if place != 3 else both
        assert chunk.kl == pytest.approx(bernoulli_divergence("kl", at, to).numpy(), rel=1e-9)
        assert chunk.tv == pytest.approx(bernoulli_divergence("tv", at, to).numpy(), rel=1e-9)


def test_parts_and_chunks_add_up() -> None:
    log = random_log(SIZE + 5000, 3)
    cut = SIZE // 2 + 7
    parts = [select(log, slice(0, cut)), select(log, slice(cut, None))]
    rules = ["ppo", "kl@0.01", "spo"]
    whole, split = rows_of(compare([log], rules)), rows_of(compare(parts, rules))
    for one, other in zip(whole, split, strict=True):
        assert one["clip_fraction"] == pytest.approx(other["clip_fraction"], rel=1e-12)
        assert one["gradient_kept"] == pytest.approx(other["gradient_kept"], rel=1e-9)
        assert one["only_this_rule"] == other["only_this_rule"]


def test_tokens_that_one_rule_alone_clips() -> None:
    log = random_log(2000, 4, step=1.0)
    found = {row["rule"]: row for row in rows_of(compare([log], ["ppo", "dapo", "kl@0.01"]))}
    clipped = {}
    for name in found:
        low, high = replayed_rule(name).rule.region.log_bounds(log.old_log_prob)  # type: ignore[union-attr]
        x, a = log.log_prob - log.old_log_prob, log.advantages
        clipped[name] = ((a > 0) & (x > high)) | ((a < 0) & (x < low))
    for name, own in clipped.items():
        others = np.any([each for other, each in clipped.items() if other != name], axis=0)
        assert found[name]["only_this_rule"] == pytest.approx((own & ~others).sum(), abs=1)
    assert found["ppo"]["only_this_rule"] + found["kl@0.01"]["only_this_rule"] > 50


def test_intervals_cover_the_truth_as_often_as_they_state() -> None:
    """Sequences differ in how many of their tokens are clipped, which is what widens them."""
    rng = np.random.default_rng(0)
    truth, covered, count = 0.2, 0, 400
    for _ in range(count):
        share = rng.beta(0.5, 2.0, 320)
        clipped = rng.binomial(30, share)
        part = clipped.reshape(32, 10).sum(1).astype(float)
        estimate = quotient(part, np.full(32, 300.0))
        covered += estimate.low <= truth <= estimate.high
    assert 0.92 <= covered / count <= 0.98


def test_a_share_has_an_interval_in_text_if_there_are_several_sequences() -> None:
    log = random_log(400, 6, step=0.8)
    for count, has_interval in ((50, False), (400, True)):  # sequences of 50 tokens
        [row] = rows_of(compare([select(log, slice(0, count))], ["ppo"]))
        share, text = row["clip_fraction"], texts_of(row)["clipped"]
        wanted = f"{share['value']:.2%}"
        if has_interval:
            wanted += f" ±{100 * (share['high'] - share['value']):.2f}"
        assert text == wanted
        assert share["value"] > 0.0


def test_the_quantile_is_that_of_the_groups() -> None:
    from scipy.stats import t

    assert pytest.approx(t.ppf(0.975, 31), abs=1e-4) == T_95


def test_nan_tokens_are_left_out_and_counted() -> None:
    log = random_log(200, 5)
    wrong = log._replace(
        log_prob=np.where(np.arange(200) < 3, math.nan, log.log_prob),
        advantages=np.where(np.arange(200) == 9, math.nan, log.advantages),
    )
    wrong.advantages[20:22] = math.inf, 1e30
    wrong.old_log_prob[30] = wrong.log_prob[30] = -math.inf
    found = compare([wrong], ["ppo"])
    assert (found.sampled, found.unknown) == (200, 7)
    assert found.sums["tokens"].sum() == 193
    [row] = rows_of(found)
    assert math.isfinite(row["loss"])


@pytest.mark.parametrize("name", ["bapo", "m2po"])
def test_a_region_that_changes_with_the_batch_is_refused(name: str) -> None:
    with pytest.raises(
        InvalidValueError, match=f"rule '{name}' has a region that changes with the batch"
    ):
        compare([random_log(10)], [name])


def test_texts_name_a_preset_a_region_or_a_surrogate_with_a_region() -> None:
    assert replayed_rule("dppo-kl").rule.surrogate.name == "mask"
    assert replayed_rule("kl@0.05").rule.surrogate.name == "min-clip"
    found = replayed_rule("mask: kl@0.05 ")
    assert (found.name, found.rule.surrogate.name) == ("mask: kl@0.05", "mask")
    assert replayed_rule(Clip(0.2)).name == "clip@0.2"
    assert replayed_rule("price:kl@0.1").rule.surrogate.name == "min-clip"
    with pytest.raises(
        InvalidValueError, match=r"rule 'kll@0.1': .*, column 1: .* did you mean 'kl'"
    ):
        replayed_rule("kll@0.1")
    with pytest.raises(InvalidValueError, match=r"did you mean 'mask'"):
        replayed_rule("masks:kl@0.05")
    with pytest.raises(InvalidTypeError, match="a rule must be a str, a Region or a Preset, got"):
        replayed_rule(0.2)  # type: ignore[arg-type]


def test_bad_arguments_are_refused() -> None:
    log = random_log(10)
    with pytest.raises(InvalidValueError, match="rules must name at least one rule"):
        compare([log], [])
    with pytest.raises(InvalidValueError, match="rules must differ, got 'ppo' twice"):
        compare([log], ["ppo", "ppo"])
    with pytest.raises(InvalidValueError, match=r"log must have at least one token .* in 0 tokens"):
        compare([], ["ppo"])
    nothing = log._replace(log_prob=np.full(10, math.nan))
    with pytest.raises(InvalidValueError, match=r"numbers for both .* got none in 10 tokens"):
        compare([nothing], ["ppo"])
    with pytest.raises(InvalidValueError, match=r"'icepop' corrects .* has no rollout_log_prob"):
        compare([log], ["icepop"])
