"""torchrl's own losses with a band; it runs where torchrl is installed (make test-torchrl)."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torchrl")

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import (
    NormalParamExtractor,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.llm import GRPOLoss

from bandpo import region_from_spec
from bandpo.error import InvalidTypeError, InvalidValueError, MissingHookError
from bandpo.integrations.settings import LossSettings
from bandpo.integrations.torchrl import BandClipPPOLoss, BandGRPOLoss
from bandpo.presets import preset
from bandpo.schedule import Linear, ScheduledBand
from support.packages import fresh
from support.trainer_batch import REGION, TrainerBatch, assert_same, trainer_batch


class Dist:
    """What `GRPOLoss` reads of a policy's distribution: a mask, and log-probs of actions."""

    def __init__(self, log_prob: torch.Tensor, mask: torch.Tensor) -> None:
        self.mask, self._log_prob = mask, log_prob

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        return self._log_prob


class Actor(nn.Module):
    """A policy whose log-probs are the batch's."""

    in_keys = ()

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def get_dist(self, tensordict: TensorDict, **_: Any) -> Dist:
        return Dist(tensordict["now"], self.mask)

    _get_sft_dist = get_dist


def as_tensordict(batch: TrainerBatch, log_prob: torch.Tensor) -> TensorDict:
    tensors = {
        "advantage": batch.advantages[..., None],
        ("tokens", "full"): torch.zeros(batch.old_log_prob.shape, dtype=torch.int64),
        ("log_probs", "full"): batch.old_log_prob,
        "now": log_prob,
    }
    return TensorDict(tensors, [len(batch.advantages)])


def grpo(batch: TrainerBatch, **options: Any) -> BandGRPOLoss:
    return BandGRPOLoss(Actor(batch.response_mask), entropy_bonus=False, **options)


RULE = LossSettings(REGION)

MODES: dict[str, dict[str, Any]] = {
    "token_mean": {"loss_agg_mode": "token-mean"},
    "prompt_mean": {"loss_agg_mode": "seq-mean-token-mean", "global_batch_size": 4},
    "none": {"loss_agg_mode": "none"},
}


@pytest.mark.parametrize("padding", [-1.0, float("nan")])
@pytest.mark.parametrize("aggregation", MODES)
@pytest.mark.parametrize("rule", ["bandpo-kl", "dppo-tv", "cispo", "sapo", "dual-clip"])
def test_loss_and_gradient_are_those_of_policy_loss(
    rule: str, aggregation: str, padding: float
) -> None:
    batch = trainer_batch().with_padding(padding)
    loss_fn = grpo(batch, aggregation=aggregation, settings=LossSettings(preset=rule))

    def loss(log_prob: torch.Tensor) -> Any:
        return loss_fn(as_tensordict(batch, log_prob)).loss_objective

    assert_same(batch.of(loss), batch.wanted(**{**preset(rule).arguments(), **MODES[aggregation]}))


def test_a_fixed_clip_is_that_of_torchrl() -> None:
    batch = trainer_batch()
    theirs = GRPOLoss(Actor(batch.response_mask), entropy_bonus=False, clip_epsilon=(0.2, 0.28))
    ours = grpo(batch, settings=LossSettings("clip@0.2,0.28"))

    def loss(loss_fn: Any) -> Any:
        return batch.of(lambda log_prob: loss_fn(as_tensordict(batch, log_prob)).loss_objective)

    assert_same(loss(ours), loss(theirs))


def test_the_clip_fraction_is_of_the_tokens_that_count() -> None:
    batch = trainer_batch().with_padding(float("nan"))
    output = grpo(batch, settings=RULE)(as_tensordict(batch, batch.log_prob))
    torch.testing.assert_close(output.clip_fraction, torch.tensor(4 / 13))


def test_a_scheduled_band_is_read_at_each_call() -> None:
    batch = trainer_batch()
    source = ScheduledBand("kl", Linear(0.05, 0.001, 2), cap=10)
    loss_fn = grpo(batch, settings=LossSettings(source))
    for _ in range(2):
        found = batch.of(lambda now: loss_fn(as_tensordict(batch, now)).loss_objective)
        assert_same(found, batch.wanted(region=source.region))
        source.step()


def policy(continuous: bool = False) -> tuple[Any, Any]:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(3, 4), *([NormalParamExtractor()] if continuous else []))
    keys = ["loc", "scale"] if continuous else ["logits"]
    actor = ProbabilisticActor(
        TensorDictModule(head, in_keys=["observation"], out_keys=keys),
        in_keys=keys,
        distribution_class=TanhNormal if continuous else OneHotCategorical,
        return_log_prob=True,
    )
    return actor, ValueOperator(nn.Linear(3, 1), in_keys=["observation"])


def sampled(actor: Any) -> Any:
    """Some steps of an environment, with the log-probs of an older policy."""
    torch.manual_seed(1)
    data = actor(TensorDict({"observation": torch.randn(64, 3)}, [64])).detach()
    data["action_log_prob"] += 0.4 * torch.randn(64)
    data["advantage"] = torch.randn(64, 1)
    return data


