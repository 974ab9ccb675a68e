"""ms-swift: its GRPO trainer with a band, on ms-swift itself (make test-ms-swift) or a contract."""

from __future__ import annotations

import runpy
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from bandpo.error import InvalidTypeError, InvalidValueError, MissingHookError
from support.packages import fake, fresh, is_installed, version_of
from support.trainer_batch import REGION, TrainerBatch, assert_same, trainer_batch

INSTALLED = is_installed("swift")


class GRPOTrainer:
    """ms-swift's trainer as it is documented: arguments, the method that clips, and its callers."""

    args: Any
    loss_type: str
    max_completion_length: int
    rollout_importance_sampling_mode: str | None
    epsilon_low: Any
    epsilon_high: Any
    _get_per_token_logps_and_entropies: Any

    def __init__(self, model: Any = None, *, args: Any) -> None: ...

    def _compute_loss_and_metrics(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        log_prob, _ = self._get_per_token_logps_and_entropies(model, model_inputs, grpo_batch)
        old = log_prob.detach()
        if grpo_batch.old_per_token_logps is not None:
            old = grpo_batch.old_per_token_logps
        weights = torch.ones_like(log_prob)
        if self.rollout_importance_sampling_mode is not None:
            weights = (old - grpo_batch.rollout_per_token_logps).exp().clamp(max=1.01)
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
            "dr_grpo": lambda: losses.sum() / (len(mask) * self.max_completion_length),
            "dapo": lambda: losses.sum() / grpo_batch.num_items_in_batch,
        }[self.loss_type]()
        return loss, {"clipping": {"region_clip_mean": (clipped * mask).sum() / mask.sum()}}

    def _compute_loss_single(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        return self._compute_loss_and_metrics(model, model_inputs, grpo_batch)

    def _compute_loss_chunked(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        size = self.args.per_device_train_batch_size
        total = torch.tensor(0.0)
        for start in range(0, len(grpo_batch.completion_mask), size):
            rows = slice(start, start + size)
            part, given = (
                {name: value[rows] if _is_by_row(value) else value for name, value in of.items()}
                for of in (vars(grpo_batch), model_inputs)
            )
            loss, _ = self._compute_loss_and_metrics(model, given, SimpleNamespace(**part))
            total = total + loss * len(part["completion_mask"])
        return total / len(grpo_batch.completion_mask)


def _is_by_row(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


@pytest.fixture
def ms_swift(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter, and the trainer of ms-swift where it is installed, otherwise the contract."""
    if INSTALLED:
        module = fresh(monkeypatch, "bandpo.integrations.ms_swift")
        mapping = module.TrainerFactory.TRAINER_MAPPING
        monkeypatch.setitem(mapping, "grpo", mapping["grpo"])
    else:
        version_of(monkeypatch, "4.6.0")
        mapping = {"grpo": "swift.rlhf_trainers.GRPOTrainer"}
        factory = type("TrainerFactory", (), {"TRAINER_MAPPING": mapping})
        fake(monkeypatch, "swift.rlhf_trainers", GRPOTrainer=GRPOTrainer)
        fake(monkeypatch, "swift.trainers", TrainerFactory=factory)
        module = fresh(monkeypatch, "bandpo.integrations.ms_swift")
    module.mapping = mapping
    return module


def arguments(**others: Any) -> SimpleNamespace:
    given = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "use_liger_kernel": False,
        "delta": None,
        "log_entropy": False,
        "top_entropy_quantile": 1.0,
        "per_device_train_batch_size": 2,
    }
    return SimpleNamespace(**{**given, **others})


def built(ms_swift: Any, **others: Any) -> Any:
    """A trainer with what its losses read, though ms-swift's own constructor needs a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ms_swift.GRPOTrainer, "__init__", lambda self, **_: None)
        trainer = ms_swift.BandGRPOTrainer(args=arguments())
    kept = {"gather_for_metrics": torch.atleast_1d, "num_processes": 1}
    given = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "max_completion_length": 10,
        "beta": 0.0,
        "kl_in_reward": False,
        "compute_entropy": False,
        "overlong_filter": False,
        "rollout_importance_sampling_mode": None,
        "rollout_importance_sampling_threshold": 1.01,
        "log_rollout_offpolicy_metrics": False,
        "disable_rollout_importance_sampling": False,
        "off_policy_sequence_mask_delta": None,
        "_has_teacher": False,
        "sdar_loss_coef": 0.0,
        "chord_sft_iterator": None,
        "model_accepts_loss_kwargs": True,
        "is_multimodal": False,
        "_metrics": {"train": defaultdict(list)},
        "model": SimpleNamespace(training=True),
        "template": SimpleNamespace(padding_free=False),
        "accelerator": SimpleNamespace(**kept),
        "args": arguments(),
        "_get_per_token_logps_and_entropies": lambda model, inputs, *_, **__: (
            inputs["log_prob"],
            None,
        ),
    }
    vars(trainer).update({**given, **others})
    return trainer


def inputs(batch: TrainerBatch, **others: Any) -> Any:
    """ms-swift's batch of a step."""
    given = {
        "completion_mask": batch.response_mask,
        "truncated_mask": torch.zeros(len(batch.response_mask), dtype=torch.bool),
        "seq_lengths": batch.response_mask.sum(1),
        "old_per_token_logps": batch.old_log_prob,
        "rollout_per_token_logps": None,
        "advantages": batch.advantages,
        "num_items_in_batch": batch.response_mask.sum(),
        **others,
    }
    if INSTALLED:
        from swift.rl_core.data import GRPOBatch

        return GRPOBatch(**given)
    return SimpleNamespace(**given)


def of_tokens(log_prob: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of the model; its log-probs are among them."""
    return {"log_prob": log_prob, "input_ids": torch.zeros(log_prob.shape, dtype=torch.int64)}


def whole(trainer: Any, given: Any) -> Any:
    """Loss, and metrics, as a function of the log-probs."""
    return lambda now: trainer._compute_loss_and_metrics(None, of_tokens(now), given)


def value_of(trainer: Any, batch: TrainerBatch) -> Any:
    """The loss alone, likewise."""
    loss = whole(trainer, inputs(batch))
    return lambda now: loss(now)[0]


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
    trainer = built(ms_swift, loss_type=loss_type)
    loss = whole(trainer, inputs(batch))
    wanted = batch.wanted(region=REGION, **MODES[loss_type])
    assert_same(batch.of(lambda now: loss(now)[0]), wanted)
    assert loss(batch.log_prob)[1]["clipping"]["region_clip_mean"] > 0
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.28)


def test_parts_of_a_batch_have_the_bounds_of_their_tokens(ms_swift: Any) -> None:
    batch = trainer_batch()
    ms_swift.install(region=REGION)
    trainer, given = built(ms_swift), inputs(batch)
    found = batch.of(lambda now: trainer._compute_loss_chunked(None, of_tokens(now), given))
    assert_same(found, batch.wanted(region=REGION, **MODES["grpo"]))


def test_weights_and_the_anchor_are_of_the_rollout_policy(ms_swift: Any) -> None:
    batch = trainer_batch()
    ms_swift.install(region=REGION, anchor="rollout")
    trainer = built(ms_swift, loss_type="bnpo", rollout_importance_sampling_mode="token_truncate")
    loss = whole(trainer, inputs(batch, rollout_per_token_logps=batch.rollout_log_prob))
    weights = (batch.old_log_prob - batch.rollout_log_prob).exp().clamp(max=1.01)
    wanted = batch.wanted(
        region=REGION, anchor_log_prob=batch.rollout_log_prob, rollout_is_weights=weights
    )
    assert_same(batch.of(lambda now: loss(now)[0]), wanted)
    with pytest.raises(InvalidValueError, match="anchor must be 'old' with ms-swift where"):
        whole(trainer, inputs(batch))(batch.log_prob)


def test_without_old_log_probs_nothing_clips(ms_swift: Any) -> None:
    batch = trainer_batch()
    ms_swift.install(region=REGION)
    loss = whole(built(ms_swift), inputs(batch, old_per_token_logps=None))
    assert loss(batch.log_prob)[1]["clipping"]["region_clip_mean"] == 0


def test_the_numbers_are_put_back_after_an_error(ms_swift: Any) -> None:
    batch = trainer_batch()
    ms_swift.install(region=REGION)
    trainer = built(ms_swift)
    with pytest.raises(TypeError):
        whole(trainer, inputs(batch, advantages=None))(batch.log_prob)
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.28)


def test_a_trainer_keeps_its_rule_and_the_factory_has_the_last(ms_swift: Any) -> None:
    batch, trainers = trainer_batch(), []
    for region in ("kl@0.5", REGION):
        ms_swift.install(region=region)
        trainers.append((region, built(ms_swift, loss_type="bnpo")))
    module, _, name = ms_swift.mapping["grpo"].rpartition(".")
    assert (module, getattr(ms_swift, name)) == (ms_swift.__name__, ms_swift.BandGRPOTrainer)
    for region, trainer in trainers:
        assert_same(batch.of(value_of(trainer, batch)), batch.wanted(region=region))


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
        ({"delta": 20.0}, "delta, a cap of the ratio in ms-swift, must be left out.* got 20.0"),
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
    assert ms_swift.mapping["grpo"] == "swift.rlhf_trainers.GRPOTrainer"


def test_a_trainer_without_a_rule_is_refused(ms_swift: Any) -> None:
    with pytest.raises(InvalidTypeError, match="settings must be set by install"):
        ms_swift.BandGRPOTrainer(args=arguments())


def test_a_method_that_reads_no_epsilons_is_an_import_error(
    ms_swift: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ms_swift.GRPOTrainer
    monkeypatch.setattr(theirs, "_compute_loss_and_metrics", lambda self, *_: None)
    with pytest.raises(MissingHookError, match=r"ms-swift 4\.6\.0 has no 'epsilon_low' in"):
        fresh(monkeypatch, "bandpo.integrations.ms_swift")


def test_the_plugin_of_the_example_installs_the_rule(ms_swift: Any) -> None:
    runpy.run_path(str(Path(__file__).parents[2] / "examples/ms_swift/band.py"))
    assert ms_swift.mapping["grpo"] == f"{ms_swift.__name__}.BandGRPOTrainer"
