"""A small causal transformer, as many copies of it as there are runs, and its pre-training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from bandpo.plot.output import whole_file

from .task import Task

PRETRAIN_STEPS = 300
PRETRAIN_RATE = 3e-3
DEMONSTRATIONS = 64
"""Answers of the corpus to each prompt in a step of pre-training, for answers of one token."""

Parameters = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Size:
    """Width of the residual stream, heads and layers; the inner width of a layer is 4 widths."""

    width: int = 64
    heads: int = 4
    layers: int = 2


SMALL = Size()
LARGE = Size(512, 8, 3)
"""About 10 million parameters."""


class Replicas(torch.nn.Module):
    """Independent copies of one policy, whose tensors have a first axis of copies.

    One matrix product then serves all copies, where 64 prompts alone would leave the time to the
    overhead of the calls.

    Args:
        starts: Parameters of each copy.
        size: Their size.
    """

    def __init__(self, starts: Parameters, size: Size) -> None:
        super().__init__()
        self.size = size
        for name, value in starts.items():
            self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Returns natural log-probabilities of the last ``length`` next tokens.

        Args:
            tokens: int64 [copies, sequences, places].
            length: Number of places.

        Returns:
            float32 [copies, sequences, length, vocabulary].
        """
        w = dict(self.named_parameters())
        heads, layers = self.size.heads, self.size.layers
        copies, sequences, places = tokens.shape
        # One table of all copies, because the gradient of an index of two axes takes longer.
        first = w["token"].shape[1] * torch.arange(copies, device=tokens.device)
        rows = tokens + first[:, None, None]
        x = functional.embedding(rows, w["token"].flatten(0, 1)) + w["place"][:, None, :places]
        for layer in range(layers):
            h = _normalised(x, w[f"attention_norm_{layer}"])
            qkv = _linear(h, w[f"qkv_{layer}"]).reshape(*h.shape[:-1], 3, heads, -1)
            # Sequences and heads on one axis, because a GPU takes 65535 of the first at most.
            q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            mixed = mixed.reshape(copies, sequences, heads, places, -1).transpose(2, 3).flatten(-2)
            if layer == layers - 1:  # the places before are read by attention alone
                x, mixed = (part[:, :, places - length :] for part in (x, mixed))
            x = x + _linear(mixed, w[f"out_{layer}"])
            h = _linear(_normalised(x, w[f"feed_norm_{layer}"]), w[f"up_{layer}"])
            x = x + _linear(functional.gelu(h), w[f"down_{layer}"])
        return functional.log_softmax(_linear(_normalised(x, w["norm"]), w["head"]), -1)


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.flatten(1, 2), weight).reshape(*x.shape[:3], -1)


def _normalised(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:]) * gain[:, None, None]


def _drawn(task: Task, size: Size, generator: torch.Generator) -> Parameters:
    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    width = size.width
    places = task.prompts.shape[1] + task.length
    fan_in = 1.0 / math.sqrt(width)
    drawn = {
        "token": normal(task.vocabulary, width, scale=1.0),
        "place": normal(places, width, scale=1.0),
        "norm": torch.ones(width),
        "head": normal(width, task.vocabulary, scale=0.5 * fan_in),
    }
    for layer in range(size.layers):
        drawn |= {
            f"attention_norm_{layer}": torch.ones(width),
            f"qkv_{layer}": normal(width, 3 * width, scale=fan_in),
            f"out_{layer}": normal(width, width, scale=0.5 * fan_in),
            f"feed_norm_{layer}": torch.ones(width),
            f"up_{layer}": normal(width, 4 * width, scale=fan_in),
            f"down_{layer}": normal(4 * width, width, scale=0.25 * fan_in),
        }
    return drawn


def inputs(prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Returns the tokens before each token of the answers, [..., sequences, places].

    Args:
        prompts: int64 [..., sequences, prompt length].
        answers: int64 [..., sequences, length].
    """
    return torch.cat([prompts, answers[..., :-1]], -1)


def pretrain(
    task: Task, *, seed: int, size: Size, steps: int = PRETRAIN_STEPS, device: str = "cpu"
) -> Parameters:
    """Returns the parameters of a policy that is fitted to the task's corpus, on the processor."""
    generator = torch.Generator().manual_seed(seed)
    start = {name: value[None] for name, value in _drawn(task, size, generator).items()}
    policy = Replicas(start, size).to(device)
    # The rate of a width of 64; wider layers take smaller ones.
    optimizer = torch.optim.Adam(policy.parameters(), PRETRAIN_RATE * 64 / size.width)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    count = DEMONSTRATIONS if task.length == 1 else 4
    all_prompts = task.prompts.to(device)
    for _ in range(steps):
        answers = task.demonstrations(generator, count)
        counted = task.mask(answers).to(device)
        answers = answers.to(device)
        if task.length == 1:
            log_probs = policy(all_prompts[None], 1)[0, :, 0].gather(1, answers[..., 0])
            loss = -log_probs.mean()
        else:
            prompts = all_prompts[:, None].expand(-1, count, -1)
            tokens = inputs(prompts, answers).flatten(0, 1)
            log_probs = policy(tokens[None], task.length)[0]
            target, counted = (part.flatten(0, 1) for part in (answers, counted))
            loss = -log_probs.gather(-1, target[..., None])[..., 0][counted].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: value.detach()[0].cpu().clone() for name, value in policy.named_parameters()}


def checkpoint(
    task: Task, *, seed: int, path: Path, size: Size, steps: int, device: str = "cpu"
) -> Parameters:
    """Returns the parameters in a safetensors file, which is pre-trained and written if missing."""
    from safetensors.torch import load_file, save

    if path.exists():
        return load_file(path)
    parameters = pretrain(task, seed=seed, size=size, steps=steps, device=device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, (".safetensors",)) as file:
        file.write(save(parameters))
    return parameters
