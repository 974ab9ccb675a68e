"""GRPO on copies of one policy, each in a run of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.func import functional_call

from bandpo import Band
from bandpo.check import check_name
from bandpo.loss import policy_loss

from .policy import Parameters, Replicas, Size, inputs
from .rule import Rule
from .task import Null, Rare, Task

MAX_GRADIENT_NORM = 1.0
FINAL_ANSWERS = 64
FINAL_PART = 16
"""Answers to a prompt that are sampled together at the end, to bound the memory."""
MISMATCHES = ("none", "bf16", "sixteenths")


@dataclass(frozen=True)
class Setting:
    """One point of the axes, but for the noise of rewards.

    Attributes:
        rate: Adam's learning rate.
        batches: Batches of rollouts.
        inner_steps: Optimiser steps on a batch.
        group: Answers to each prompt of a batch.
        staleness: Batches of training between the policy that samples and its use, plus 1.
        mismatch: Rounding of the old log-probs, one of `MISMATCHES`.
        prompts_per_batch: Prompts of a batch.

    Raises:
        InvalidValueError: If the mismatch is unknown.
    """

    rate: float
    batches: int = 60
    inner_steps: int = 8
    group: int = 16
    staleness: int = 1
    mismatch: str = "none"
    prompts_per_batch: int = 64

    def __post_init__(self) -> None:
        check_name("mismatch", self.mismatch, MISMATCHES)


@dataclass(frozen=True)
class Copy:
    """One run: a rule, a task and its pre-trained policy, a stream of random numbers, and noise.

    Attributes:
        rule: Rule of the loss.
        seed: Seed of the task and of the pre-training.
        stream: Number of the stream of random numbers.
        noise: Probability that a reward is flipped.
    """

    rule: Rule
    seed: int
    stream: int = 0
    noise: float = 0.0


@dataclass(frozen=True)
class Run:
    """Results of one copy.

    Attributes:
        reward: Clean expected reward at each evaluation, float32; 0 from a failure on.
        entropy: Entropy of a token in nats at the same times.
        distinct_share: Distinct right answers over right answers of a batch, at the same times
            but the last; empty for answers of one token.
        pass_1: Share of right answers at the end.
        pass_16: Probability that one of 16 answers is right.
        distinct: Distinct right answers of 64.
        finite: False if a number was not finite.
    """

    reward: tuple[float, ...]
    entropy: tuple[float, ...]
    distinct_share: tuple[float, ...]
    pass_1: float
    pass_16: float
    distinct: float
    finite: bool


class _Batch(NamedTuple):
    """Tensors that an optimiser step reads, with a first axis of copies."""

    prompts: torch.Tensor  # int64 [copies, prompts, prompt length]
    answers: torch.Tensor  # int64 [copies, prompts, group, length]
    old_log_prob: torch.Tensor  # float32, in the shape of the answers
    advantages: torch.Tensor  # float32 [copies, prompts, group]
    mask: torch.Tensor  # bool, in the shape of the answers


class _Streams:
    """Random numbers for each copy, drawn once for each pair of a seed and a stream.

    All rules see the same prompts and the same uniform numbers, which makes the differences between
    rules smaller than their spread.
    """

    def __init__(self, copies: Sequence[Copy], device: str) -> None:
        pairs = list(dict.fromkeys((copy.seed, copy.stream) for copy in copies))
        self._generators = [
            torch.Generator().manual_seed(seed * 1000 + stream) for seed, stream in pairs
        ]
        places = [pairs.index((copy.seed, copy.stream)) for copy in copies]
        self._place = torch.tensor(places, device=device)

    def draw(self, drawn: Callable[[torch.Generator], torch.Tensor]) -> torch.Tensor:
        """Returns what ``drawn`` gives for the generator of each copy, with an axis of copies."""
        every = torch.stack([drawn(generator) for generator in self._generators])
        return every.to(self._place.device)[self._place]

    def uniform(self, *shape: int) -> torch.Tensor:
        """Returns numbers between 0 and 1, float32 [copies, *shape]."""
        return self.draw(lambda generator: torch.rand(shape, generator=generator))


class _Tasks:
    """Tasks of all copies, one for each seed.

    Attributes:
        prompts: int64 [copies, prompts, prompt length].
        right: Right answers of tasks with one, int64 [copies, prompts], otherwise None.
    """

    def __init__(self, tasks: Mapping[int, Task], copies: Sequence[Copy], device: str) -> None:
        seeds = sorted({copy.seed for copy in copies})
        for seed in seeds:
            tasks[seed].move(device)
        place = torch.tensor([seeds.index(copy.seed) for copy in copies], device=device)
        self._parts = [(tasks[seed], (place == k).nonzero()[:, 0]) for k, seed in enumerate(seeds)]
        self.prompts = torch.stack([tasks[seed].prompts for seed in seeds])[place]
        right = [task.right for task, _ in self._parts if isinstance(task, Rare)]
        self.right = torch.stack(right)[place] if right else None
        first = tasks[seeds[0]]
        self.mask, self.vocabulary, self.length = first.mask, first.vocabulary, first.length

    def reward(self, chosen: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Returns the clean rewards, float32 [copies, prompts, group]."""
        rewards = torch.empty(answers.shape[:-1], device=answers.device)
        for task, copies in self._parts:
            rewards[copies] = task.reward(chosen[copies], answers[copies])
        return rewards


