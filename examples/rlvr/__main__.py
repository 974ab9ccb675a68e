"""Commands of the study: ``python -m examples.rlvr --help``."""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path

from .grid import (
    CHOSEN_STUDIES,
    COPIES,
    MULTI_TOKEN,
    SIZES,
    STUDIES,
    Chosen,
    Chunk,
    chunks,
    noises_of,
)
from .policy import SMALL
from .task import TASKS

RESULTS = Path(__file__).parent / "results"
TUNED_BY = {"finals": "tuning", "large-tuning": "finals", "large-finals": "large-tuning"}
"""Study whose results choose the rules of another one."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    every = argparse.ArgumentParser(prog="python -m examples.rlvr")
    commands = every.add_subparsers(dest="command", required=True)
    results = argparse.ArgumentParser(add_help=False)
    about_results = "folder of results, by default the committed one"
    results.add_argument("--results", type=Path, default=RESULTS, help=about_results)
    for name, about in {
        "run": "train the runs that are missing",
        "count": "print the number of runs",
        "best": "print the best strength and rate of every family",
        "pack": "write the results of a study into one file",
    }.items():
        of_study = commands.add_parser(name, help=about, parents=[results])
        of_study.add_argument("study", choices=[*STUDIES, *CHOSEN_STUDIES])
        if name != "pack":
            of_study.add_argument(
                "--task", choices=list(TASKS), action="append", help="default: all"
            )
        if name in ("run", "count"):
            of_study.add_argument(
                "--copies", type=_count, default=COPIES, help="max runs of a chunk"
            )
        if name == "run":
            of_study.add_argument("--minutes", type=float, default=float("inf"), help="max time")
            of_study.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    of_figures = commands.add_parser("figure", help="draw a figure", parents=[results])
    of_figures.add_argument("name", choices=["differences", "radius", "curves", "bandit"])
    commands.add_parser("report", help="print the comparisons", parents=[results])
    return every


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> int:
    """Runs one command and returns its exit status: 3 if chunks are still missing."""
    given = parser().parse_args()
    if given.command in ("report", "figure"):
        is_bandit = given.command == "figure" and given.name == "bandit"
        _require(given.results, *(() if is_bandit else ("tuning", "finals")))
    if given.command == "report":
        from .report import report

        print(report(given.results), end="")
        return 0
    if given.command == "figure":
        from .figure import write_figure

        write_figure(given.name, given.results)
        return 0

    from . import compare, runner

    study = given.study
    if given.command == "pack":
        _require(given.results, study)
        print(runner.pack(given.results, study))
        return 0
    tasks = given.task or list(TASKS)
    if given.command == "best":
        _require(given.results, study)
        rows = runner.read(given.results, study)
        for task in tasks:
            for noise in noises_of(task):
                of_task = [row for row in rows if (row["task"], row["noise"]) == (task, noise)]
                for family, (rule, rate, area, seeds) in compare.best(of_task).items():
                    print(f"{task} {noise:g} {family}: {rule.region} {rate:g} {area:.3f} {seeds}")
        return 0
    if study in TUNED_BY:
        _require(given.results, TUNED_BY[study])

    def chosen(task: str) -> Chosen:
        rows = runner.read(given.results, TUNED_BY[study])
        return compare.choice(rows, "rare" if task == "null" else task, noises_of(task))

    def runs(task: str) -> list[Chunk]:
        of_task = (
            CHOSEN_STUDIES[study](task, chosen(task)) if study in TUNED_BY else STUDIES[study](task)
        )
        return list(chunks(study, task, of_task, copies=given.copies, size=SIZES.get(study, SMALL)))

    every = list(chain.from_iterable(runs(task) for task in tasks))
    if given.command == "count":
        long = sum(len(chunk.copies) for chunk in every if chunk.task in MULTI_TOKEN)
        print(f"{sum(len(chunk.copies) for chunk in every)} runs, {long} with several tokens")
        return 0
    missing = runner.run(
        every, given.results / study, seconds=60.0 * given.minutes, device=given.device
    )
    print(f"{len(every) - missing} of {len(every)} chunks have results")
    return 3 if missing else 0


def _require(results: Path, *studies: str) -> None:
    """Ends with a message if a study has no results."""
    from .runner import files

    for study in studies:
        if not files(results, study):
            parser().error(f"argument --results: {results} has no results of {study}")


if __name__ == "__main__":
    sys.exit(main())
