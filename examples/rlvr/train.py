"""GRPO on copies of one policy, each under a rule of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bandpo import Band
from bandpo.loss import policy_loss

from .policy import Parameters, Replicas, inputs
from .rule import Rule
from .task import Null, Rare, Task

MAX_GRADIENT_NORM = 1.0
FINAL_ANSWERS = 64
MISMATCHES = ("none", "bf16", "sixteenths")


@dataclass(frozen=True)
class Setting:
    """One point of the axes.

    Attributes:
        rate: Adam's learning rate.
        batches: Batches of rollouts.
        inner_steps: Optimiser steps on a batch.
        group: Answers to each prompt of a batch.
        noise: Probability that a reward is flipped.
        staleness: Batches of training between the policy that samples and its use, plus 1.
        mismatch: Rounding of the old log-probs, one of `MISMATCHES`.
        prompts_per_batch: Prompts of a batch.
    """

    rate: float
    batches: int = 60
    inner_steps: int = 8
    group: int = 16
    noise: float = 0.0
    staleness: int = 1
    mismatch: str = "none"
    prompts_per_batch: int = 64


@dataclass(frozen=True)
class Run:
    """One rule in one setting.

    Attributes:
        reward: Clean expected reward at each evaluation, float32; 0 from a failure on.
        entropy: Entropy of a token in nats at the same times.
        pass_1: Share of right answers at the end.
        pass_16: Probability that one of 16 answers is right.
        distinct: Distinct right answers of 64.
        finite: False if a number was not finite.
    """

    reward: tuple[float, ...]
    entropy: tuple[float, ...]
    pass_1: float
    pass_16: float
    distinct: float
    finite: bool


def train(
    start: Parameters, task: Task, rules: Sequence[Rule], setting: Setting, *, seed: int
) -> list[Run]:
    """Trains one copy of a policy for each rule and returns their runs, in the same order.

    All copies see the same prompts and the same uniform numbers. The result depends on the rules
    only through the last bits of batched matrix products.
    """
    copies = len(rules)
    generator = torch.Generator().manual_seed(seed)
    policy = Replicas(start, copies)
    optimizer = torch.optim.Adam(policy.parameters(), setting.rate)
    arguments = [rule.arguments() for rule in rules]
    snapshots: deque[Parameters] = deque(maxlen=setting.staleness)
    sampler = Replicas(start, copies)
    noise = 0.5 if isinstance(task, Null) else setting.noise
    rewards, entropies = [], []

    for _ in range(setting.batches):
        snapshots.append({k: v.detach().clone() for k, v in policy.named_parameters()})
        sampler.load_state_dict(snapshots[0])
        chosen = torch.randperm(len(task.prompts), generator=generator)
        chosen = chosen[: setting.prompts_per_batch]
        answers, log_probs, entropy = _sample(sampler, task, chosen, setting.group, generator)
        clean = task.reward(chosen, answers)
        rewards.append(_right(policy, task) if isinstance(task, Rare) else clean.mean((1, 2)))
        entropies.append(entropy)
        flips = torch.rand(clean.shape[1:], generator=generator) < noise
        advantages = _group_advantages(torch.where(flips, 1.0 - clean, clean))
        mask = task.mask(answers)
        old = _rounded(log_probs, setting.mismatch)
        _fit(
            policy,
            optimizer,
            arguments,
            rules,
            setting,
            task,
            chosen,
            answers,
            old,
            advantages,
            mask,
        )

    everything = torch.arange(len(task.prompts))
    with torch.no_grad():
        answers, _, entropy = _sample(policy, task, everything, FINAL_ANSWERS, generator)
    right = task.reward(everything, answers)
    exact = _right(policy, task) if isinstance(task, Rare) else right.mean((1, 2))
    rewards.append(exact)
    entropies.append(entropy)
    return _runs(torch.stack(rewards, 1), torch.stack(entropies, 1), right, answers, task)


def _fit(
    policy: Replicas,
    optimizer: torch.optim.Adam,
    arguments: Sequence[dict[str, Any]],
    rules: Sequence[Rule],
    setting: Setting,
    task: Task,
    chosen: torch.Tensor,
    answers: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    """Takes the inner steps on one batch."""
    copies = len(rules)
    shape = (copies, -1, task.length)
    old, mask = old.reshape(shape), mask.reshape(shape)
    spread = advantages[..., None].expand(answers.shape).reshape(shape)
    regions = [
        _scaled(given["region"], spread[copy]) if rule.scaled else given["region"]
        for copy, (rule, given) in enumerate(zip(rules, arguments, strict=True))
    ]
    for _ in range(setting.inner_steps):
        log_prob = _log_probs(policy, task, chosen, answers).reshape(shape)
        loss = torch.zeros(())
        for copy, part in enumerate(log_prob.unbind(0)):
            given = arguments[copy] | {"region": regions[copy]}
            loss = loss + policy_loss(old[copy], part, spread[copy], mask[copy], **given).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        _clip_gradients(policy)
        optimizer.step()


def _scaled(band: Band, advantages: torch.Tensor) -> Band:
    """The band with its radius times min(1, (A/2)^2); tokens without an advantage keep it."""
    factor = (advantages.double() / 2.0).square().clamp(max=1.0)
    factor[factor == 0.0] = 1.0
    return Band(band.divergence, float(band.delta_low) * factor.numpy())


def _log_probs(
    policy: Replicas, task: Task, chosen: torch.Tensor, answers: torch.Tensor
) -> torch.Tensor:
    """Log-probs of the answers [copies, prompts, group, length], in their shape."""
    copies, prompts, group, _ = answers.shape
    rows = task.prompts[chosen]
    if task.length == 1:
        # One pass a prompt serves its whole group.
        every: torch.Tensor = policy(rows.expand(copies, -1, -1), 1)[:, :, 0]
        return every.gather(-1, answers[..., 0])[..., None]
    repeated = rows[:, None].expand(copies, prompts, group, -1)
    tokens = inputs(repeated, answers).flatten(1, 2)
    log_probs: torch.Tensor = policy(tokens, task.length)
    picked = log_probs.gather(-1, answers.flatten(1, 2)[..., None])
    return picked.reshape(answers.shape)


@torch.no_grad()
def _sample(
    policy: Replicas, task: Task, chosen: torch.Tensor, group: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answers and their log-probs [copies, prompts, group, length], and the entropy a token."""
    copies = next(policy.parameters()).shape[0]
    prompts = task.prompts[chosen].expand(copies, -1, -1)
    uniform = torch.rand(len(chosen), group, task.length, generator=generator)
    if task.length == 1:
        every = policy(prompts, 1)[:, :, 0]
        answers = _draw(every, uniform[..., 0])
        log_probs = every.gather(-1, answers)
        return answers[..., None], log_probs[..., None], -(every.exp() * every).sum(-1).mean(-1)
    tokens = prompts[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)
    picked, entropies = [], []
    for place in range(task.length):
        every = policy(tokens, 1)[:, :, 0]
        drawn = _draw(every, uniform[..., place].reshape(-1, 1))
        tokens = torch.cat([tokens, drawn], -1)
        picked.append(every.gather(-1, drawn)[..., 0])
        entropies.append(-(every.exp() * every).sum(-1))
    answers = tokens[..., -task.length :]
    answers = answers.reshape(len(answers), -1, group, task.length)
    log_probs = torch.stack(picked, -1).reshape(answers.shape)
    mask = task.mask(answers)
    entropy = torch.stack(entropies, -1).reshape(answers.shape)
    return answers, log_probs, (entropy * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))