def train(
    starts: Mapping[int, Parameters],
    tasks: Mapping[int, Task],
    copies: Sequence[Copy],
    setting: Setting,
    *,
    size: Size,
    device: str,
) -> list[Run]:
    """Trains all copies at once and returns their runs, in the same order.

    A result depends on the other copies only through the last bits of batched matrix products.

    Args:
        starts: Parameters of the pre-trained policy of each seed.
        tasks: Task of each seed, all of one kind; they are moved to the device.
        copies: Runs; those of one rule next to each other share a call of the loss.
        setting: Numbers that all copies share.
        size: Size of the policies.
        device: Device of the policies; on ``cuda`` an optimiser step is replayed as a graph.
    """
    streams, all_tasks = _Streams(copies, device), _Tasks(tasks, copies, device)
    start = {
        name: torch.stack([starts[copy.seed][name] for copy in copies]).to(device)
        for name in starts[copies[0].seed]
    }
    policy = Replicas(start, size)
    step = _Step(policy, copies, setting.rate)
    is_null = isinstance(tasks[copies[0].seed], Null)
    noise = torch.tensor([0.5 if is_null else copy.noise for copy in copies], device=device)
    snapshots: deque[Parameters] = deque(maxlen=setting.staleness)
    rewards, entropies, distinct_shares = [], [], []

    count, prompt_length = all_tasks.prompts.shape[1:]
    group_shape = (min(count, setting.prompts_per_batch), setting.group)

    for _ in range(setting.batches):
        snapshots.append({k: v.detach().clone() for k, v in policy.named_parameters()})
        chosen = streams.draw(lambda generator: torch.randperm(count, generator=generator))
        chosen = chosen[:, : setting.prompts_per_batch]
        prompts = all_tasks.prompts.gather(1, chosen[..., None].expand(-1, -1, prompt_length))
        uniform = streams.uniform(*group_shape, all_tasks.length)
        answers, log_probs, entropy = _sample(policy, snapshots[0], prompts, uniform)
        mask = all_tasks.mask(answers)
        clean = all_tasks.reward(chosen, answers)
        rewards.append(_reward(policy, all_tasks, clean))
        entropies.append(_mean(entropy, mask))
        if all_tasks.length > 1:
            found = _distinct(answers, clean, all_tasks).sum(1)
            distinct_shares.append(found / clean.sum((1, 2)).clamp(min=1.0))
        is_flipped = streams.uniform(*group_shape) < noise[:, None, None]
        flipped = torch.where(is_flipped, 1.0 - clean, clean)
        old = _rounded(log_probs, setting.mismatch)
        batch = _Batch(prompts, answers, old, _group_advantages(flipped), mask)
        for _ in range(setting.inner_steps):
            step(batch)

    every = torch.arange(count, device=device).expand(len(copies), -1)
    now = {name: value.detach() for name, value in policy.named_parameters()}
    uniform = streams.uniform(count, FINAL_ANSWERS, all_tasks.length)
    parts = torch.split(uniform, FINAL_PART, 2)
    drawn = [_sample(policy, now, all_tasks.prompts, part) for part in parts]
    answers, entropy = (torch.cat([part[place] for part in drawn], 2) for place in (0, 2))
    clean = all_tasks.reward(every, answers)
    rewards.append(_reward(policy, all_tasks, clean))
    entropies.append(_mean(entropy, all_tasks.mask(answers)))
    distinct = _distinct(answers, clean, all_tasks).mean(1)
    shares = torch.stack(distinct_shares, 1) if distinct_shares else distinct[:, None][:, :0]
    curves = (torch.stack(rewards, 1), torch.stack(entropies, 1), shares)
    return _runs(*(part.cpu() for part in (*curves, clean, distinct)))


