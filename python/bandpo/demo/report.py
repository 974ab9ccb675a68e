"""The report: a conclusion that is computed from the runs, and three tables."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from bandpo.demo.result import BIN_NAMES, Result
from bandpo.demo.rule import CAP, FIXED, NO_CLIP, PAPER_DELTA, band_name


def print_report(result: Result, console: Console | None = None) -> None:
    """Prints the conclusion, the three tables and the settings, to stdout by default."""
    console = Console() if console is None else console
    console.print(result.conclusion, highlight=False)
    outcomes = [_outcome_table(result, noise) for noise in result.noises]
    for table in (*outcomes, _clip_table(result)):
        console.print()
        unbounded = console.options.update(max_width=10_000)
        if console.measure(table, options=unbounded).maximum <= console.width:
            console.print(table, highlight=False)
        else:
            _print_rows(table, console)
    settings = result.settings
    console.print(
        f"\nBands: radius {settings.delta}, and {PAPER_DELTA} as published; no ratio above "
        f"{CAP:g}.\n"
        f"Noisy rewards: each is flipped with probability {settings.noise}, in training alone.\n"
        f"Task: {settings.prompts} prompts, each with one right answer of its own, of probability "
        f"{statistics.median(result.base_probability):.2g} after pre-training (median).\n"
        f"GRPO: {settings.batches} batches of {settings.prompts_per_batch} prompts with "
        f"{settings.group} answers each, {settings.inner_steps} steps on a batch, "
        f"Adam at {settings.learning_rate:g}.\n"
        f"Seeds: {settings.seeds}; each has a task, a pre-trained policy and random numbers of its "
        "own, which all rules share.",
        highlight=False,
    )
    if result.picture is not None:
        console.print(f"Picture: {result.picture}", highlight=False, markup=False, soft_wrap=True)
    if result.tokens is not None:
        console.print(
            f"Tokens of {FIXED}, clean rewards, seed 0: {result.tokens}\n\n"
            f"Other rules on these tokens:\n  {replay_command(result.tokens, settings.delta)}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def replay_command(tokens: str, delta: float) -> str:
    """Returns the command that replays the tokens of a demo, with its first band."""
    words = ["bandpo", "replay", tokens]
    for rule in ("dapo", "bandpo-kl", f"(kl@{delta}).cap({CAP:g})"):
        words += ["--rule", rule]
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
    """Returns the comparison of the first band with every other rule, in paragraphs.

    A seed gives all rules the same start, so they are compared seed by seed: a number is called
    higher or lower only if it is so on every seed.
    """
    band = band_name(result.settings.delta)
    paragraphs = [headline(result)]
    for noise in result.noises:
        final, mean, entropy = (
            _against_others(result, band, noise, measure) for measure in _MEASURES
        )
        paragraphs.append(
            f"With {rewards_text(noise)}, the final reward of {band} {final}. "
            f"Its mean reward over all batches {mean}. Its final entropy {entropy}."
        )
    seeds = result.settings.seeds
    few = f"So few seeds ({seeds}) do not show how far they spread. " if seeds < 3 else ""
    paragraphs.append(
        f"{few}The study in docs/evidence.md has 8 seeds, and more tasks, rules and rates of noise."
    )
    return "\n".join(paragraphs)


def headline(result: Result) -> str:
    """Returns the first paragraph: the lowest and the highest final reward with each noise."""
    parts = []
    for noise in result.noises:
        medians = {
            rule: statistics.median(_final_rewards(result, rule, noise)) for rule in result.rules
        }
        low, high = (best(medians, key=lambda rule: medians[rule]) for best in (min, max))
        parts.append(
            f"with {rewards_text(noise)} {medians[low]:.2f} ({low}) to {medians[high]:.2f} ({high})"
        )
    return f"Final reward {'; '.join(parts)}."


def rewards_text(noise: float) -> str:
    """Returns the words for rewards that are flipped with that probability."""
    return f"{100.0 * noise:g} % of rewards flipped" if noise else "clean rewards"


def _final_rewards(result: Result, rule: str, noise: float) -> list[float]:
    return [run.reward[-1] for run in result.of(rule, noise)]


def _mean_rewards(result: Result, rule: str, noise: float) -> list[float]:
    return [run.mean_reward for run in result.of(rule, noise)]


def _final_entropies(result: Result, rule: str, noise: float) -> list[float]:
    return [run.entropy[-1] for run in result.of(rule, noise)]


@dataclass(frozen=True)
class _Measure:
    """A number of a run: its heading and digits in the table, and its values by seed."""

    heading: str
    digits: int
    values: Callable[[Result, str, float], list[float]]


_MEASURES = (
    _Measure("final reward", 3, _final_rewards),
    _Measure("mean reward\nover all batches", 3, _mean_rewards),
    _Measure("final entropy\nin nats", 2, _final_entropies),
)


def _against_others(result: Result, band: str, noise: float, measure: _Measure) -> str:
    """The predicate of a sentence, which names each other rule once, with its median."""
    values = {rule: measure.values(result, rule, noise) for rule in result.rules}
    medians = {rule: statistics.median(of_rule) for rule, of_rule in values.items()}
    digits = _digits(list(medians.values()))
    clauses: dict[str, list[str]] = {"higher": [], "lower": [], "level": []}
    for rule in result.rules:
        if rule == band:
            continue
        differences = [
            ours - theirs for ours, theirs in zip(values[band], values[rule], strict=True)
        ]
        higher, lower = (sum(sign * each > 0.0 for each in differences) for sign in (1, -1))
        seeds = len(differences)
        median = f"{medians[rule]:.{digits}f}"
        if seeds in (higher, lower):
            clauses["higher" if higher else "lower"].append(f"{rule} ({median})")
        else:
            clauses["level"].append(
                f"{rule} ({median}; higher on {higher} of {seeds}, lower on {lower})"
            )
    parts = [
        f"{word} than {_listed(clauses[word])} on every seed"
        for word in ("higher", "lower")
        if clauses[word]
    ]
    if clauses["level"]:
        parts.append(f"within the seed spread of {_listed(clauses['level'])}")
    return f"({medians[band]:.{digits}f}) was {'; '.join(parts)}"


def _digits(values: Sequence[float]) -> int:
    """The digits after the point, 2 to 6, that show which values differ."""
    different = len(set(values))
    shown = (
        digits for digits in range(2, 6) if len({f"{v:.{digits}f}" for v in values}) == different
    )
    return next(shown, 6)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _outcome_table(result: Result, noise: float) -> Table:
    title = rewards_text(noise)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"{title[0].upper()}{title[1:]}: median over seeds (min..max)",
        caption="Reward and entropy are exact means over all prompts, never flipped.",
    )
    table.add_column("clip rule", no_wrap=True)
    columns = []
    for measure in _MEASURES:
        table.add_column(measure.heading, justify="right", no_wrap=True)
        values = [measure.values(result, rule, noise) for rule in result.rules]
        columns.append([_spread(of_rule, f"{{:.{measure.digits}f}}".format) for of_rule in values])
    for row in zip(result.rules, *columns, strict=True):
        table.add_row(*row)
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
        title=f"{100.0 * result.settings.noise:g} % of rewards flipped: clip fraction, by old "
        "probability",
        caption="up: share of the tokens with A > 0 that were above the upper bound\n"
        "down: share of those with A < 0 that were below the lower bound\n"
        "-: no such token; all in the last inner step of a batch",
    )
    table.add_column("clip rule", no_wrap=True)
    table.add_column("side", no_wrap=True)
    for name in BIN_NAMES:
        table.add_column(name.replace("-", "-\n"), justify="right", no_wrap=True)
    for rule in result.rules:
        if rule == NO_CLIP:
            continue
        up, down = result.clip_fractions(rule, result.settings.noise)
        table.add_row(rule, "up", *map(_fraction, up))
        table.add_row("", "down", *map(_fraction, down))
    return table


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
