"""The tasks: prompts, a corpus of demonstrations, and a reward that a program checks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

PLUS, STOP = 10, 11
"""Tokens of `Countdown` after the ten digits."""


class Task(ABC):
    """Prompts with a verifiable reward.

    Attributes:
        prompts: Tokens, int64 [prompts, prompt length].
        vocabulary: Number of tokens; prompts and answers share them.
        length: Max tokens of an answer.
    """

    prompts: torch.Tensor
    vocabulary: int
    length: int

    @abstractmethod
    def __init__(self, seed: int) -> None: ...

    @abstractmethod
    def demonstrations(self, generator: torch.Generator, count: int) -> torch.Tensor:
        """Draws ``count`` answers of the corpus to each prompt, int64 [prompts, count, length]."""

    @abstractmethod
    def reward(self, chosen: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Returns 1 for a right answer and 0 for a wrong one, float32 [..., prompts, group].

        Args:
            chosen: Rows of ``prompts``, int64 [..., prompts].
            answers: Tokens, int64 [..., prompts, group, length].
        """

    def move(self, device: str) -> None:
        """Moves the tensors of the task, which afterwards gives rewards on that device."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))

    def mask(self, answers: torch.Tensor) -> torch.Tensor:
        """Returns True for each token up to the end of its answer, bool, in the same shape."""
        return torch.ones_like(answers, dtype=torch.bool)


class Rare(Task):
    """One right answer of one token to each prompt, at rank 32 of Zipf's law (0.005 of 300)."""

    RANK = 32

    def __init__(self, seed: int) -> None:
        prompts = 128
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary, self.length = 300, 1
        words = torch.randperm(26**3, generator=generator)[:prompts]
        self.prompts = torch.stack([words // 26**place % 26 for place in range(3)], 1)
        self.right = torch.randperm(self.vocabulary, generator=generator)[:prompts]
        order = torch.rand(prompts, self.vocabulary, generator=generator).argsort(1)
        rows = torch.arange(prompts)
        was_at = (order == self.right[:, None]).int().argmax(1)
        order[rows, was_at] = order[:, self.RANK - 1].clone()
        order[:, self.RANK - 1] = self.right
        self._order = order

    def demonstrations(self, generator: torch.Generator, count: int) -> torch.Tensor:
        """Draws answers by Zipf's law over the order of each prompt."""
        share = 1.0 / torch.arange(1, self.vocabulary + 1)
        ranks = torch.multinomial(
            share.expand(len(self.prompts), -1), count, replacement=True, generator=generator
        )
        return self._order.gather(1, ranks)[..., None]

    def reward(self, chosen: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Returns whether the one token is the right one."""
        return (answers[..., 0] == self.right[chosen][..., None]).float()


class Null(Rare):
    """The prompts of `Rare` with a training reward that is a coin; its area is that of `Rare`.

    The trainer flips every reward with probability 1/2, so that no answer is better.
    """


class Many(Task):
    """Three tokens with 4 right ones of 32 at each place, so 64 right answers to a prompt."""

    RANKS = (2, 4, 8, 16)

    def __init__(self, seed: int) -> None:
        prompts = 32
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary, self.length = 32, 3
        words = torch.randperm(26**3, generator=generator)[:prompts]
        self.prompts = torch.stack([words // 26**place % 26 for place in range(3)], 1)
        self._order = torch.rand(prompts, 3, self.vocabulary, generator=generator).argsort(-1)
        right = torch.zeros(prompts, 3, self.vocabulary, dtype=torch.bool)
        ranks = torch.tensor(self.RANKS) - 1
        self.right = right.scatter_(-1, self._order[..., ranks], True)

    def demonstrations(self, generator: torch.Generator, count: int) -> torch.Tensor:
        """Draws each token by Zipf's law over the order of its prompt and place."""
        share = 1.0 / torch.arange(1, self.vocabulary + 1)
        rows = len(self.prompts) * self.length
        ranks = torch.multinomial(
            share.expand(rows, -1), count, replacement=True, generator=generator
        )
        drawn = self._order.flatten(0, 1).gather(1, ranks)
        return drawn.reshape(len(self.prompts), self.length, count).transpose(1, 2)

    def reward(self, chosen: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Returns whether all three tokens are right."""
        places = torch.arange(self.length, device=answers.device)
        right = self.right[chosen[..., None, None], places, answers]
        return right.all(-1).float()


class Countdown(Task):
    """Sums of one to three digits: a prompt is a first digit and a target, ``7+4+2;`` is an answer.

    The length of an answer is 2, 4 or 6 tokens. A tenth of the corpus reaches its target.
    """

    RIGHT_SHARE = 0.1

    def __init__(self, seed: int) -> None:
        prompts = 64
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary, self.length = 12, 6
        first, rest = torch.arange(190) // 19, torch.arange(190) % 19
        kept = torch.randperm(190, generator=generator)[:prompts]
        self._first, self._rest = first[kept], rest[kept]
        target = self._first + self._rest
        self.prompts = torch.stack([self._first, target // 10, target % 10], 1)

    def demonstrations(self, generator: torch.Generator, count: int) -> torch.Tensor:
        """Draws sums of two or three digits, a tenth of which are right."""
        shape = (len(self.prompts), count)

        def digit(below: int) -> torch.Tensor:
            return torch.randint(below, shape, generator=generator)

        rest = self._rest[:, None].expand(shape)
        second = digit(10)
        low, high = (rest - 9).clamp(min=0), rest.clamp(max=9)
        right_second = low + digit(1 << 30) % (high - low + 1)
        right = torch.rand(shape, generator=generator) < self.RIGHT_SHARE
        second = torch.where(right, right_second, second)
        third = torch.where(right, rest - right_second, digit(10))
        # A sum of two digits, if it is drawn; of those that should be right, only if it can be.
        short = torch.rand(shape, generator=generator) < 0.5
        short &= ~right | (rest <= 9)
        second = torch.where(short & right, rest, second)
        plus, stop = torch.full(shape, PLUS), torch.full(shape, STOP)
        return torch.stack(
            [
                self._first[:, None].expand(shape),
                plus,
                second,
                torch.where(short, stop, plus),
                torch.where(short, stop, third),
                stop,
            ],
            -1,
        )

    def mask(self, answers: torch.Tensor) -> torch.Tensor:
        """Returns True up to the first stop token, which counts."""
        stops = (answers == STOP).int()
        return stops.cumsum(-1) - stops == 0

    def reward(self, chosen: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Returns whether an answer is a sum that begins and ends as the prompt demands."""
        counts = self.mask(answers)
        digits, marks = answers[..., 0::2], answers[..., 1::2]
        written = counts[..., 0::2]
        well_formed = ((digits < 10) | ~written).all(-1)
        well_formed &= ((marks >= PLUS) | ~counts[..., 1::2]).all(-1)
        well_formed &= (marks == STOP).any(-1)
        total = torch.where(written, digits, 0).sum(-1)
        first = self._first[chosen][..., None]
        right = (digits[..., 0] == first) & (total == first + self._rest[chosen][..., None])
        return (well_formed & right).float()


TASKS: dict[str, type[Task]] = {"rare": Rare, "many": Many, "countdown": Countdown, "null": Null}