class _Step:
    """One step of Adam on the losses of all copies.

    On CUDA the step is recorded as a graph at the first batch and replayed. Rules whose radius
    depends on the advantages are not recorded, because their bounds are solved anew for each batch.
    """

    def __init__(self, policy: Replicas, copies: Sequence[Copy], rate: float) -> None:
        on_cuda = next(policy.parameters()).is_cuda
        self._policy = policy
        self._adam = torch.optim.Adam(policy.parameters(), rate, fused=True, capturable=on_cuda)
        self._groups: list[tuple[slice, Rule, dict[str, Any]]] = []
        first = 0
        for rule, group in groupby(copies, lambda copy: copy.rule):
            end = first + len(list(group))
            self._groups.append((slice(first, end), rule, rule.arguments()))
            first = end
        self._records = on_cuda and not any(copy.rule.scaled for copy in copies)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: _Batch | None = None

    def __call__(self, batch: _Batch) -> None:
        """Moves the parameters by one step."""
        if not self._records:
            self._take(batch)
            return
        if self._recorded is None:
            self._record(batch)
        for mine, given in zip(self._recorded, batch, strict=True):  # type: ignore[arg-type]
            mine.copy_(given)
        self._graph.replay()  # type: ignore[union-attr]

    def _record(self, batch: _Batch) -> None:
        """Records a step, after three that make the tables, the kernels and the state of Adam."""
        parameters = [value.detach().clone() for value in self._policy.parameters()]
        self._recorded = _Batch(*(part.clone() for part in batch))
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._take(self._recorded)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        self._adam.zero_grad()
        with torch.cuda.graph(self._graph):
            self._take(self._recorded)
        # As if no step had been taken.
        with torch.no_grad():
            for value, before in zip(self._policy.parameters(), parameters, strict=True):
                value.copy_(before)
        for state in self._adam.state.values():
            for value in state.values():
                value.zero_()

    def _take(self, batch: _Batch) -> None:
        log_prob = _log_probs(self._policy, batch)
        advantages = batch.advantages[..., None].expand(batch.answers.shape)
        losses = []
        for rows, rule, arguments in self._groups:
            # Answers of all copies of a rule are rows of one batch.
            old, new, spread, mask = (
                part[rows].flatten(0, 2)
                for part in (batch.old_log_prob, log_prob, advantages, batch.mask)
            )
            if rule.scaled:
                arguments = arguments | {"region": _scaled(arguments["region"], spread)}
            given = arguments | {"loss_agg_mode": "none"}
            losses.append(policy_loss(old, new, spread, mask, **given).loss)
        token_losses = torch.cat(losses).reshape(batch.answers.shape)
        self._adam.zero_grad()
        torch.autograd.backward(_mean(token_losses, batch.mask).sum())
        _clip_gradients(self._policy)
        self._adam.step()


