"""The results of a demo run, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bandpo.demo.settings import Settings

# The bins of `bandpo.loss.PROBABILITY_EDGES`, which needs torch; an edge belongs to the bin above.
BIN_NAMES = ("< 0.001", "0.001-0.01", "0.01-0.1", "0.1-0.5", ">= 0.5")


@dataclass(frozen=True)
class Run:
    """One rule on one seed, with clean or noisy rewards.

    Attributes:
        rule: Name of the clip rule.
        seed: The seed.
        noise: Probability that a reward was flipped in training, 0 for clean rewards.
        reward: Expected reward over all prompts, never flipped, exact and not sampled, before the
            first batch and after each one.
        entropy: Mean entropy of the answers over all prompts, in nats, at the same times.
        positive_tokens: Tokens with A > 0 by bin of their old probability, over all batches.
        clipped_up: Those of them whose ratio was above the upper bound in the last inner step.
        negative_tokens: Tokens with A < 0 by bin.
        clipped_down: Those of them whose ratio was below the lower bound in the last inner step.
    """

    rule: str
    seed: int
    noise: float
    reward: tuple[float, ...]
    entropy: tuple[float, ...]
    positive_tokens: tuple[int, ...]
    clipped_up: tuple[int, ...]
    negative_tokens: tuple[int, ...]
    clipped_down: tuple[int, ...]

    @property
    def mean_reward(self) -> float:
        """Mean of ``reward`` over its times, the area under its curve."""
        return math.fsum(self.reward) / len(self.reward)


@dataclass(frozen=True)
class Result:
    """All runs of a demo.

    Attributes:
        settings: Those of the run.
        base_probability: Median probability of the right answer after pre-training, for each seed.
        runs: One for each seed, noise and rule.
        conclusion: The comparison of the rules, in words.
        picture: Path of the picture, None for none.
        tokens: Path of the recorded tokens, None for none.
    """

    settings: Settings
    base_probability: tuple[float, ...]
    runs: tuple[Run, ...]
    conclusion: str = ""
    picture: str | None = None
    tokens: str | None = None

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules, in the order in which they were run."""
        return tuple(dict.fromkeys(run.rule for run in self.runs))

    @property
    def noises(self) -> tuple[float, float]:
        """Probabilities of a flipped reward: 0, and that of the settings."""
        return 0.0, self.settings.noise

    def of(self, rule: str, noise: float) -> list[Run]:
        """The runs of one rule with one noise, in the order of the seeds."""
        return [run for run in self.runs if (run.rule, run.noise) == (rule, noise)]

    def clip_fractions(
        self, rule: str, noise: float
    ) -> tuple[list[float | None], list[float | None]]:
        """Clip fraction up and down by bin, over all seeds; None where a bin has no such token.

        Up is the share of the tokens with A > 0 whose ratio was above the upper bound in the last
        inner step, down the share of those with A < 0 whose ratio was below the lower bound.
        """
        runs = self.of(rule, noise)
        return (
            _shares([run.clipped_up for run in runs], [run.positive_tokens for run in runs]),
            _shares([run.clipped_down for run in runs], [run.negative_tokens for run in runs]),
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as dicts, tuples and numbers that `json.dumps` takes."""
        document = asdict(self)
        for run, written in zip(self.runs, document["runs"], strict=True):
            written["mean_reward"] = run.mean_reward
        document["probability_bins"] = BIN_NAMES
        for word, noise in zip(("clean", "noisy"), self.noises, strict=True):
            fractions = {rule: self.clip_fractions(rule, noise) for rule in self.rules}
            document[f"clip_fraction_up_{word}"] = {rule: up for rule, (up, _) in fractions.items()}
            document[f"clip_fraction_down_{word}"] = {
                rule: down for rule, (_, down) in fractions.items()
            }
        return document


def _shares(parts: Sequence[Sequence[int]], wholes: Sequence[Sequence[int]]) -> list[float | None]:
    part_sums = [sum(counts) for counts in zip(*parts, strict=True)]
    whole_sums = [sum(counts) for counts in zip(*wholes, strict=True)]
    return [
        part / whole if whole else None for part, whole in zip(part_sums, whole_sums, strict=True)
    ]
