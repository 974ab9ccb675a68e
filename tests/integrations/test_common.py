"""What several adapters share: epsilons, the loss of settings, steps, versions and hooks."""

from __future__ import annotations

import gc
import math
import pickle
import warnings
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

from bandpo import Band, Clip, by_sign, policy_loss, region_from_spec
from bandpo.error import (
    InvalidTypeError,
    InvalidValueError,
    MissingHookError,
    ResumeWarning,
    VersionWarning,
)
from bandpo.integrations import version
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.loss import TrainerLoss
from bandpo.integrations.settings import LossSettings
from bandpo.integrations.version import check_version, missing_hook, require, require_reads
from bandpo.loss import GlobalBatch
from bandpo.schedule import ScheduledBand

REGIONS = ("kl@0.05", "(kl@0.05).cap(10)", "kl@0.01|clip@0.2,0.28", "clip@0.2", "clip@1,inf")

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Relative difference of a bound that goes through an epsilon: expm1 and the sum with 1."""


def batch(seed: int = 0, shape: tuple[int, int] = (4, 16)) -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    old = -4 * torch.rand(shape, generator=make)
    new = (old + torch.randn(shape, generator=make) * 0.4).requires_grad_()
    advantages = torch.randn(shape, generator=make)
    mask = torch.rand(shape, generator=make) < 0.8
    return old, new, advantages, mask


def clamped_loss(
    old: torch.Tensor, new: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    eps_low: torch.Tensor, eps_high: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """PPO's loss as a trainer writes it."""
    ratio = torch.exp(new - old)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("spec", REGIONS)
@pytest.mark.parametrize("anchored", [False, True])
def test_a_trainers_clamp_with_epsilons_is_the_loss_of_the_region(
    spec: str, anchored: bool
) -> None:
    old, new, advantages, mask = batch()
    anchor = old + 0.05 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    given = anchor if anchored else None
    region = region_from_spec(spec)
    loss = clamped_loss(old, new, advantages, mask, *epsilons(region, old, given))
    ours = policy_loss(old, new, advantages, mask, region=region, anchor_log_prob=given)
    assert loss.item() == pytest.approx(ours.loss.item(), rel=1e-6)
    theirs, expected = (torch.autograd.grad(x, new)[0] for x in (loss, ours.loss))
    torch.testing.assert_close(theirs, expected, rtol=1e-6, atol=1e-9)
    assert ours.metrics["clip_fraction_high"] > 0 or spec == "clip@1,inf"


@pytest.mark.parametrize("spec", REGIONS)
def test_no_log_prob_makes_an_epsilon_of_nan(spec: str) -> None:
    old = torch.tensor([math.nan, math.inf, 1.0, 1e-6, 0.0, -1e-9, -2.0, -100.0, -math.inf])
    for low, high in (
        epsilons(region_from_spec(spec), old),
        epsilons(region_from_spec(spec), old, old.flip(0)),
    ):
        assert not low.isnan().any()
        assert not high.isnan().any()
    low, high = epsilons(region_from_spec(spec), old)
    assert (low[0].item(), high[0].item()) == (0.0, 0.0)
    assert torch.equal(low[1:4], low[4].expand(3))  # above 0 is read as 0
    assert torch.equal(high[1:4], high[4].expand(3))


def test_epsilons_of_padding_touch_no_loss() -> None:
    old, new, advantages, mask = batch()
    region = region_from_spec("kl@0.05")
    clean = clamped_loss(old, new, advantages, mask, *epsilons(region, old))
    # As a trainer that fills the log-ratio of padding, whose old log-probs are NaN.
    padded = torch.where(mask, old, math.nan)
    filled = clamped_loss(
        torch.where(mask, old, new.detach()), new, advantages, mask, *epsilons(region, padded)
    )
    assert torch.equal(clean, filled)