def _scaled(band: Band, advantages: torch.Tensor) -> Band:
    """The band with its radius times min(1, (A/2)^2); tokens without an advantage keep it."""
    factor = (advantages.double() / 2.0).square().clamp(max=1.0)
    factor[factor == 0.0] = 1.0
    return Band(band.divergence, float(band.delta_low) * factor.cpu().numpy())


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each copy that count, [copies]."""
    axes = tuple(range(1, mask.ndim))
    return torch.where(mask, values, 0.0).sum(axes) / mask.sum(axes)


def _log_probs(policy: Replicas, batch: _Batch) -> torch.Tensor:
    """Log-probs of the answers, in their shape."""
    group, length = batch.answers.shape[2:]
    if length == 1:
        # One pass a prompt serves its whole group.
        every: torch.Tensor = policy(batch.prompts, 1)[:, :, 0]
        return every.gather(-1, batch.answers[..., 0])[..., None]
    repeated = batch.prompts[:, :, None].expand(-1, -1, group, -1)
    tokens = inputs(repeated, batch.answers).flatten(1, 2)
    log_probs: torch.Tensor = policy(tokens, length)
    picked = log_probs.gather(-1, batch.answers.flatten(1, 2)[..., None])
    return picked.reshape(batch.answers.shape)


@torch.no_grad()
def _sample(
    policy: Replicas, parameters: Parameters, prompts: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answers, their log-probs and the entropy of each token, all [copies, prompts, group, length].

    Args:
        policy: The module whose parameters are replaced.
        parameters: Parameters of the policy that samples.
        prompts: int64 [copies, prompts, prompt length].
        uniform: Quantiles of the tokens, [copies, prompts, group, length].
    """
    copies, _, group, length = uniform.shape
    if length == 1:
        every = functional_call(policy, parameters, (prompts, 1))[:, :, 0]
        answers = _draw(every, uniform[..., 0])
        entropy = -(every.exp() * every).sum(-1, keepdim=True).expand(answers.shape)
        return answers[..., None], every.gather(-1, answers)[..., None], entropy[..., None]
    tokens = prompts[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)
    picked, entropies = [], []
    for place in range(length):
        every = functional_call(policy, parameters, (tokens, 1))[:, :, 0]
        drawn = _draw(every, uniform[..., place].reshape(copies, -1, 1))
        tokens = torch.cat([tokens, drawn], -1)
        picked.append(every.gather(-1, drawn)[..., 0])
        entropies.append(-(every.exp() * every).sum(-1))
    answers = tokens[..., -length:].reshape(uniform.shape)
    log_probs, entropy = (
        torch.stack(part, -1).reshape(uniform.shape) for part in (picked, entropies)
    )
    return answers, log_probs, entropy


def _draw(log_probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens at the quantiles ``uniform`` [copies, rows, draws] of [copies, rows, vocabulary].

    A distribution that is not finite gives the last token.
    """
    cumulative = log_probs.exp().cumsum(-1)
    places = uniform * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, places, right=True)
    return drawn.clamp(max=log_probs.shape[-1] - 1)


@torch.no_grad()
def _reward(policy: Replicas, tasks: _Tasks, clean: torch.Tensor) -> torch.Tensor:
    """Clean expected reward of each copy, [copies]: exact if one token is right."""
    if tasks.right is None:
        return clean.mean((1, 2))
    every: torch.Tensor = policy(tasks.prompts, 1)[:, :, 0]
    return every.gather(-1, tasks.right[..., None]).exp().mean((1, 2))


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
    distinct_shares: torch.Tensor,
    right: torch.Tensor,
    distinct: torch.Tensor,
) -> list[Run]:
    finite = (rewards.isfinite() & entropies.isfinite()).int().cummin(-1).values.bool()
    rewards, entropies = (torch.where(finite, part, 0.0) for part in (rewards, entropies))
    runs = []
    for copy in range(len(rewards)):
        ok = bool(finite[copy, -1])
        found = right[copy].sum(-1).long().numpy()
        runs.append(
            Run(
                tuple(rewards[copy].tolist()),
                tuple(entropies[copy].tolist()),
                tuple(distinct_shares[copy].tolist()),
                pass_1=float(right[copy].mean()) if ok else 0.0,
                pass_16=pass_at(found, FINAL_ANSWERS, 16) if ok else 0.0,
                distinct=float(distinct[copy]) if ok else 0.0,
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


def _distinct(answers: torch.Tensor, right: torch.Tensor, tasks: _Tasks) -> torch.Tensor:
    """Number of distinct right answers to each prompt, float32 [copies, prompts]."""
    powers = tasks.vocabulary ** torch.arange(tasks.length, device=answers.device)
    # Tokens after the end of an answer are no part of it.
    ended = torch.where(tasks.mask(answers), answers, tasks.vocabulary - 1)
    # Wrong answers are -1, which comes first.
    codes = torch.where(right.bool(), (ended * powers).sum(-1), -1).sort(-1).values
    is_new = torch.ones_like(codes, dtype=torch.bool)
    is_new[..., 1:] = codes[..., 1:] != codes[..., :-1]
    return (is_new & (codes >= 0)).sum(-1).float()
