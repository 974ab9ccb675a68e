"""A tiny policy and its rollouts, whose gradient one process or several ranks compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bandpo.loss import GlobalBatch, PolicyLossResult, policy_loss

VOCABULARY, HIDDEN = 11, 5
LENGTHS = [5, 0, 3, 6, 1, 4, 6, 2, 0, 5]
"""Tokens that count of each sequence; two have none."""

Split = list[list[list[int]]]
"""The sequences of each micro-batch of each rank."""

WHOLE: Split = [[list(range(len(LENGTHS)))]]


class TinyPolicy(torch.nn.Module):
    """Log-probabilities of tokens, each from the token before it."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN)
            self.head = torch.nn.Linear(HIDDEN, VOCABULARY)
        self.to(dtype)

    def forward(self, previous: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Returns one log-prob a token, with a last dimension of 1."""
        logits: torch.Tensor = self.head(self.embedding(previous).tanh())
        return logits.log_softmax(-1).gather(-1, tokens[..., None])


class Rollouts(NamedTuple):
    """Sequences that an old policy drew, [S, T], with an advantage each, [S]."""

    previous: torch.Tensor
    tokens: torch.Tensor
    old_log_prob: torch.Tensor
    weights: torch.Tensor
    response_mask: torch.Tensor
    advantages: torch.Tensor

    @classmethod
    def drawn(cls, dtype: torch.dtype) -> Rollouts:
        """Returns the rollouts that every process draws."""
        rng = torch.Generator().manual_seed(3)
        shape = len(LENGTHS), max(LENGTHS)
        previous, tokens = (torch.randint(VOCABULARY, shape, generator=rng) for _ in range(2))
        weights, noise = (torch.rand(shape, generator=rng, dtype=torch.float64) for _ in range(2))
        mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
        mask[3, 2] = False  # a hole
        with torch.no_grad():
            old = TinyPolicy(0, torch.float64)(previous, tokens)[..., 0] + 0.4 * (noise - 0.5)
        advantages = torch.randn(shape[0], generator=rng, dtype=torch.float64)
        return cls(
            previous,
            tokens,
            old.clamp(max=0.0).to(dtype),
            (0.5 + weights).to(dtype),
            mask,
            advantages.to(dtype),
        )

    def rows(self, rows: list[int], padding: int) -> Rollouts:
        """Returns some sequences, as wide as the longest of them and the padding."""
        width = max((LENGTHS[row] for row in rows), default=0) + padding
        *of_tokens, advantages = (part[rows] for part in self)
        return Rollouts._make([*(part[:, :width] for part in of_tokens), advantages])

    def packed(self) -> tuple[Rollouts, torch.Tensor]:
        """Returns the tokens one after another, up to the last that counts, and the offsets."""
        kept = self.response_mask.flip(-1).cumsum(-1).flip(-1) > 0
        cu_seqlens = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))
        *of_tokens, advantages = self
        each = advantages[:, None].expand(kept.shape)
        return Rollouts._make(part[kept] for part in (*of_tokens, each)), cu_seqlens


def loss_of(
    model: torch.nn.Module, rollouts: Rollouts, cu_seqlens: torch.Tensor | None, **options: Any
) -> PolicyLossResult:
    """Returns the loss of a micro-batch."""
    return policy_loss(
        rollouts.old_log_prob,
        model(rollouts.previous, rollouts.tokens).squeeze(-1),
        rollouts.advantages,
        rollouts.response_mask,
        rollout_is_weights=rollouts.weights,
        cu_seqlens=cu_seqlens,
        **options,
    )


MicroBatches = list[tuple[Rollouts, "torch.Tensor | None"]]
"""Some sequences each, and their offsets if they are packed."""


def micro_batches(rollouts: Rollouts, split: Split, *, packed: bool) -> MicroBatches:
    """Returns the micro-batches of this rank, the widths of which differ from those of others."""
    rank = dist.get_rank()
    parts = [rollouts.rows(rows, padding=rank) for rows in split[rank]]
    return [part.packed() if packed else (part, None) for part in parts]


def counts_of(rollouts: Rollouts) -> GlobalBatch:
    """Returns the counts of all rollouts, for one process."""
    mask = rollouts.response_mask
    return GlobalBatch(mask.sum(), mask.any(-1).sum(), loss_scale_factor=max(LENGTHS))


def counts_of_all_ranks(rollouts: Rollouts, split: Split) -> GlobalBatch:
    """Returns the same for this rank, which counts its own sequences and takes an all-reduce."""
    mask = rollouts.response_mask[[row for rows in split[dist.get_rank()] for row in rows]]
    counts = torch.stack([mask.sum(), mask.any(-1).sum()])
    dist.all_reduce(counts)
    tokens, sequences = counts.unbind()
    return GlobalBatch(tokens, sequences, dist.get_world_size(), max(LENGTHS))


def wrapped(model: TinyPolicy, wrapper: str) -> torch.nn.Module:
    """Returns a model whose gradients are averaged over the ranks, by "ddp" or "fsdp2"."""
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def synchronised(model: torch.nn.Module, now: bool) -> AbstractContextManager[object]:
    """Returns the context of a backward pass after which gradients are averaged, or are not."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    elif isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return nullcontext()


def gradient_of(model: torch.nn.Module) -> torch.Tensor:
    """Returns all gradients of a model in a row, collected from its shards."""
    return _in_a_row([parameter.grad for parameter in model.parameters()])


def parameters_of(model: torch.nn.Module) -> torch.Tensor:
    """Returns all parameters of a model, likewise."""
    return _in_a_row([parameter.detach() for parameter in model.parameters()])


def _in_a_row(tensors: list[torch.Tensor | None]) -> torch.Tensor:
    found = []
    for tensor in tensors:
        assert tensor is not None
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found.append(whole.reshape(-1))
    return torch.cat(found)