def test_epsilons_are_float32_or_better_under_autocast() -> None:
    old = torch.linspace(-3.0, -0.01, 64)
    region = Band("kl", 0.05)
    plain = epsilons(region, old)
    with torch.autocast("cpu", torch.bfloat16):
        inside = epsilons(region, old)
    for expected, found in zip(plain, inside, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(expected, found)
    for dtype, computed in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        for epsilon in epsilons(region, old.to(dtype)):
            assert epsilon.dtype == computed
    exact = [torch.from_numpy(bound).float() for bound in region.bounds(old.numpy())]
    torch.testing.assert_close(1 - plain[0], exact[0], rtol=ROUNDING, atol=0)
    torch.testing.assert_close(1 + plain[1], exact[1], rtol=2e-6, atol=0)  # of the table


def test_epsilons_have_no_gradient_and_need_two_bounds() -> None:
    old = batch()[1]
    assert not any(epsilon.requires_grad for epsilon in epsilons(Band("kl", 0.05), old))
    with pytest.raises(InvalidTypeError, match="region must be"):
        epsilons(by_sign(positive=Clip(0.2), negative=Clip(0.1)), old)  # type: ignore[arg-type]


def test_the_loss_of_settings_is_that_of_their_arguments() -> None:
    old, new, advantages, mask = batch()
    rollout = old + 0.1
    counts = GlobalBatch(tokens=100, dp_size=2)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"preset": "dppo-kl"}, {}),
        ({"anchor": "rollout"}, {"anchor_log_prob": rollout}),
        ({"preset": "icepop"}, {"rollout_log_prob": rollout}),
        (
            {"anchor": "rollout", "correction": "tis"},
            {"anchor_log_prob": rollout, "rollout_log_prob": rollout},
        ),
    ]
    for fields, read in cases:
        settings = LossSettings(**fields)
        loss = TrainerLoss(settings)
        found = loss(
            old, new, advantages, mask,
            loss_agg_mode="token-mean", rollout_log_prob=rollout, global_batch=counts,
        )  # fmt: skip
        expected = policy_loss(
            old, new, advantages, mask,
            **settings.arguments(), loss_agg_mode="token-mean", global_batch=counts, **read,
        )  # fmt: skip
        assert torch.equal(found.loss, expected.loss)
        if read:
            with pytest.raises(InvalidValueError, match="rollout_log_prob must be given with"):
                loss(old, new, advantages, mask, loss_agg_mode="token-mean")


def test_the_loss_of_settings_follows_its_own_region() -> None:
    old, new, advantages, mask = batch()
    loss = TrainerLoss(LossSettings(region="kl@1", schedule="linear(0.5, 0.001, 2)"))
    assert isinstance(loss.region, ScheduledBand)
    for delta in (0.5, 0.2505, 0.001, 0.001):
        found = loss(old, new, advantages, mask, loss_agg_mode="token-sum")
        expected = policy_loss(
            old, new, advantages, mask, region=Band("kl", delta), loss_agg_mode="token-sum"
        )
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
        loss.region.step()


def counting(deltas: str = "linear(0.5, 0.25, 4)") -> TrainerLoss:
    return TrainerLoss(LossSettings(region="kl@1", schedule=deltas), count_steps=True)


def train(loss: TrainerLoss, optimiser: torch.optim.Optimizer, steps: int) -> list[float]:
    """The delta in each step, of two micro-batches each."""
    (weight,) = optimiser.param_groups[0]["params"]
    old, new, advantages, mask = batch()
    assert isinstance(loss.region, ScheduledBand)
    seen = []
    for _ in range(steps):
        for _ in range(2):
            result = loss(old, new.detach() + weight, advantages, mask, loss_agg_mode="token-sum")
            result.loss.backward()  # type: ignore[no-untyped-call]
        seen.append(loss.region.schedule.value)
        optimiser.step()
    return seen


def adam() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)


def test_a_schedule_follows_the_steps_of_an_optimiser() -> None:
    assert train(counting(), adam(), 6) == [0.5, 0.4375, 0.375, 0.3125, 0.25, 0.25]
    assert train(counting("constant(0.1)"), adam(), 2) == [0.1, 0.1]
    uncounted = TrainerLoss(LossSettings(region="kl@1", schedule="linear(0.5, 0.25, 4)"))
    assert train(uncounted, adam(), 2) == [0.5, 0.5]


