"""Fused heads of others in front of our loss: values, gradients, and no copy of the log-probs.

TRL's is in test_trl.py. Kernels in Triton need a GPU; each head has another path, which runs here.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable

import pytest

pytest.importorskip("torch")

import torch

from bandpo.loss import policy_loss
from support.linear_head import TEMPERATURE, LinearHead
from support.packages import is_installed
from support.trainer_batch import REGION, assert_same

LogProbOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def liger(monkeypatch: pytest.MonkeyPatch) -> LogProbOf:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return lambda hidden, weight, words: LigerFusedLinearPPOBase.chunk_forward(
        hidden, weight, words, temperature=TEMPERATURE
    )


def verl(monkeypatch: pytest.MonkeyPatch) -> LogProbOf:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    head = FusedLinearForPPO(chunk_size=5)
    return lambda hidden, weight, words: head(hidden, weight, words, TEMPERATURE)[0]


def cut_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> LogProbOf:
    # It imports its kernels, and Triton with them, but on a Mac.
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def log_prob(hidden: torch.Tensor, weight: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = loss(
            hidden / TEMPERATURE, weight, words, reduction="none", impl="torch_compile"
        )
        return -found

    return log_prob


HEADS = {"liger_kernel": liger, "verl": verl, "cut_cross_entropy": cut_cross_entropy}


@pytest.fixture(params=HEADS)
def log_prob_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LogProbOf:
    if not is_installed(request.param):
        pytest.skip(f"needs {request.param}: make test-trainers, make test-verl")
    return HEADS[request.param](monkeypatch)


def test_a_loss_on_a_fused_head_is_that_on_full_logits(log_prob_of: LogProbOf) -> None:
    head = LinearHead()

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        now = log_prob_of(hidden, weight, head.words)
        tensors = (head.old_log_prob, now, head.advantages, head.mask)
        return policy_loss(*tensors, region=REGION).loss

    exact = head.in_float64()
    value, gradients = exact.wanted(region=REGION)
    assert_same(head.gradients(loss), (value.float(), gradients.float()))
    log_prob = log_prob_of(head.hidden, head.weight, head.words)
    wanted = exact.log_prob(exact.hidden, exact.weight)
    torch.testing.assert_close(log_prob.double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_loss_copies_no_log_probs_of_a_head(log_prob_of: LogProbOf) -> None:
    head = LinearHead()
    weight = head.weight.clone().requires_grad_()
    log_prob = log_prob_of(head.hidden, weight, head.words)
    assert log_prob.shape == head.words.shape
    assert log_prob.is_contiguous()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy_loss(head.old_log_prob, log_prob, head.advantages, head.mask, region=REGION)
    # The graph keeps the gradient, one number a token, and none of the tensors that it was made of.
    assert sum(tensor.numel() for tensor in kept) == log_prob.numel()
