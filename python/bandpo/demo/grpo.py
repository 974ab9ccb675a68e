"""GRPO: sampled groups of answers, advantages within a group, several steps on each batch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from bandpo import Region
from bandpo.demo.policy import Policy
from bandpo.demo.result import BIN_NAMES, Run
from bandpo.demo.settings import Settings
from bandpo.demo.task import Task, reward
from bandpo.loss import policy_loss
from bandpo.record import Recorder

MAX_GRADIENT_NORM = 1.0


def train(
    pretrained: Policy,
    task: Task,
    rule: str,
    region: Region,
    *,
    seed: int,
    noise: float,
    settings: Settings,
    record: Recorder | None = None,
    on_batch: Callable[[], object],
) -> Run:
    """Trains a copy of the policy under one region and returns its run.

    A batch samples `settings.group` answers to each of `settings.prompts_per_batch` prompts, then
    takes `settings.inner_steps` optimiser steps on all of them: the first is on-policy, and a clip
    rule acts on the later ones. An answer is one token, so every tensor is [tokens, 1]. Runs of one
    seed have the same random numbers, also for the flips, whatever their rule and ``noise``.
    """
    policy = copy.deepcopy(pretrained)
    optimizer = torch.optim.Adam(policy.parameters(), settings.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    expected_rewards, entropies = [], []
    counts = torch.zeros(4, len(BIN_NAMES), dtype=torch.int64)

    def evaluate() -> torch.Tensor:
        with torch.no_grad():
            log_probs: torch.Tensor = policy(task.prompts)
        probs = log_probs.exp()
        expected_rewards.append(probs.gather(1, task.right[:, None]).mean().item())
        entropies.append(-(probs * log_probs).sum(-1).mean().item())
        return log_probs

    log_probs = evaluate()
    for _ in range(settings.batches):
        chosen = torch.randperm(len(task.prompts), generator=generator)
        chosen = chosen[: settings.prompts_per_batch]
        prompts = task.prompts[chosen]
        answers = torch.multinomial(
            log_probs[chosen].exp(), settings.group, replacement=True, generator=generator
        )
        old_log_prob = log_probs[chosen].gather(1, answers).reshape(-1, 1)
        uniform = torch.rand(answers.shape, generator=generator)
        rewards = flipped(reward(answers, task.right[chosen]), uniform, noise)
        advantages = group_advantages(rewards).reshape(-1, 1)
        response_mask = torch.ones_like(advantages, dtype=torch.bool)

        for _ in range(settings.inner_steps):
            # One pass a prompt serves its whole group, since the answers are one token long.
            log_prob = policy(prompts).gather(1, answers).reshape(-1, 1)
            result = policy_loss(old_log_prob, log_prob, advantages, response_mask, region=region)
            if record is not None:
                record(old_log_prob, log_prob, advantages, response_mask)
            optimizer.zero_grad()
            result.loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()

        counts += clip_counts(
            old_log_prob, log_prob.detach(), advantages, response_mask, region=region
        )
        log_probs = evaluate()
        on_batch()

    positive, up, negative, down = (tuple(row) for row in counts.tolist())
    curves = tuple(expected_rewards), tuple(entropies)
    return Run(rule, seed, noise, *curves, positive, up, negative, down)


def flipped(rewards: torch.Tensor, uniform: torch.Tensor, noise: float) -> torch.Tensor:
    """Returns 1 - reward where a uniform number is below the noise, otherwise the reward.

    Args:
        rewards: 0 or 1, float32 [prompts, group].
        uniform: Numbers in [0, 1), in the same shape.
        noise: Probability of a flip.
    """
    return torch.where(uniform < noise, 1.0 - rewards, rewards)


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Returns rewards [prompts, group] less their group's mean, over its standard deviation.

    A group without any difference has advantage 0 everywhere.
    """
    spread = rewards.std(dim=1, keepdim=True)
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-6)


def clip_counts(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    region: Region,
) -> torch.Tensor:
    """Returns the tokens with A > 0, those clipped above, with A < 0, and those clipped below.

    They are the metrics of the loss by the old probability, int64 [4, bins]. The shapes are those
    of `bandpo.loss.policy_loss`.
    """
    counts = []
    for side, chosen in (("high", advantages > 0), ("low", advantages < 0)):
        metrics = policy_loss(
            old_log_prob,
            log_prob,
            advantages,
            response_mask & chosen,
            region=region,
            metrics_by_probability=True,
        ).metrics
        tokens = metrics["tokens_by_probability"]
        clipped = metrics[f"clip_fraction_{side}_by_probability"] * tokens
        counts += [tokens.round().long(), clipped.round().long()]
    return torch.stack(counts)
