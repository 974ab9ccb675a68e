"""The comparisons of the questions, as tables of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

from .compare import Difference, best, by_seed, holm, paired
from .grid import MULTI_TOKEN, noises_of
from .rule import FAMILIES
from .runner import read

BANDS = ("kl", "reverse-kl", "hellinger", "jensen-shannon", "pearson-chi2", "tv")
CLIPS = ("fixed clip", "asymmetric clip")
MATCHED = ("reverse-kl", "hellinger", "jensen-shannon", "pearson-chi2")
"""Divergences whose strengths are those of kl at equal radius over f''(1), in the same order."""
MATCHED_REWARD = {"many": 0.4, "countdown": 0.3}

AXES_RATE = 1e-3
"""The rate at which axes are compared."""

Row = Mapping[str, Any]


class Pair(NamedTuple):
    """A comparison: what is compared, where, and the difference."""

    where: str
    first: str
    second: str
    difference: Difference


class Results:
    """Rows of all studies.

    Args:
        folder: Where the packed files are, or the folders of chunks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: dict[str, list[dict[str, Any]]] = {}

    def of(self, study: str, **where: Any) -> list[Row]:
        """Returns the rows of a study whose columns have the values of ``where``."""
        if study not in self._rows:
            self._rows[study] = read(self._folder, study)
        return [
            row
            for row in self._rows[study]
            if all(row[name] == value for name, value in where.items())
        ]

    def leader(self, study: str, families: Iterable[str], **where: Any) -> str:
        """Returns the family with the largest mean area of its best strength and rate."""
        found = best(row for row in self.of(study, **where) if row["family"] in families)
        return max(found, key=lambda family: found[family][2])


def report(folder: Path) -> str:
    """Returns all tables."""
    results = Results(folder)
    parts = [
        ("1. Bands against clips and no clipping", _bands(results)),
        ("1. The end of the runs", _ends(results)),
        ("2. Divergences at matched strength", _divergences(results)),
        ("3. Sides", _sides(results)),
        ("4. Best radius of kl", _radii(results)),
        ("5. Entropy and distinct right answers at matched reward", _matched(results)),
        ("6. The null task", _null(results)),
        ("7. The published radius", _published(results)),
        ("Areas of the finals", _areas(results, "finals")),
        ("9.8 million parameters, seeds that choose the rate", _areas(results, "large-tuning")),
        ("9.8 million parameters, final seeds", _areas(results, "large-finals")),
    ]
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in parts) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pairs(pairs: Sequence[Pair]) -> str:
    """A table with p-values that are corrected over its rows."""
    corrected = holm([pair.difference.p_value for pair in pairs])
    rows = []
    for pair, p_value in zip(pairs, corrected, strict=True):
        mean, low, high = (f"{value:+.3f}" for value in pair.difference[:3])
        mark = "**" if p_value <= 0.05 else ""
        interval, chance = f"{low} to {high}", f"{p_value:.2g}"
        rows.append([*pair[:3], f"{mark}{mean}{mark}", interval, chance])
    header = ["where", "first", "second", "difference", "95 % interval", "p, corrected"]
    return _table(header, rows)


def _finals(results: Results, task: str, noise: float, family: str) -> list[Row]:
    return results.of("finals", task=task, noise=noise, family=family)


def _compared(results: Results, task: str, noise: float, first: str, second: str) -> Pair:
    runs = [_finals(results, task, noise, family) for family in (first, second)]
    one, other = (f"{rows[0]['family']} `{rows[0]['region']}`" for rows in runs)
    difference = paired(*(by_seed(rows) for rows in runs))
    return Pair(f"{task}, {noise:.0%} flipped", one, other, difference)


def _by_task(results: Results, compared: Callable[[str, float], Iterable[Pair]]) -> str:
    """A table of the finals for each task, with the comparisons at each noise."""
    tables = []
    for task, settings in groupby(_settings(results, "finals"), lambda setting: setting[0]):
        tables.append(_pairs([pair for _, noise in settings for pair in compared(task, noise)]))
    return "\n\n".join(tables)


def _settings(results: Results, study: str) -> list[tuple[str, float]]:
    found = {(row["task"], row["noise"]) for row in results.of(study) if row["task"] != "null"}
    return [
        (task, noise)
        for task in ("rare", "many", "countdown")
        for noise in noises_of(task)
        if (task, noise) in found
    ]


