"""AReaL: its actor loss with a band, on the contract or on AReaL's own function."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from bandpo.error import InvalidTypeError, InvalidValueError, MissingHookError
from support.packages import fake, fresh, is_installed, version_of, without_init
from support.trainer_batch import REGION, TrainerBatch, assert_same, trainer_batch

INSTALLED = is_installed("areal")
needs_areal = pytest.mark.skipif(not INSTALLED, reason="needs AReaL: make test-trainers")


def contract_loss(
    logprobs: Any,
    proximal_logprobs: Any,
    old_logprobs: Any,
    advantages: Any,
    eps_clip: Any,
    loss_mask: Any,
    eps_clip_higher: Any = None,
    c_clip: float | None = None,
    rejection_sampling: Any = None,
    importance_sampling_level: str = "token",
    cu_seqlens: Any = None,
) -> Any:
    """AReaL's function as it is documented, without rejection and dual clip."""
    ratio = torch.where(loss_mask, (logprobs - proximal_logprobs).exp(), 0.0)
    kept = ratio.clamp(1 - eps_clip, 1 + (eps_clip if eps_clip_higher is None else eps_clip_higher))
    losses = torch.maximum(-advantages * ratio, -advantages * kept)
    clipped = (-advantages * ratio < -advantages * kept) & loss_mask
    return torch.where(loss_mask, losses, 0.0).sum() / loss_mask.sum(), {"clip_mask": clipped}


CALLER = """
def grpo_loss_fn(logprobs, data, eps_clip, use_sapo_loss=False, **others):
    if use_sapo_loss:
        return sapo_loss_fn(logprobs=logprobs)
    return ppo_actor_loss_fn(
        logprobs=logprobs,
        old_logprobs=data["logprobs"],
        advantages=data["advantages"],
        eps_clip=eps_clip,
        eps_clip_higher=None,
        loss_mask=data["loss_mask"],
        proximal_logprobs=data["prox_logp"],
        **others,
    )
"""
"""The actor's call of the loss, by a name of its module."""


@pytest.fixture
def areal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter, and a module in place of AReaL's actor, which imports the whole of AReaL."""
    loss = contract_loss
    if INSTALLED:
        # Its configurations import servers; they are types here.
        without_init(monkeypatch, "areal", "areal.utils", "areal.utils.functional", "areal.api")
        fake(monkeypatch, "areal.api.cli_args", RejectionSamplingConfig=SimpleNamespace)
        fake(monkeypatch, "areal.utils.data", KLEstimator=SimpleNamespace)
        name = "areal.utils.functional.functional"
        loss = importlib.import_module(name).ppo_actor_loss_fn
    else:
        version_of(monkeypatch, "1.0.4")

    actor = fake(
        monkeypatch, "areal.trainer.ppo.actor", ppo_actor_loss_fn=loss, sapo_loss_fn=lambda **_: 0
    )

    exec(CALLER, vars(actor))  # noqa: S102 -- our own text
    adapter = fresh(monkeypatch, "bandpo.integrations.areal")
    return SimpleNamespace(install=adapter.install, banded=adapter.banded, actor=actor)


def called(areal: Any, batch: TrainerBatch, **others: Any) -> Any:
    data = {
        "logprobs": batch.rollout_log_prob,
        "prox_logp": batch.old_log_prob,
        "advantages": batch.advantages,
        "loss_mask": batch.response_mask,
    }
    return lambda log_prob: areal.actor.grpo_loss_fn(log_prob, data, 0.2, **others)


BATCHES = {
    "padded": trainer_batch(),
    "packed": trainer_batch().packed(),
    "of NaN": trainer_batch().with_padding(math.nan),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_loss_and_gradient_are_those_of_policy_loss(areal: Any, kind: str) -> None:
    batch = BATCHES[kind]
    areal.install(region=REGION)
    loss = called(areal, batch)
    value, gradient = batch.of(lambda log_prob: loss(log_prob)[0])
    if kind == "of NaN":  # AReaL selects by the mask after the exponential
        gradient = torch.where(batch.response_mask, gradient, 0.0)
    assert_same((value, gradient), batch.wanted(region=REGION))
    assert loss(batch.log_prob)[1]["clip_mask"].sum() == 4


def test_a_region_may_stand_at_the_rollout_policy(areal: Any) -> None:
    batch = trainer_batch()
    areal.install(region=REGION, anchor="rollout")
    loss = called(areal, batch)
    wanted = batch.wanted(region=REGION, anchor_log_prob=batch.rollout_log_prob)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)


@needs_areal
def test_a_dual_clip_of_areal_is_ours(areal: Any) -> None:
    batch = trainer_batch()
    areal.install(region=REGION)
    loss = called(areal, batch, c_clip=1.5)
    wanted = batch.wanted(region=REGION, dual_clip=1.5)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)


def test_a_second_install_replaces_the_first(areal: Any) -> None:
    batch = trainer_batch()
    for region in ("kl@0.5", REGION):
        areal.install(region=region)
    loss = called(areal, batch)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), batch.wanted(region=REGION))


@pytest.mark.parametrize(
    "rule",
    [
        {"preset": "dppo-kl"},
        {"preset": "tis"},
        {"schedule": "constant(0.1)"},
        {"region": "kll@0.05"},
        {"regoin": REGION},
    ],
)
def test_wrong_rules_are_refused_when_they_are_installed(areal: Any, rule: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError):
        areal.install(**rule)


def test_a_ratio_of_a_sequence_is_refused(areal: Any) -> None:
    batch = trainer_batch()
    areal.install(region=REGION)
    with pytest.raises(InvalidValueError, match="importance_sampling_level must be 'token'"):
        called(areal, batch, importance_sampling_level="sequence")(batch.log_prob)


def test_a_loss_that_does_not_clip_is_refused(areal: Any) -> None:
    batch = trainer_batch()
    areal.install(region=REGION)
    with pytest.raises(InvalidValueError, match="use_sapo_loss must be false"):
        called(areal, batch, use_sapo_loss=True)(batch.log_prob)


def test_settings_of_another_type_are_refused(areal: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"settings must be a LossSettings.*'kl@0\.05'"):
        areal.banded(areal.actor.ppo_actor_loss_fn, "kl@0.05")


def test_an_actor_that_calls_another_loss_is_an_import_error(
    areal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(areal.actor, "grpo_loss_fn", lambda **tensors: None)
    with pytest.raises(MissingHookError, match=r"areal 1\.0\.4 has no 'ppo_actor_loss_fn' in"):
        areal.install(region=REGION)
