"""TRL's own trainers with a band: training of a tiny model, and their loss on reference vectors."""

from __future__ import annotations

import importlib
import json
import math
import pickle
import queue
import re
import sys
import warnings
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer, TrlParser
from trl.kernels import chunked_logprob
from trl.trainer import utils as heads

from bandpo import Band, Clip, region_from_spec
from bandpo.conform.batch import Loss, MicroBatch
from bandpo.conform.batch import run as outcome_of
from bandpo.conform.compare import compared
from bandpo.conform.frameworks import framework_report
from bandpo.conform.vectors import read_vectors
from bandpo.correction import Correction
from bandpo.error import (
    BandpoError,
    InvalidTypeError,
    InvalidValueError,
    MissingHookError,
    VersionWarning,
)
from bandpo.integrations import trl as adapter
from bandpo.integrations import version
from bandpo.integrations.trl import BandPOConfig, BandPOTrainer
from bandpo.integrations.trl_config import LOSS_TYPES
from bandpo.loss import PROBABILITY_EDGES, policy_loss
from bandpo.presets import preset
from bandpo.record import read_tokens
from bandpo.schedule import Linear, ScheduledBand
from examples.trl import grpo as example
from support.trainer_batch import REGION, TrainerBatch, assert_same, trainer_batch
from support.waits import Waits

pytestmark = [
    # Those of transformers about itself.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ROUNDING = 2e-6
"""Of the sum of the absolute losses or gradients of tokens: some ten roundings of float32."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # without TRL's telemetry


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a configuration: four optimiser steps on each batch of 16 completions."""
    plain = {
        **example.DEFAULTS,
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "learning_rate": 2e-2,
        "max_steps": 6,
        "logging_steps": 3,
    }
    return plain | changes


def trainer_of(kind: type, config: Any, **options: Any) -> Any:
    return kind(
        example.toy_model(),
        example.repeats,
        config,
        train_dataset=example.prompts(),
        processing_class=example.toy_tokenizer(),
        **options,
    )


def band_trainer(folder: Path, **changes: Any) -> Any:
    return trainer_of(BandPOTrainer, BandPOConfig(**settings(folder, **changes)))


class Recorder(BandPOTrainer):
    """Keeps each micro-batch of a training with its loss and the gradient to the log-probs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[dict[str, Any]] = []

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        self.found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self.found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        loss = super()._compute_loss(model, inputs)
        log_prob = self.found[0]
        if self.model.training:
            (gradient,) = torch.autograd.grad(loss, log_prob, retain_graph=True)
            self.steps.append(
                {
                    "old": inputs["old_per_token_logps"],
                    "log_prob": log_prob.detach(),
                    "advantages": inputs["advantages"],
                    "mask": inputs["completion_mask"],
                    "tokens": inputs["num_items_in_batch"],
                    "loss": loss.detach(),
                    "gradient": gradient,
                    "region": getattr(self.region, "region", self.region),
                }
            )
        return loss


def aggregation(loss_type: str, step: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Arguments of `policy_loss` for a loss type, and what TRL divides by for the accumulation."""
    if loss_type == "dapo":  # the tokens of 4 micro-batches, of which a step accumulates 2
        return {"batch_num_tokens": step["tokens"] * 2 / 4}, 1.0
    named: dict[str, dict[str, Any]] = {
        "grpo": {"loss_agg_mode": "seq-mean-token-mean"},
        "bnpo": {"loss_agg_mode": "token-mean"},
        "dr_grpo": {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 8},
        "luspo": {"loss_agg_mode": "seq-mean-token-sum"},
    }
    return named[loss_type], 2.0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_training_has_the_loss_and_gradient_of_policy_loss(loss_type: str, tmp_path: Path) -> None:
    config = BandPOConfig(**settings(tmp_path, loss_type=loss_type, region=REGION))
    trainer = trainer_of(Recorder, config)
    trainer.train()
    assert len(trainer.steps) == 12
    clipped = torch.zeros(2)
    for step in trainer.steps:
        options, accumulated = aggregation(loss_type, step)
        log_prob = step["log_prob"].clone().requires_grad_()
        result = policy_loss(
            *(step["old"], log_prob, step["advantages"], step["mask"]),
            region=region_from_spec(REGION),
            **options,
        )
        wanted = result.loss / accumulated
        (gradient,) = torch.autograd.grad(wanted, log_prob)
        size = float(gradient.abs().sum())
        assert size > 0
        assert abs(float(step["loss"]) - float(wanted.detach())) <= ROUNDING * size
        assert float((step["gradient"] - gradient).abs().max()) <= ROUNDING * size
        metrics = result.metrics
        clipped += torch.stack([metrics["clip_fraction_low"], metrics["clip_fraction_high"]])
    assert (clipped > 0).all()
    assert trainer.epsilon_low == trainer.epsilon_high == config.epsilon


def test_a_fixed_clip_trains_as_trl_does(tmp_path: Path) -> None:
    ours = band_trainer(tmp_path, region="clip@0.2,0.28")  # which sets the seed
    ours.train()
    config = GRPOConfig(**settings(tmp_path, epsilon=0.2, epsilon_high=0.28))
    theirs = trainer_of(GRPOTrainer, config)
    theirs.train()
    logs = [trainer.state.log_history[:-1] for trainer in (ours, theirs)]
    same = [name for name in logs[1][0] if name.startswith("clip_ratio") or name == "loss"]
    assert len(same) == 6
    assert any(line["clip_ratio/region_mean"] > 0.1 for line in logs[1])
    for line, other in zip(*logs, strict=True):
        assert {n: line[n] for n in same} == pytest.approx({n: other[n] for n in same}, abs=1e-6)
    for weight, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0.0, atol=1e-5)


