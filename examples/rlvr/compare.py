"""Paired comparisons: Student's intervals, Holm's correction, the best strength of a family."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from .rule import Rule, rule_of


class Difference(NamedTuple):
    """Mean of paired differences, its 95 % interval, and the two-sided p-value of 0."""

    mean: float
    low: float
    high: float
    p_value: float
    pairs: int


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """Compares two rules by the seeds that both have.

    Args:
        first: A measure by seed, already averaged over the streams of a seed.
        second: The same of the other rule.

    Raises:
        ValueError: If fewer than two seeds are shared.
    """
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        raise ValueError(f"first and second must share at least 2 seeds, got {len(seeds)}")
    values = np.array([first[seed] - second[seed] for seed in seeds])
    count, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(count)
    if error == 0.0:
        return Difference(mean, mean, mean, 1.0 if mean == 0.0 else 0.0, count)
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    p_value = 2.0 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Difference(mean, mean - reach, mean + reach, p_value, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number by Holm's step-down method, in their order."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def by_seed(rows: Iterable[Mapping[str, Any]], measure: str = "area") -> dict[int, float]:
    """Returns the mean of a measure over the streams of each seed."""
    values = defaultdict(list)
    for row in rows:
        values[row["seed"]].append(row[measure])
    return {seed: float(np.mean(of_seed)) for seed, of_seed in values.items()}


def best(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[Rule, float, float, int]]:
    """Returns rule, rate, mean area and number of seeds of each family's largest mean area.

    Only strengths and rates with as many seeds as the most complete one of the family take part.

    Args:
        rows: Tuning runs of one task and one noise.
    """
    groups: dict[str, dict[tuple[str, float], list[Mapping[str, Any]]]] = {}
    for row in rows:
        of_family = groups.setdefault(row["family"], {})
        of_family.setdefault((row["region"], row["rate"]), []).append(row)
    winners = {}
    for family, cells in groups.items():
        seeds = max(len(by_seed(cell)) for cell in cells.values())
        means = {
            key: float(np.mean(list(by_seed(cell).values())))
            for key, cell in cells.items()
            if len(by_seed(cell)) == seeds
        }
        region, rate = max(means, key=lambda key: means[key])
        winners[family] = (rule_of(family, region), rate, means[region, rate], seeds)
    return winners


def choice(
    rows: Iterable[Mapping[str, Any]], task: str, noises: Iterable[float]
) -> dict[float, list[tuple[Rule, float]]]:
    """Returns the best rule and rate of every family by noise, of the rows of one task."""
    of_task = [row for row in rows if row["task"] == task]
    return {
        noise: [
            (rule, rate)
            for rule, rate, *_ in best(row for row in of_task if row["noise"] == noise).values()
        ]
        for noise in noises
    }
