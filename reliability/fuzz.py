"""Random and damaged input of the Python entries: each gives its result or an error of bandpo.

A target takes bytes and makes a case of them. Seeded random bytes drive it here and in tests/trust;
`guided` hands it to Atheris, which steers the bytes by the coverage that they reach. The targets in
Rust are those of fuzz_rust.

    python -m reliability.fuzz --cases 100000
    python -c "from reliability.fuzz import guided; guided('token_files', '-runs=100000')"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np

from bandpo.error import BandpoError
from reliability.result import Row, run_cases
from reliability.targets.arrays import arrays, numbers
from reliability.targets.commands import commands
from reliability.targets.files import checkpoints, descriptions, token_files
from reliability.targets.tensors import tensors
from reliability.targets.texts import schedules, specs
from reliability.tokens import SEED

TARGETS: dict[str, tuple[Callable[[bytes], None], float]] = {
    "specs": (specs, 1.0),
    "schedules": (schedules, 1.0),
    "descriptions": (descriptions, 1.0),
    "checkpoints": (checkpoints, 0.2),
    "numbers": (numbers, 4.0),
    "arrays": (arrays, 2.0),
    "token_files": (token_files, 0.3),
    "commands": (commands, 0.05),
    "tensors": (tensors, 0.2),
}
"""Targets, and their share of the cases, by what one takes."""


def one(target: Callable[[bytes], None], data: bytes) -> bool:
    """Runs a case; True if it was accepted. Any error but those of bandpo goes through."""
    try:
        target(data)
    except BandpoError:
        return False
    return True


def run(name: str, cases: int, seed: int = SEED) -> int:
    """Runs cases of a target and returns how many were accepted.

    Raises:
        AssertionError: If a case fails, with its bytes.
    """
    rng = np.random.default_rng(seed)
    accepted = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What a case is warned about on purpose; others of numpy or Python are findings.
        for expected in ("log_prob", "advantages", "old_log_prob", "Clip", "the table of", "far"):
            warnings.filterwarnings("ignore", rf"(?s).*{expected}")
        for number in range(cases):
            data = rng.bytes(int(rng.integers(4, 120)))
            try:
                accepted += one(TARGETS[name][0], data)
            except Exception as error:
                raise AssertionError(f"{name}, case {number}, {data!r}: {error!r}") from error
    return accepted


def fuzz(cases: int, seed: int = SEED) -> Iterator[Row]:
    """All targets, each with its share of the cases."""
    for name, (target, share) in TARGETS.items():
        count = int(cases * share)
        what = (target.__doc__ or name).rstrip(".").split(",")[0]
        yield Row(what, count, {"accepted": run(name, count, seed), "other errors": 0})


def guided(name: str, *arguments: str) -> None:
    """Runs a target under Atheris, by the options of libFuzzer, and ends the process."""
    import atheris

    atheris.instrument_all()
    target = TARGETS[name][0]
    atheris.Setup([name, *arguments], lambda data: one(target, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    run_cases("fuzz", __doc__, fuzz, cases=100_000, seed=SEED, of="cases of a target of share 1")