# The loss on given log-probs


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What TRL's forward pass returns in place of a model's log-probs, under the key "log_prob"."""
    held: dict[str, Any] = {}

    def forward(trainer: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return held["log_prob"], torch.zeros_like(held["log_prob"]), None

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", forward)
    return held


def inputs_of(batch: MicroBatch | TrainerBatch, tokens: int, **more: Any) -> dict[str, Any]:
    ids = torch.zeros(batch.log_prob.shape, dtype=torch.long)
    return {
        "prompt_ids": ids[:, :0],
        "prompt_mask": ids[:, :0],
        "completion_ids": ids,
        "completion_mask": batch.response_mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_log_prob,
        "num_items_in_batch": torch.tensor(tokens),
        **more,
    }


def in_one_step(trainer: Any) -> Any:
    """The trainer as if a batch were one micro-batch of one optimiser step."""
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    return trainer


Pair = tuple[torch.Tensor, torch.Tensor]


def found_by(trainer: Any, given: dict[str, Any], batch: TrainerBatch, **more: Any) -> Pair:
    """TRL's loss of a batch and its gradient to the log-probs."""

    def loss(log_prob: torch.Tensor) -> Any:
        given["log_prob"] = log_prob
        inputs = inputs_of(batch, int(batch.response_mask.sum()), **more)
        return trainer._compute_loss(trainer.model, inputs)

    return batch.of(loss)


# TRL counts the sequence without tokens as well.
BY_ROW = {"global_batch_size": 4}
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_agg_mode": "seq-mean-token-mean", **BY_ROW},
    "bnpo": {"loss_agg_mode": "token-mean"},
    "dr_grpo": {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 8, **BY_ROW},
    "dapo": {"loss_agg_mode": "token-mean"},
    "luspo": {"loss_agg_mode": "seq-mean-token-sum", **BY_ROW},
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_batch_of_all_trainers_has_the_loss_of_policy_loss(
    loss_type: str, tmp_path: Path, given: dict[str, Any]
) -> None:
    trainer = in_one_step(band_trainer(tmp_path, region=REGION, loss_type=loss_type))
    for padding in (0.0, 5.0, -1e30):
        batch = trainer_batch().with_padding(padding)
        options = AGGREGATIONS[loss_type]
        assert_same(found_by(trainer, given, batch), batch.wanted(region=REGION, **options))
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True  # as a run with vLLM has
    assert_same(
        found_by(trainer, given, batch, importance_sampling_ratio=batch.weights),
        batch.wanted(region=REGION, rollout_is_weights=batch.weights, **options),
    )
    logs = {"loss": 0.0}
    trainer.log(logs)
    assert all(map(math.isfinite, logs.values()))
    assert logs["band/valid_tokens"] == 4 * batch.response_mask.sum()


TYPES = {
    "token-mean": "dapo",
    "seq-mean-token-sum": "luspo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
}


def test_presets_give_their_reference_vectors(tmp_path: Path, given: dict[str, Any]) -> None:
    names = ("ppo", "dapo", "trgppo", "bandpo-kl", "bandpo-tv", "bandpo-chi2", "dcpo")
    cases = ("float32", "p1", "zero-advantages", "split")
    trainers = {
        name: band_trainer(
            tmp_path,
            region=f"preset:{name}",
            max_completion_length=6,
        )
        for name in names
    }
    seen = 0
    for vector in read_vectors():
        if vector.preset in names and vector.case in cases and vector.mode in TYPES:
            seen += 1
            trainer = trainers[vector.preset]
            trainer.loss_type = TYPES[vector.mode]
            parts = 2 if vector.case == "split" else 1
            trainer.current_gradient_accumulation_steps = parts
            trainer.args.steps_per_generation = parts

            def loss(batch: MicroBatch, trainer: Any = trainer) -> Loss:
                given["log_prob"] = batch.log_prob
                return Loss(trainer._compute_loss(trainer.model, inputs_of(batch, batch.tokens)))

            verdict = compared(vector, outcome_of(vector, loss))
            assert verdict.agrees, verdict
    assert seen == len(names) * len(cases) * len(TYPES)


