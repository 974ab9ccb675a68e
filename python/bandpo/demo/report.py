"""The report: a conclusion that is computed from the runs, and two tables."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from bandpo.demo.result import BIN_NAMES, Result
from bandpo.demo.rule import BAND, CAP, FIXED


def print_report(result: Result, console: Console | None = None) -> None:
    """Prints the conclusion, the two tables and the settings, to stdout by default."""
    console = Console() if console is None else console
    console.print(result.conclusion, highlight=False)
    for table in (_outcome_table(result), _clip_table(result)):
        console.print()
        unbounded = console.options.update(max_width=10_000)
        if console.measure(table, options=unbounded).maximum <= console.width:
            console.print(table, highlight=False)
        else:
            _print_rows(table, console)
    settings = result.settings
    console.print(
        f"\nBand: KL, delta {settings.delta:g}, upper bound capped at {CAP:g}, from a table of "
        f"{result.table_nbytes} bytes (largest error found {max(result.table_max_error):.1g}); "
        "no dual clip.\n"
        f"Task: {settings.prompts} prompts, each with one right answer of its own, of probability "
        f"{statistics.median(result.base_probability):.2g} after pre-training (median).\n"
        f"GRPO: {settings.batches} batches of {settings.prompts_per_batch} prompts with "
        f"{settings.group} answers each, {settings.inner_steps} steps on a batch, "
        f"Adam at {settings.learning_rate:g}.\n"
        f"Seeds: {settings.seeds}; each has a task and a pre-trained policy of its own, from which "
        "all rules start.",
        highlight=False,
    )
    if result.picture is not None:
        console.print(f"Picture: {result.picture}", highlight=False, markup=False, soft_wrap=True)
    if result.tokens is not None:
        console.print(
            f"Tokens of the {FIXED}, seed 0: {result.tokens}\n\nOther rules on these tokens:\n  "
            f"{replay_command(result.tokens)}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def replay_command(tokens: str) -> str:
    """Returns the command that replays the tokens of a demo."""
    words = ["bandpo", "replay", tokens, "--rule", "dapo", "--rule", "bandpo-kl"]
    page = f"{tokens.removesuffix('-tokens')}.html"
    return shlex.join([*words, "--match", "clip-fraction", "--html", page])


def _print_rows(table: Table, console: Console) -> None:
    """Prints a table that is wider than the console, each cell on a line of its own."""
    console.print(table.title or "", highlight=False)
    headings = [
        str(column.header).replace("-\n", "-").replace("\n", " ") for column in table.columns
    ]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        first, *rest = map(str, cells)
        if first:
            console.print(first, highlight=False)
        for heading, cell in zip(headings[1:], rest, strict=True):
            console.print(f"  {heading}: {cell}", highlight=False)
    if table.caption:
        console.print(table.caption, highlight=False)


def conclusion(result: Result) -> str:
    """Returns the comparison of the band with every other rule.

    A seed gives all rules the same start, so they are compared seed by seed: one is called faster
    or slower, higher or lower, only if it is so on every seed.
    """
    return " ".join(_sentences(result))


def headline(result: Result) -> str:
    """Returns the first sentence of the conclusion."""
    return _sentences(result)[0]


def _sentences(result: Result) -> list[str]:
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
    text = _reward_text([standing.median for standing in reward])
    sentences.append(_against_others(f"The {BAND}'s final reward", reward, text, "higher", "lower"))
    if seeds < 3:
        sentences.append(f"So few seeds ({seeds}) do not show how far they spread.")
    return sentences


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


def _reward_text(missed: Sequence[float]) -> Callable[[float], str]:
    """Rewards with two digits, or with as many as show which of these differ."""
    digits = _digits([1.0 - value for value in missed])
    return lambda value: f"{1.0 - value:.{digits}f}"


def _digits(values: Sequence[float]) -> int:
    """The digits after the point, 2 to 6, that show which values differ."""
    different = len(set(values))
    shown = (
        digits for digits in range(2, 6) if len({f"{v:.{digits}f}" for v in values}) == different
    )
    return next(shown, 6)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _outcome_table(result: Result) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="Median over seeds (min..max)",
        caption="Reward and entropy are exact means over all prompts, not sampled.",
    )
    table.add_column("clip rule", no_wrap=True)
    for heading in ("batches to\nhalf reward", "final reward", "final entropy\nin nats"):
        table.add_column(heading, justify="right", no_wrap=True)
    limit = result.settings.batches
    reward, entropy = (
        {rule: [getattr(run, name)[-1] for run in result.of_rule(rule)] for rule in result.rules}
        for name in ("reward", "entropy")
    )
    reward_digits, entropy_digits = (
        _digits([statistics.median(values) for values in of_rule.values()])
        for of_rule in (reward, entropy)
    )
    for rule in result.rules:
        table.add_row(
            rule,
            _spread(
                _batches_to_half(result, rule),
                lambda batches: f">{limit}" if math.isinf(batches) else f"{batches:g}",
            ),
            _spread(reward[rule], f"{{:.{reward_digits}f}}".format),
            _spread(entropy[rule], f"{{:.{entropy_digits}f}}".format),
        )
    return table


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    middle, first, last = (
        text(value) for value in (statistics.median(values), min(values), max(values))
    )
    return middle if first == last else f"{middle} ({first}..{last})"


def _clip_table(result: Result) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="Clip fraction in the last inner step, by old probability p of the token",
        caption="up: share of the tokens with A > 0 that were above the upper bound\n"
        "down: share of those with A < 0 that were below the lower bound\n"
        "-: no such token",
    )
    table.add_column("clip rule", no_wrap=True)
    table.add_column("side", no_wrap=True)
    for name in BIN_NAMES:
        table.add_column(name.replace("-", "-\n"), justify="right", no_wrap=True)
    for rule in result.rules:
        up, down = result.clip_fractions(rule)
        table.add_row(rule, "up", *map(_fraction, up))
        table.add_row("", "down", *map(_fraction, down))
    return table


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
