"""Measure the accuracy of bounds and tables and write docs/accuracy.md.

Bounds are compared with the references in tests/data and, with --full, with that many further
points a divergence, solved at 60 digits by tests/reference.py on the spot. Tables are compared
with the solver. The result depends on the arguments and the version of bandpo alone.

    python tools/make_accuracy.py --full 10000
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from random import Random
from typing import TypeVar

import bandpo
import numpy as np
from make_reference import log_of, log_uniform, points
from mpmath import isinf, mp, mpf
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from reference import DIGITS, bound, condition, parse, saturation, to_double  # noqa: E402

SIDES = ("log_lower", "log_upper")
PROMISED = 1e-14
"""Relative error of a log bound."""
TABLE_TARGET = 1e-6
TABLE_BYTES = 32 * 1024
TABLE_DELTAS = (1e-4, 1e-3, 0.01, 0.05, 0.3, 1.0)
NEAR = 0.02
"""Near saturation: delta within this of the delta that saturates the bound, relatively."""
REGIONS = ("p < 1e-6", "1e-6 .. 0.5", "0.5 .. 1 - 1e-6", "p > 1 - 1e-6", "near saturation")
EXHAUSTIVE = ROOT / "docs" / "accuracy-exhaustive.json"

# log p so near 0 that a bound with a limit other than 0 there has reached it to 60 digits.
ALMOST_CERTAIN = -(mpf(10) ** -401)

T = TypeVar("T")
Floats = NDArray[np.float64]
Point = tuple[float, float]
# A log bound: its nearest float64, what remains, and whether delta is near saturation.
Truth = tuple[float, float, bool]


@dataclass(frozen=True)
class Measured:
    """Bounds of one divergence beside the truth. Arrays over the two sides are ``[2, points]``."""

    spec: str
    logp: Floats
    delta: Floats
    actual: Floats
    relative: Floats  # of log bounds: above 0 is outside, -inf or inf where infinities differ
    ulp: Floats
    region: NDArray[np.intp]  # index into REGIONS


# --- the truth ---------------------------------------------------------------------------------


def near_saturation(spec: str, log_prob: float, delta: float, upper: bool) -> bool:
    """Return whether delta is near the one that saturates this bound."""
    if isinf(parse(spec).at_zero()):
        return False
    # bhattacharyya is the logarithm of 1 - hellinger, which may be as small as sqrt(5e-324).
    edge = saturation(spec, log_prob, upper, 200)
    return bool(abs(delta - edge) <= NEAR * edge)


def split(value: mpf) -> tuple[float, float]:
    """Return the nearest finite float64, or -inf of -inf, and the float64 nearest to the rest."""
    if isinf(value):
        return float(value), 0.0
    nearest = to_double(value)
    if np.isinf(nearest):  # the library's answer is -f64::MAX there
        return float(np.copysign(np.finfo(np.float64).max, nearest)), 0.0
    return nearest, to_double(mp.fsub(value, nearest, exact=True))


def solve(job: tuple[str, Point]) -> tuple[Truth, Truth]:
    """Return both bounds of a point, from the 60-digit reference."""
    spec, (log_prob, delta) = job
    low, high = (
        (
            *split(bound(spec, log_prob, delta, upper)[0]),
            near_saturation(spec, log_prob, delta, upper),
        )
        for upper in (False, True)
    )
    return low, high


def nearness(job: tuple[str, Point]) -> tuple[bool, bool]:
    """Return whether each side of a point is near saturation."""
    spec, (log_prob, delta) = job
    return (
        near_saturation(spec, log_prob, delta, False),
        near_saturation(spec, log_prob, delta, True),
    )


def limit_radii(spec: str) -> list[float]:
    """Return radii for the limit p = 1: from 1e-8 to 10, and around the one that allows all."""
    radii = [to_double(log_uniform(1e-8, 10.0, i / 100)) for i in range(101)]
    edge = to_double(saturation(spec, ALMOST_CERTAIN, False, 1000))
    around = [edge * (1 + sign * size) for size in (1e-2, 1e-6, 1e-12) for sign in (-1, 1)]
    return radii + (around if edge <= 10.0 else [])


def solve_certain(job: tuple[str, float]) -> Truth:
    """Return log_lower in the limit p = 1, from the reference at smaller and smaller 1 - p."""
    spec, delta = job
    value, _ = bound(spec, ALMOST_CERTAIN, delta, False)
    nearer, _ = bound(spec, ALMOST_CERTAIN**3, delta, False)
    if value == nearer or abs(value / nearer - 1) < mpf(10) ** -50:
        return (*split(value), False)
    return 0.0, 0.0, False  # it still moves: f'(inf) is infinite and the limit 0


def file_spec(path: Path) -> str:
    """Return the divergence that a reference file is about."""
    return path.stem.removeprefix("band_").replace("_", ":", 1)


def read(path: Path) -> tuple[list[Point], list[tuple[Truth, Truth]]]:
    """Return points and bounds of a reference file."""
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))

    def number(row: dict[str, str], name: str) -> float:
        return float.fromhex(row[name])

    truths = []
    for row in rows:
        low, high = ((number(row, s), number(row, s + "_rest"), False) for s in SIDES)
        truths.append((low, high))
    return [(number(row, "logp"), number(row, "delta")) for row in rows], truths


def far_points(spec: str, count: int) -> list[Point]:
    """Return points beyond what is promised: p below 1e-300, or 1 - p below 1e-16."""
    random = Random(zlib.crc32(spec.encode()))  # noqa: S311 - sample points, not secrets
    log_probs = [-5e-324, -1e-310, -745.0]
    for i in range(count - len(log_probs)):
        s = random.random()
        log_probs.append(
            log_of(log_uniform(5e-324, 1e-300, s)) if i % 2 else -(10.0 ** (-16 - 284 * s))
        )
    return [(lp, to_double(log_uniform(1e-8, 10.0, random.random()))) for lp in log_probs]


# --- the comparison ----------------------------------------------------------------------------


def compare(spec: str, sample: Sequence[Point], truths: Sequence[tuple[Truth, Truth]]) -> Measured:
    """Return the library's bounds beside the truth."""
    logp, delta = (np.array(column) for column in zip(*sample, strict=True))
    actual = np.stack(bandpo.Band(spec, delta).log_bounds(logp))
    nearest = np.array([[truth[side][0] for truth in truths] for side in (0, 1)])
    rest = np.array([[truth[side][1] for truth in truths] for side in (0, 1)])
    near = np.array([[truth[side][2] for truth in truths] for side in (0, 1)])
    relative, ulp = errors(actual, nearest, rest)
    by_p = np.searchsorted([np.log(1e-6), np.log(0.5), np.log1p(-1e-6)], logp)
    return Measured(spec, logp, delta, actual, relative, ulp, np.where(near, 4, by_p))


