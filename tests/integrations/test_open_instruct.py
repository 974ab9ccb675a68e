"""Open-Instruct: its GRPO loss with a band, on the contract of its function (August 2026)."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from bandpo.error import InvalidTypeError, InvalidValueError, MissingHookError, VersionWarning
from bandpo.integrations import version
from support.packages import fake, fresh, version_of
from support.trainer_batch import REGION, TrainerBatch, assert_same, trainer_batch

MODULE = "open_instruct.grpo_utils"


def compute_grpo_loss(
    *,
    new_logprobs: Any,
    ratio: Any,
    advantages: Any,
    ref_logprobs: Any,
    config: Any,
    rho_weights: Any,
) -> Any:
    """The function as it is documented, with the KL term left out."""
    if config.loss_fn == "cispo":
        losses = -advantages * ratio.detach() * new_logprobs
        return losses, torch.zeros_like(losses), torch.zeros_like(losses)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - config.clip_lower, 1.0 + config.clip_higher)
    losses = torch.maximum(unclipped, clipped) * rho_weights
    return losses, (clipped > unclipped).float(), torch.zeros_like(losses)


@pytest.fixture
def open_instruct(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter, and the contract in place of Open-Instruct's module."""
    version_of(monkeypatch, "0.3.1.dev29+ge6c3044aa")
    module = fake(monkeypatch, MODULE, compute_grpo_loss=compute_grpo_loss)
    adapter = fresh(monkeypatch, "bandpo.integrations.open_instruct")
    return SimpleNamespace(install=adapter.install, banded=adapter.banded, module=module)


def config(**others: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"loss_fn": "dapo", "clip_lower": 0.2, "clip_higher": 0.272, **others})


def called(open_instruct: Any, batch: TrainerBatch, settings: Any = None, **weights: Any) -> Any:
    """Loss and clip fraction as a trainer makes them of what the function returns."""

    def loss(log_prob: torch.Tensor) -> Any:
        mask = batch.response_mask
        losses, clipped, _ = open_instruct.module.compute_grpo_loss(
            new_logprobs=log_prob,
            ratio=torch.exp(log_prob - batch.old_log_prob),
            advantages=batch.advantages,
            ref_logprobs=None,
            config=settings or config(),
            rho_weights=weights.get("rho_weights", torch.ones_like(log_prob)),
        )
        return (losses * mask).sum() / mask.sum(), (clipped * mask).sum() / mask.sum()

    return loss


@pytest.mark.parametrize("batch", [trainer_batch(), trainer_batch().packed()])
def test_loss_and_gradient_are_those_of_policy_loss(
    open_instruct: Any, batch: TrainerBatch
) -> None:
    open_instruct.install(region=REGION)
    loss = called(open_instruct, batch)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), batch.wanted(region=REGION))
    assert loss(batch.log_prob)[1] > 0


def test_weights_multiply_the_loss_of_a_token(open_instruct: Any) -> None:
    batch = trainer_batch()
    open_instruct.install(region=REGION)
    loss = called(open_instruct, batch, rho_weights=batch.weights)
    wanted = batch.wanted(region=REGION, rollout_is_weights=batch.weights)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)


def test_a_second_install_replaces_the_first_and_the_configuration_stays(
    open_instruct: Any,
) -> None:
    batch, settings = trainer_batch(), config()
    for region in ("kl@0.5", REGION):
        open_instruct.install(region=region)
    loss = called(open_instruct, batch, settings)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), batch.wanted(region=REGION))
    assert settings == config()


def test_a_ratio_of_0_is_clipped(open_instruct: Any) -> None:
    open_instruct.install(region=REGION)
    now = torch.tensor([[-201.0]], requires_grad=True)
    losses, clipped, _ = open_instruct.module.compute_grpo_loss(
        new_logprobs=now,
        ratio=torch.exp(now - torch.tensor([[-1.0]])),
        advantages=torch.tensor([[-1.0]]),
        ref_logprobs=None,
        config=config(),
        rho_weights=torch.ones(1, 1),
    )
    assert clipped == 1
    assert torch.autograd.grad(losses.sum(), now)[0] == 0.0


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"preset": "dppo-kl"}, "surrogate must be 'min-clip' with Open-Instruct"),
        ({"preset": "tis"}, "preset must be left out with Open-Instruct"),
        ({"region": REGION, "anchor": "rollout"}, "anchor must be left out with Open-Instruct"),
        ({"region": "kl@0.05", "schedule": "constant(0.1)"}, "schedule must be left out"),
        ({"region": "kll@0.05"}, "kll"),
        ({"regoin": REGION}, "regoin"),
    ],
)
def test_wrong_rules_are_refused_when_they_are_installed(
    open_instruct: Any, rule: dict[str, Any], match: str
) -> None:
    with pytest.raises(InvalidValueError, match=match):
        open_instruct.install(**rule)
    with pytest.raises(InvalidTypeError, match="settings must be a LossSettings"):
        open_instruct.banded(compute_grpo_loss, REGION)


def test_a_loss_that_does_not_clip_is_refused(open_instruct: Any) -> None:
    open_instruct.install(region=REGION)
    loss = called(open_instruct, trainer_batch(), config(loss_fn="cispo"))
    with pytest.raises(InvalidValueError, match=r"loss_fn must be 'dapo' .* 'cispo'"):
        loss(trainer_batch().log_prob)


def test_a_function_that_reads_no_epsilons_is_an_import_error(
    open_instruct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(new_logprobs: Any, ratio: Any, config: Any) -> Any:
        return config.loss_fn

    monkeypatch.setattr(open_instruct.module, "compute_grpo_loss", other)
    with pytest.raises(MissingHookError, match=r"open-instruct .* has no 'clip_lower' in"):
        open_instruct.install(region=REGION)


def test_another_version_warns(open_instruct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    version_of(monkeypatch, "0.4.0")
    monkeypatch.setattr(version, "_WARNED", set())
    with pytest.warns(VersionWarning, match=r"open-instruct is 0\.4\.0; .* tested with 0\.3"):
        open_instruct.install(region=REGION)


def test_a_missing_function_is_an_import_error(
    open_instruct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(open_instruct.module, "compute_grpo_loss")
    with pytest.raises(MissingHookError, match=r"grpo_utils\.compute_grpo_loss"):
        open_instruct.install(region=REGION)


def test_the_example_selects_the_loss_that_clips() -> None:
    script = (Path(__file__).parents[2] / "examples/open_instruct/train.sh").read_text()
    assert re.search(r"--loss_fn dapo\b", script)
    assert int(re.findall(r"--num_epochs (\d+)", script)[0]) > 1
