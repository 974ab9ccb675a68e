"""SkyRL: a loss in its registry, on the contract or on SkyRL's own registry and reductions."""

from __future__ import annotations

import importlib
import math
import pickle
import typing
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import typing_extensions

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.settings import LossSettings
from bandpo.presets import preset
from support.packages import fake, fresh, is_installed, version_of
from support.trainer_batch import REGION, TrainerBatch, assert_same, trainer_batch

UTILS = "skyrl.backends.skyrl_train.utils"
INSTALLED = is_installed("skyrl")
needs_skyrl = pytest.mark.skipif(not INSTALLED, reason="needs SkyRL: make test-trainers")

MAX_TOKENS = 10

REDUCTIONS: dict[str, dict[str, Any]] = {
    "token_mean": {"loss_agg_mode": "token-mean"},
    "token_mean_legacy": {"loss_agg_mode": "token-mean"},
    "sequence_mean": {"loss_agg_mode": "seq-mean-token-mean", "global_batch_size": 4},
    "seq_mean_token_sum_norm": {
        "loss_agg_mode": "seq-mean-token-sum-norm",
        "global_batch_size": 4,
        "loss_scale_factor": MAX_TOKENS,
    },
    "prompt_mean": {"loss_agg_mode": "token-mean"},
}
"""Reductions of SkyRL; with one prompt the last is the mean over its tokens."""


class ContractRegistry:
    """SkyRL's registry as it is documented: a name is registered once."""

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}

    def register(self, name: str, func: Any) -> None:
        assert name not in self._functions
        self._functions[name] = func

    def get(self, name: str) -> Any:
        return self._functions[name]

    def unregister(self, name: str) -> None:
        del self._functions[name]


def contract_correction(loss: Any, old: Any, rollout: Any, mask: Any, config: Any) -> Any:
    return loss, mask, {}


def contract_division(
    advantages: Any, mask: Any, reduction: str, micro_batch: int, max_tokens: int, prompts: Any
) -> Any:
    """What SkyRL divides the advantages by."""
    divisors = {
        "sequence_mean": len(mask) * mask.sum(1, keepdim=True).clamp(min=1),
        "seq_mean_token_sum_norm": len(mask) * max_tokens,
    }
    return advantages / divisors.get(reduction, mask.sum())


@pytest.fixture
def skyrl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter and SkyRL's module of losses, whose registry is empty of ours."""
    if INSTALLED:
        # Its configuration needs the one of Python 3.12.
        monkeypatch.setattr(typing, "TypedDict", typing_extensions.TypedDict)
        utils = importlib.import_module(f"{UTILS}.ppo_utils")
    else:
        version_of(monkeypatch, "0.3.0")
        utils = fake(
            monkeypatch,
            f"{UTILS}.ppo_utils",
            PolicyLossRegistry=ContractRegistry(),
            reduce_loss=lambda loss, mask: (loss * mask).sum(),
            apply_loss_reduction_to_advantages_minibatch=contract_division,
        )
        fake(
            monkeypatch,
            f"{UTILS}.off_policy_correction_utils",
            apply_off_policy_correction=contract_correction,
            off_policy_correction_enabled=lambda config: config.tis_ratio_type is not None,
        )
    adapter = fresh(monkeypatch, "bandpo.integrations.skyrl")
    registry = utils.PolicyLossRegistry

    def registered(**fields: Any) -> Any:
        adapter.register("bandpo", **fields)
        found = registry.get("bandpo")
        registry.unregister("bandpo")
        return found

    return SimpleNamespace(adapter=adapter, utils=utils, registered=registered)


def config(**correction: Any) -> Any:
    """The part of SkyRL's configuration that a loss reads."""
    if INSTALLED:
        from skyrl.train.config import AlgorithmConfig

        found = AlgorithmConfig(policy_loss_type="bandpo")
        for name, value in correction.items():
            setattr(found.off_policy_correction, name, value)
        return found
    off = SimpleNamespace(**{"tis_ratio_type": None, **correction})
    return SimpleNamespace(off_policy_correction=off)


