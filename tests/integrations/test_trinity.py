"""Trinity-RFT: a policy loss by its path, on the contract or on Trinity's own registry."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from bandpo.error import InvalidValueError
from bandpo.presets import preset
from support.packages import fake, fresh, is_installed, version_of
from support.trainer_batch import REGION, TrainerBatch, assert_same, trainer_batch

INSTALLED = is_installed("trinity")
PATH = "bandpo.integrations.trinity.BandPolicyLossFn"

EPSILON = 1e-5
"""Of a value: Trinity's means divide by a count plus 1e-8 and a sum plus 1e-8."""

MODES: dict[str, dict[str, Any]] = {
    "token-mean": {},
    "seq-mean-token-sum": {"global_batch_size": 4},
    "seq-mean-token-mean": {"global_batch_size": 4},
    "seq-mean-token-sum-norm": {"global_batch_size": 1},
}
"""Trinity's modes; its mean over sequences includes empty ones, and the last is a sum over T."""


NAMES = {"old_log_probs": "old_logprob", "response_mask": "action_mask"}
"""Names of Trinity for those of verl."""


class ContractLossFn:
    """The base class: a backend, and keywords by the names that the backend has for them."""

    def __init__(self, backend: str = "verl") -> None:
        self.backend = backend

    def __init_subclass__(cls) -> None:
        ours = cls.__call__

        def call(self: Any, **tensors: Any) -> Any:
            return ours(self, **{NAMES.get(name, name): t for name, t in tensors.items()})

        cls.__call__ = call  # type: ignore[method-assign]

    def __call__(self, **tensors: Any) -> Any:
        raise NotImplementedError


def contract_aggregation(values: Any, mask: Any, loss_agg_mode: str) -> Any:
    counts = {
        "token-mean": mask.sum(),
        "seq-mean-token-sum": len(mask),
        "seq-mean-token-mean": len(mask) * mask.sum(1, keepdim=True).clamp(min=1),
        "seq-mean-token-sum-norm": mask.shape[1],
    }
    return (values * mask / counts[loss_agg_mode]).sum()


@pytest.fixture
def trinity(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the loss as Trinity does, from its path and arguments."""
    if not INSTALLED:
        version_of(monkeypatch, "0.6.0")
        fake(
            monkeypatch,
            "trinity.algorithm.policy_loss_fn.policy_loss_fn",
            PolicyLossFn=ContractLossFn,
        )
        fake(monkeypatch, "trinity.algorithm.utils", aggregate_loss=contract_aggregation)
    adapter = fresh(monkeypatch, "bandpo.integrations.trinity")

    def make(**arguments: Any) -> Any:
        kind = adapter.BandPolicyLossFn
        if INSTALLED:
            registry = importlib.import_module("trinity.algorithm.policy_loss_fn").POLICY_LOSS_FN
            kind = registry.get(PATH)
        return kind(backend="verl", **{**kind.default_args(), **arguments})

    return make


def called(loss_fn: Any, batch: TrainerBatch) -> Any:
    """The loss as Trinity's trainer calls it."""
    return lambda log_prob: loss_fn(
        logprob=log_prob,
        old_log_probs=batch.old_log_prob,
        response_mask=batch.response_mask,
        advantages=batch.advantages,
    )


@pytest.mark.parametrize("padding", [-1.0, math.nan])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["bandpo-kl", "dppo-tv", "cispo"])
def test_loss_and_gradient_are_those_of_policy_loss(
    trinity: Any, name: str, mode: str, padding: float
) -> None:
    batch = trainer_batch().with_padding(padding)
    loss = called(trinity(preset=name, loss_agg_mode=mode), batch)
    found = batch.of(lambda log_prob: loss(log_prob)[0])
    options = {**preset(name).arguments(), "loss_agg_mode": mode, **MODES[mode]}
    if mode == "seq-mean-token-sum-norm":
        options["loss_scale_factor"] = batch.response_mask.shape[1]
    for one, other in zip(found, batch.wanted(**options), strict=True):
        torch.testing.assert_close(one, other, rtol=EPSILON, atol=0.0)


@pytest.mark.skipif(not INSTALLED, reason="needs Trinity: make test-trainers")
def test_a_fixed_clip_is_that_of_trinity(trinity: Any) -> None:
    batch = trainer_batch()
    registry = importlib.import_module("trinity.algorithm.policy_loss_fn").POLICY_LOSS_FN
    theirs = registry.get("ppo")(clip_range_low=0.2, clip_range_high=0.28, clip_ratio_c=3.0)
    ours = trinity(region="clip@0.2,0.28", dual_clip=3.0)
    losses = [called(loss_fn, batch) for loss_fn in (ours, theirs)]
    found, wanted = (batch.of(lambda log_prob, loss=loss: loss(log_prob)[0]) for loss in losses)  # type: ignore[misc]
    assert_same(found, wanted)
    metrics, other = (loss(batch.log_prob)[1] for loss in losses)
    for name in ("pg_clipfrac", "ppo_kl", "pg_loss"):
        assert metrics[name] == pytest.approx(other[name], rel=EPSILON)


def test_trinity_selects_the_tensors_by_our_names(trinity: Any) -> None:
    if INSTALLED:
        wanted = ["old_log_probs", "response_mask", "advantages"]
        assert trinity().select_keys == wanted


def test_metrics_are_numbers(trinity: Any) -> None:
    batch = trainer_batch()
    _, metrics = called(trinity(region=REGION), batch)(batch.log_prob)
    assert metrics["pg_clipfrac"] == pytest.approx(4 / 13)
    assert {type(value) for value in metrics.values()} == {float}


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"regoin": REGION}, "regoin"),
        ({"preset": "tis"}, "preset must be left out with Trinity"),
        ({"anchor": "rollout"}, "anchor must be left out with Trinity"),
        ({"schedule": "linear(0.1, 0.02, 9)"}, "schedule must be left out with Trinity"),
    ],
)
def test_wrong_rules_are_refused_when_the_loss_is_made(
    trinity: Any, rule: dict[str, Any], match: str
) -> None:
    with pytest.raises(InvalidValueError, match=match):
        trinity(**rule)


def test_the_configuration_of_the_example_is_accepted(trinity: Any) -> None:
    yaml = pytest.importorskip("yaml")
    file = Path(__file__).parents[2] / "examples/trinity/band.yaml"
    algorithm = yaml.safe_load(file.read_text())["algorithm"]
    assert algorithm["policy_loss_fn"] == PATH
    batch = trainer_batch()
    loss = called(trinity(**algorithm["policy_loss_fn_args"]), batch)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), batch.wanted(region=REGION))