@pytest.mark.parametrize(
    ("anchor", "correction"), [("rollout", None), ("old", "icepop"), ("rollout", "tis")]
)
def test_rollout_log_probs_move_the_region_and_weigh_the_tokens(
    anchor: str, correction: str | None, tmp_path: Path, given: dict[str, Any]
) -> None:
    trainer = in_one_step(band_trainer(tmp_path, region=REGION))
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.args.anchor = anchor
    arguments = {} if correction is None else preset(correction).correction or {}
    trainer._correction = Correction(**arguments) if arguments else None
    batch = trainer_batch()
    rollout = batch.old_log_prob + 40 * (batch.rollout_log_prob - batch.old_log_prob)
    rollout[0, 0] = batch.old_log_prob[0, 0]
    unknown = rollout.clone()
    unknown[0, 0] = torch.nan  # the engine gave none
    unknown[~batch.response_mask] = torch.nan
    found = found_by(
        *(trainer, given, batch),
        sampling_per_token_logps=unknown,
        importance_sampling_ratio=batch.weights,  # TRL's, which a correction replaces
    )
    options: dict[str, Any] = {"rollout_is_weights": batch.weights}
    plain = batch.wanted(region=REGION, **options)
    if arguments:
        options = {"correction": arguments, "rollout_log_prob": rollout}
    if anchor == "rollout":
        options["anchor_log_prob"] = rollout
    wanted = batch.wanted(region=REGION, **options)
    assert_same(found, wanted)
    assert not torch.allclose(wanted[1], plain[1], rtol=1e-3)


