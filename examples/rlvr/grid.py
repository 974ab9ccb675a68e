"""The runs of the study, in chunks that one call trains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product

from .policy import LARGE, PRETRAIN_STEPS, SMALL, Size
from .rule import FAMILIES, MULTI_TOKEN_FAMILIES, Rule, rules_of
from .train import Copy, Setting

MULTI_TOKEN = ("many", "countdown")
TUNING_SEEDS = range(1000, 1004)
FINAL_SEEDS = range(8)
STREAMS = (0, 1)
COPIES = 16
"""Runs of a chunk on a processor: more take no less time a run, and lose more if it is cut off."""
LARGE_FAMILIES = (
    "asymmetric clip",
    "no clipping",
    "dcpo",
    "kl",
    "kl 0.05",
    "reverse-kl",
    "band above",
)

_BASES = {
    "many": Setting(1e-3, batches=40, prompts_per_batch=16),
    "countdown": Setting(1e-3, batches=30, prompts_per_batch=16),
}


@dataclass(frozen=True)
class Chunk:
    """Runs that are trained together: of one task, setting and size."""

    study: str
    task: str
    setting: Setting
    copies: tuple[Copy, ...]
    size: Size = SMALL
    pretrain_steps: int = PRETRAIN_STEPS

    @property
    def name(self) -> str:
        """File name of its results, from everything that they depend on."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return f"{self.study}-{self.task}-{digest}.parquet"


Runs = Iterable[tuple[Setting, Iterable[Copy]]]
"""Settings, and the copies of each."""
Chosen = Mapping[float, Iterable[tuple[Rule, float]]]
"""Rules and their rates, by noise."""


def noises_of(task: str) -> tuple[float, ...]:
    """Shares of flipped rewards that a task is run with."""
    if task == "null":
        return (0.0,)
    return (0.0, 0.05) if task in MULTI_TOKEN else (0.0, 0.02, 0.05, 0.1)


def families_of(task: str) -> Mapping[str, list[str]]:
    """Families that are compared on a task, with their strengths."""
    return MULTI_TOKEN_FAMILIES if task in MULTI_TOKEN else FAMILIES


def tuning(task: str) -> Runs:
    """Every rule at every rate and noise, on the tuning seeds; nothing on `null`.

    `null` has no reward to tune by, and takes the choices of `rare` without noise.
    """
    rates = (3e-4, 1e-3) if task in MULTI_TOKEN else (1e-4, 3e-4, 1e-3)
    seeds = TUNING_SEEDS[:2] if task in MULTI_TOKEN else TUNING_SEEDS
    for rate in () if task == "null" else rates:
        yield _at(task, rate), _copies(rules_of(families_of(task)), seeds, (0,), noises_of(task))


def axes(task: str) -> Runs:
    """The radii of kl, and the baselines, along each axis of question 4, on `rare`."""
    if task != "rare":
        return
    rules = rules_of(FAMILIES, "kl", "no clipping", "asymmetric clip")
    for name, values in {
        "inner_steps": (1, 4, 16),
        "group": (4, 64),
        "staleness": (4, 16),
        "mismatch": ("bf16", "sixteenths"),
    }.items():
        for value, rate in product(values, (3e-4, 1e-3)):
            setting = replace(_at(task, rate), **{name: value})  # type: ignore[arg-type]
            yield setting, _copies(rules, TUNING_SEEDS, (0,), (0.0, 0.05))


def reduced(task: str) -> Runs:
    """Two bands, one clip and no clipping, at one rate, with and without noise."""
    rules = [
        *rules_of(FAMILIES, "no clipping"),
        Rule("asymmetric clip", "clip@0.2,0.28"),
        Rule("kl", "(kl@0.005).cap(10)"),
        Rule("kl", "(kl@0.05).cap(10)"),
    ]
    batches = 10 if task in MULTI_TOKEN else 30
    setting = replace(_at(task, 1e-3), batches=batches)
    yield (
        setting,
        _copies(rules, TUNING_SEEDS[:2], (0,), sorted({0.0, noises_of(task)[-1]})),
    )


def finals(task: str, chosen: Chosen) -> Runs:
    """The chosen rule and rate of every family, by noise, on the final seeds and both streams."""
    for rate in sorted({rate for winners in chosen.values() for _, rate in winners}):
        yield _at(task, rate), _chosen(chosen, rate, FINAL_SEEDS, STREAMS)


def large_tuning(task: str, chosen: Chosen) -> Runs:
    """Policies of 10 million parameters with the rules of the small ones, to choose their rates."""
    if task != "rare":
        return
    of_large = {
        noise: [(rule, rate) for rule, rate in chosen[noise] if rule.family in LARGE_FAMILIES]
        for noise in (0.0, 0.05)
    }
    for rate in (3e-5, 1e-4, 3e-4):
        yield _at(task, rate), _chosen(of_large, None, TUNING_SEEDS[:2], (0,))


def large_finals(task: str, chosen: Chosen) -> Runs:
    """The same at their best rates, on the final seeds."""
    if task != "rare":
        return
    for rate in sorted({rate for winners in chosen.values() for _, rate in winners}):
        yield _at(task, rate), _chosen(chosen, rate, FINAL_SEEDS, (0,))


def chunks(
    study: str, task: str, runs: Runs, *, copies: int = COPIES, size: Size = SMALL
) -> Iterator[Chunk]:
    """Returns the runs in chunks of at most ``copies``.

    Rules whose radius depends on the advantages have chunks of their own.
    """
    for setting, of_setting in runs:
        every = list(of_setting)
        for is_scaled in (False, True):
            kind = [copy for copy in every if copy.rule.scaled == is_scaled]
            for first in range(0, len(kind), copies):
                # Those of a rule next to each other, because they share a call of the loss.
                part = sorted(kind[first : first + copies], key=lambda copy: copy.rule.name)
                yield Chunk(study, task, setting, tuple(part), size)


def _at(task: str, rate: float) -> Setting:
    return replace(_BASES.get(task, Setting(rate)), rate=rate)


def _copies(
    rules: Iterable[Rule], seeds: Iterable[int], streams: Iterable[int], noises: Iterable[float]
) -> list[Copy]:
    """One seed after the other, so that a study that was cut off has whole seeds."""
    order = product(seeds, streams, noises, rules)
    return [Copy(rule, seed, stream, noise) for seed, stream, noise, rule in order]


def _chosen(
    chosen: Chosen, rate: float | None, seeds: Iterable[int], streams: Iterable[int]
) -> list[Copy]:
    """Copies of the rules that are chosen at a rate, or of all."""
    return [
        Copy(rule, seed, stream, noise)
        for seed, stream in product(seeds, streams)
        for noise, winners in chosen.items()
        for rule, its_rate in winners
        if rate in (None, its_rate)
    ]


STUDIES: Mapping[str, Callable[[str], Runs]] = {"tuning": tuning, "axes": axes, "reduced": reduced}
"""Studies that need no result of another one."""
CHOSEN_STUDIES: Mapping[str, Callable[[str, Chosen], Runs]] = {
    "finals": finals,
    "large-tuning": large_tuning,
    "large-finals": large_finals,
}
"""Studies of the rules that another one has chosen."""
SIZES = {"large-tuning": LARGE, "large-finals": LARGE}