def errors(actual: Floats, nearest: Floats, rest: Floats) -> tuple[Floats, Floats]:
    """Return relative errors, positive where outside, and absolute errors in ULP of the truth."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        # Neighbouring doubles subtract exactly, so this sees errors far below one ulp.
        error = (actual - nearest) - rest
        relative = error / nearest
        ulp = np.abs(error) / np.spacing(np.abs(nearest))
    same = (actual == nearest) & (np.isinf(nearest) | (nearest == 0.0))
    outward = np.where(np.abs(actual) > np.abs(nearest), np.inf, -np.inf)
    odd = ~np.isfinite(relative)
    return (
        np.where(same, 0.0, np.where(odd, outward, relative)),
        np.where(same, 0.0, np.where(odd, np.inf, ulp)),
    )


def progress(jobs: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield from an iterable and report on standard error."""
    started = time.monotonic()
    for done, item in enumerate(jobs, 1):
        yield item
        if done % 200 == 0 or done == total:
            sys.stderr.write(f"\r{what}: {done}/{total}  {time.monotonic() - started:.0f} s ")
            sys.stderr.flush()
    sys.stderr.write("\n")


def measure_bounds(
    files: Sequence[Path], full: int, workers: int
) -> tuple[list[Measured], list[Measured], list[Measured]]:
    """Return what was measured in the promised range, beyond it, and at logp = 0."""
    inside, far, certain = [], [], []
    with Pool(workers) as pool:
        for path in files:
            spec = file_spec(path)
            sample, truths = read(path)
            near = pool.map(nearness, [(spec, point) for point in sample], chunksize=16)
            truths = [
                ((*low[:2], is_near[0]), (*high[:2], is_near[1]))
                for (low, high), is_near in zip(truths, near, strict=True)
            ]
            known = set(sample)
            more = [point for point in points(spec, full) if point not in known] if full else []
            beyond = far_points(spec, min(max(full // 10, 20), 500))
            jobs = [(spec, point) for point in more + beyond]
            solved: list[tuple[Truth, Truth]] = list(
                progress(pool.imap(solve, jobs, chunksize=16), len(jobs), spec)
            )
            inside.append(compare(spec, sample + more, truths + solved[: len(more)]))
            far.append(compare(spec, beyond, solved[len(more) :]))
            radii = limit_radii(spec)
            limits = pool.map(solve_certain, [(spec, d) for d in radii], chunksize=8)
            certain.append(
                compare(spec, [(0.0, d) for d in radii], [(t, (0.0, 0.0, False)) for t in limits])
            )
    return inside, far, certain


# --- the report --------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, the first column left-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def largest(values: Floats) -> float:
    """Return the largest size, 0 of none."""
    return float(np.abs(values).max(initial=0.0))


def number(value: float) -> str:
    """Return a number as two digits."""
    return "0" if value == 0.0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def outside(result: Measured) -> int:
    """Return how many bounds lie outside the exact one."""
    return int((result.relative > 0.0).sum())


def ulps(values: Floats) -> str:
    """Return the largest number of ULP."""
    worst = largest(values)
    return f"{worst:.1f}" if worst < 1e4 else number(worst)


def summary(results: Sequence[Measured], sides: Sequence[int] = (0, 1)) -> str:
    """Return the table over all regions."""
    rows = []
    for result in results:
        row = [result.spec, str(result.logp.size)]
        for side in sides:
            row += [number(largest(result.relative[side])), ulps(result.ulp[side])]
        rows.append([*row, str(outside(result))])
    names = [name for side in sides for name in (SIDES[side], "ULP")]
    return table(["divergence", "points", *names, "outside"], rows)


def by_region(results: Sequence[Measured], side: int) -> str:
    """Return the table of one side by region."""
    rows = []
    for result in results:
        row = [result.spec]
        for region in range(len(REGIONS)):
            here = result.region[side] == region
            worst = number(largest(result.relative[side, here]))
            row.append(f"{worst} ({ulps(result.ulp[side, here])})" if here.any() else "none")
        rows.append(row)
    return table(["divergence", *REGIONS], rows)


def faults(results: Sequence[Measured]) -> list[str]:
    """Return every point that breaks the promise, one line each."""
    lines = []
    for result in results:
        for side, i in np.argwhere(~((result.relative <= 0.0) & (result.relative >= -PROMISED))):
            log_prob, delta = float(result.logp[i]), float(result.delta[i])
            w = bound(result.spec, log_prob, delta, bool(side))[1]
            kappa = condition(result.spec, log_prob, delta, bool(side), w)
            lines.append(
                f"| {result.spec} | {SIDES[side]} | {log_prob.hex()} | {delta.hex()} "
                f"| {float(result.actual[side, i]).hex()} "
                f"| {number(float(result.relative[side, i]))} | {number(float(kappa))} |"
            )
    return lines


def measure_tables(
    specs: Sequence[str], samples: int
) -> list[tuple[str, float, int, float, float]]:
    """Return (divergence, delta, bytes, error of log_upper, error of lower) of every table."""
    jobs = [(spec, delta) for spec in specs for delta in TABLE_DELTAS]
    measured = []
    for job in progress(jobs, len(jobs), "tables"):
        spec, delta = job
        verified = bandpo.Band(spec, delta).table().verify(samples)
        measured.append((spec, delta, verified.nbytes, *verified.max_error))
    return measured


def by_delta(
    specs: Sequence[str], measured: Sequence[tuple[str, float, int, float, float]]
) -> tuple[str, str]:
    """Return the tables of errors and of sizes, a column for each delta."""
    errors_of = {(spec, delta): (upper, lower) for spec, delta, _, upper, lower in measured}
    size = {(spec, delta): nbytes for spec, delta, nbytes, _, _ in measured}
    header = ["divergence", *(f"{delta:g}" for delta in TABLE_DELTAS)]
    error_rows = [
        [spec, *(" / ".join(number(e) for e in errors_of[spec, d]) for d in TABLE_DELTAS)]
        for spec in specs
    ]
    size_rows = [[spec, *(str(size[spec, d]) for d in TABLE_DELTAS)] for spec in specs]
    return table(header, error_rows), table(header, size_rows)


def exhaustive(path: Path) -> str:
    """Return the section on exhaustive verifications, from the results that were kept."""
    rows = [
        [
            entry["divergence"],
            f"{entry['delta']:g}",
            f"{entry['values']:,}".replace(",", " "),
            number(entry["max_error_log_upper"]),
            number(entry["max_error_lower"]),
        ]
        for entry in json.loads(path.read_text())
    ]
    return f"""
## Every float32

`bandpo table verify --exhaustive` compares a table with the solver at every float32 log-probability
in [-104, 0]. Its results are kept in `docs/accuracy-exhaustive.json`.

{table(["divergence", "delta", "values", "log_upper", "lower"], rows)}
"""


def report(args: argparse.Namespace) -> str:
    """Measure everything and return the document."""
    files = sorted((ROOT / "tests" / "data").glob("band_*.csv"))
    specs = [file_spec(path) for path in files]
    results, far, certain = measure_bounds(files, args.full, args.workers)
    broken = faults(results)
    measured = measure_tables(specs, args.samples)
    error_table, size_table = by_delta(specs, measured)
    of_points = sum(result.logp.size for result in results)
    worst = max(largest(result.relative) for result in results)
    command = f"python tools/make_accuracy.py --full {args.full} --samples {args.samples}"
    text = f"""# Accuracy

Written by `{command}` with bandpo {bandpo.__version__}.
It holds for the points that were measured; [numerics.md](numerics.md) says why others should be no
different.

## Bounds

| | promised | measured |
| --- | ---: | ---: |
| largest relative error of log_lower and log_upper | {number(PROMISED)} | {number(worst)} |
| bounds outside the exact one | 0 | {sum(map(outside, results))} |
| bounds that saturate where the exact one does not, or the reverse | 0 | \
{sum(map(wrongly_saturated, results))} |

The promise is for every built-in divergence, p from 1e-300 to 1 - 1e-16 and delta from 1e-8 to 10.
{of_points} points, both bounds of each, were compared with {DIGITS}-digit references: those in
`tests/data` and {args.full} more for each divergence (a point in both counts once). Of a divergence
whose bounds saturate, a tenth of the points has delta at the value that saturates one, a float next
to it, or off by 1e-2, 1e-6 or 1e-12 of it.

Largest relative error, and largest error in units in the last place (ULP) of the exact bound:

{summary(results)}

Most of it is the move inwards by 3.6e-15 that keeps a bound inside: it comes to 16 to 32 ULP.

### log_lower by region

Largest relative error, ULP in brackets. Near saturation means delta within {NEAR:.0%} of the one from
which on the bound is -inf (log_lower) or -logp (log_upper); the other columns are without those points.

{by_region(results, 0)}

### log_upper by region

{by_region(results, 1)}
"""
    if broken:
        text += """
### Points that break the promise

A relative error above 0 is outside the exact bound.

| divergence | bound | logp | delta | returned | relative error | condition number |
| --- | --- | --- | --- | --- | ---: | ---: |
"""
        text += "\n".join(broken) + "\n"
    text += f"""
### Beyond the promise

The solver answers everywhere, with less accuracy where p or 1 - p is about to underflow: p from
5e-324 to 1e-300, and 1 - p from 5e-324 to 1e-16.

{summary(far)}

### The limit p = 1

log_lower at logp = 0, for radii from 1e-8 to 10 and, where a finite radius allows everything, around
that one: 1e-2, 1e-6 and 1e-12 of it below and above. log_upper is 0 there.

{summary(certain, sides=(0,))}

## Tables

| | promised | measured |
| --- | ---: | ---: |
| largest error of log_upper and of lower | {number(TABLE_TARGET)} | \
{number(max(max(row[3:]) for row in measured))} |
| bytes | {TABLE_BYTES} | {max(row[2] for row in measured)} |

The promise is for every built-in divergence and delta from 1e-4 to 1. The error is absolute, beyond
one float32 ULP of the bound, where the log bound lies within +-20. Each table was compared with the
solver at {args.samples} float32 log-probabilities, evenly spaced in their bit patterns over [-104, 0].

Largest error of log_upper / of lower, by delta:

{error_table}

Bytes, by delta:

{size_table}
"""
    if EXHAUSTIVE.exists():
        text += exhaustive(EXHAUSTIVE)
    return text


def wrongly_saturated(result: Measured) -> int:
    """Return how many bounds are saturated where the exact one is not, or the reverse."""
    return int(np.isinf(result.relative).sum())


def main() -> None:
    """Parse the command line and write the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument(
        "--full", type=int, default=0, help="further points a divergence (%(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=1_000_000, help="log-probs a table (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "accuracy.md")
    args = parser.parse_args()
    text = report(args)
    args.out.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
