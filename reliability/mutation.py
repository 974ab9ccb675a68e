"""Changes of Python, one operator, number or condition at a time: a test that fails kills them.

The changes are those of cosmic-ray. The tests are those that reach the changed line, as
`python -m reliability.coverage` found them, up to half a minute of them, shortest first.
A change that no test kills is printed with its line, to be killed, or explained in
`reliability/survivors.json`.

    python -m reliability.mutation --cases 500
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from reliability.result import Row, run_cases
from reliability.survivors import reason
from reliability.tokens import SEED

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "bandpo"
FOLDERS = ("loss", "region", "schedule", "record", "replay")
FAILED = "failed.txt"
"""The file with the name of the last test that failed, beside the copy of the package."""

LIMIT = 30.0
"""Seconds of tests for a change, by their times without it."""

BINARY = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Add", "Pow_Mul")
SETS = ("BitAnd_BitOr", "BitOr_BitAnd")
COMPARED = (
    *("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is"),
)
OPERATORS = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in (*BINARY, *SETS)),
    *(f"ReplaceComparisonOperator_{pair}" for pair in COMPARED),
    *("ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not", "AddNot"),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer"),
    "ZeroIterationForLoop",
)
"""Operators of cosmic-ray. Of each kind, those whose result may well be of the same type."""


class Change(NamedTuple):
    """One change of one file."""

    file: str
    """From the root of the repository."""
    line: int
    operator: str
    occurrence: int
    """Number among the places of the operator in the file."""

    @property
    def text(self) -> str:
        """The line before the change."""
        return (ROOT / self.file).read_text(encoding="utf-8").splitlines()[self.line - 1].strip()

    @property
    def source(self) -> str:
        """The changed file."""
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.operators.provider import OperatorProvider

        operator = OperatorProvider()[self.operator]()
        return str(
            mutate_code((ROOT / self.file).read_text(encoding="utf-8"), operator, self.occurrence)
        )

    @property
    def after(self) -> str:
        """The line after the change."""
        return self.source.splitlines()[self.line - 1].strip()


def _is_idle(node: Any) -> bool:
    """True inside an annotation, which nothing evaluates, and for the `*` before keywords."""
    if node.parent is not None and node.parent.type == "parameters":
        return True
    while node.parent is not None:
        parent = node.parent
        if parent.type == "annassign" and node is parent.children[1]:
            return True
        if parent.type in ("param", "funcdef") and node is parent.annotation:
            return True
        if parent.type == "tfpdef" and node is parent.children[-1]:
            return True
        node = parent
    return False


def changes(folder: str) -> list[Change]:
    """Every change of a package."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.operators.provider import OperatorProvider

    found = []
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        tree = get_ast(path.read_text(encoding="utf-8"))
        file = path.relative_to(ROOT).as_posix()
        for name in OPERATORS:
            operator, occurrence = OperatorProvider()[name](), -1
            for node in ast_nodes(tree):
                for start, _ in operator.mutation_positions(node):
                    occurrence += 1
                    if not _is_idle(node):
                        found.append(Change(file, start[0], name, occurrence))
    return found


class Failure:
    """A plugin of pytest that writes the name of a test that fails."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest after each test."""
        if report.failed:
            self._path.write_text(report.nodeid, encoding="utf-8")


def run_tests(package: str, tests: list[str]) -> None:
    """Runs tests on a copy of the package, and ends the process with 0 if they pass."""
    import pytest

    os.setsid()
    sys.path.insert(0, package)
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = os.pathsep.join([package, str(ROOT / "tests"), str(ROOT)])
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.chdir(ROOT)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    words = ["-x", "-q", "-p", "no:cacheprovider", *tests]
    os._exit(int(pytest.main(words, plugins=[Failure(Path(package, FAILED))])))


class Tests:
    """The tests of each line, from the data of `reliability.coverage`."""

    def __init__(self) -> None:
        from coverage import CoverageData

        from reliability.coverage import DATA, tests

        self._tests = tests()
        self._data = CoverageData(basename=str(DATA))
        self._data.read()

    def of(self, change: Change) -> list[str]:
        """Those that reach the changed line, then others that reach its file.

        A line that runs at the import belongs to the test that imports it first, if to any.
        """
        lines = self._data.contexts_by_lineno(str(ROOT / change.file))
        reached = self._tests.keys() & {name for names in lines.values() for name in names}
        direct = set(lines.get(change.line, ()))
        chosen: list[str] = []
        total = 0.0
        for name in sorted(reached, key=lambda name: (name not in direct, self._tests[name])):
            seconds, test = self._tests[name]
            total += seconds
            if total > LIMIT and chosen:
                break
            chosen.append(test)
        return chosen


class Copy:
    """A copy of the package, in which one file at a time is changed."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._passing: set[str] = set()
        # Processes that begin with their packages imported take three seconds less each.
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["numpy", "pytest", "torch"])
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, Path(place, "bandpo"), ignore=ignored)

    def passes(self, tests: list[str]) -> bool:
        """True if the tests pass; they are ended after five times their limit."""
        process = self._processes.Process(target=run_tests, args=(self._place, tests))
        process.start()
        process.join(5 * LIMIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # those that tests started too
        process.join()
        return process.exitcode == 0

    def kills(self, tests: list[str], change: Change) -> bool:
        """True if a test fails, or they do not end, because of the change.

        Raises:
            AssertionError: If the test that fails does so without the change too.
        """
        failed = Path(self._place, FAILED)
        failed.unlink(missing_ok=True)
        path = Path(self._place, Path(change.file).relative_to("python"))
        before = path.read_text(encoding="utf-8")
        path.write_text(change.source, encoding="utf-8")
        is_killed = not self.passes(tests)
        path.write_text(before, encoding="utf-8")
        if is_killed and failed.exists():
            test = failed.read_text(encoding="utf-8")
            assert test in self._passing or self.passes([test]), f"{test} fails without a change"
            self._passing.add(test)
        return is_killed


def mutation(cases: int, seed: int = SEED) -> Iterator[Row]:
    """A sample of the changes of each package, of the same size.

    Raises:
        AssertionError: If a test fails without a change.
    """
    tests = Tests()
    with tempfile.TemporaryDirectory() as place:
        copy = Copy(place)
        for folder in FOLDERS:
            every = changes(folder)
            share = min(cases // len(FOLDERS), len(every))
            counts = {"killed": 0, "without an effect": 0, "survived": 0}
            survived = []
            chosen = random.Random(seed).sample(every, share)  # noqa: S311 -- no secret
            assert copy.passes(tests.of(chosen[0])), "tests fail without a change"
            for change in chosen:
                reached = tests.of(change)
                outcome = "killed"
                if not reached or not copy.kills(reached, change):
                    known = reason(change.file, change.text, change.after)
                    outcome = "without an effect" if known else "survived"
                text = f"{change.file}:{change.line} {change.text} -> {change.after}"
                print(f"{outcome}: {text}", flush=True)
                if outcome == "survived":
                    survived.append(text)
                counts[outcome] += 1
            check = f"changes of python/bandpo/{folder}, of {len(every):,}"
            yield Row(check, share, counts, survived)


if __name__ == "__main__":
    run_cases("mutation", __doc__, mutation, cases=500, seed=SEED, of="changes")
