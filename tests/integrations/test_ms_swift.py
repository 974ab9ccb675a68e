"""ms-swift: its GRPO trainer with a band, on the contract of the method that clips (4.6.0)."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from bandpo.error import InvalidTypeError, InvalidValueError, MissingHookError
from support.packages import fake, fresh, version_of
from support.trainer_batch import REGION, TrainerBatch, assert_same, trainer_batch


class GRPOTrainer:
    """ms-swift's trainer as it is documented: arguments, the method that clips, and its callers."""

    def __init__(self, model: Any = None, *, args: Any) -> None:
        self.args, self.loss_type = args, args.loss_type
        self.epsilon_low, self.epsilon_high = 0.2, 0.28

    def _compute_loss_and_metrics(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        log_prob = model(model_inputs)
        old = log_prob.detach()
        if grpo_batch.old_per_token_logps is not None:
            old = grpo_batch.old_per_token_logps
        if grpo_batch.rollout_per_token_logps is None:
            weights = torch.ones_like(log_prob)
        else:
            weights = grpo_batch.weights
        ratio = torch.exp(log_prob - old)
        kept = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        if self.args.delta is not None:
            ratio = ratio.clamp(max=self.args.delta)
        advantages, mask = grpo_batch.advantages, grpo_batch.completion_mask
        losses = -torch.minimum(ratio * advantages, kept * advantages) * weights * mask
        lengths = mask.sum(-1).clamp(min=1)
        clipped = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        clipped = clipped | (ratio > 1 + self.epsilon_high) & (advantages > 0)
        loss = {
            "grpo": lambda: (losses.sum(-1) / lengths).mean(),
            "bnpo": lambda: losses.sum() / mask.sum(),
            "dr_grpo": lambda: losses.sum() / (len(mask) * 10),
            "dapo": lambda: losses.sum() / grpo_batch.num_items_in_batch,
        }[self.loss_type]()
        return loss, {"region_clip_mean": (clipped * mask).sum() / mask.sum()}

    def _compute_loss_single(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        return self._compute_loss_and_metrics(model, model_inputs, grpo_batch)

    def _compute_loss_chunked(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        size = len(grpo_batch.completion_mask) // 2
        parts = []
        for rows in (slice(0, size), slice(size, None)):
            part = SimpleNamespace(
                **{
                    name: value[rows] if isinstance(value, torch.Tensor) and value.ndim else value
                    for name, value in vars(grpo_batch).items()
                }
            )
            loss, _ = self._compute_loss_and_metrics(model, model_inputs[rows], part)
            parts.append(loss * len(part.completion_mask))
        return sum(parts) / len(grpo_batch.completion_mask), {}


@pytest.fixture
def ms_swift(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter, where ms-swift's trainer is the contract."""
    version_of(monkeypatch, "4.6.0")
    mapping = {"grpo": "swift...GRPOTrainer"}
    factory = type("TrainerFactory", (), {"TRAINER_MAPPING": mapping})
    fake(monkeypatch, "swift.rlhf_trainers", GRPOTrainer=GRPOTrainer)
    fake(monkeypatch, "swift.trainers", TrainerFactory=factory)
    module = fresh(monkeypatch, "bandpo.integrations.ms_swift")
    module.mapping = mapping
    return module


def arguments(**others: Any) -> SimpleNamespace:
    given = {"loss_type": "grpo", "importance_sampling_level": "token", "use_liger_kernel": False}
    return SimpleNamespace(**{**given, "delta": None, **others})


def inputs(batch: TrainerBatch, *, rollout: bool = False) -> SimpleNamespace:
    """ms-swift's batch of a step."""
    return SimpleNamespace(
        completion_mask=batch.response_mask,
        old_per_token_logps=batch.old_log_prob,
        rollout_per_token_logps=batch.rollout_log_prob if rollout else None,
        weights=batch.weights,
        advantages=batch.advantages,
        num_items_in_batch=batch.response_mask.sum(),
    )


MODES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_agg_mode": "seq-mean-token-mean", "global_batch_size": 4},
    "bnpo": {"loss_agg_mode": "token-mean"},
    "dr_grpo": {
        "loss_agg_mode": "seq-mean-token-sum-norm",
        "loss_scale_factor": 10,
        "global_batch_size": 4,
    },
    "dapo": {"loss_agg_mode": "token-mean"},
}


@pytest.mark.parametrize("loss_type", MODES)
def test_loss_and_gradient_are_those_of_policy_loss(ms_swift: Any, loss_type: str) -> None:
    batch = trainer_batch()
    ms_swift.install(region=REGION)
    trainer = ms_swift.BandGRPOTrainer(args=arguments(loss_type=loss_type))
    found = batch.of(lambda now: trainer._compute_loss_single(lambda x: x, now, inputs(batch))[0])
    assert_same(found, batch.wanted(region=REGION, **MODES[loss_type]))
    _, metrics = trainer._compute_loss_single(lambda x: x, batch.log_prob, inputs(batch))
    assert metrics["region_clip_mean"] > 0
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.28)


def test_parts_of_a_batch_have_the_bounds_of_their_tokens(ms_swift: Any) -> None:
    batch = trainer_batch()
    ms_swift.install(region=REGION)
    trainer = ms_swift.BandGRPOTrainer(args=arguments())
    found = batch.of(lambda now: trainer._compute_loss_chunked(lambda x: x, now, inputs(batch))[0])
    assert_same(found, batch.wanted(region=REGION, **MODES["grpo"]))


def test_weights_and_the_anchor_are_of_the_rollout_policy(ms_swift: Any) -> None:
    batch = trainer_batch()
    ms_swift.install(region=REGION, anchor="rollout")
    trainer = ms_swift.BandGRPOTrainer(args=arguments(loss_type="bnpo"))
    given = inputs(batch, rollout=True)
    found = batch.of(lambda now: trainer._compute_loss_single(lambda x: x, now, given)[0])
    wanted = batch.wanted(
        region=REGION, anchor_log_prob=batch.rollout_log_prob, rollout_is_weights=batch.weights
    )
    assert_same(found, wanted)
    with pytest.raises(InvalidValueError, match="anchor must be 'old' with ms-swift where"):
        trainer._compute_loss_single(lambda x: x, batch.log_prob, inputs(batch))


def test_without_old_log_probs_nothing_clips(ms_swift: Any) -> None:
    batch = trainer_batch()
    ms_swift.install(region=REGION)
    trainer = ms_swift.BandGRPOTrainer(args=arguments())
    given = inputs(batch)
    given.old_per_token_logps = None
    _, metrics = trainer._compute_loss_single(lambda x: x, batch.log_prob, given)
    assert metrics["region_clip_mean"] == 0


def test_the_numbers_are_put_back_after_an_error(ms_swift: Any) -> None:
    batch = trainer_batch()
    ms_swift.install(region=REGION)
    trainer = ms_swift.BandGRPOTrainer(args=arguments())
    given = inputs(batch)
    given.advantages = None
    with pytest.raises(TypeError):
        trainer._compute_loss_single(lambda x: x, batch.log_prob, given)
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.28)


def test_the_factory_builds_the_trainer_of_the_last_rule(ms_swift: Any) -> None:
    for region in ("kl@0.5", REGION):
        ms_swift.install(region=region)
    module, _, name = ms_swift.mapping["grpo"].rpartition(".")
    assert (module, getattr(ms_swift, name)) == (ms_swift.__name__, ms_swift.BandGRPOTrainer)
    assert repr(ms_swift.BandGRPOTrainer.region) == "(Band('kl', 0.05) & Clip(1.0, 9.0))"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        *(
            ({"loss_type": name}, f"loss_type.*{name}")
            for name in ("cispo", "sapo", "real", "fipo")
        ),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be 'token'"),
        ({"importance_sampling_level": "sequence_token"}, "got 'sequence_token'"),
        ({"use_liger_kernel": True}, "use_liger_kernel must be False"),
    ],
)
def test_losses_without_a_clip_of_tokens_are_refused_at_construction(
    ms_swift: Any, options: dict[str, Any], match: str
) -> None:
    ms_swift.install(region=REGION)
    with pytest.raises(InvalidValueError, match=match):
        ms_swift.BandGRPOTrainer(args=arguments(**options))


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"preset": "dppo-kl"}, "surrogate must be 'min-clip' with ms-swift"),
        ({"preset": "tis"}, "preset must be left out with ms-swift"),
        ({"region": "kl@0.05", "schedule": "constant(0.1)"}, "schedule must be left out"),
        ({"region": "kll@0.05"}, "kll"),
        ({"regoin": REGION}, "regoin"),
    ],
)
def test_wrong_rules_are_refused_when_they_are_installed(
    ms_swift: Any, rule: dict[str, Any], match: str
) -> None:
    with pytest.raises(InvalidValueError, match=match):
        ms_swift.install(**rule)
    assert ms_swift.mapping["grpo"] == "swift...GRPOTrainer"


def test_a_trainer_without_a_rule_is_refused(ms_swift: Any) -> None:
    with pytest.raises(InvalidTypeError, match="settings must be set by install"):
        ms_swift.BandGRPOTrainer(args=arguments())


def test_a_method_that_reads_no_epsilons_is_an_import_error(
    ms_swift: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GRPOTrainer, "_compute_loss_and_metrics", lambda self, *_: None)
    with pytest.raises(MissingHookError, match=r"ms-swift 4\.6\.0 has no 'epsilon_low' in"):
        fresh(monkeypatch, "bandpo.integrations.ms_swift")


def test_the_plugin_of_the_example_installs_the_rule(ms_swift: Any) -> None:
    runpy.run_path(str(Path(__file__).parents[2] / "examples/ms_swift/band.py"))
    assert ms_swift.mapping["grpo"] == f"{ms_swift.__name__}.BandGRPOTrainer"
