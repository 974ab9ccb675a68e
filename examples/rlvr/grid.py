"""The runs of the study, in chunks that one call trains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

from .rule import FAMILIES, SEQUENCE_FAMILIES, Rule, rules_of
from .train import Setting

RATES = (1e-4, 3e-4, 1e-3)
NOISES = (0.0, 0.02, 0.05, 0.1)
TUNING_SEEDS = tuple(range(1000, 1004))
FINAL_SEEDS = tuple(range(8))
STREAMS = (0, 1)
COPIES = 16
"""Rules of a chunk: more take no less time a run, and lose more when a chunk is cut off."""

MULTI_TOKEN = ("many", "countdown")


@dataclass(frozen=True)
class Chunk:
    """Rules that are trained together: same task, seed, stream and setting."""

    study: str
    task: str
    seed: int
    stream: int
    setting: Setting
    rules: tuple[Rule, ...]
    pretrain_steps: int = 300

    @property
    def name(self) -> str:
        """File name of its results, from everything that they depend on."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return f"{self.study}-{self.task}-{self.seed}-{digest}.parquet"


def tuning(task: str) -> Iterator[Chunk]:
    """Every rule at every rate and noise, on the tuning seeds, one seed after the other."""
    families = [*FAMILIES, *(SEQUENCE_FAMILIES if task in MULTI_TOKEN else ())]
    noises = (0.0,) if task == "null" else NOISES
    for seed, noise, rate in product(TUNING_SEEDS, noises, RATES):
        yield from _chunks("tuning", task, seed, 0, Setting(rate, noise=noise), rules_of(*families))


def axes(task: str) -> Iterator[Chunk]:
    """The radii of kl, and the baselines, along each axis of question 4, on the tuning seeds."""
    rules = rules_of("kl", "no clipping", "asymmetric clip")
    varied: list[Callable[[Setting], Setting]] = []
    varied += [lambda s, n=n: replace(s, inner_steps=n) for n in (1, 4, 16)]  # type: ignore[misc]
    varied += [lambda s, n=n: replace(s, group=n) for n in (4, 64)]  # type: ignore[misc]
    varied += [lambda s, n=n: replace(s, staleness=n) for n in (4, 16)]  # type: ignore[misc]
    varied += [lambda s, m=m: replace(s, mismatch=m) for m in ("bf16", "sixteenths")]  # type: ignore[misc]
    for seed, vary, noise, rate in product(TUNING_SEEDS, varied, (0.0, 0.05), RATES[1:]):
        yield from _chunks("axes", task, seed, 0, vary(Setting(rate, noise=noise)), rules)


def reduced(task: str) -> Iterator[Chunk]:
    """One band, one clip and no clipping, at one rate, with and without noise."""
    rules = [
        *rules_of("no clipping"),
        Rule("asymmetric clip", "clip@0.2,0.28"),
        Rule("kl", "(kl@0.005).cap(10)"),
        Rule("kl", "(kl@0.05).cap(10)"),
    ]
    for seed, noise in product(TUNING_SEEDS[:2], (0.0, 0.05)):
        setting = Setting(1e-3, batches=30, noise=noise)
        yield from _chunks("reduced", task, seed, 0, setting, rules)


def finals(task: str, chosen: dict[float, list[tuple[Rule, float]]]) -> Iterator[Chunk]:
    """The chosen rule and rate of every family, by noise, on the final seeds and both streams."""
    for seed, stream in product(FINAL_SEEDS, STREAMS):
        for noise, winners in chosen.items():
            for rate in sorted({rate for _, rate in winners}):
                rules = [rule for rule, its_rate in winners if its_rate == rate]
                setting = Setting(rate, noise=noise)
                yield from _chunks("finals", task, seed, stream, setting, rules)


def _chunks(
    study: str, task: str, seed: int, stream: int, setting: Setting, rules: list[Rule]
) -> Iterator[Chunk]:
    for first in range(0, len(rules), COPIES):
        part = tuple(rules[first : first + COPIES])
        yield Chunk(study, task, seed, stream, setting, part)


STUDIES: dict[str, Callable[[str], Iterator[Chunk]]] = {
    "tuning": tuning,
    "axes": axes,
    "reduced": reduced,
}
"""Studies that need no result of another one."""
