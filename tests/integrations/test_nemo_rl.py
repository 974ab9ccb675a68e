"""NeMo-RL: its clipped loss with a band, on the contract of its module of losses (August 2026)."""

from __future__ import annotations

import pickle
import sys
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
LOSSES = "nemo_rl.algorithms.loss.loss_functions"
GRPO = "nemo_rl.algorithms.grpo"

SETUP = """
def setup(config):
    return ClippedPGLossFn(config, use_fused_linear_logprobs=True)
"""


class ClippedPGLossFn:
    """NeMo-RL's loss as it is documented: its settings, its tensors, its global counts."""

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.disable_ppo_ratio = cfg.disable_ppo_ratio
        self.force_on_policy_ratio = cfg.force_on_policy_ratio
        self.sequence_level_importance_ratios = cfg.sequence_level_importance_ratios
        self.use_cispo = cfg.use_cispo
        self.ratio_clip_min, self.ratio_clip_max = cfg.ratio_clip_min, cfg.ratio_clip_max
        self.token_level = cfg.token_level_loss

    def __call__(
        self, next_token_logprobs: Any, data: Any, global_valid_seqs: Any, global_valid_toks: Any
    ) -> Any:
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        ratio = (next_token_logprobs - data["prev_logprobs"][:, 1:]).exp()
        kept = ratio.clamp(1 - self.ratio_clip_min, 1 + self.ratio_clip_max)
        advantages = data["advantages"][:, 1:]
        losses = torch.maximum(-advantages * ratio, -advantages * kept) * mask
        if self.token_level:
            loss = losses.sum() / global_valid_toks
        else:
            loss = (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / global_valid_seqs
        clamped = (kept * mask).sum() / global_valid_toks
        return loss, {"loss": loss.item(), "probs_ratio_clamped": clamped.item()}


@pytest.fixture
def nemo_rl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter, where NeMo-RL's modules are the contract."""
    monkeypatch.setattr(ClippedPGLossFn, "__module__", LOSSES)
    fake(monkeypatch, LOSSES, ClippedPGLossFn=ClippedPGLossFn)
    grpo = fake(monkeypatch, GRPO, ClippedPGLossFn=ClippedPGLossFn)
    exec(SETUP, vars(grpo))  # noqa: S102 -- our own text
    return fresh(monkeypatch, "bandpo.integrations.nemo_rl")


def config(**others: Any) -> Any:
    given: dict[str, Any] = dict.fromkeys(
        ("disable_ppo_ratio", "force_on_policy_ratio", "sequence_level_importance_ratios"), False
    )
    numbers = {"use_cispo": False, "ratio_clip_min": 0.2, "ratio_clip_max": 0.28}
    return SimpleNamespace(**{**given, **numbers, "token_level_loss": True, **others})


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of NeMo-RL, which has a column for the first token."""
    return torch.cat([tensor[:, :1] * 0, tensor], 1)


def called(loss_fn: Any, batch: TrainerBatch) -> Any:
    """The loss as NeMo-RL's workers call it, with counts of a batch that is twice as large."""
    mask = batch.response_mask.float()
    data = {
        "prev_logprobs": shifted(batch.old_log_prob),
        "generation_logprobs": shifted(batch.rollout_log_prob),
        "advantages": shifted(batch.advantages),
        "token_mask": shifted(mask),
        "sample_mask": torch.ones(len(mask)),
    }
    counts = {"global_valid_seqs": torch.tensor(6), "global_valid_toks": torch.tensor(26)}
    return lambda log_prob: loss_fn(next_token_logprobs=log_prob, data=data, **counts)


@pytest.mark.parametrize(
    ("token_level", "mode"),
    [
        (True, {"loss_agg_mode": "token-mean", "batch_num_tokens": 26}),
        (False, {"loss_agg_mode": "seq-mean-token-mean", "global_batch_size": 6}),
    ],
)
def test_loss_and_gradient_are_those_of_policy_loss(
    nemo_rl: Any, token_level: bool, mode: dict[str, Any]
) -> None:
    batch = trainer_batch()
    loss_fn = nemo_rl.BandClippedPGLossFn(config(token_level_loss=token_level), settings=RULE)
    loss = called(loss_fn, batch)
    found = batch.of(lambda log_prob: loss(log_prob)[0])
    assert_same(found, batch.wanted(region=REGION, **mode))
    assert (loss_fn.ratio_clip_min, loss_fn.ratio_clip_max) == (0.2, 0.28)


def test_a_region_may_stand_at_the_rollout_policy(nemo_rl: Any) -> None:
    batch = trainer_batch()
    settings = LossSettings(REGION, anchor="rollout")
    loss = called(nemo_rl.BandClippedPGLossFn(config(), settings=settings), batch)
    anchor = batch.rollout_log_prob
    wanted = batch.wanted(region=REGION, anchor_log_prob=anchor, batch_num_tokens=26)
    assert_same(batch.of(lambda log_prob: loss(log_prob)[0]), wanted)


def test_install_makes_setup_build_the_loss(nemo_rl: Any) -> None:
    nemo_rl.install(region=REGION)
    loss_fn = sys.modules[GRPO].setup(config())
    assert isinstance(loss_fn, nemo_rl.BandClippedPGLossFn)
    assert loss_fn.use_fused_linear_logprobs
    assert loss_fn.region == RULE.region_or_source()


def test_a_loss_pickles_for_the_workers(nemo_rl: Any) -> None:
    loss_fn = nemo_rl.BandClippedPGLossFn(config(), settings=RULE)
    copied = pickle.loads(pickle.dumps(loss_fn))  # noqa: S301 -- our own bytes
    assert copied.region == loss_fn.region


@pytest.mark.parametrize(
    "name",
    ["disable_ppo_ratio", "force_on_policy_ratio", "sequence_level_importance_ratios", "use_cispo"],
)
def test_configurations_that_clip_no_ratio_of_a_token_are_refused(nemo_rl: Any, name: str) -> None:
    with pytest.raises(InvalidValueError, match=f"{name} must be false"):
        nemo_rl.BandClippedPGLossFn(config(**{name: True}), settings=RULE)


@pytest.mark.parametrize(
    "rule", [{"preset": "dppo-kl"}, {"preset": "tis"}, {"schedule": "constant(0.1)"}]
)
def test_rules_that_are_more_than_a_clamp_are_refused(nemo_rl: Any, rule: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match="with NeMo-RL"):
        nemo_rl.BandClippedPGLossFn(config(), settings=LossSettings(**rule))
    with pytest.raises(InvalidTypeError, match="settings must be a LossSettings"):
        nemo_rl.BandClippedPGLossFn(config(), settings=REGION)


def test_a_loss_without_its_epsilons_is_an_import_error(
    nemo_rl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = type("Other", (), {"__call__": lambda self, data: data})
    fake(monkeypatch, LOSSES, ClippedPGLossFn=other)
    with pytest.raises(MissingHookError, match=r"nemo-rl .* has no 'ratio_clip_min' in"):
        fresh(monkeypatch, "bandpo.integrations.nemo_rl")


def test_a_setup_that_builds_another_loss_is_an_import_error(nemo_rl: Any) -> None:
    sys.modules[GRPO].setup = lambda config: config  # type: ignore[attr-defined]
    with pytest.raises(MissingHookError, match=r"nemo-rl .* has no 'ClippedPGLossFn' in"):
        nemo_rl.install(region=REGION)
