"""Steps of adding a divergence, checked for every divergence there is.

Vector laws are checked by `cargo test band::vector`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bandpo import Divergence
from bandpo._core import DIVERGENCES, KERNEL_SOURCE
from bandpo._core import Divergence as Solver
from bandpo.error import InvalidValueError
from support.reference import parse

ROOT = Path(__file__).parents[2]


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def family(spec: str) -> str:
    """The name without its parameter."""
    return spec.partition(":")[0]


def has_rust_docs(spec: str) -> bool:
    return (
        re.search(rf"^/// \| `{family(spec)}\b", text("rust/divergence/mod.rs"), re.M) is not None
    )


def has_python_docs(spec: str) -> bool:
    """True if both tables, the formulas and their limits, have a row."""
    rows = re.findall(rf"^ *{family(spec)}(?::\w)? {{2,}}", Divergence.__doc__ or "", re.M)
    return len(rows) == 2


def has_kernel(spec: str) -> bool:
    generator = Solver(spec).kernel_generator
    kinds = re.search(r"enum Kind \{(.*?)\}", KERNEL_SOURCE, re.S)
    assert kinds is not None
    return generator is not None and f"= {generator[0]}," in f"{kinds[1].strip()},"


def has_generator(spec: str) -> bool:
    """True if the independent solver has the generator."""
    try:
        return bool(parse(spec).text)
    except ValueError:
        return False


def has_reference(spec: str) -> bool:
    return (ROOT / f"tests/data/band_{spec.replace(':', '_')}.csv.gz").exists()


# The file of a step -> its check.
STEPS: dict[str, Callable[[str], bool]] = {
    "rust/divergence/mod.rs": has_rust_docs,
    "python/bandpo/divergence.py": has_python_docs,
    "cuda/generator.cuh": has_kernel,
    "tests/support/reference.py": has_generator,
    "tests/data": has_reference,
}


@pytest.mark.parametrize("spec", DIVERGENCES)
def test_every_step_is_done_for_every_divergence(spec: str) -> None:
    missing = [path for path, is_done in STEPS.items() if not is_done(spec)]
    assert not missing, f"{spec} has no entry in {', '.join(missing)}; see CONTRIBUTING.md"


def test_an_unknown_divergence_misses_every_step() -> None:
    with pytest.raises(InvalidValueError, match="not known"):
        has_kernel("triangular")
    others = STEPS.keys() - {"cuda/generator.cuh"}
    assert [path for path in others if STEPS[path]("triangular")] == []


def test_names_stand_once_in_the_list() -> None:
    assert max(Counter(map(family, DIVERGENCES)).values()) == 1


def test_contributing_names_every_step() -> None:
    section = re.search(r"## To add a divergence\n(.*?)\n## ", text("CONTRIBUTING.md"), re.S)
    assert section is not None
    assert [path for path in STEPS if f"`{path}`" not in section[1]] == []
