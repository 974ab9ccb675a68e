"""Changes of single operators of the loss, one at a time: tests that fail kill them.

A change that no test kills is printed with its line, to be killed or explained.

    python -m reliability.mutation --cases 100
"""

from __future__ import annotations

import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reliability.result import Row, run_cases
from reliability.tokens import SEED

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "bandpo"
FOLDER = PACKAGE / "loss"

TESTS = (
    *("policy", "metrics", "domain", "penalty", "budgets", "gamma_weight", "far_tokens"),
    *("second_derivatives", "corrected", "anchor", "loss"),
)
"""Files of tests/loss that take less than a minute; those that take a short time come first."""

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or,
    ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.USub: ast.UAdd,
}  # fmt: skip
"""Operators, and what stands in place of each."""


def _places(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int]]:
    """Parts that can be changed: a node, its field and the index in it. No annotation is one."""
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        for name in ("annotation", "returns", "slice")
        if isinstance(getattr(node, name, None), ast.AST)
        for inner in ast.walk(getattr(node, name))
        if name != "slice" or not isinstance(inner, ast.Constant)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Compare):
            yield from ((node, "ops", k) for k, op in enumerate(node.ops) if type(op) in SWAPS)
        elif isinstance(node, ast.BinOp | ast.BoolOp | ast.UnaryOp):
            if type(node.op) in SWAPS:
                yield node, "op", 0
            elif isinstance(node.op, ast.Not):
                yield node, "not", 0
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            yield node, "value", 0
        elif isinstance(node, ast.If | ast.IfExp):
            yield node, "test", 0


def mutants() -> list[tuple[Path, int]]:
    """Every change: a file, and the number of the place in it."""
    return [
        (path, number)
        for path in sorted(FOLDER.glob("*.py"))
        for number, _ in enumerate(_places(ast.parse(path.read_text(encoding="utf-8"))))
    ]


def mutant(path: Path, number: int) -> tuple[str, str]:
    """The source with one change, and the changed line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node, field, index = list(_places(tree))[number]
    before = ast.unparse(node)
    if field == "ops":
        node.ops[index] = SWAPS[type(node.ops[index])]()  # type: ignore[attr-defined]
    elif field == "op":
        node.op = SWAPS[type(node.op)]()  # type: ignore[attr-defined]
    elif field == "not":
        node.op, node.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)  # type: ignore[attr-defined]
    elif field == "test":
        node.test = ast.UnaryOp(ast.Not(), node.test)  # type: ignore[attr-defined]
    else:
        value = node.value  # type: ignore[attr-defined]
        node.value = not value if isinstance(value, bool) else value + 1  # type: ignore[attr-defined]
    first, second = (text.partition("\n")[0] for text in (before, ast.unparse(node)))
    place = f"{path.name}:{getattr(node, 'lineno', 0)}"
    return ast.unparse(ast.fix_missing_locations(tree)), f"{place} {first} -> {second}"


def is_killed(source: str, path: Path) -> bool:
    """True if a test fails, or they do not end in ten minutes."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "bandpo")
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / path.relative_to(PACKAGE)).write_text(source, encoding="utf-8")
        search = [place, str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        files = [str(ROOT / "tests" / "loss" / f"test_{name}.py") for name in TESTS]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(search)}, cwd=ROOT,
                capture_output=True, check=False, timeout=600,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return True
    return done.returncode != 0


def mutation(cases: int, seed: int = SEED) -> Iterator[Row]:
    """A sample of the changes.

    Raises:
        AssertionError: If the tests fail without a change.
    """
    some = FOLDER / "policy.py"
    assert not is_killed(some.read_text(encoding="utf-8"), some), "the tests fail without a change"
    every = mutants()
    chosen = random.Random(seed).sample(every, min(cases, len(every)))  # noqa: S311 -- no secret
    survived = []
    for path, number in chosen:
        source, text = mutant(path, number)
        if is_killed(source, path):
            print(f"killed: {text}", flush=True)
        else:
            print(f"survived: {text}", flush=True)
            survived.append(text)
    check = f"changes of python/bandpo/loss, a sample of {len(every)}"
    yield Row(check, len(chosen), {"killed": len(chosen) - len(survived)}, survived)


if __name__ == "__main__":
    run_cases("mutation", __doc__, mutation, cases=100, seed=SEED, of="changes")
