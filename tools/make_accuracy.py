"""Measure the accuracy of bounds and tables and write docs/accuracy.md.

Bounds are compared with the references in tests/data and, with --full, with that many further
points a divergence, solved at 60 digits by tests/reference.py on the spot. Tables are compared
with the solver. The result depends on the arguments and the version of bandpo alone.

    python tools/make_accuracy.py --full 10000

Solving takes most of the time. With --references FILE it is done once: the file is written, or
read where it is there. Delete it when tests/reference.py or tests/data change.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from multiprocessing import Pool
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np
from make_reference import log_of, log_uniform, points
from mpmath import isinf, mp, mpf
from numpy.typing import NDArray

import bandpo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from reference import (  # noqa: E402
    DIGITS,
    bound,
    condition,
    divergence,
    parse,
    saturation,
    to_double,
)

SIDES = ("log_lower", "log_upper")
PROMISED = 1e-14
"""Relative error of a log bound."""
ILL_CONDITIONED, BACKWARD = 20.0, 2.0
"""Above this condition number a bound may instead be exact for a delta so many ULP away."""
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
class Sample:
    """Points of one divergence with the truth. Arrays over the two sides are ``[2, points]``."""

    logp: Floats
    delta: Floats
    nearest: Floats
    rest: Floats
    near: NDArray[np.bool_]


@dataclass(frozen=True)
class Measured:
    """What the library gives for a sample."""

    spec: str
    sample: Sample
    actual: Floats
    relative: Floats  # errors of log bounds: above 0 is outside, inf where infinities differ
    ulp: Floats
    region: NDArray[np.intp]  # index into REGIONS

    def outside(self) -> int:
        """Return how many bounds lie outside the exact one."""
        return int((self.relative > 0.0).sum())

    def wrongly_saturated(self) -> int:
        """Return how many bounds are saturated where the exact one is not, or the reverse."""
        return int(np.isinf(self.relative).sum())


@dataclass(frozen=True)
class Poor:
    """A bound whose relative error is not within what is promised for well-conditioned ones."""

    spec: str
    side: int
    logp: float
    delta: float
    actual: float
    relative: float
    kappa: float
    backward: float  # distance of D at the bound from delta, in ULP of delta

    def kept(self) -> bool:
        """Return whether the promise for ill-conditioned bounds holds."""
        return self.relative <= 0.0 and self.kappa > ILL_CONDITIONED and self.backward <= BACKWARD


# --- the truth ---------------------------------------------------------------------------------


def near_saturation(spec: str, log_prob: float, delta: float, upper: bool) -> bool:
    """Return whether delta is near the one that saturates this bound."""
    if isinf(parse(spec).at_zero()):
        return False
    # These two are logarithms of 1 minus a divergence, which may be as small as sqrt(5e-324).
    digits = 200 if spec.startswith(("renyi", "bhattacharyya")) else 40
    edge = saturation(spec, log_prob, upper, digits)
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


def gather(points_: Sequence[Point], truths: Sequence[tuple[Truth, Truth]]) -> Sample:
    """Return points and truths as arrays."""
    logp, delta = (np.array(column) for column in zip(*points_, strict=True))
    nearest, rest, near = (
        np.array([[truth[side][field] for truth in truths] for side in (0, 1)])
        for field in range(3)
    )
    return Sample(logp, delta, nearest, rest, near.astype(bool))


def compare(spec: str, sample: Sample) -> Measured:
    """Return the library's bounds beside the truth."""
    actual = np.stack(bandpo.Band(spec, sample.delta).log_bounds(sample.logp))
    relative, ulp = errors(actual, sample.nearest, sample.rest)
    by_p = np.searchsorted([np.log(1e-6), np.log(0.5), np.log1p(-1e-6)], sample.logp)
    return Measured(spec, sample, actual, relative, ulp, np.where(sample.near, 4, by_p))


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
    started = reported = time.monotonic()
    for done, item in enumerate(jobs, 1):
        yield item
        now = time.monotonic()
        if now - reported > 0.5 or done == total:
            sys.stderr.write(f"\r{what}: {done}/{total}  {now - started:.0f} s ")
            sys.stderr.flush()
            reported = now
    sys.stderr.write("\n")