def _draw(log_probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens at the quantiles ``uniform`` [rows, draws] of [copies, rows, vocabulary].

    All copies share the numbers, which makes the differences between rules smaller than their
    spread. A distribution that is not finite gives the last token.
    """
    cumulative = log_probs.exp().cumsum(-1)
    places = uniform.expand(len(log_probs), -1, -1) * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, places.contiguous(), right=True)
    return drawn.clamp(max=log_probs.shape[-1] - 1)


@torch.no_grad()
def _right(policy: Replicas, task: Rare) -> torch.Tensor:
    """Mean probability of the right answer over all prompts, float32 [copies]."""
    copies = next(policy.parameters()).shape[0]
    every: torch.Tensor = policy(task.prompts.expand(copies, -1, -1), 1)[:, :, 0]
    return every.gather(-1, task.right.expand(copies, -1)[..., None]).exp().mean((1, 2))


def _group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards [copies, prompts, group] less their group's mean, over its standard deviation."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + 1e-6)


def _rounded(log_probs: torch.Tensor, mismatch: str) -> torch.Tensor:
    if mismatch == "bf16":
        return log_probs.bfloat16().float()
    if mismatch == "sixteenths":
        return (log_probs * 16.0).round() / 16.0
    return log_probs


def _clip_gradients(policy: Replicas) -> None:
    """Scales the gradient of each copy to a norm of at most 1, as a run of its own would."""
    gradients = [value.grad for value in policy.parameters() if value.grad is not None]
    square = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
    factor = (MAX_GRADIENT_NORM / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.reshape(-1, *(1 for _ in gradient.shape[1:])))


def _runs(
    rewards: torch.Tensor,
    entropies: torch.Tensor,
    right: torch.Tensor,
    answers: torch.Tensor,
    task: Task,
) -> list[Run]:
    finite = (rewards.isfinite() & entropies.isfinite()).int().cummin(-1).values.bool()
    rewards, entropies = (torch.where(finite, part, 0.0) for part in (rewards, entropies))
    runs = []
    for copy in range(len(rewards)):
        ok = bool(finite[copy, -1])
        runs.append(
            Run(
                tuple(rewards[copy].tolist()),
                tuple(entropies[copy].tolist()),
                pass_1=float(right[copy].mean()) if ok else 0.0,
                pass_16=pass_at(right[copy].sum(-1).long().numpy(), FINAL_ANSWERS, 16)
                if ok
                else 0.0,
                distinct=_distinct(answers[copy], right[copy], task) if ok else 0.0,
                finite=ok,
            )
        )
    return runs


def pass_at(right: np.ndarray, drawn: int, k: int) -> float:
    """Returns the mean probability that k of the drawn answers, without repeats, hold a right one.

    ``1 - C(drawn - right, k)/C(drawn, k)``, unbiased (arXiv 2107.03374).

    Args:
        right: Right answers of each prompt, int64 [prompts].
        drawn: Answers of each prompt.
        k: Number of them.
    """
    steps = np.arange(k)
    wrong = (drawn - right)[:, None]
    return float(np.mean(1.0 - np.prod(np.clip(wrong - steps, 0, None) / (drawn - steps), axis=1)))


def _distinct(answers: torch.Tensor, right: torch.Tensor, task: Task) -> float:
    """Mean number of distinct right answers of a prompt."""
    powers = task.vocabulary ** torch.arange(task.length)
    # Tokens after the end of an answer are no part of it.
    code = (torch.where(task.mask(answers), answers, task.vocabulary - 1) * powers).sum(-1)
    counts = [len(row[hit].unique()) for row, hit in zip(code, right.bool(), strict=True)]
    return float(np.mean(counts))