def test_a_region_without_a_spec_is_set_on_the_trainer(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    folder = tmp_path / "tokens"
    trainer = in_one_step(band_trainer(tmp_path, region="clip@0.2", record=str(folder)))
    trainer.region = table = Band("kl", [0.05, 0.02]).table()
    batch = trainer_batch()
    for step in range(10):  # of which one is recorded
        trainer.state.global_step = step
        assert_same(found_by(trainer, given, batch), batch.wanted(region=table))
    trainer._recording.flush()
    assert read_tokens(folder).metadata.rule == {"region": repr(table)}
    with pytest.raises(InvalidValueError, match=r"rule must be set before the first batch"):
        trainer.region = Clip(0.3)
    assert trainer.region is table


def test_a_region_that_the_trainer_cannot_take_is_refused_where_it_is_set(tmp_path: Path) -> None:
    trainer = band_trainer(tmp_path, region="clip@0.2")
    for given in ("kl@0.05", 0.2, ScheduledBand("kl", Linear(0.1, 0.05, 3))):
        with pytest.raises(InvalidTypeError, match=r"region must be a bandpo\.Region, got"):
            trainer.region = given
    scheduled = band_trainer(tmp_path, **SCHEDULED)
    with pytest.raises(InvalidValueError, match="region must be in the configuration with"):
        scheduled.region = Clip(0.2)


def test_rollout_log_probs_that_some_batches_lack_are_nan_in_the_record(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    batch = trainer_batch()
    rollout = {"sampling_per_token_logps": batch.rollout_log_prob}
    for first, later, columns in ((rollout, {}, True), ({}, rollout, False)):
        folder = tmp_path / f"tokens-{columns}"
        trainer = in_one_step(band_trainer(tmp_path, region=REGION, record=str(folder)))
        for step in range(20):
            trainer.state.global_step = step
            found_by(trainer, given, batch, **(first if step < 10 else later))
        trainer._recording.flush()
        logs = list(read_tokens(folder))
        assert [log.rollout_log_prob is not None for log in logs] == [columns] * len(logs)
        for log in logs if columns else ():
            missing = torch.as_tensor(log.rollout_log_prob).isnan()
            assert torch.equal(missing, torch.as_tensor(log.step) >= 10)
    trainer.args.anchor = "rollout"
    with pytest.raises(InvalidValueError, match="anchor must be 'old', and correction be left out"):
        found_by(trainer, given, batch)


# Metrics


def test_logged_metrics_are_those_of_the_tokens_since_the_last_log(tmp_path: Path) -> None:
    config = BandPOConfig(**settings(tmp_path, region="(tv@0.15).cap(5)"))
    trainer = trainer_of(Recorder, config)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line, steps in zip(lines, (trainer.steps[:6], trainer.steps[6:]), strict=True):
        masks = [step["mask"].bool() for step in steps]
        old = torch.cat([step["old"][mask] for step, mask in zip(steps, masks, strict=True)])
        new = torch.cat([step["log_prob"][mask] for step, mask in zip(steps, masks, strict=True)])
        advantages = torch.cat(
            [
                step["advantages"][:, None].expand(mask.shape)[mask]
                for step, mask in zip(steps, masks, strict=True)
            ]
        )
        p, ratio = old.double().exp(), (new - old).double().exp()
        lower, upper = (1 - 0.15 / p).clamp(min=0), (1 + 0.15 / p).minimum(1 / p).clamp(max=5)
        low, high = (ratio < lower) & (advantages < 0), (ratio > upper) & (advantages > 0)
        wanted = {
            "clip_fraction_low": low,
            "clip_fraction_high": high,
            "approx_kl": old - new,
            "entropy": -old,
        }
        wanted = {name: value.double().mean() for name, value in wanted.items()}
        wanted |= {"ratio_min": ratio.min(), "ratio_max": ratio.max()}
        wanted |= {"valid_tokens": torch.tensor(len(p)), "nonfinite_tokens": torch.tensor(0)}
        wanted["positive_log_probs"] = torch.tensor(0)
        wanted["dual_clip_fraction"] = torch.tensor(0.0)
        stopped = low | high
        removed = (advantages.abs() * ratio)[stopped].sum() / (advantages.abs() * ratio).sum()
        wanted |= {"gradient_removed": removed, "all_ratios_one": torch.tensor(False)}
        wanted["approx_kl_k3"] = (ratio - 1 - (new - old)).mean()
        for start, end in pairwise(PROBABILITY_EDGES):
            inside = (p >= start) & ((p < end) | (end == 1.0))
            some = inside.sum().clamp(min=1)
            wanted[f"tokens_by_probability/{start:g}-{end:g}"] = inside.sum()
            for name, clipped in (("low", low), ("high", high)):
                share = (clipped & inside).sum() / some
                wanted[f"clip_fraction_{name}_by_probability/{start:g}-{end:g}"] = share
        found = {name.removeprefix("band/"): v for name, v in line.items() if "band/" in name}
        assert found == pytest.approx(
            {name: float(value) for name, value in wanted.items()}, rel=1e-4, abs=1e-6
        )
        assert wanted["clip_fraction_low"] > 0


def test_a_micro_batch_is_counted_without_waiting_for_the_device(tmp_path: Path) -> None:
    trainer = band_trainer(tmp_path)
    tokens = torch.zeros(2, 3, device="meta")  # which has no numbers, so that reading one fails
    for anchor in (None, None):
        trainer._count(tokens, tokens, tokens[:, 0], tokens.long(), anchor)
    trainer.log({"other": 1.0})  # of a user, perhaps on one rank
    with pytest.raises(InvalidValueError, match="meta"):
        trainer.log({"loss": 1.0})


def test_a_band_adds_no_wait_to_the_loss_of_trl(tmp_path: Path, given: dict[str, Any]) -> None:
    batch = trainer_batch()

    def waits(trainer: Any) -> list[str]:
        in_one_step(trainer)
        given["log_prob"] = batch.log_prob
        inputs = inputs_of(batch, int(batch.response_mask.sum()))
        found = []
        for _ in range(2):  # in the first call tables are made
            with Waits() as mode:
                trainer._compute_loss(trainer.model, dict(inputs))
            found = mode.names
        return found

    options = settings(tmp_path, loss_type="bnpo")
    plain = waits(trainer_of(GRPOTrainer, GRPOConfig(**options)))
    band = band_trainer(tmp_path, loss_type="bnpo", record=str(tmp_path / "tokens"))
    assert waits(band) == plain != []


def test_evaluation_has_metrics_of_its_own(tmp_path: Path) -> None:
    config = settings(tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8)
    trainer = trainer_of(
        BandPOTrainer,
        BandPOConfig(**config, schedule="linear(0.05, 0.01, 4)", region="kl@0.1"),
        eval_dataset=example.prompts().select(range(4)),
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert len(lines) == 3
    for line, delta in zip(lines, (0.03, 0.01, 0.01), strict=True):
        assert line["eval_band/delta"] == pytest.approx(delta)
        assert line["eval_band/approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert line["eval_band/valid_tokens"] > 4
        assert "band/delta" not in line


# Schedules and checkpoints

SCHEDULED = {"region": "(kl@0.1).cap(10)", "schedule": "linear(0.08, 0.02, 6)"}


def deltas(trainer: Any) -> list[float]:
    """The delta of each optimiser step of a `Recorder`."""
    steps = trainer.steps[:: trainer.args.gradient_accumulation_steps]
    return [step["region"].parts[0].delta_high for step in steps]


@pytest.mark.parametrize("restored", [False, True])
def test_a_schedule_steps_once_an_optimiser_step_and_resumes(
    tmp_path: Path, restored: bool
) -> None:
    options = settings(
        tmp_path,
        **SCHEDULED,
        save_strategy="steps",
        save_steps=4,
        max_steps=8,
        logging_steps=1,
        restore_callback_states_from_checkpoint=restored,
    )
    wanted = [0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.02]
    whole = trainer_of(Recorder, BandPOConfig(**options))
    whole.train()
    assert deltas(whole) == pytest.approx(wanted)
    logged = [line["band/delta"] for line in whole.state.log_history if "loss" in line]
    assert logged == pytest.approx([*wanted[1:], 0.02])
    kept = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    assert kept["stateful_callbacks"]["bandpo"] == {"taken": 4}

    resumed = trainer_of(Recorder, BandPOConfig(**options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert deltas(resumed) == pytest.approx(wanted[4:])
    resumed.steps.clear()
    resumed.train()  # anew
    assert deltas(resumed) == pytest.approx(wanted)


def test_a_checkpoint_of_trl_itself_resumes_with_a_band(tmp_path: Path) -> None:
    options = settings(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    plain = trainer_of(GRPOTrainer, GRPOConfig(**options))
    plain.train()
    options |= {"max_steps": 4, **SCHEDULED}
    trainer = trainer_of(Recorder, BandPOConfig(**options))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert deltas(trainer) == pytest.approx([0.08, 0.07])
    assert (tmp_path / "checkpoint-4").exists()


def test_a_checkpoint_of_another_schedule_is_refused_before_the_first_step(tmp_path: Path) -> None:
    options = settings(tmp_path, save_strategy="steps", save_steps=4, max_steps=4, **SCHEDULED)
    trainer_of(BandPOTrainer, BandPOConfig(**options)).train()
    options |= {"schedule": "linear(0.08, 0.02, 3)", "max_steps": 8}
    trainer = trainer_of(Recorder, BandPOConfig(**options))
    with pytest.raises(InvalidValueError, match="taken must be a whole number from 0 to steps = 3"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.steps == []


def test_an_entropy_targeted_delta_follows_the_entropy_of_trl(tmp_path: Path) -> None:
    options = settings(
        tmp_path,
        region="kl@0.1",
        schedule="entropy(0.05, 5.0, 0.1, 0.001, 0.2)",  # a target that the entropy does not reach
        logging_steps=1,
    )
    trainer = trainer_of(BandPOTrainer, BandPOConfig(**options))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    value = 0.05
    for line in lines:
        value *= torch.tensor(0.1 * (5.0 - line["entropy"]) / 5.0).exp().item()
        assert line["band/delta"] == pytest.approx(value, rel=1e-5)
    assert value > 0.06


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": "kl@-1"}, "delta"),
        ({"region": "kl@0.05)"}, "column 8"),
        ({"region": "kll@0.05"}, "did you mean 'kl'"),
        ({"region": "preset:bapo"}, "must not be learnt from batches"),
        ({"region": "preset:topr"}, "has no region of its own"),
        ({"region": "kl@0.05|kl@0.1", "schedule": "linear(0.1, 0.01, 10)"}, "one band"),
        ({"schedule": "linear(0.1, 0.01)"}, "steps is missing"),
        ({"schedule": "cosin(1, 2, 3)"}, "did you mean 'cosine'"),
        ({"schedule": 0.05}, "schedule must be text"),
        *(
            ({"region": region}, f"'preset:bandpo-kl', or a bandpo.Region, got {region!r}")
            for region in (0.05, True, None, ["kl@0.05"])
        ),
        ({"epsilon": 0.1}, "epsilon must be left out"),
        ({"epsilon_high": 0.28}, "epsilon_high must be left out"),
        ({"loss_type": "cispo"}, "loss_type must be one of grpo, bnpo, dr_grpo, dapo, luspo"),
        ({"loss_type": "sapo"}, "loss_type must be"),
        ({"loss_type": "vespo"}, "loss_type must be"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be 'token'"),
        ({"delta": 3.0}, "delta, a cap of the ratio in TRL, must be left out with a region"),
        ({"delta": "3"}, "got '3'; region='(kl@0.01).cap(10)' has a cap where"),
        ({"use_liger_kernel": True}, "use_kernels"),
        ({"anchor": "rollout"}, "use_vllm"),
        ({"anchor": "new"}, "anchor must be one of old, rollout"),
        ({"correction": "icepop"}, "use_vllm"),
        ({"correction": "dapo", "use_vllm": True}, "correction must be one of icepop"),
        ({"correction": "icepopp", "use_vllm": True}, "did you mean 'icepop'"),
        *(
            ({"correction": given, "use_vllm": True}, "correction must be the name of a preset")
            for given in (Correction(Clip(0.5, 4)), {"region": "clip@0.5,4"}, 2.0)
        ),
    ],
)
def test_settings_that_trl_cannot_follow_are_refused_in_the_configuration(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BandpoError) as raised:
        BandPOConfig(**settings(tmp_path, **changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("loss_type", "cispo", "loss_type must be one of"),
        ("importance_sampling_level", "sequence", "importance_sampling_level must be 'token'"),
        ("epsilon", 0.1, "epsilon must be left out"),
        ("delta", 3.0, "got 3.0; region="),
        ("use_liger_kernel", True, "use_liger_kernel must be False"),
        ("region", "kll@0.05", "did you mean 'kl'"),
        ("correction", Correction(Clip(0.5, 4)), "correction must be the name of a preset"),
    ],
)
def test_a_field_that_is_assigned_later_is_refused_before_the_model_is_loaded(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    config = BandPOConfig(**settings(tmp_path))
    setattr(config, field, value)
    with pytest.raises(BandpoError) as raised:
        BandPOTrainer("no/model", example.repeats, config)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("delta", 1.5, "delta, a cap of the ratio in TRL, must be left out"),
        ("epsilon_high", 0.28, "epsilon_high must be left out"),
        ("region", "kl@0.001", "must be set before the trainer is made"),
        ("schedule", "linear(0.1, 0.02, 10)", "must be set before the trainer is made"),
        ("record", "tokens", "must be set before the trainer is made"),
    ],
)
def test_a_field_that_is_assigned_after_the_trainer_is_made_is_refused_before_the_first_step(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    trainer = trainer_of(Recorder, BandPOConfig(**settings(tmp_path)))
    setattr(trainer.args, field, value)
    with pytest.raises(InvalidValueError, match=message):
        trainer.train()
    assert trainer.steps == []


def test_a_region_that_is_assigned_later_is_that_of_the_trainer(tmp_path: Path) -> None:
    config = BandPOConfig(**settings(tmp_path))
    config.region = Clip(0.2, 0.28)
    assert trainer_of(BandPOTrainer, config).region == Clip(0.2, 0.28)
    assert config.region == "clip@0.2,0.28"


def test_a_configuration_without_a_region_is_refused_before_the_model_is_loaded(
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidTypeError, match="args must be a BandPOConfig"):
        BandPOTrainer("no/model", example.repeats, GRPOConfig(**settings(tmp_path)))
    with pytest.raises(InvalidTypeError, match="args must be a BandPOConfig"):
        BandPOTrainer("no/model", example.repeats)


def test_a_command_line_and_a_file_fill_the_region(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nregion: kl@0.01|clip@0.2,0.28\n"
    )
    parser = TrlParser(BandPOConfig)
    (config,) = parser.parse_args_and_config(["--config", str(file)])
    assert config.region == "kl@0.01|clip@0.2,0.28"
    (config,) = TrlParser(BandPOConfig).parse_args_and_config(
        [
            "--config",
            str(file),
            "--region",
            "(kl@0.1).cap(10)",
            "--schedule",
            "cosine(0.1, 0.01, 9)",
        ]
    )
    assert (config.region, config.schedule) == ("(kl@0.1).cap(10)", "cosine(0.1, 0.01, 9)")
    with pytest.raises(InvalidValueError, match="kll"):
        TrlParser(BandPOConfig).parse_args_and_config(["--config", str(file), "--region", "kll@1"])
    assert "--region" in TrlParser(BandPOConfig).format_help()


def test_a_region_becomes_text_so_that_the_arguments_can_be_saved(tmp_path: Path) -> None:
    region = Band("kl", 0.05).cap(10) | Clip(0.2, 0.28)
    config = BandPOConfig(**settings(tmp_path, region=region))
    assert isinstance(config.region, str)
    assert region_from_spec(config.region) == region
    assert json.loads(config.to_json_string())["region"] == config.region
    assert pickle.loads(pickle.dumps(config)).region == config.region  # noqa: S301
    with pytest.raises(InvalidValueError, match="has no spec"):
        BandPOConfig(**settings(tmp_path, region=Band("kl", 0.05).table()))


# Warnings and hooks


def test_a_run_in_which_nothing_can_clip_warns_and_has_no_clip(tmp_path: Path) -> None:
    options = settings(
        tmp_path, num_iterations=1, steps_per_generation=2, max_steps=2, logging_steps=2
    )
    with pytest.warns(UserWarning, match="nothing can clip.*num_iterations to 2.*= 2") as caught:
        trainer = trainer_of(BandPOTrainer, BandPOConfig(**options))
    assert sum("nothing can clip" in str(warning.message) for warning in caught) == 1
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["clip_ratio/region_mean"] for line in lines] == [0.0]
    assert lines[0]["band/approx_kl"] == 0.0
    for changes in ({"num_iterations": 2}, {"steps_per_generation": 4}):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="nothing can clip")
            band_trainer(tmp_path, **{**options, **changes})


@pytest.mark.filterwarnings("ignore:nothing can clip")
def test_another_version_of_trl_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "_WARNED", set())
    monkeypatch.setattr(metadata, "version", lambda name: "1.17.0")
    with pytest.warns(VersionWarning, match="trl is 1.17.0; .* tested with 1.16"):
        band_trainer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VersionWarning)
        band_trainer(tmp_path)


def no_loss(self: Any, model: Any, inputs: Any) -> Any:
    """A loss of a TRL to come, which has no epsilons."""
    return self._get_per_token_logps_and_entropies(inputs["old_per_token_logps"])


def other_entry(self: Any, model: Any, inputs: Any) -> Any:
    """A caller that has a loss of its own, as before TRL 1.0 with Liger."""


@pytest.mark.parametrize(
    ("hook", "change", "missing"),
    [
        ("_compute_loss", no_loss, "'epsilon_low' in no_loss"),
        ("compute_loss", other_entry, "'_compute_loss' in other_entry"),
        ("_get_per_token_logps_and_entropies", None, "_get_per_token_logps_and_entropies"),
        ("__module__", "unsloth_compiled_cache.UnslothGRPOTrainer", "Unsloth"),
    ],
)
def test_a_trl_without_the_hook_is_an_import_error_that_names_it(
    hook: str, change: Any, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change is None:
        monkeypatch.delattr(GRPOTrainer, hook)
    else:
        monkeypatch.setattr(GRPOTrainer, hook, change)
    monkeypatch.delitem(sys.modules, adapter.__name__)
    with pytest.raises(MissingHookError, match=f"trl {metadata.version('trl')} has no") as raised:
        importlib.import_module(adapter.__name__)
    assert missing in str(raised.value)


def test_rloo_has_one_ratio_a_sequence_and_so_no_adapter() -> None:
    read = RLOOTrainer._compute_loss.__code__.co_consts
    assert "old_logps" in read
    assert "old_per_token_logps" not in read


# The asynchronous trainer


class Idle:
    """Stands for the processes of vLLM, which a loss does not need."""

    rollout_buffer = None
    metrics_queue: queue.Queue[Any] = queue.Queue()

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def test_the_asynchronous_trainer_has_the_loss_of_policy_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "none")  # which TRL reads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bandpo.integrations.trl_async import AsyncBandPOConfig, AsyncBandPOTrainer
    example.toy_model().save_pretrained(tmp_path)
    example.toy_tokenizer().save_pretrained(tmp_path)
    options: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    config = AsyncBandPOConfig(**options, max_steps=2, dtype="float32", region=REGION)
    trainer = AsyncBandPOTrainer(
        str(tmp_path),
        example.repeats,
        config,
        train_dataset=example.prompts(),
        rollout_worker=Idle(),
        weight_transfer=Idle(),
    )
    batch = trainer_batch().packed()
    count = len(batch.old_log_prob)
    held: dict[str, torch.Tensor] = {}

    def model(**inputs: Any) -> Any:
        return SimpleNamespace(log_probs=held["log_prob"][None], entropy=torch.zeros(1, count))

    row = torch.arange(count)[None]
    inputs = {
        "attention_mask": torch.ones(1, count, dtype=torch.long),
        "input_ids": row,
        "position_ids": row,
        "shift_labels": row,
        "token_index": row,
        "old_log_probs": batch.old_log_prob[None],
        "advantages": batch.advantages[None],
        "segment_id": torch.zeros(1, count, dtype=torch.long),
        "global_n_tokens": torch.tensor([float(count)]),
        "global_n_forward_tokens": torch.tensor([float(count)]),
        "mean_seq_len": torch.tensor([float(count)]),
        "tree_max_seqlens": torch.tensor([[1, 1]]),
        **{f"tree_{n}": row for n in ("kv_index", "cu_seqlens_q", "cu_seqlens_k")},
    }
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()

    def loss(log_prob: torch.Tensor) -> Any:
        held["log_prob"] = log_prob
        return trainer.compute_loss(model, inputs)

    assert_same(batch.of(loss), batch.wanted(region=REGION))
    ones = torch.ones(count)
    wanted = policy_loss(
        *(batch.old_log_prob, batch.log_prob, batch.advantages, ones), region=REGION
    )
    assert float(wanted.metrics["clip_fraction_low"]) * float(wanted.metrics["clip_fraction_high"])
    metrics = trainer._metrics["train"]
    for side in ("low", "high"):
        assert metrics[f"clip_ratio/{side}_mean"] == pytest.approx(
            [float(wanted.metrics[f"clip_fraction_{side}"])]
        )
    logged = {"loss": 0.0}
    trainer.log(logged)
    assert logged["band/gradient_removed"] == pytest.approx(
        float(wanted.metrics["gradient_removed"]), rel=1e-5
    )
    assert trainer.epsilon_low == trainer.epsilon_high == config.epsilon


# The record


def test_a_record_has_the_tokens_of_the_training_alone(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    config = BandPOConfig(
        **settings(
            tmp_path, region=REGION, record=str(folder), max_steps=20, report_to=[], beta=0.0
        )
    )
    trainer = trainer_of(Recorder, config)
    trainer.train()
    logs = list(read_tokens(folder))
    steps = sorted({int(step) for log in logs for step in log.step})
    assert len(steps) == 2  # one in each run of ten, of an optimiser step's two micro-batches
    seen = [trainer.steps[2 * step + part] for step in steps for part in (0, 1)]
    for name, column in (("old", "old_log_prob"), ("log_prob", "log_prob")):
        wanted = torch.cat([batch[name][batch["mask"] == 1] for batch in seen])
        found = torch.cat([torch.as_tensor(getattr(log, column)) for log in logs])
        torch.testing.assert_close(found.float().sort()[0], wanted.sort()[0], rtol=0, atol=0)
    metadata = read_tokens(folder).metadata
    assert (metadata.temperature, metadata.old_policy) == (config.temperature, "trainer")
    assert metadata.rule == {"region": REGION}


@pytest.mark.parametrize("record", ["", " ", 3, True])
def test_a_record_that_is_no_folder_is_refused_in_the_configuration(
    tmp_path: Path, record: Any
) -> None:
    with pytest.raises(InvalidTypeError, match="record must be the path of a folder, got"):
        BandPOConfig(**settings(tmp_path, record=record))


# Heads


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the number of elements of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


class Kept:
    """Tensors that a graph keeps for its backward pass."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors.append(tensor)
        return tensor


WORDS = 500
"""Size of the vocabulary, so that the logits are the largest tensor of a model without the head."""


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_loss_on_the_fused_head_is_that_on_full_logits(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "_CHUNKED_LOGPROB_CHUNK_SIZE", 100)
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 64)
    config = example.toy_model().config
    config.vocab_size = WORDS
    plain, fused = Qwen2ForCausalLM(config), Qwen2ForCausalLM(config)
    fused.load_state_dict(plain.state_dict())
    heads.add_fused_lm_head(fused, temperature=temperature)
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (64, 17), generator=make)
    labels = ids.clone()
    labels[:, :9] = -100
    labels[0, 12:] = -100  # padding
    mask = labels[:, 1:] != -100
    with torch.no_grad():
        logits = plain(ids).logits[:, :-1] / temperature
        taken = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    old = taken + 2.0 * torch.randn(taken.shape, generator=make)
    advantages = torch.randn(64, generator=make)
    results = []
    for model in (plain, fused):
        watch = LargestTensor()
        with watch:
            if model is fused:
                log_prob = model(ids, labels=labels, fused_lm_head=True).log_probs
            else:
                logits = model(ids).logits[:, :-1] / temperature
                log_prob = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            kept = Kept()
            with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
                result = policy_loss(old, log_prob, advantages, mask, region=REGION)
            torch.autograd.backward(result.loss)
        assert max(tensor.numel() for tensor in kept.tensors) <= log_prob.numel()
        weights = [weight.grad for weight in model.parameters()]
        results.append((result, weights, watch.elements))
    (wanted, gradients, whole), (found, ours, chunk) = results
    assert float(wanted.metrics["clip_fraction_low"]) * float(wanted.metrics["clip_fraction_high"])
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    assert whole >= 64 * 16 * WORDS > 4 * chunk


# The example, the page and the vectors


def test_the_example_runs(capfd: pytest.CaptureFixture[str]) -> None:
    trainer = example.main(["--max_steps", "4", "--logging_steps", "2", "--region", "kl@0.01"])
    assert trainer.state.global_step == 4
    assert trainer.region == Band("kl", 0.01)


PAGE = Path(__file__).parents[2] / "docs/integrations/trl.md"


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    training, head = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    trainer = settings(tmp_path, max_steps=2)
    del trainer["num_iterations"]
    names = {
        "settings": trainer,
        "model": example.toy_model(),
        "reward": example.repeats,
        "dataset": example.prompts(),
        "tokenizer": example.toy_tokenizer(),
    }
    exec(compile(training, PAGE.name, "exec"), names)  # noqa: S102 -- our own text
    assert names["trainer"].state.global_step == 2
    ids = torch.randint(3, 23, (4, 9))
    names |= {
        "model": example.toy_model(),
        "ids": ids,
        "labels": ids,
        "old_log_prob": torch.full((4, 8), -3.0),
        "advantages": torch.ones(4),
    }
    exec(compile(head, PAGE.name, "exec"), names)  # noqa: S102 -- our own text
    assert names["log_prob"].shape == (4, 8)


def test_the_page_names_every_metric_and_field(tmp_path: Path) -> None:
    text = PAGE.read_text()
    trainer = band_trainer(tmp_path, max_steps=2, logging_steps=2, **SCHEDULED)
    trainer.train()
    logged = {name for name in trainer.state.log_history[0] if name.startswith("band/")}
    assert len(logged) > 20
    for name in logged:
        short = re.sub(r"_by_probability/.*", "_by_probability", name.removeprefix("band/"))
        assert short.replace("_fraction_high", "_fraction_low") in text, name
    for own in set(BandPOConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__):
        assert f"| `{own}` |" in text


def test_the_conformance_vectors_differ_where_the_page_says() -> None:
    report = framework_report("trl", read_vectors())
    assert len(report.verdicts) == 207
    assert sum(verdict.agrees for verdict in report.verdicts) == 128
    kinds = {"bfloat16", "padding", "empty-row", "ratio89"}
    other = {(v.preset, v.case) for v in report.verdicts if not v.agrees and v.case not in kinds}
    assert other == {("sapo", "float32"), ("sapo", "split")}
    assert all(v.agrees for v in report.verdicts if (v.mode, v.case) == ("token-mean", "empty-row"))
