"""A small causal transformer, as many copies of it as there are rules, and its pre-training."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional

from bandpo.plot.output import whole_file

from .task import Task

WIDTH, HEADS, LAYERS = 64, 4, 2
PRETRAIN_STEPS = 300
PRETRAIN_RATE = 3e-3
DEMONSTRATIONS = 64
"""Answers of the corpus to each prompt in a step of pre-training, for answers of one token."""

Parameters = dict[str, torch.Tensor]


class Replicas(torch.nn.Module):
    """Independent copies of one policy, whose tensors have a first axis of copies.

    One matrix product then serves all copies, where 64 prompts alone would leave the time to the
    overhead of the calls.
    """

    def __init__(self, parameters: Parameters, copies: int) -> None:
        super().__init__()
        for name, value in parameters.items():
            stacked = value.unsqueeze(0).repeat(copies, *(1 for _ in value.shape))
            self.register_parameter(name, torch.nn.Parameter(stacked))

    def forward(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Returns natural log-probabilities of the last ``length`` next tokens.

        Args:
            tokens: int64 [copies, sequences, places].
            length: Number of places.

        Returns:
            float32 [copies, sequences, length, vocabulary].
        """
        w = dict(self.named_parameters())
        copies, sequences, places = tokens.shape
        copy = torch.arange(copies)[:, None]
        x = w["token"][copy, tokens.flatten(1)].reshape(copies, sequences, places, WIDTH)
        x = x + w["place"][:, None, :places]
        for layer in range(LAYERS):
            h = _normalised(x, w[f"attention_norm_{layer}"])
            qkv = _linear(h, w[f"qkv_{layer}"]).reshape(*h.shape[:-1], 3, HEADS, -1)
            q, k, v = (part.flatten(0, 1).transpose(1, 2) for part in qkv.unbind(-3))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            mixed = mixed.transpose(1, 2).reshape(copies, sequences, places, -1)
            x = x + _linear(mixed, w[f"out_{layer}"])
            h = _linear(_normalised(x, w[f"feed_norm_{layer}"]), w[f"up_{layer}"])
            x = x + _linear(functional.gelu(h), w[f"down_{layer}"])
        x = _normalised(x[:, :, places - length :], w["norm"])
        return functional.log_softmax(_linear(x, w["head"]), -1)


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.flatten(1, 2), weight).reshape(*x.shape[:3], -1)


def _normalised(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, (WIDTH,)) * gain[:, None, None]


def _drawn(task: Task, generator: torch.Generator) -> Parameters:
    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    places = task.prompts.shape[1] + task.length
    fan_in = 1.0 / math.sqrt(WIDTH)
    drawn = {
        "token": normal(task.vocabulary, WIDTH, scale=1.0),
        "place": normal(places, WIDTH, scale=1.0),
        "norm": torch.ones(WIDTH),
        "head": normal(WIDTH, task.vocabulary, scale=0.5 * fan_in),
    }
    for layer in range(LAYERS):
        drawn |= {
            f"attention_norm_{layer}": torch.ones(WIDTH),
            f"qkv_{layer}": normal(WIDTH, 3 * WIDTH, scale=fan_in),
            f"out_{layer}": normal(WIDTH, WIDTH, scale=0.5 * fan_in),
            f"feed_norm_{layer}": torch.ones(WIDTH),
            f"up_{layer}": normal(WIDTH, 4 * WIDTH, scale=fan_in),
            f"down_{layer}": normal(4 * WIDTH, WIDTH, scale=0.25 * fan_in),
        }
    return drawn


def inputs(prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Returns the tokens before each token of the answers, [..., sequences, places].

    Args:
        prompts: int64 [..., sequences, prompt length].
        answers: int64 [..., sequences, length].
    """
    return torch.cat([prompts, answers[..., :-1]], -1)


def pretrain(task: Task, *, seed: int, steps: int = PRETRAIN_STEPS) -> Parameters:
    """Returns the parameters of a policy that is fitted to the task's corpus."""
    generator = torch.Generator().manual_seed(seed)
    policy = Replicas(_drawn(task, generator), 1)
    optimizer = torch.optim.Adam(policy.parameters(), PRETRAIN_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    count = DEMONSTRATIONS if task.length == 1 else 4
    for _ in range(steps):
        answers = task.demonstrations(generator, count)
        if task.length == 1:
            log_probs = policy(task.prompts[None], 1)[0, :, 0].gather(1, answers[..., 0])
            loss = -log_probs.mean()
        else:
            prompts = task.prompts[:, None].expand(-1, count, -1)
            tokens = inputs(prompts, answers).flatten(0, 1)
            log_probs = policy(tokens[None], task.length)[0]
            target, counted = (part.flatten(0, 1) for part in (answers, task.mask(answers)))
            loss = -log_probs.gather(-1, target[..., None])[..., 0][counted].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: value.detach()[0].clone() for name, value in policy.named_parameters()}


def checkpoint(task: Task, *, seed: int, path: Path, steps: int = PRETRAIN_STEPS) -> Parameters:
    """Returns the parameters in a safetensors file, which is pre-trained and written if missing."""
    from safetensors.torch import load_file, save

    if path.exists():
        return load_file(path)
    parameters = pretrain(task, seed=seed, steps=steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, (".safetensors",)) as file:
        file.write(save(parameters))
    return parameters
