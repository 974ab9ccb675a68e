"""Peers of the benchmarks do the same work, and the gate on instructions can fail."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from bench_gpu import bisected_loss
from count_instructions import ALLOWED, broken

from bandpo import Band, Clip, sides
from bandpo.loss import policy_loss
from benchmarks import interleaved, peers
from benchmarks.loss import METHODS, PEERS, Step
from benchmarks.solver import PEER_DIVERGENCES
from benchmarks.tokens import DELTA, undecided
from support.batches import random_batch

FIND_ROOT = 1e-12  # its default tolerance is a residual of 0 or an x that moves by 4 ulp of itself
BISECTED_IN_FLOAT64 = 1e-13  # 50 halvings of a bracket that is at most 5 wide leave 5 * 2**-50
SUMMED = 1e-6  # float32, by two orders of summation


@pytest.mark.parametrize("divergence", PEER_DIVERGENCES)
def test_find_root_finds_the_band(divergence: str) -> None:
    logp = undecided(1024)
    found = peers.find_root(divergence, logp, DELTA)
    np.testing.assert_allclose(found, Band(divergence, DELTA).bounds(logp), rtol=FIND_ROOT)


def test_bisection_finds_the_band() -> None:
    logp = undecided(1024)
    found = peers.bisection(DELTA, torch.tensor(logp))
    exact = Band("kl", DELTA).bounds(logp)
    for side, bound in zip(found, exact, strict=True):
        np.testing.assert_allclose(side.numpy(), bound, rtol=BISECTED_IN_FLOAT64)


def test_a_bisected_loss_is_a_policy_loss_with_the_band_above() -> None:
    batch = random_batch((2, 64), dtype=torch.float64)
    batch.log_prob.requires_grad_()
    upper_alone = sides(lower=Clip(1.0), upper=Band("kl", DELTA))
    peer = bisected_loss(*batch)
    ours = policy_loss(*batch, region=upper_alone, loss_agg_mode="token-sum", exact=True).loss
    torch.testing.assert_close(ours, peer, rtol=BISECTED_IN_FLOAT64, atol=0.0)
    slopes = (torch.autograd.grad(loss, batch.log_prob)[0] for loss in (ours, peer))
    torch.testing.assert_close(*slopes, rtol=BISECTED_IN_FLOAT64, atol=0.0)


def test_ppo_clip_is_a_policy_loss_with_a_clip() -> None:
    def of(loss: torch.Tensor, log_prob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return loss, torch.autograd.grad(loss, log_prob)[0]

    generator = torch.Generator().manual_seed(1)
    old = -torch.rand(4, 64, generator=generator)
    log_prob = (old + 0.5 * torch.randn(4, 64, generator=generator)).requires_grad_()
    advantages = torch.randn(4, 64, generator=generator)
    mask = torch.rand(4, 64, generator=generator) < 0.7
    batch = (old, log_prob, advantages, mask)
    peer = of(peers.ppo_clip(*batch), log_prob)
    ours = of(policy_loss(*batch, region=Clip(0.2, 0.28)).loss, log_prob)
    for ours_is, peer_is in zip(ours, peer, strict=True):
        torch.testing.assert_close(ours_is, peer_is, rtol=SUMMED, atol=0.0)


@pytest.mark.parametrize("method", [METHODS[0], PEERS[0]])
def test_a_step_has_a_gradient(method: str) -> None:
    step = Step(method, size=1024)
    step.forward_backward()
    assert step.log_prob.grad is not None
    assert step.log_prob.grad.isfinite().all()
    assert (step.log_prob.grad != 0.0).any()


def test_benchmarks_of_a_gpu_are_not_applicable_without_one() -> None:
    with pytest.raises(NotImplementedError, match="cuda on cpu"):
        Step("cuda", size=1024)


def test_ratios_are_ours_over_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def spend(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    monkeypatch.setattr("time.perf_counter", lambda: clock)
    found = interleaved.compare(lambda: spend(0.25), lambda: spend(0.125), seconds=4.0)
    assert found == (0.25, 0.125, 2.0, 2.0, 2.0)


def test_the_gate_fails_where_more_is_counted_than_allowed() -> None:
    stored = {"solver": 1000.0, "loss": 50.0}
    assert broken(stored, stored) == []
    assert broken(stored, {"solver": 1000.0 * (1.0 + ALLOWED), "loss": 1.0}) == []
    (line,) = broken(stored, {"solver": 1001.0 * (1.0 + ALLOWED), "loss": 50.0})
    assert line.startswith("solver: 1051.05 a token, +5.1%")
    assert len(broken(stored, {"solver": 1000.0})) == 1
    assert len(broken(stored, {**stored, "table": 1.0})) == 1
