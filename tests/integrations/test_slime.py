"""slime: its policy loss with a band, on the contract of its module of losses (0.3.1)."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from bandpo.error import InvalidTypeError, InvalidValueError, MissingHookError
from support.packages import fake, fresh, version_of
from support.trainer_batch import REGION, TrainerBatch, assert_same, trainer_batch

MODULE = "slime.backends.megatron_utils.loss"


def policy_loss_function(args: Any, batch: Any, logits: Any, sum_of_sample_mean: Any) -> Any:
    """slime's loss as it is documented; the logits are log-probs here, and already packed."""
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    log_probs = logits
    ratio = (log_probs - (torch.cat(old) if old else log_probs.detach())).exp()
    advantages = torch.cat(batch["advantages"])
    kept = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    losses = torch.maximum(-ratio * advantages, -kept * advantages)
    clipped = (-kept * advantages > -ratio * advantages).float()
    loss = sum_of_sample_mean(losses)
    return loss, {"loss": loss.detach(), "pg_clipfrac": sum_of_sample_mean(clipped)}


@pytest.fixture
def slime(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter, where slime's module of losses is the contract."""
    version_of(monkeypatch, "0.3.1")
    fake(monkeypatch, MODULE, policy_loss_function=policy_loss_function)
    return fresh(monkeypatch, "bandpo.integrations.slime")


def arguments(**others: Any) -> Namespace:
    given = {
        "advantage_estimator": "grpo",
        "use_rollout_logprobs": False,
        "eps_clip": 0.2,
        "eps_clip_high": 0.28,
        "bandpo": {"region": REGION},
    }
    return Namespace(**{**given, **others})


def samples(batch: TrainerBatch, **names: str) -> dict[str, list[torch.Tensor]]:
    """slime's lists, one tensor a sample."""
    assert batch.cu_seqlens is not None
    lengths = batch.cu_seqlens.diff().tolist()
    return {key: list(torch.split(getattr(batch, name), lengths)) for key, name in names.items()}


FULL = {
    "advantages": "advantages",
    "log_probs": "old_log_prob",
    "rollout_log_probs": "rollout_log_prob",
}


def reduction(batch: TrainerBatch, per_token: bool) -> Any:
    """slime's ``sum_of_sample_mean``: of tokens with ``calculate_per_token_loss``."""
    assert batch.cu_seqlens is not None
    lengths = batch.cu_seqlens.diff().tolist()

    def reduce(values: torch.Tensor) -> torch.Tensor:
        means = [part.sum() / max(len(part), 1) for part in torch.split(values, lengths)]
        return values.sum() if per_token else torch.stack(means).sum()

    return reduce


def called(slime: Any, batch: TrainerBatch, args: Namespace, per_token: bool = True) -> Any:
    tensors = samples(batch, **FULL)
    return lambda log_prob: slime.band_loss(args, tensors, log_prob, reduction(batch, per_token))


@pytest.mark.parametrize("per_token", [True, False])
def test_loss_and_gradient_are_those_of_policy_loss(slime: Any, per_token: bool) -> None:
    batch = trainer_batch().packed()
    loss = called(slime, batch, arguments(), per_token)
    mode = (
        {"loss_agg_mode": "token-sum"}
        if per_token
        else {"loss_agg_mode": "seq-mean-token-mean", "global_batch_size": 1}
    )
    found = batch.of(lambda log_prob: loss(log_prob)[0])
    assert_same(found, batch.wanted(region=REGION, **mode))
    assert loss(batch.log_prob)[1]["pg_clipfrac"] > 0


def test_the_old_policy_is_the_one_that_slime_takes(slime: Any) -> None:
    batch = trainer_batch().packed()
    loss = called(slime, batch, arguments(use_rollout_logprobs=True))
    theirs = TrainerBatch(**{**vars(batch), "old_log_prob": batch.rollout_log_prob})
    wanted = theirs.wanted(region=REGION, loss_agg_mode="token-sum")
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)


def test_a_region_may_stand_at_the_rollout_policy(slime: Any) -> None:
    batch = trainer_batch().packed()
    loss = called(slime, batch, arguments(bandpo={"region": REGION, "anchor": "rollout"}))
    wanted = batch.wanted(
        region=REGION, anchor_log_prob=batch.rollout_log_prob, loss_agg_mode="token-sum"
    )
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)


def test_an_anchor_that_a_batch_lacks_is_refused(slime: Any) -> None:
    batch = trainer_batch().packed()
    args = arguments(bandpo={"region": REGION, "anchor": "rollout"})
    tensors = samples(batch, advantages="advantages", log_probs="old_log_prob")
    with pytest.raises(InvalidValueError, match="anchor must be 'old' with slime"):
        slime.band_loss(args, tensors, batch.log_prob, reduction(batch, True))


def test_on_policy_nothing_clips_and_the_arguments_stay(slime: Any) -> None:
    batch = trainer_batch().packed()
    args = arguments()
    before = dict(vars(args))
    tensors = {**samples(batch, advantages="advantages"), "log_probs": []}
    _, metrics = slime.band_loss(args, tensors, batch.log_prob, reduction(batch, True))
    assert metrics["pg_clipfrac"] == 0
    called(slime, batch, args)(batch.log_prob)
    assert vars(args) == before


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"bandpo": None}, InvalidTypeError, "bandpo must be the fields of a rule"),
        ({"bandpo": "kl@0.05"}, InvalidTypeError, "got str"),
        ({"bandpo": {"regoin": "kl@0.05"}}, InvalidValueError, "regoin"),
        ({"bandpo": {"preset": "dppo-kl"}}, InvalidValueError, "surrogate must be .* with slime"),
        ({"bandpo": {"preset": "tis"}}, InvalidValueError, "preset must be left out with slime"),
        ({"bandpo": {"schedule": "constant(0.1)"}}, InvalidValueError, "schedule must be left out"),
        ({"advantage_estimator": "gspo"}, InvalidValueError, "ratio of a token.* 'gspo'"),
        ({"advantage_estimator": "cispo"}, InvalidValueError, "ratio of a token.* 'cispo'"),
    ],
)
def test_what_the_clamp_cannot_express_is_refused(
    slime: Any, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    batch = trainer_batch().packed()
    with pytest.raises(error, match=match):
        called(slime, batch, arguments(**changes))(batch.log_prob)


def test_a_loss_that_reads_no_epsilons_is_an_import_error(
    slime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = trainer_batch().packed()
    fake(monkeypatch, MODULE, policy_loss_function=lambda args, *_: args.clip)
    with pytest.raises(MissingHookError, match=r"slime .* has no 'eps_clip' in"):
        called(slime, batch, arguments())(batch.log_prob)


def test_the_configuration_of_the_example_is_accepted(slime: Any) -> None:
    yaml = pytest.importorskip("yaml")
    folder = Path(__file__).parents[2] / "examples/slime"
    batch = trainer_batch().packed()
    args = arguments(**yaml.safe_load((folder / "band.yaml").read_text()))
    loss = called(slime, batch, args)
    wanted = batch.wanted(region=REGION, loss_agg_mode="token-sum")
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)
    path = f"--custom-loss-function-path bandpo.integrations.slime.{slime.band_loss.__name__}"
    assert path in (folder / "band.sh").read_text()