def _bands(results: Results) -> str:
    def compared(task: str, noise: float) -> Iterator[Pair]:
        where = {"task": task, "noise": noise}
        band = results.leader("tuning", BANDS, **where)
        clip = results.leader("tuning", CLIPS, **where)
        for other in (clip, "wide constant", "no clipping"):
            yield _compared(results, task, noise, band, other)

    return _by_task(results, compared)


def _ends(results: Results) -> str:
    """Means after the last batch, of kl at both radii, the best clip and no clipping."""
    rows = []
    for task, noise in _settings(results, "finals"):
        clip = results.leader("tuning", CLIPS, task=task, noise=noise)
        for family in ("kl", "kl 0.05", clip, "no clipping"):
            runs = _finals(results, task, noise, family)
            means = [
                sum(float(run[name]) for run in runs) / len(runs)
                for name in ("pass_1", "pass_16", "distinct")
            ]
            entropy = sum(float(run["entropy"][-1]) for run in runs) / len(runs)
            rows.append(
                [f"{task}, {noise:.0%} flipped", f"{family} `{runs[0]['region']}`"]
                + [f"{value:.2f}" for value in (*means, entropy)]
            )
    header = ["where", "rule", "p@1", "p@16", "distinct right of 64", "entropy, nats"]
    return _table(header, rows)


def _divergences(results: Results) -> str:
    """Each divergence against kl, on the tuning seeds, at kl's best rate for the radius."""
    pairs = []
    for noise, (place, kl) in product(noises_of("rare"), enumerate(FAMILIES["kl"])):
        of_kl = results.of("tuning", task="rare", noise=noise, family="kl", region=kl)
        (_, rate, *_) = best(of_kl)["kl"]
        first = by_seed(row for row in of_kl if row["rate"] == rate)
        for family in MATCHED:
            region = FAMILIES[family][place]
            rows = results.of(
                "tuning", task="rare", noise=noise, family=family, region=region, rate=rate
            )
            difference = paired(by_seed(rows), first)
            pairs.append(Pair(f"rare, {noise:.0%} flipped", f"`{region}`", f"`{kl}`", difference))
    corrected = holm([pair.difference.p_value for pair in pairs])
    significant = sum(p_value <= 0.05 for p_value in corrected)
    lines = []
    for family in MATCHED:
        of_family = [pair for pair in pairs if pair.first.startswith(f"`({family}")]
        means = [pair.difference.mean for pair in of_family]
        mean, span = sum(means) / len(means), f"{min(means):+.3f} to {max(means):+.3f}"
        lines.append([family, f"{len(means)}", f"{mean:+.3f}", span])
    lines.append(["all", f"{len(pairs)}", f"{significant} with a corrected p of at most 0.05", ""])
    header = ["divergence less kl", "radii and noises", "mean difference", "from and to"]
    tv = [_compared(results, "rare", noise, "tv", "kl") for noise in noises_of("rare")]
    return _table(header, lines) + "\n\n" + _pairs(tv)


def _sides(results: Results) -> str:
    kinds = (("band above", "band below"), ("band above", "kl"), ("band below", "kl"))
    return _by_task(
        results, lambda task, noise: [_compared(results, task, noise, *kind) for kind in kinds]
    )


_AXES: Sequence[tuple[str, str, Callable[[Row], bool]]] = (
    ("inner steps 1", "axes", lambda row: row["inner_steps"] == 1),
    ("inner steps 4", "axes", lambda row: row["inner_steps"] == 4),
    ("inner steps 8, groups of 16, fresh, float32", "tuning", lambda row: True),
    ("inner steps 16", "axes", lambda row: row["inner_steps"] == 16),
    ("groups of 4", "axes", lambda row: row["group"] == 4),
    ("groups of 64", "axes", lambda row: row["group"] == 64),
    ("4 batches old", "axes", lambda row: row["staleness"] == 4),
    ("16 batches old", "axes", lambda row: row["staleness"] == 16),
    ("old log-probs in bf16", "axes", lambda row: row["mismatch"] == "bf16"),
    ("old log-probs in 1/16", "axes", lambda row: row["mismatch"] == "sixteenths"),
)