@pytest.mark.parametrize("delay_actor", [False, True])
def test_clip_ppo_has_the_gradient_of_policy_loss(delay_actor: bool) -> None:
    actor, _ = policy()
    data = sampled(actor)
    options = {"entropy_bonus": False, "critic_coeff": None, "delay_actor": delay_actor}
    loss_fn = BandClipPPOLoss(actor, None, settings=RULE, **options)
    if delay_actor:  # the proximal policy is another one than the sampling policy
        for parameter in loss_fn.target_actor_network_params.values(True, True):
            parameter.data += 0.3 * torch.randn(parameter.shape)
    found = loss_fn(data)["loss_objective"]
    parameters = list(loss_fn.actor_network_params.values(True, True))
    found_gradient = torch.autograd.grad(found, parameters)

    def log_prob(params: Any) -> Any:
        with params.to_module(loss_fn.actor_network):
            return loss_fn.actor_network.get_dist(data).log_prob(data["action"])

    behaviour = data["action_log_prob"]
    old = log_prob(loss_fn.target_actor_network_params).detach() if delay_actor else behaviour
    batch = TrainerBatch(
        old_log_prob=old,
        log_prob=log_prob(loss_fn.actor_network_params),
        advantages=data["advantage"][:, 0],
        response_mask=torch.ones(64, dtype=torch.bool),
        rollout_log_prob=behaviour,
        weights=(old - behaviour).exp(),
    )
    wanted, gradient = batch.wanted(region=REGION, rollout_is_weights=batch.weights)
    fixed, _ = batch.wanted(region="clip@0.2,0.2", rollout_is_weights=batch.weights)
    assert abs(float(wanted - fixed)) > 0.01
    torch.testing.assert_close(found.detach(), wanted)
    wanted_gradient = torch.autograd.grad(batch.log_prob, parameters, gradient)
    for one, other in zip(found_gradient, wanted_gradient, strict=True):
        torch.testing.assert_close(one, other)


def test_a_policy_of_densities_is_refused() -> None:
    actor, critic = policy(continuous=True)
    with pytest.raises(InvalidTypeError, match=r"discrete actions.* TanhNormal"):
        BandClipPPOLoss(actor, critic, settings=RULE)(sampled(actor))


@pytest.mark.parametrize("loss", [BandGRPOLoss, BandClipPPOLoss])
def test_a_second_clip_is_refused(loss: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"clip_epsilon must be left out.* got 0\.2"):
        loss(*policy()[:1], settings=RULE, clip_epsilon=0.2)


def test_a_ratio_cap_with_a_delayed_actor_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="max_importance_ratio must be None"):
        BandClipPPOLoss(*policy(), settings=RULE, delay_actor=True, max_importance_ratio=2.0)


@pytest.mark.parametrize("loss", [BandGRPOLoss, BandClipPPOLoss])
@pytest.mark.parametrize("rule", [{"anchor": "rollout"}, {"preset": "tis"}])
def test_rules_that_need_a_third_policy_are_refused(loss: Any, rule: dict[str, Any]) -> None:
    with pytest.raises(
        InvalidValueError, match=f"{next(iter(rule))} must be left out with torchrl"
    ):
        loss(settings=LossSettings(**rule))


@pytest.mark.parametrize("loss", [BandGRPOLoss, BandClipPPOLoss])
@pytest.mark.parametrize("given", ["kl@0.05", None, {"region": "kl@0.05"}])
def test_settings_of_another_type_are_refused(loss: Any, given: Any) -> None:
    with pytest.raises(InvalidTypeError, match="settings must be a LossSettings"):
        loss(settings=given)


@pytest.mark.parametrize("loss", [BandGRPOLoss, BandClipPPOLoss])
@pytest.mark.parametrize("name", ["bapo", "m2po"])
def test_rules_that_learn_from_batches_are_refused(loss: Any, name: str) -> None:
    with pytest.raises(InvalidValueError, match="region must not be learnt from batches with tor"):
        loss(settings=LossSettings(preset=name))


@pytest.mark.parametrize("rule", ["topr", "dppo-kl", "dual-clip"])
def test_rules_that_are_more_than_a_clamp_are_refused(rule: str) -> None:
    with pytest.raises(InvalidValueError, match="with torchrl's ClipPPOLoss"):
        BandClipPPOLoss(*policy(), settings=LossSettings(preset=rule))


@pytest.mark.parametrize(
    ("adapter", "base", "name"),
    [
        ("torchrl", GRPOLoss, "_compute_policy_objective"),
        ("torchrl", GRPOLoss, "_log_weight"),
        ("torchrl_ppo", ClipPPOLoss, "_clip_bounds"),
    ],
)
def test_a_hook_that_is_gone_is_an_import_error(
    adapter: str, base: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(base, name)
    with pytest.raises(MissingHookError, match=rf"torchrl 0\.\d+.* has no {base.__name__}\.{name}"):
        fresh(monkeypatch, f"bandpo.integrations.{adapter}")


def test_a_hook_that_nothing_calls_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRPOLoss, "forward", lambda self, tensordict: tensordict)
    with pytest.raises(MissingHookError, match="has no '_log_weight' in "):
        fresh(monkeypatch, "bandpo.integrations.torchrl")


def test_losses_pickle_with_their_region() -> None:
    import pickle

    batch = trainer_batch()
    copied = pickle.loads(pickle.dumps(grpo(batch, settings=RULE)))  # noqa: S301 -- our own bytes
    found = batch.of(lambda now: copied(as_tensordict(batch, now)).loss_objective)
    assert_same(found, batch.wanted(region=region_from_spec(REGION)))


def test_the_example_trains() -> None:
    import runpy
    from pathlib import Path

    example = Path(__file__).parents[2] / "examples/torchrl/grpo.py"
    rewards = runpy.run_path(str(example))["main"](steps=2, region=REGION)
    assert len(rewards) == 2
