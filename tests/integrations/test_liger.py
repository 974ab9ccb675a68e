"""Liger's chunked GRPO loss with a band (make test-trainers)."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

pytest.importorskip("liger_kernel")

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

from bandpo.error import InvalidTypeError, InvalidValueError, MissingHookError
from bandpo.integrations.liger import LOSS_TYPES, BandGRPOLoss
from bandpo.integrations.settings import LossSettings
from bandpo.loss import policy_loss
from support.linear_head import TEMPERATURE, LinearHead
from support.packages import fresh
from support.trainer_batch import REGION, assert_same

RULE = LossSettings(REGION)
MODES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_agg_mode": "seq-mean-token-mean", "global_batch_size": 4},
    "bnpo": {"loss_agg_mode": "token-mean"},
    "dapo": {"loss_agg_mode": "token-mean"},
    "dr_grpo": {
        "loss_agg_mode": "seq-mean-token-sum-norm",
        "loss_scale_factor": 10,
        "global_batch_size": 4,
    },
}


def of(head: LinearHead, loss_fn: Any, old: torch.Tensor | None) -> Any:
    """Loss and gradients of Liger's loss."""
    others = (head.words, head.mask.float(), head.advantages)
    return head.gradients(lambda *leaves: loss_fn(*leaves, *others, old_per_token_logps=old)[0])


def chunked(loss_type: str = "dapo", **options: Any) -> Any:
    kind = BandGRPOLoss if "settings" in options else LigerFusedLinearGRPOLoss
    plain = {"beta": 0.0, "use_ref_model": False, "compiled": False, "temperature": TEMPERATURE}
    return kind(loss_type=loss_type, max_completion_length=10, **{**plain, **options})


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
@pytest.mark.parametrize("loss_type", MODES)
def test_loss_and_gradients_are_those_of_policy_loss(loss_type: str, chunk_size: int) -> None:
    head = LinearHead()
    loss_fn = chunked(loss_type, settings=RULE, chunk_size=chunk_size)
    found = of(head, loss_fn, head.old_log_prob)
    assert_same(found, head.wanted(region=REGION, **MODES[loss_type]))


def test_luspo_weighs_sequences_by_their_lengths() -> None:
    head = LinearHead()
    head.mask = torch.ones_like(head.mask)  # Liger's mean is over padding as well
    found = of(head, chunked("luspo", settings=RULE), head.old_log_prob)
    value, gradient = head.wanted(region=REGION)
    assert_same(found, (value * head.mask.shape[1], gradient * head.mask.shape[1]))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_fixed_clip_is_that_of_liger(loss_type: str) -> None:
    head = LinearHead()
    theirs = chunked(loss_type, epsilon_low=0.2, epsilon_high=0.28, beta=0.1)
    ours = chunked(loss_type, settings=LossSettings("clip@0.2,0.28"), beta=0.1)
    assert_same(of(head, ours, head.old_log_prob), of(head, theirs, head.old_log_prob))


def test_without_old_log_probs_nothing_clips() -> None:
    head = LinearHead()
    assert_same(of(head, chunked(settings=RULE), None), of(head, chunked(), None))


def test_it_compiles() -> None:
    head = LinearHead()
    torch.compiler.reset()
    found = of(head, chunked(settings=RULE, compiled=True), head.old_log_prob)
    assert_same(found, head.wanted(region=REGION))


def test_metrics_are_those_of_the_band() -> None:
    head = LinearHead()
    others = (head.words, head.mask.float(), head.advantages)
    _, (clipped,) = chunked(settings=RULE)(
        head.hidden, head.weight, *others, old_per_token_logps=head.old_log_prob
    )
    metrics = policy_loss(
        head.old_log_prob,
        head.log_prob(head.hidden, head.weight),
        head.advantages,
        head.mask,
        region=REGION,
    ).metrics
    assert clipped == metrics["clip_fraction_low"] + metrics["clip_fraction_high"] > 0


def test_a_loss_pickles() -> None:
    head = LinearHead()
    copied = pickle.loads(pickle.dumps(chunked(settings=RULE)))  # noqa: S301 -- our own bytes
    assert_same(of(head, copied, head.old_log_prob), head.wanted(region=REGION))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss_type": "cispo"}, "loss_type, with a region,.*cispo"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be 'token'"),
        ({"delta": 3.0}, "delta, a cap of the ratio in Liger, must be left out.* got 3.0"),
        ({"settings": LossSettings(preset="dppo-kl")}, "surrogate must be 'min-clip' with Liger"),
        ({"settings": LossSettings(preset="tis")}, "preset must be left out with Liger"),
        ({"settings": LossSettings(anchor="rollout")}, "anchor must be left out with Liger"),
        ({"settings": LossSettings("preset:bapo")}, "region must not be learnt from batches with"),
    ],
)
def test_what_the_clamp_cannot_express_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidValueError, match=match):
        chunked(**{"settings": RULE, **options})


@pytest.mark.parametrize("given", [REGION, None, {"region": REGION}])
def test_settings_of_another_type_are_refused(given: Any) -> None:
    with pytest.raises(InvalidTypeError, match="settings must be a LossSettings"):
        chunked(settings=given)


def test_a_function_that_does_not_read_the_hook_is_an_import_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LigerFusedLinearPPOBase, "forward", staticmethod(lambda cls, ctx: None))
    with pytest.raises(MissingHookError, match=r"liger-kernel 0\.\d+\.\d+ has no 'ppo_loss_fn'"):
        fresh(monkeypatch, "bandpo.integrations.liger")


def test_an_argument_that_the_module_does_not_keep_is_an_import_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(ctx: Any, weight: Any, temper: float) -> None: ...

    monkeypatch.setattr(LigerFusedLinearGRPOFunction, "forward", forward)
    with pytest.raises(MissingHookError, match="has no temper in LigerFusedLinearGRPOLoss"):
        chunked(settings=RULE)


def test_the_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    import runpy
    from pathlib import Path

    example = Path(__file__).parents[2] / "examples/liger/grpo.py"
    rewards = runpy.run_path(str(example))["main"](steps=10, region="clip@0.05")
    assert sum(rewards[-3:]) > sum(rewards[:3])
    shares = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert max(shares) > 0
