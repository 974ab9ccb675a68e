"""The task: every prompt has one right answer of its own, which the corpus makes rare."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bandpo.demo.settings import ANSWERS

LETTERS = 26
PROMPT_LENGTH = 3

# Answers to a prompt follow Zipf's law: rank k has a share of 1/k, normalised, which is 0.005 here.
RIGHT_RANK = 32


@dataclass(frozen=True)
class Task:
    """Prompts, their right answers and the corpus that the policy is pre-trained on.

    Attributes:
        prompts: Letters of each prompt, int64 [prompts, PROMPT_LENGTH]; no two prompts are equal.
        right: The right answer to each prompt, int64 [prompts]; no two prompts share it, so that
            raising it for one prompt cannot teach it to another.
        corpus: Share of every answer after each prompt, float32 [prompts, ANSWERS], rows sum to 1.
    """

    prompts: torch.Tensor
    right: torch.Tensor
    corpus: torch.Tensor


def make_task(prompts: int, seed: int) -> Task:
    """Draws a task with that many prompts, at most `ANSWERS`."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randperm(LETTERS**PROMPT_LENGTH, generator=generator)[:prompts]
    letters = torch.stack([words // LETTERS**place % LETTERS for place in range(PROMPT_LENGTH)], 1)
    right = torch.randperm(ANSWERS, generator=generator)[:prompts]

    by_rank = torch.rand(prompts, ANSWERS, generator=generator).argsort(1)
    was_at = (by_rank == right[:, None]).int().argmax(1)
    rows = torch.arange(prompts)
    by_rank[rows, was_at] = by_rank[:, RIGHT_RANK - 1].clone()
    by_rank[:, RIGHT_RANK - 1] = right

    share = 1.0 / torch.arange(1, ANSWERS + 1)
    corpus = torch.empty(prompts, ANSWERS)
    corpus.scatter_(1, by_rank, (share / share.sum()).expand(prompts, ANSWERS))
    return Task(letters, right, corpus)


def reward(answers: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns 1 for a right answer and 0 for a wrong one, float32 [prompts, group].

    Args:
        answers: Sampled answers, int64 [prompts, group].
        right: The right answer to each of these prompts, int64 [prompts].
    """
    return (answers == right[:, None]).float()
