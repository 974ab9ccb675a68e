"""Commands of the study: ``python -m examples.rlvr --help``."""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path

from .grid import MULTI_TOKEN, NOISES, STUDIES, finals
from .task import TASKS

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Runs one command and returns its exit status: 3 if chunks are still missing."""
    parser = argparse.ArgumentParser(prog="python -m examples.rlvr")
    parser.add_argument("command", choices=["run", "count", "best", "figure", "pack"])
    parser.add_argument("study", choices=[*STUDIES, "finals"], nargs="?", default="tuning")
    parser.add_argument("--reduced", action="store_true", help="the study of ten minutes")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="default: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="max time of a run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    study = "reduced" if given.reduced else given.study
    tasks = given.task or list(TASKS)

    from . import compare, runner

    folder = given.results / study

    def tuned(task: str, noise: float) -> dict[str, tuple[compare.Rule, float, float, int]]:
        rows = runner.read(given.results / "tuning")
        return compare.best(row for row in rows if (row["task"], row["noise"]) == (task, noise))

    if given.command == "best":
        for task in tasks:
            for noise in NOISES:
                for family, (rule, rate, area, seeds) in tuned(task, noise).items():
                    print(f"{task} {noise:g} {family}: {rule.region} {rate:g} {area:.3f} {seeds}")
        return 0
    if given.command == "figure":
        from .figure import write_figures

        write_figures(runner.read(folder), given.results)
        return 0
    if given.command == "pack":
        print(runner.pack(folder, given.results / f"{study}.parquet"))
        return 0
    if study == "finals":
        chunks = list(
            chain.from_iterable(
                finals(
                    task,
                    {
                        noise: [(rule, rate) for rule, rate, *_ in winners.values()]
                        for noise in NOISES
                        if (winners := tuned(task, noise))
                    },
                )
                for task in tasks
            )
        )
    else:
        chunks = list(chain.from_iterable(STUDIES[study](task) for task in tasks))
    if given.command == "count":
        long = sum(len(chunk.rules) for chunk in chunks if chunk.task in MULTI_TOKEN)
        print(f"{sum(len(chunk.rules) for chunk in chunks)} runs, {long} with several tokens")
        return 0
    missing = runner.run(chunks, folder, seconds=60.0 * given.minutes)
    print(f"{len(chunks) - missing} of {len(chunks)} chunks have results")
    return 3 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
