"""Liger's chunked GRPO loss with a band, and its head in front of our loss (make test-trainers)."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

pytest.importorskip("liger_kernel")

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

from bandpo.error import InvalidValueError, MissingHookError
from bandpo.integrations.liger import LOSS_TYPES, BandGRPOLoss
from bandpo.integrations.settings import LossSettings
from bandpo.loss import policy_loss
from support.packages import fresh
from support.trainer_batch import REGION, assert_same, trainer_batch

RULE = LossSettings(REGION)
SEQUENCES, WORDS, HIDDEN = 4, 11, 8
TEMPERATURE = 0.7

MODES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_agg_mode": "seq-mean-token-mean", "global_batch_size": SEQUENCES},
    "bnpo": {"loss_agg_mode": "token-mean"},
    "dapo": {"loss_agg_mode": "token-mean"},
    "dr_grpo": {
        "loss_agg_mode": "seq-mean-token-sum-norm",
        "loss_scale_factor": 10,
        "global_batch_size": SEQUENCES,
    },
}


class Head:
    """Hidden states and a head whose log-probs are near those of the batch."""

    def __init__(self) -> None:
        make = torch.Generator().manual_seed(0)
        batch = trainer_batch()
        shape = batch.log_prob.shape
        self.weight = torch.randn(WORDS, HIDDEN, generator=make)
        self.hidden = torch.randn(*shape, HIDDEN, generator=make)
        self.words = torch.randint(WORDS, shape, generator=make)
        self.mask = batch.response_mask
        self.advantages = batch.advantages[:, 0]
        now = self.log_prob(self.hidden, self.weight)
        self.old_log_prob = now - (batch.log_prob - batch.old_log_prob)

    def log_prob(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The log-probs of the words by softmax over all logits."""
        logits = hidden @ weight.T / TEMPERATURE
        return logits.log_softmax(-1).gather(-1, self.words[..., None])[..., 0]

    def gradients(self, loss: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The value of a loss of hidden states and weight, and its gradients in one vector."""
        leaves = [tensor.clone().requires_grad_() for tensor in (self.hidden, self.weight)]
        value = loss(*leaves)
        found = torch.autograd.grad(value, leaves)
        return value.detach(), torch.cat([gradient.reshape(-1) for gradient in found])

    def wanted(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradients of `policy_loss` behind the plain head."""
        return self.gradients(
            lambda *leaves: (
                policy_loss(
                    self.old_log_prob, self.log_prob(*leaves), self.advantages, self.mask, **options
                ).loss
            )
        )

    def of(self, loss_fn: Any, old: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradients of Liger's loss."""
        others = (self.words, self.mask.float(), self.advantages)
        return self.gradients(lambda *leaves: loss_fn(*leaves, *others, old_per_token_logps=old)[0])


def chunked(loss_type: str = "dapo", **options: Any) -> Any:
    kind = BandGRPOLoss if "settings" in options else LigerFusedLinearGRPOLoss
    plain = {"beta": 0.0, "use_ref_model": False, "compiled": False, "temperature": TEMPERATURE}
    return kind(loss_type=loss_type, max_completion_length=10, **{**plain, **options})


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
@pytest.mark.parametrize("loss_type", MODES)
def test_loss_and_gradients_are_those_of_policy_loss(loss_type: str, chunk_size: int) -> None:
    head = Head()
    loss_fn = chunked(loss_type, settings=RULE, chunk_size=chunk_size)
    found = head.of(loss_fn, head.old_log_prob)
    assert_same(found, head.wanted(region=REGION, **MODES[loss_type]))


def test_luspo_weighs_sequences_by_their_lengths() -> None:
    head = Head()
    head.mask = torch.ones_like(head.mask)  # Liger's mean is over padding as well
    found = head.of(chunked("luspo", settings=RULE), head.old_log_prob)
    value, gradient = head.wanted(region=REGION)
    assert_same(found, (value * head.mask.shape[1], gradient * head.mask.shape[1]))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_fixed_clip_is_that_of_liger(loss_type: str) -> None:
    head = Head()
    theirs = chunked(loss_type, epsilon_low=0.2, epsilon_high=0.28, beta=0.1, delta=3.0)
    ours = chunked(loss_type, settings=LossSettings("clip@0.2,0.28"), beta=0.1, delta=3.0)
    assert_same(head.of(ours, head.old_log_prob), head.of(theirs, head.old_log_prob))


def test_without_old_log_probs_nothing_clips() -> None:
    head = Head()
    assert_same(head.of(chunked(settings=RULE), None), head.of(chunked(), None))


def test_it_compiles() -> None:
    head = Head()
    torch.compiler.reset()
    found = head.of(chunked(settings=RULE, compiled=True), head.old_log_prob)
    assert_same(found, head.wanted(region=REGION))


def test_metrics_are_those_of_the_band() -> None:
    head = Head()
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
    head = Head()
    copied = pickle.loads(pickle.dumps(chunked(settings=RULE)))  # noqa: S301 -- our own bytes
    assert_same(head.of(copied, head.old_log_prob), head.wanted(region=REGION))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss_type": "cispo"}, "loss_type, with a region,.*cispo"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be 'token'"),
        ({"settings": LossSettings(preset="dppo-kl")}, "surrogate must be 'min-clip' with Liger"),
        ({"settings": LossSettings(preset="tis")}, "preset must be left out with Liger"),
        ({"settings": LossSettings(anchor="rollout")}, "anchor must be left out with Liger"),
    ],
)
def test_what_the_clamp_cannot_express_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidValueError, match=match):
        chunked(**{"settings": RULE, **options})


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


def test_the_head_in_front_of_our_loss_has_the_values_of_a_plain_one() -> None:
    head = Head()

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        now = LigerFusedLinearPPOBase.chunk_forward(
            hidden, weight, head.words, temperature=TEMPERATURE
        )
        tensors = (head.old_log_prob, now, head.advantages, head.mask)
        return policy_loss(*tensors, region=REGION).loss

    assert_same(head.gradients(loss), head.wanted(region=REGION))


def test_the_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    import runpy
    from pathlib import Path

    example = Path(__file__).parents[2] / "examples/liger/grpo.py"
    rewards = runpy.run_path(str(example))["main"](steps=10, region="clip@0.05")
    assert sum(rewards[-3:]) > sum(rewards[:3])
    shares = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert max(shares) > 0
