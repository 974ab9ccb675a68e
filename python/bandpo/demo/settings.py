"""The settings of a demo run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from bandpo.check import positive_number, real_number
from bandpo.error import InvalidTypeError, InvalidValueError

# Answers that the policy chooses from. Each prompt has a right one of its own.
ANSWERS = 300


@dataclass(frozen=True)
class Settings:
    """One demo run.

    Attributes:
        seeds: How many, counted from 0. Each has a task, a pre-trained policy and a stream of
            random numbers of its own, which all rules share, with clean and with noisy rewards.
        batches: Rollout batches of one training run.
        prompts: Prompts in a task, at most `ANSWERS`.
        prompts_per_batch: How many of them a batch has, drawn without replacement.
        group: Answers sampled for each prompt of a batch, at least 2.
        inner_steps: Optimiser steps on a batch, each on all of its tokens.
        learning_rate: Adam's, constant.
        pretrain_steps: Optimiser steps that fit the policy to the corpus.
        delta: Radius of the first KL band; the second has `bandpo.demo.rule.PAPER_DELTA`.
        noise: Probability that a reward is flipped in training, in the runs with noisy rewards;
            above 0 and below 1/2, where a reward carries nothing.

    Raises:
        InvalidTypeError: If a count is not an int, or another setting not a real number.
        InvalidValueError: If a setting is out of range.
    """

    seeds: int = 2
    batches: int = 60
    prompts: int = 128
    prompts_per_batch: int = 64
    group: int = 16
    inner_steps: int = 8
    learning_rate: float = 1e-3
    pretrain_steps: int = 300
    delta: float = 0.01
    noise: float = 0.05

    def __post_init__(self) -> None:
        ranges = {
            "prompts": (1, ANSWERS),
            "prompts_per_batch": (1, self.prompts),
            "group": (2, math.inf),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, float):
                continue
            if not isinstance(value, int):
                raise InvalidTypeError(f"{field.name} must be an int, got {value!r}")
            low, high = ranges.get(field.name, (1, math.inf))
            if not low <= value <= high:
                allowed = f"at least {low}" if high == math.inf else f"in {low}..{high}"
                raise InvalidValueError(f"{field.name} must be {allowed}, got {value}")
        positive_number("learning_rate", self.learning_rate)
        positive_number("delta", self.delta)
        if not 0.0 < real_number("noise", self.noise) < 0.5:
            raise InvalidValueError(f"noise must be above 0 and below 0.5, got {self.noise}")