def called(
    skyrl: Any, batch: TrainerBatch, rule: dict[str, Any], reduction: str, **correction: Any
) -> Any:
    """The loss as SkyRL's worker calls it, as a function of the log-probs."""
    mask = batch.response_mask.float()
    advantages = skyrl.utils.apply_loss_reduction_to_advantages_minibatch(
        batch.advantages, mask, reduction, len(mask), MAX_TOKENS, [(0, len(mask))]
    )
    loss = skyrl.registered(**rule)
    return lambda log_prob: loss(
        log_prob,
        batch.old_log_prob,
        advantages,
        config=config(**correction),
        loss_mask=mask,
        rollout_logprobs=batch.rollout_log_prob,
    )


@pytest.mark.parametrize("padding", [-1.0, math.nan])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["bandpo-kl", "dppo-tv", "cispo", "tis"])
def test_loss_and_gradient_are_those_of_policy_loss(
    skyrl: Any, name: str, reduction: str, padding: float
) -> None:
    batch = trainer_batch().with_padding(padding)
    if INSTALLED:  # which multiplies rollout log-probs by the mask
        padded = batch.rollout_log_prob.nan_to_num(nan=-1.0)
        batch = TrainerBatch(**{**vars(batch), "rollout_log_prob": padded})
    loss = called(skyrl, batch, {"preset": name}, reduction)
    corrected = preset(name).correction is not None
    rollout = {"rollout_log_prob": batch.rollout_log_prob} if corrected else {}
    wanted = batch.wanted(**{**preset(name).arguments(), **REDUCTIONS[reduction], **rollout})
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)


def test_micro_batches_add_up_to_the_whole(skyrl: Any) -> None:
    batch = trainer_batch()
    mask = batch.response_mask.float()
    advantages = skyrl.utils.apply_loss_reduction_to_advantages_minibatch(
        batch.advantages, mask, "token_mean", 2, MAX_TOKENS, None
    )
    loss = skyrl.registered(region=REGION)

    def both(log_prob: torch.Tensor) -> Any:
        parts = (slice(0, 2), slice(2, 4))
        return sum(
            loss(log_prob[p], batch.old_log_prob[p], advantages[p], config(), mask[p], None)[0]
            for p in parts
        )

    assert_same(batch.of(both), batch.wanted(region=REGION))


def test_a_region_may_stand_at_the_rollout_policy(skyrl: Any) -> None:
    batch = trainer_batch()
    loss = called(skyrl, batch, {"region": REGION, "anchor": "rollout"}, "token_mean")
    wanted = batch.wanted(region=REGION, anchor_log_prob=batch.rollout_log_prob)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)


@needs_skyrl
def test_a_correction_of_skyrl_is_ours(skyrl: Any) -> None:
    batch = trainer_batch()
    limits = {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.02}
    loss = called(skyrl, batch, {"region": REGION}, "token_mean", **limits)
    weights = (batch.old_log_prob - batch.rollout_log_prob).exp().clamp(max=1.02)
    wanted = batch.wanted(region=REGION, rollout_is_weights=weights)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)


def test_two_corrections_are_refused(skyrl: Any) -> None:
    batch = trainer_batch()
    loss = called(skyrl, batch, {"preset": "tis"}, "token_mean", tis_ratio_type="token")
    with pytest.raises(InvalidValueError, match="off_policy_correction must be left out"):
        loss(batch.log_prob)


def test_metrics_are_numbers(skyrl: Any) -> None:
    batch = trainer_batch()
    _, metrics = called(skyrl, batch, {"region": REGION}, "token_mean")(batch.log_prob)
    assert metrics["clip_ratio"] == pytest.approx(4 / 13)
    assert metrics["band/clip_fraction_low"] == pytest.approx(1 / 13)
    assert {type(value) for value in metrics.values()} <= {float}


@pytest.mark.parametrize(
    "rule",
    [
        {"preset": "ipo"},
        {"schedule": "linear(0.1, 0.02, 9)"},
        {"regoin": REGION},
        {"region": "kll@0.05"},
    ],
)
def test_wrong_rules_are_refused_when_they_are_registered(skyrl: Any, rule: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError):
        skyrl.adapter.register("bandpo", **rule)
    with pytest.raises(InvalidTypeError, match="settings must be a LossSettings"):
        skyrl.adapter.BandPolicyLoss(REGION)


def test_a_loss_pickles_for_ray(skyrl: Any) -> None:
    loss = skyrl.registered(region=REGION)
    content = pickle.dumps(loss)
    assert len(content) < 2048
    copied = pickle.loads(content)  # noqa: S301 -- our own bytes
    assert copied.loss.settings == LossSettings(REGION)
