"""prime-rl: its custom loss, on the contract of its loss module (0.8.0)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from bandpo.error import InvalidTypeError, InvalidValueError, MissingHookError
from bandpo.presets import preset
from support.packages import fake, fresh, version_of
from support.trainer_batch import REGION, assert_same, trainer_batch

MODULE = "prime_rl.trainer.rl.loss"


@dataclass
class LossInputs:
    """The tensors of one sample, 1-D."""

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = field(default=None)


@dataclass
class LossOutputs:
    """A sum over the tokens of a sample, and 0-dim metrics."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


@pytest.fixture
def prime_rl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter, where prime-rl's module of losses is the contract."""
    version_of(monkeypatch, "0.8.0")
    fake(monkeypatch, MODULE, LossInputs=LossInputs, LossOutputs=LossOutputs)
    return fresh(monkeypatch, "bandpo.integrations.prime_rl")


def trained(prime_rl: Any, weighted: bool, **fields: Any) -> Any:
    """The loss of a batch as prime-rl computes it: a sum of samples by the count of all tokens."""
    batch = trainer_batch().with_padding(math.nan)

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for row in range(len(log_prob)):
            inputs = LossInputs(
                log_prob[row],
                batch.old_log_prob[row],
                None,
                batch.advantages[row],
                batch.response_mask[row],
                batch.weights[row] if weighted else None,
            )
            outputs = prime_rl.band_loss(inputs, **fields)
            assert all(value.ndim == 0 for value in outputs.metrics.values())
            total = total + outputs.loss
        return total / batch.response_mask.sum()

    return batch.of(loss)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["bandpo-kl", "dppo-tv", "cispo", "gmpo", "cppo"])
def test_loss_and_gradient_are_those_of_policy_loss(
    prime_rl: Any, name: str, weighted: bool
) -> None:
    batch = trainer_batch()
    options = {"rollout_is_weights": batch.weights} if weighted else {}
    wanted = batch.wanted(**{**preset(name).arguments(), "loss_agg_mode": "token-mean", **options})
    assert_same(trained(prime_rl, weighted, preset=name), wanted)


def test_weights_scale_the_penalty_as_in_prime_rl(prime_rl: Any) -> None:
    """The loss of prime-rl 0.8.0 of type "ipo", in our words."""
    batch = trainer_batch()
    rule = preset("ipo").arguments()

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        log_ratio = log_prob - batch.old_log_prob
        moved = (log_prob.exp() - batch.old_log_prob.exp()).abs() > rule["region"].delta_low
        moved |= log_prob > 0  # a band ends at a probability of 1, and prime-rl's 0.1 beyond it
        gain = torch.where(moved, 0.0, batch.advantages * log_ratio.exp())
        terms = rule["log_ratio_penalty"] * log_ratio**2 - gain
        total: torch.Tensor = (batch.response_mask * batch.weights * terms).sum()
        return total / batch.response_mask.sum()

    value, gradient = batch.of(loss)
    found = trained(prime_rl, True, preset="ipo")
    assert_same((value, found[1]), (value, gradient))  # a mask's value is of log_prob, not of ratio


def test_metrics_are_tensors_without_a_gradient(prime_rl: Any) -> None:
    batch = trainer_batch()
    now, old = batch.log_prob.requires_grad_()[0], batch.old_log_prob[0]
    inputs = LossInputs(now, old, None, batch.advantages[0], batch.response_mask[0])
    metrics = prime_rl.band_loss(inputs, region=REGION).metrics
    assert not any(value.requires_grad for value in metrics.values())
    torch.testing.assert_close(metrics["band/clip_fraction_high"], torch.tensor(3 / 6))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"regoin": "kl@0.05"}, "regoin"),
        ({"region": "kll@0.05"}, "kll"),
        ({"preset": "tis"}, "preset must be left out with prime-rl"),
        ({"anchor": "rollout"}, "anchor must be left out with prime-rl"),
        ({"schedule": "linear(0.1, 0.02, 9)"}, "schedule must be left out with prime-rl"),
    ],
)
def test_wrong_rules_are_refused(prime_rl: Any, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidValueError, match=match):
        trained(prime_rl, False, **fields)


def test_objects_are_refused(prime_rl: Any) -> None:
    with pytest.raises(InvalidTypeError, match="kwargs must be text"):
        trained(prime_rl, False, region=object())


def test_a_module_without_its_outputs_is_an_import_error(
    prime_rl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, MODULE).__dict__.pop("LossOutputs")
    with pytest.raises(
        MissingHookError, match=r"prime-rl .* has no prime_rl\.trainer.*LossOutputs"
    ):
        trained(prime_rl, False, region=REGION)


def test_the_configuration_of_the_example_is_accepted(prime_rl: Any) -> None:
    tomllib = pytest.importorskip("tomllib")
    text = (Path(__file__).parents[2] / "examples/prime_rl/band.toml").read_text()
    loss = tomllib.loads(text)["trainer"]["loss"]
    assert loss["import_path"] == f"bandpo.integrations.prime_rl.{prime_rl.band_loss.__name__}"
    wanted = trainer_batch().wanted(region="(kl@0.01).cap(10)")
    assert_same(trained(prime_rl, False, **loss["kwargs"]), wanted)
