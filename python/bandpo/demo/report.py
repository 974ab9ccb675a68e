"""The report: two tables, and a conclusion that is computed from the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from bandpo.demo.result import BIN_NAMES, Result
from bandpo.demo.rule import BAND, FIXED


def print_report(result: Result, console: Console | None = None) -> None:
    """Prints what was run, the two tables and the conclusion, to stdout unless told otherwise."""
    console = Console() if console is None else console
    settings = result.settings
    console.print(
        f"Band: KL, delta {settings.delta:g}, from a table of {result.table_nbytes} bytes "
        f"(largest error found {max(result.table_max_error):.1g}); no cap, no dual clip.\n"
        f"Task: {settings.prompts} prompts, each with one right answer of its own, of probability "
        f"{statistics.median(result.base_probability):.2g} after pre-training (median).\n"
        f"GRPO: {settings.batches} batches of {settings.prompts_per_batch} prompts with "
        f"{settings.group} answers each, {settings.inner_steps} steps on a batch, "
        f"Adam at {settings.learning_rate:g}.\n"
        f"Seeds: {settings.seeds}; each has a task and a pre-trained policy of its own, from which "
        "all rules start.",
        highlight=False,
    )
    for table in (_outcome_table(result), _clip_table(result)):
        console.print(table, highlight=False)
    if result.picture is not None:
        console.print(f"Picture: {result.picture}", highlight=False, markup=False, soft_wrap=True)
    console.print(result.conclusion, highlight=False)


def conclusion(result: Result) -> str:
    """Returns what the runs say of the band against every other rule.

    A seed gives all rules the same start, so they are compared seed by seed: one is called faster
    or slower, higher or lower, only if it is so on every seed.
    """
    seeds, limit = result.settings.seeds, result.settings.batches
    sentences = []

    speed = [_compare(result, rule, _batches_to_half) for rule in result.rules]
    if all(math.isinf(standing.median) for standing in speed):
        sentences.append(
            f"No rule reached half reward within {limit} batches on more than half of the seeds."
        )
    else:
        first = min(standing.median for standing in speed)
        winners = [standing.rule for standing in speed if standing.median == first]
        sentences.append(
            f"Half reward came first under {_listed(winners)} (median {first:g} batches)."
        )
    if any(run.batches_to_half is not None for run in result.runs):
        text = _batches_text(limit)
        sentences.append(_against_others(f"The {BAND}", speed, text, "faster", "slower"))
        sentences.append(_verdict(speed))

    reward = [_compare(result, rule, _missed_reward) for rule in result.rules]
    sentences.append(
        _against_others(f"The {BAND}'s final reward", reward, _reward_text, "higher", "lower")
    )
    if seeds < 3:
        sentences.append(f"So few seeds ({seeds}) do not show how far they spread.")
    return " ".join(sentences)


@dataclass(frozen=True)
class _Standing:
    """A rule's median, and on how many seeds the band did better (wins) or worse (losses)."""

    rule: str
    median: float
    wins: int
    losses: int
    seeds: int

    @property
    def beaten(self) -> bool:
        return self.wins == self.seeds

    @property
    def ahead(self) -> bool:
        return self.losses == self.seeds


def _compare(
    result: Result, rule: str, cost: Callable[[Result, str], Sequence[float]]
) -> _Standing:
    ours, theirs = cost(result, BAND), cost(result, rule)
    return _Standing(
        rule=rule,
        median=statistics.median(theirs),
        wins=sum(our < their for our, their in zip(ours, theirs, strict=True)),
        losses=sum(our > their for our, their in zip(ours, theirs, strict=True)),
        seeds=len(theirs),
    )


def _against_others(
    subject: str,
    standings: Sequence[_Standing],
    text: Callable[[float], str],
    better: str,
    worse: str,
) -> str:
    band = next(standing for standing in standings if standing.rule == BAND)
    others = [standing for standing in standings if standing.rule != BAND]
    clauses = []
    for word, group in (
        (better, [standing for standing in others if standing.beaten]),
        (worse, [standing for standing in others if standing.ahead]),
    ):
        if group:
            rules = _listed([f"{standing.rule} ({text(standing.median)})" for standing in group])
            clauses.append(f"{word} than {rules} on every seed")
    level = [
        f"{standing.rule} ({text(standing.median)}; {better} on {standing.wins} of "
        f"{standing.seeds}, {worse} on {standing.losses})"
        for standing in others
        if not (standing.beaten or standing.ahead)
    ]
    if level:
        clauses.append(f"within the seed spread of {_listed(level)}")
    return f"{subject} ({text(band.median)}) was {'; '.join(clauses)}."


def _verdict(speed: Sequence[_Standing]) -> str:
    beaten = [standing.rule for standing in speed if standing.beaten]
    unbeaten = [
        standing.rule for standing in speed if not standing.beaten and standing.rule != BAND
    ]
    if not beaten:
        return "So in speed it beat none of them."
    if not unbeaten:
        return "So in speed it beat the fixed clip and both baselines."
    if beaten == [FIXED]:
        return (
            "So in speed it beat the fixed clip but neither baseline, which is no evidence for the "
            "band over a looser rule without one."
        )
    return f"So in speed it beat {_listed(beaten)} but not {_listed(unbeaten)}."


def _batches_to_half(result: Result, rule: str) -> list[float]:
    counts = [run.batches_to_half for run in result.of_rule(rule)]
    return [math.inf if count is None else count for count in counts]


def _missed_reward(result: Result, rule: str) -> list[float]:
    return [1.0 - run.reward[-1] for run in result.of_rule(rule)]


def _batches_text(limit: int) -> Callable[[float], str]:
    return lambda batches: f"more than {limit}" if math.isinf(batches) else f"{batches:g}"


def _reward_text(missed: float) -> str:
    return f"{1.0 - missed:.2f}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _outcome_table(result: Result) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Median over seeds (least..greatest)",
        caption="Reward and entropy are exact means over all prompts, not sampled.",
    )
    table.add_column("clip rule", no_wrap=True)
    for heading in ("batches to\nhalf reward", "final reward", "final entropy\nin nats"):
        table.add_column(heading, justify="right")
    limit = result.settings.batches
    for rule in result.rules:
        runs = result.of_rule(rule)
        table.add_row(
            rule,
            _spread(
                _batches_to_half(result, rule),
                lambda batches: f">{limit}" if math.isinf(batches) else f"{batches:g}",
            ),
            _spread([run.reward[-1] for run in runs], "{:.2f}".format),
            _spread([run.entropy[-1] for run in runs], "{:.2f}".format),
        )
    return table


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    middle, least, greatest = (
        text(value) for value in (statistics.median(values), min(values), max(values))
    )
    return middle if least == greatest else f"{middle} ({least}..{greatest})"


def _clip_table(result: Result) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Clip fraction in the last inner step, by old probability p of the token",
        caption="up: share of the tokens with A > 0 that were above the upper bound\n"
        "down: share of those with A < 0 that were below the lower bound\n"
        "-: no such token",
    )
    table.add_column("clip rule", no_wrap=True)
    table.add_column("side")
    for name in BIN_NAMES:
        table.add_column(name.replace("-", "-\n"), justify="right", no_wrap=True)
    for rule in result.rules:
        up, down = result.clip_fractions(rule)
        table.add_row(rule, "up", *map(_fraction, up))
        table.add_row("", "down", *map(_fraction, down))
    return table


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
