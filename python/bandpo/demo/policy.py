"""The policy: a small causal transformer that reads a prompt and writes one answer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bandpo.demo.settings import ANSWERS
from bandpo.demo.task import LETTERS, PROMPT_LENGTH, Task

WIDTH = 64
HEADS = 4
LAYERS = 2
LEARNING_RATE = 3e-3


class Block(torch.nn.Module):
    """Self-attention and a feed-forward layer, each normalised before and added after."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = torch.nn.LayerNorm(WIDTH)
        self.queries_keys_values = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = torch.nn.Linear(WIDTH, WIDTH)
        self.feed_forward = torch.nn.Sequential(
            torch.nn.LayerNorm(WIDTH),
            torch.nn.Linear(WIDTH, 4 * WIDTH),
            torch.nn.GELU(),
            torch.nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [prompts, PROMPT_LENGTH, WIDTH] to the same shape."""
        qkv = self.queries_keys_values(self.attention_norm(x))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(heads.transpose(1, 2).flatten(2))
        added: torch.Tensor = self.feed_forward(x)
        return x + added


class Policy(torch.nn.Module):
    """Log-probabilities of every answer to a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.letter = torch.nn.Embedding(LETTERS, WIDTH)
        self.place = torch.nn.Embedding(PROMPT_LENGTH, WIDTH)
        self.blocks = torch.nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.answer = torch.nn.Linear(WIDTH, ANSWERS, bias=False)

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        """Returns natural log-probabilities, float32 [prompts, ANSWERS].

        Args:
            prompts: Letters, int64 [prompts, PROMPT_LENGTH].
        """
        x = self.blocks(self.letter(prompts) + self.place.weight)
        return torch.log_softmax(self.answer(self.norm(x[:, -1])), dim=-1)


def pretrain(task: Task, *, seed: int, steps: int, on_step: Callable[[], object]) -> Policy:
    """Returns a new policy fitted to the task's corpus by cross-entropy, all prompts a step.

    It draws the weights from torch's global CPU generator, which it seeds.
    """
    torch.default_generator.manual_seed(seed)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = -(task.corpus * policy(task.prompts)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step()
    return policy
