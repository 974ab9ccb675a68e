"""OpenRLHF: its policy loss with a band, against the contract and against its own module."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from bandpo import Clip
from bandpo.correction import Correction
from bandpo.error import InvalidTypeError, InvalidValueError, MissingHookError
from bandpo.integrations.settings import LossSettings
from support.packages import fake, fresh, is_installed, version_of, without_init
from support.trainer_batch import REGION, assert_same, trainer_batch


class ContractLoss(torch.nn.Module):
    """`PolicyLoss` of OpenRLHF 0.11.2 as far as it is documented: what it is given and returns."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
    ) -> None:
        super().__init__()
        self.clip_eps_low, self.clip_eps_high = clip_eps_low, clip_eps_high
        self.token_level_loss, self.policy_loss_type = token_level_loss, policy_loss_type

    def forward(
        self,
        log_probs: Any,
        old_log_probs: Any,
        advantages: Any,
        action_mask: Any = None,
        rollout_log_probs: Any = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Any, ...]:
        ratio = (log_probs - old_log_probs).exp()
        kept = ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high)
        losses = -torch.minimum(ratio * advantages, kept * advantages) * action_mask
        clipped = ((kept * advantages < ratio * advantages) * action_mask).sum()
        if not self.token_level_loss:
            losses = losses / action_mask.sum(1, keepdim=True).clamp(min=1)
            count = global_batch_size or (action_mask.sum(1) > 0).sum()
        else:
            count = batch_num_tokens or action_mask.sum()
        loss = losses.sum() / count * dp_size
        return loss, clipped / action_mask.sum(), torch.zeros(()), None, None


INSTALLED = is_installed("openrlhf")
needs_openrlhf = pytest.mark.skipif(not INSTALLED, reason="needs OpenRLHF: make test-trainers")
needs_contract = pytest.mark.skipif(INSTALLED, reason="OpenRLHF itself is here")


@pytest.fixture
def openrlhf(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter on OpenRLHF's module of losses, which needs no GPU, or else on the contract."""
    loss = ContractLoss
    if INSTALLED:
        fake(monkeypatch, "deepspeed")
        without_init(monkeypatch, "openrlhf", "openrlhf.models")
        loss = importlib.import_module("openrlhf.models.loss").PolicyLoss
    else:
        version_of(monkeypatch, "0.11.2")
        fake(monkeypatch, "openrlhf.models.loss", PolicyLoss=loss)
    importlib.import_module("openrlhf.models").PolicyLoss = loss  # type: ignore[attr-defined]
    return fresh(monkeypatch, "bandpo.integrations.openrlhf")


RULE = LossSettings(REGION)

MODES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, {}),
    ({"token_level_loss": False}, {}, {"loss_agg_mode": "seq-mean-token-mean"}),
    ({}, {"dp_size": 2, "batch_num_tokens": 20.0}, {"dp_size": 2, "batch_num_tokens": 20.0}),
    (
        {"token_level_loss": False},
        {"dp_size": 2, "global_batch_size": 5.0},
        {"loss_agg_mode": "seq-mean-token-mean", "dp_size": 2, "global_batch_size": 5.0},
    ),
]


def called(loss_fn: Any, log_prob: Any, **counts: Any) -> Any:
    """The loss as OpenRLHF's actor calls it."""
    batch = trainer_batch()
    tensors = (log_prob, batch.old_log_prob, batch.advantages)
    mask = batch.response_mask.float()
    return loss_fn(*tensors, action_mask=mask, rollout_log_probs=batch.rollout_log_prob, **counts)


@pytest.mark.parametrize(("options", "counts", "wanted"), MODES)
def test_loss_and_gradient_are_those_of_policy_loss(
    openrlhf: Any, options: dict[str, Any], counts: dict[str, Any], wanted: dict[str, Any]
) -> None:
    batch = trainer_batch()
    loss_fn = openrlhf.BandPolicyLoss(settings=RULE, **options)
    found = batch.of(lambda log_prob: called(loss_fn, log_prob, **counts)[0])
    assert_same(found, batch.wanted(region=REGION, **wanted))
    assert called(loss_fn, batch.log_prob)[1] == pytest.approx(4 / 13)
    assert (loss_fn.clip_eps_low, loss_fn.clip_eps_high) == (0.2, 0.2)