def references(files: Sequence[Path], full: int, workers: int) -> dict[str, Sample]:
    """Return the samples of each divergence: in the promised range, far beyond it, and at p = 1."""
    samples = {}
    with Pool(workers) as pool:
        for path in files:
            spec = file_spec(path)
            known, truths = read(path)
            near = pool.map(nearness, [(spec, point) for point in known], chunksize=16)
            truths = [
                ((*low[:2], is_near[0]), (*high[:2], is_near[1]))
                for (low, high), is_near in zip(truths, near, strict=True)
            ]
            seen = set(known)
            more = [point for point in points(spec, full) if point not in seen] if full else []
            far = far_points(spec, min(max(full // 10, 20), 500))
            jobs = [(spec, point) for point in more + far]
            solved = list(progress(pool.imap(solve, jobs, chunksize=16), len(jobs), spec))
            samples[f"{spec}/promised"] = gather(known + more, truths + solved[: len(more)])
            samples[f"{spec}/far"] = gather(far, solved[len(more) :])
            radii = limit_radii(spec)
            limits = pool.map(solve_certain, [(spec, d) for d in radii], chunksize=8)
            samples[f"{spec}/limit"] = gather(
                [(0.0, d) for d in radii], [(truth, (0.0, 0.0, False)) for truth in limits]
            )
    return samples


def kept_references(
    path: Path | None, files: Sequence[Path], full: int, workers: int
) -> dict[str, Sample]:
    """Return the same from a file where it is there, else solve, and write it if it is named."""
    names = [field.name for field in fields(Sample)]
    if path is not None and path.exists():
        with np.load(path) as kept:
            if int(kept["full"]) != full:
                raise SystemExit(f"{path} was made with --full {int(kept['full'])}: delete it")
            keys = {name.rsplit("/", 1)[0] for name in kept.files} - {"full"}
            return {key: Sample(*(kept[f"{key}/{name}"] for name in names)) for key in keys}
    samples = references(files, full, workers)
    if path is not None:
        arrays = {f"{k}/{name}": getattr(s, name) for k, s in samples.items() for name in names}
        np.savez_compressed(path, full=np.array(full), **arrays)
    return samples


def poor_bounds(results: Sequence[Measured]) -> list[Poor]:
    """Return every bound that is outside or off by more than is promised."""
    poor = []
    for result in results:
        spec = result.spec
        for side, i in np.argwhere(~((result.relative <= 0.0) & (result.relative >= -PROMISED))):
            logp, delta = float(result.sample.logp[i]), float(result.sample.delta[i])
            actual, relative = float(result.actual[side, i]), float(result.relative[side, i])
            w = bound(spec, logp, delta, bool(side))[1]
            kappa = float(condition(spec, logp, delta, bool(side), w))
            backward = abs(divergence(spec, logp, actual) - delta) / float(np.spacing(delta))
            poor.append(
                Poor(spec, int(side), logp, delta, actual, relative, kappa, float(backward))
            )
    return poor


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


def ulps(values: Floats) -> str:
    """Return the largest number of ULP."""
    worst = largest(values)
    return f"{worst:.1f}" if worst < 1e4 else number(worst)


def summary(results: Sequence[Measured], sides: Sequence[int] = (0, 1)) -> str:
    """Return the table over all regions."""
    rows = []
    for result in results:
        row = [result.spec, str(result.sample.logp.size)]
        for side in sides:
            row += [number(largest(result.relative[side])), ulps(result.ulp[side])]
        rows.append([*row, str(result.outside())])
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


def ill_conditioned(poor: Sequence[Poor]) -> str:
    """Return the table of bounds that keep the promise in its second form only."""
    rows = []
    for spec in sorted({bound_.spec for bound_ in poor}):
        here = [bound_ for bound_ in poor if bound_.spec == spec]
        rows.append(
            [
                spec,
                str(len(here)),
                number(max(-bound_.relative for bound_ in here)),
                number(min(bound_.kappa for bound_ in here)),
                number(max(bound_.backward for bound_ in here)),
            ]
        )
    header = ["divergence", "bounds", "largest error", "least condition number", "ULP of delta"]
    return table(header, rows)


def broken_promises(poor: Sequence[Poor]) -> str:
    """Return the table of bounds that keep it in neither form."""
    rows = [
        [
            bound_.spec,
            SIDES[bound_.side],
            *(value.hex() for value in (bound_.logp, bound_.delta, bound_.actual)),
            *(number(value) for value in (bound_.relative, bound_.kappa, bound_.backward)),
        ]
        for bound_ in poor
    ]
    header = ["divergence", "bound", "logp", "delta", "returned", "error", "condition number"]
    return table([*header, "ULP of delta"], rows)


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
    samples = kept_references(args.references, files, args.full, args.workers)
    results, far, limit = (
        [compare(spec, samples[f"{spec}/{part}"]) for spec in specs]
        for part in ("promised", "far", "limit")
    )
    poor = poor_bounds(results)
    kept = [bound_ for bound_ in poor if bound_.kept()]
    broken = [bound_ for bound_ in poor if not bound_.kept()]
    measured = measure_tables(specs, args.samples)
    error_table, size_table = by_delta(specs, measured)
    size = sum(result.sample.logp.size for result in results)
    command = f"python tools/make_accuracy.py --full {args.full} --samples {args.samples}"
    text = f"""# Accuracy

Written by `{command}` with bandpo {bandpo.__version__}.
It holds for the points that were measured; [numerics.md](numerics.md) says why others should be no
different.

## Bounds

| | promised | measured |
| --- | ---: | ---: |
| bounds outside the exact one | 0 | {sum(result.outside() for result in results)} |
| bounds that saturate where the exact one does not, or the reverse | 0 | \
{sum(result.wrongly_saturated() for result in results)} |
| bounds with a relative error above {PROMISED:.0e}, condition number up to \
{ILL_CONDITIONED:.0f} | 0 | {sum(bound_.kappa <= ILL_CONDITIONED for bound_ in broken)} |
| the same above {ILL_CONDITIONED:.0f}, unless D is within {BACKWARD:.0f} ULP of delta | 0 | \
{sum(bound_.kappa > ILL_CONDITIONED for bound_ in broken)} |

The promise is for every built-in divergence, p from 1e-300 to 1 - 1e-16 and delta from 1e-8 to 10.
The errors are those of log_lower and log_upper. {size} points, both bounds of each, were compared
with {DIGITS}-digit references: those in `tests/data` and {args.full} more for each divergence (a
point in both counts once). Of a divergence whose bounds saturate, a tenth of the points has delta
at the value that saturates one, a float next to it, or off by 1e-2, 1e-6 or 1e-12 of it.

Largest relative error, and largest error in units in the last place (ULP) of the exact bound:

{summary(results)}

Most of it is the move inwards by 3.6e-15 that keeps a bound inside: it comes to 16 to 32 ULP.

### log_lower by region

Largest relative error, ULP in brackets. Near saturation means delta within {NEAR:.0%} of the one
from which on the bound is -inf (log_lower) or -logp (log_upper); the other columns are without such
points.

{by_region(results, 0)}

### log_upper by region

{by_region(results, 1)}
"""
    if kept:
        text += f"""
### Ill-conditioned bounds

The condition number says by how much more than itself a relative change of logp or delta changes
the bound. Just below saturation of the lower side it may exceed 1e16: then even the last bit of
delta moves the bound by more than the bound. Above {ILL_CONDITIONED:.0f} a bound need not be within
{PROMISED:.0e} if the exact D at it is within {BACKWARD:.0f} ULP of delta, and not above it.
{len(kept)} bounds are such:

{ill_conditioned(kept)}
"""
    if broken:
        text += f"""
### Bounds that break the promise

An error above 0 is outside the exact bound. The last column is the distance of D from delta.

{broken_promises(broken)}
"""
    text += f"""
### Beyond the promise

The solver answers everywhere, with less accuracy where p or 1 - p is about to underflow: p from
5e-324 to 1e-300, and 1 - p from 5e-324 to 1e-16.

{summary(far)}

### The limit p = 1

log_lower at logp = 0, for radii from 1e-8 to 10 and, where a finite radius allows everything,
around that one: 1e-2, 1e-6 and 1e-12 of it below and above. log_upper is 0 there.

{summary(limit, sides=(0,))}

## Tables

| | promised | measured |
| --- | ---: | ---: |
| largest error of log_upper and of lower | {number(TABLE_TARGET)} | \
{number(max(max(row[3:]) for row in measured))} |
| bytes | {TABLE_BYTES} | {max(row[2] for row in measured)} |

The promise is for every built-in divergence and delta from 1e-4 to 1. The error is absolute, beyond
one float32 ULP of the bound, where the log bound lies within +-20. Each table was compared with the
solver at {args.samples} float32 log-probabilities, evenly spaced in their bit patterns over
[-104, 0], and at 16 in every cell.

Largest error of log_upper / of lower, by delta:

{error_table}

Bytes, by delta:

{size_table}
"""
    if EXHAUSTIVE.exists():
        text += exhaustive(EXHAUSTIVE)
    return text


def main() -> None:
    """Parse the command line and write the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument(
        "--full", type=int, default=0, help="further points a divergence (%(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=1_000_000, help="log-probs a table (%(default)s)"
    )
    parser.add_argument(
        "--references", type=Path, help="file that keeps the solved points between runs"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "accuracy.md")
    args = parser.parse_args()
    text = report(args)
    args.out.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