def test_a_step_without_a_call_of_the_loss_does_not_count() -> None:
    loss, optimiser, critic = counting(), adam(), adam()
    critic.step()
    assert train(loss, optimiser, 1) == [0.5]
    critic.step()
    with torch.no_grad():  # an evaluation
        old, new, advantages, mask = batch()
        loss(old, new.detach(), advantages, mask, loss_agg_mode="token-sum")
    critic.step()
    assert train(loss, optimiser, 1) == [0.4375]


def test_a_resumed_schedule_goes_on_from_the_optimisers_own_count() -> None:
    before = adam()
    train(counting(), before, 2)
    after, loss = adam(), counting()
    after.load_state_dict(before.state_dict())
    with pytest.warns(ResumeWarning, match=r"has taken 3 steps.*the first delta, 0.5$"):
        assert train(loss, after, 2) == [0.5, 0.3125]
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)  # has no count
    assert train(counting(), sgd, 2) == [0.5, 0.4375]


def test_a_copy_of_a_counting_loss_counts_on_its_own() -> None:
    loss = counting()
    train(loss, adam(), 1)
    copied = pickle.loads(pickle.dumps(loss))  # noqa: S301 -- our own bytes
    assert train(copied, adam(), 2) == [0.4375, 0.375]
    assert train(loss, adam(), 1) == [0.4375]
    gc.collect()  # losses of other tests
    assert len(_global_optimizer_post_hooks) == 2
    del loss, copied
    gc.collect()
    assert len(_global_optimizer_post_hooks) == 0


@pytest.mark.parametrize(
    ("found", "first", "last", "warns"),
    [
        ("1.16.0", "1.16", None, False),
        ("1.16", "1.16", "1.17", False),
        ("1.17.4", "1.16", "1.17", False),
        ("1.18", "1.16", "1.17", True),
        ("1.18.0rc1", "1.16", "1.17", True),
        ("1.15.9", "1.16", "1.17", True),
        ("0.9.1", "0.9.1", None, False),
        ("0.9.1.post1", "0.9.1", None, False),
        ("0.9.10", "0.9.1", None, True),
        ("2", "1.16", "1.17", True),
        ("main", "1.16", None, True),
    ],
)
def test_a_version_that_was_not_tested_warns_once(
    monkeypatch: pytest.MonkeyPatch, found: str, first: str, last: str | None, warns: bool
) -> None:
    def adapter() -> None:
        check_version("trainer", first, last)

    monkeypatch.setattr(metadata, "version", lambda name: found)
    monkeypatch.setattr(version, "_WARNED", set())
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            adapter()
    assert [w.category for w in given] == ([VersionWarning] if warns else [])
    if warns:
        tested = first if last is None else f"{first} to {last}"
        assert str(given[0].message) == (
            f"trainer is {found}; bandpo's adapter was tested with {tested}"
        )
        assert given[0].filename == __file__  # the adapter's caller


def test_a_hook_that_is_gone_is_an_error_with_the_version() -> None:
    def reads(config: object) -> object:
        return config.epsilon_low  # type: ignore[attr-defined]

    owner = SimpleNamespace(register=None)
    require("numpy", owner, "register")
    require_reads("numpy", reads, "epsilon_low", "config")
    place = r"^no-such-trainer of an unknown version has no"
    with pytest.raises(MissingHookError, match=place + r" SimpleNamespace.hook, which bandpo's"):
        require("no-such-trainer", owner, "register", "hook")
    with pytest.raises(MissingHookError, match=place + r" 'epsilon_high' in .*reads, which"):
        require_reads("no-such-trainer", reads, "epsilon_low", "epsilon_high")
    with pytest.raises(MissingHookError, match=r"numpy \d.* has no math.hook, which"):
        require("numpy", math, "hook")
    assert isinstance(missing_hook("x", "y"), ImportError)