def test_a_region_may_stand_at_the_rollout_policy(openrlhf: Any) -> None:
    batch = trainer_batch()
    loss_fn = openrlhf.BandPolicyLoss(settings=LossSettings(REGION, anchor="rollout"))
    wanted = batch.wanted(region=REGION, anchor_log_prob=batch.rollout_log_prob)
    assert_same(batch.of(lambda log_prob: called(loss_fn, log_prob)[0]), wanted)
    with pytest.raises(InvalidValueError, match="rollout_log_probs must be given"):
        loss_fn(batch.log_prob, batch.old_log_prob, batch.advantages, batch.response_mask)


@pytest.mark.parametrize(
    ("options", "correction"),
    [
        ({"is_correction_mode": "mask"}, Correction(Clip.between(0.97, 1.02))),
        ({"is_correction_mode": "clip"}, Correction(Clip.between(0.97, 1.02), action="truncate")),
    ],
)
@needs_openrlhf
def test_a_correction_of_openrlhf_is_ours(
    openrlhf: Any, options: dict[str, Any], correction: Correction
) -> None:
    batch = trainer_batch()
    given = {"is_correction_level": "token", "is_correction_threshold": [0.97, 1.02], **options}
    loss_fn = openrlhf.BandPolicyLoss(settings=RULE, **given)
    wanted = batch.wanted(
        region=REGION, correction=correction, rollout_log_prob=batch.rollout_log_prob
    )
    assert_same(batch.of(lambda log_prob: called(loss_fn, log_prob)[0]), wanted)


@needs_openrlhf
def test_a_dual_clip_of_openrlhf_is_ours(openrlhf: Any) -> None:
    batch = trainer_batch()
    loss_fn = openrlhf.BandPolicyLoss(settings=RULE, dual_clip=1.5)
    wanted = batch.wanted(region=REGION, dual_clip=1.5)
    assert_same(batch.of(lambda log_prob: called(loss_fn, log_prob)[0]), wanted)


def test_what_the_clamp_cannot_express_is_refused(openrlhf: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"policy_loss_type must be 'ppo'.* 'gspo'"):
        openrlhf.BandPolicyLoss(settings=RULE, policy_loss_type="gspo")
    with pytest.raises(InvalidTypeError, match="settings must be a LossSettings"):
        openrlhf.BandPolicyLoss(settings=REGION)
    rules: list[dict[str, Any]] = [
        {"correction": "tis"},
        {"preset": "dppo-kl"},
        {"schedule": "linear(0.1, 0.02, 9)"},
    ]
    for rule in rules:
        with pytest.raises(InvalidValueError, match="with OpenRLHF"):
            openrlhf.BandPolicyLoss(settings=LossSettings(**rule))
        with pytest.raises(InvalidValueError, match="with OpenRLHF"):
            openrlhf.install(**rule)


def test_install_puts_the_loss_where_the_actor_takes_it_from(
    openrlhf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = importlib.import_module("openrlhf.models")
    theirs = models.PolicyLoss
    for name in ("openrlhf.trainer", "openrlhf.trainer.ray"):
        fake(monkeypatch, name)
    actor = fake(monkeypatch, "openrlhf.trainer.ray.ppo_actor", PolicyLoss=theirs)
    openrlhf.install(region=REGION)
    for made in (models.PolicyLoss, actor.PolicyLoss):
        loss_fn = made(clip_eps_low=0.1, clip_eps_high=0.3)
        assert isinstance(loss_fn, openrlhf.BandPolicyLoss)
        assert loss_fn.region == RULE.region_or_source()


@needs_contract
def test_a_loss_without_its_epsilons_is_an_import_error(
    openrlhf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(torch.nn.Module):
        def forward(self, log_probs: Any) -> Any:
            return log_probs

    fake(monkeypatch, "openrlhf.models.loss", PolicyLoss=Other)
    with pytest.raises(MissingHookError, match=r"openrlhf 0\.11\.2 has no 'clip_eps_low' in"):
        fresh(monkeypatch, "bandpo.integrations.openrlhf")
