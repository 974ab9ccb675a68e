"""ROLL: its actor workers with a band, on the contract of its workers (0.3.0)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from bandpo.error import InvalidTypeError, InvalidValueError, MissingHookError
from bandpo.integrations.settings import LossSettings
from support.packages import fake, fresh
from support.trainer_batch import REGION, TrainerBatch, assert_same, trainer_batch

RULE = LossSettings(REGION)
RLVR = "roll.pipeline.rlvr.actor_worker"
AGENTIC = "roll.pipeline.agentic.agentic_actor_worker"


class ContractWorker:
    """ROLL's worker: where its loss finds old log-probs and the range of the clip."""

    def __init__(self, pipeline_config: Any) -> None:
        self.pipeline_config = pipeline_config

    def get_old_log_probs_with_cache(self, data: Any, log_probs: Any) -> Any:
        return data.batch["old_log_probs"]

    def loss_func(self, data: Any, output_tensor: Any) -> Any:
        config, log_probs, mask = self.pipeline_config, output_tensor, data.batch["response_mask"]
        old = self.get_old_log_probs_with_cache(data, log_probs)
        ratio = (log_probs - old).exp()
        low = config.pg_clip_low if config.use_pg_clip_range else config.pg_clip
        high = config.pg_clip_high if config.use_pg_clip_range else config.pg_clip
        kept = ratio.clamp(1 - low, 1 + high)
        advantages = data.batch["advantages"]
        losses = -torch.minimum(ratio * advantages, kept * advantages)
        if config.dual_clip_loss:
            limited = -torch.maximum(-losses, (1 + 2 * config.pg_clip) * advantages)
            losses = torch.where(advantages < 0, limited, losses)
        clipped = ((kept != ratio) * mask).sum()
        return (losses * mask).sum() / data.meta_info["batch_num_tokens"], {"clipped": clipped}


@pytest.fixture(params=["BandActorWorker", "BandAgenticActorWorker"])
def worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class of the adapter, on the contract."""
    for name in (RLVR, AGENTIC):
        fake(monkeypatch, name, ActorWorker=type("ActorWorker", (ContractWorker,), {}))
        for method in ("loss_func", "get_old_log_probs_with_cache"):
            assert getattr(sys.modules[name].ActorWorker, method)
    return getattr(fresh(monkeypatch, "bandpo.integrations.roll"), request.param)


def config(**others: Any) -> Any:
    given = {
        "use_pg_clip_range": False,
        "pg_clip": 0.2,
        "pg_clip_low": 0.2,
        "pg_clip_high": 0.28,
        "dual_clip_loss": False,
    }
    return SimpleNamespace(**{**given, **others})


def called(worker: Any, batch: TrainerBatch, settings: Any = RULE, **others: Any) -> Any:
    """The loss of a subclass as ROLL calls it."""
    own = type("MyWorker", (worker,), {"settings": settings})(config(**others))
    tensors = {
        "old_log_probs": batch.old_log_prob,
        "infer_logprobs": batch.rollout_log_prob,
        "advantages": batch.advantages,
        "response_mask": batch.response_mask.float(),
    }
    data = SimpleNamespace(batch=tensors, meta_info={"batch_num_tokens": 20})
    return lambda log_prob: own.loss_func(data, log_prob)


@pytest.mark.parametrize("given", [{}, {"dual_clip": 1.4}])
def test_loss_and_gradient_are_those_of_policy_loss(worker: Any, given: dict[str, Any]) -> None:
    batch = trainer_batch()
    loss = called(worker, batch, dual_clip_loss=bool(given))
    wanted = batch.wanted(region=REGION, batch_num_tokens=20, **given)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)


def test_a_region_may_stand_at_the_rollout_policy(worker: Any) -> None:
    batch = trainer_batch()
    loss = called(worker, batch, LossSettings(REGION, anchor="rollout"))
    anchor = batch.rollout_log_prob
    wanted = batch.wanted(region=REGION, anchor_log_prob=anchor, batch_num_tokens=20)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)


def test_an_anchor_that_a_batch_lacks_is_refused(worker: Any) -> None:
    settings = LossSettings(REGION, anchor="rollout")
    own = type("MyWorker", (worker,), {"settings": settings})(config())
    data = SimpleNamespace(
        batch={"old_log_probs": trainer_batch().old_log_prob, "response_mask": None}
    )
    with pytest.raises(InvalidValueError, match="anchor must be 'old' with ROLL"):
        own.loss_func(data, trainer_batch().log_prob)


def test_the_configuration_stays_as_it_was(worker: Any) -> None:
    batch = trainer_batch()
    own = type("MyWorker", (worker,), {"settings": RULE})(config())
    with pytest.raises(AttributeError):
        own.loss_func(None, batch.log_prob)
    assert own.pipeline_config == config()


@pytest.mark.parametrize(
    "rule", [{"preset": "dppo-kl"}, {"preset": "tis"}, {"schedule": "constant(0.1)"}]
)
def test_what_the_clamp_cannot_express_is_refused_with_the_class(
    worker: Any, rule: dict[str, Any]
) -> None:
    with pytest.raises(InvalidValueError, match="with ROLL"):
        type("MyWorker", (worker,), {"settings": LossSettings(**rule)})


@pytest.mark.parametrize("given", [REGION, None, {"region": REGION}])
def test_settings_of_another_type_are_refused_with_the_class(worker: Any, given: Any) -> None:
    with pytest.raises(InvalidTypeError, match="settings must be a LossSettings"):
        type("MyWorker", (worker,), {"settings": given})


def test_a_class_without_a_rule_is_refused(worker: Any) -> None:
    with pytest.raises(InvalidTypeError, match="settings must be a LossSettings of class"):
        worker(config())


@pytest.mark.parametrize(
    ("field", "value"), [("importance_sampling", "seq"), ("ratio_type", "segment")]
)
def test_a_ratio_of_several_tokens_is_refused(worker: Any, field: str, value: str) -> None:
    batch = trainer_batch()
    with pytest.raises(InvalidValueError, match=rf"{field} must be 'token'.* '{value}'"):
        called(worker, batch, **{field: value})(batch.log_prob)


@pytest.mark.parametrize(
    "other",
    [
        {"get_old_log_probs_with_cache": ContractWorker.get_old_log_probs_with_cache},
        {"loss_func": lambda self, data, output_tensor: None},
    ],
)
def test_a_worker_without_the_hook_is_an_import_error(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {"get_old_log_probs_with_cache": None, "loss_func": lambda self: None, **other}
    for name in (RLVR, AGENTIC):
        fake(monkeypatch, name, ActorWorker=type("ActorWorker", (), contents))
    with pytest.raises(MissingHookError, match=r"roll .* has no "):
        fresh(monkeypatch, "bandpo.integrations.roll")


@pytest.mark.usefixtures("worker")
def test_the_class_of_the_example_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = pytest.importorskip("yaml")
    folder = Path(__file__).parents[2] / "examples/roll"
    path = yaml.safe_load((folder / "band.yaml").read_text())["actor_train"]["worker_cls"]
    module, _, name = path.rpartition(".")
    monkeypatch.syspath_prepend(str(folder))
    try:
        kind = getattr(importlib.import_module(module), name)
    finally:
        sys.modules.pop(module, None)
    assert kind.settings == RULE