def _radii(results: Results) -> str:
    """Mean area of each radius of kl at the rate 1e-3, and of the baselines."""
    rules = [*(("kl", spec) for spec in FAMILIES["kl"]), ("no clipping", "clip@1,1e9")]
    rows = []
    for (name, study, is_it), noise in product(_AXES, (0.0, 0.02, 0.05, 0.1)):
        where = {"task": "rare", "noise": noise, "rate": AXES_RATE}
        of = [row for row in results.of(study, **where) if is_it(row)]
        if not of:
            continue
        areas = []
        for family, region in rules:
            cell = [row for row in of if (row["family"], row["region"]) == (family, region)]
            areas.append(best(cell)[family][2])
        clip = max(best(row for row in of if row["family"] == "asymmetric clip").values())
        top = max(areas[:-1])
        rows.append(
            [name, f"{noise:.0%}"]
            + [f"**{area:.3f}**" if area == top else f"{area:.3f}" for area in areas]
            + [f"{clip[2]:.3f}"]
        )
    radii = [spec.partition("@")[2].partition(")")[0] for spec in FAMILIES["kl"]]
    return _table(["axis", "flipped", *radii, "no clipping", "best asymmetric clip"], rows)


def _matched(results: Results) -> str:
    """Band against clip where the reward first reaches a level; runs that never do are left out."""
    tables, reached = [], []
    for task in MULTI_TOKEN:
        pairs = []
        for noise in noises_of(task):
            where = {"task": task, "noise": noise}
            band, clip = (results.leader("tuning", names, **where) for names in (BANDS, CLIPS))
            matched = []
            for family in (band, clip):
                matched.append(_at_level(_finals(results, task, noise, family)))
                reached.append(f"{family} {len(matched[-1])} of 16 on {task} with {noise:.0%}")
            for measure in ("entropy", "distinct_share"):
                first, second = (by_seed(rows, measure) for rows in matched)
                if len(first.keys() & second.keys()) >= 2:
                    difference = paired(first, second)
                    what = f"{task}, {noise:.0%} flipped, {measure}, {difference.pairs} seeds"
                    pairs.append(Pair(what, band, clip, difference))
        tables.append(_pairs(pairs))
    return "\n\n".join(tables) + f"\n\nRuns that reach the reward: {'; '.join(reached)}."


def _at_level(runs: Iterable[Row]) -> list[Row]:
    """Seed, entropy and distinct share of each run when its reward first reached the level."""
    rows: list[Row] = []
    for run in runs:
        level = MATCHED_REWARD[run["task"]]
        # The last evaluation has no distinct answers of a batch.
        places = (k for k, reward in enumerate(run["reward"][:-1]) if reward >= level)
        if (place := next(places, None)) is not None:
            rows.append(
                {"seed": run["seed"]}
                | {name: run[name][place] for name in ("entropy", "distinct_share")}
            )
    return rows


def _null(results: Results) -> str:
    families = dict.fromkeys(row["family"] for row in results.of("finals", task="null"))
    pairs = [
        _compared(results, "null", 0.0, family, "no clipping")
        for family in families
        if family != "no clipping"
    ]
    corrected = holm([pair.difference.p_value for pair in pairs])
    means = [pair.difference.mean for pair in pairs]
    return (
        f"{len(pairs)} families against no clipping: differences from {min(means):+.5f} to "
        f"{max(means):+.5f}, smallest corrected p-value {min(corrected):.2g}."
    )


def _published(results: Results) -> str:
    def compared(task: str, noise: float) -> Iterator[Pair]:
        clip = results.leader("tuning", CLIPS, task=task, noise=noise)
        for names in (("kl", "kl 0.05"), ("kl 0.05", clip), ("kl 0.05", "no clipping")):
            pair = _compared(results, task, noise, *names)
            if pair.first.partition(" `")[2] != pair.second.partition(" `")[2]:
                yield pair

    return _by_task(results, compared)


def _areas(results: Results, study: str) -> str:
    """Mean area, spec and rate of each family's choice."""
    settings = _settings(results, study)
    families = dict.fromkeys(row["family"] for row in results.of(study) if row["task"] != "null")
    found = [best(results.of(study, task=task, noise=noise)) for task, noise in settings]
    rows = []
    for family in families:
        cells = []
        for winners in found:
            if family not in winners:
                cells.append("")
                continue
            rule, rate, area, _ = winners[family]
            cells.append(f"{area:.3f} `{rule.region.removesuffix('.cap(10)')}` {rate:g}")
        rows.append([family, *cells])
    return _table(["family", *(f"{task}, {noise:.0%}" for task, noise in settings)], rows)
