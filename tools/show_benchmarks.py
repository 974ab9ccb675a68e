"""Prints the last results of asv as Markdown tables.

The page that asv publishes needs scripts from the network.

    python tools/show_benchmarks.py
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from asv.benchmarks import Benchmarks
from asv.config import Config
from asv.results import Results, iter_results
from asv.util import human_value
from make_results import markdown

ROOT = Path(__file__).resolve().parents[1]


def rows(results: Results, benchmarks: Benchmarks) -> Iterator[list[str]]:
    """Yields name, parameters and value of each benchmark that was run."""
    for name in sorted(results.get_result_keys(benchmarks)):
        unit = benchmarks[name]["unit"]
        combinations = itertools.product(*results.get_result_params(name))
        values = results.get_result_value(name, results.get_result_params(name))
        for parameters, value in zip(combinations, values, strict=True):
            yield [name, ", ".join(text.strip("'") for text in parameters), shown(value, unit)]


def shown(value: float | None, unit: str) -> str:
    """Returns a value with three digits and its unit, and n/a for NaN, which asv stores for n/a."""
    if value is None:
        return "failed"
    return "n/a" if math.isnan(value) else str(human_value(float(f"{value:.3g}"), unit))


def main() -> int:
    """Prints the results of the last run of each environment and machine."""
    config = Config.load(str(ROOT / "asv.conf.json"))
    folder = ROOT / config.results_dir
    if not (folder / "benchmarks.json").exists():
        print("show_benchmarks: there are no measurements: run make bench", file=sys.stderr)
        return 1
    config.results_dir = str(folder)
    benchmarks = Benchmarks.load(config)
    last: dict[tuple[str, str], Results] = {}
    for results in iter_results(str(folder)):
        key = (results.params["machine"], results.env_name)
        if key not in last or last[key].date < results.date:
            last[key] = results
    for (machine, environment), results in last.items():
        print(f"## {results.commit_hash[:8]} on {machine}, {environment}\n")
        print(markdown(["benchmark", "parameters", "cost"], rows(results, benchmarks)), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
