"""Measures the accuracy of bounds and tables and writes docs/accuracy.md.

Bounds are compared with all 60-digit references of tools/make_reference.py, tables with the solver.
The result depends on the arguments and the version of bandpo alone.

    make reference
    python tools/make_accuracy.py
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from make_reference import FULL
from numpy.typing import NDArray

import bandpo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from bandpo.region import Status  # noqa: E402
from conftest import Reference, read_reference  # noqa: E402
from support.contract import BACKWARD, ILL_CONDITIONED, RELATIVE  # noqa: E402
from support.reference import DIGITS, divergence  # noqa: E402

SIDES = ("log_lower", "log_upper")
REFERENCE = 10.0**-DIGITS
"""Relative error of a reference. A bound that is outside by less counts as inside."""
TABLE_TARGET = 1e-6
TABLE_BYTES = 32 * 1024
TABLE_DELTAS = (1e-4, 1e-3, 0.01, 0.05, 0.3, 1.0)
NEAR = 0.02
"""Max relative distance of delta from the one that saturates a bound, near saturation."""
REGIONS = (
    "p < 1e-300",
    "p < 1e-6",
    "p < 0.5",
    "1-p < 0.5",
    "1-p < 1e-6",
    "1-p < 1e-16",
    "p = 1",
    "near saturation",
)
MAX_EVALUATIONS = int(
    re.findall(
        r"MAX_BOUND_EVALUATIONS: u32 = (\d+);",
        (ROOT / "rust" / "band" / "mod.rs").read_text(encoding="utf-8"),
    )[0]
)
"""Max evaluations of D for one bound."""
EXHAUSTIVE = ROOT / "docs" / "accuracy-exhaustive.json"

T = TypeVar("T")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Results of the library at reference points. Arrays over the two sides are ``[2, points]``."""

    spec: str
    logp: Floats
    delta: Floats
    kappa: Floats  # condition numbers
    actual: Floats
    relative: Floats  # errors of log bounds: above 0 is outside, inf if infinities differ
    ulp: Floats
    denormal: NDArray[np.bool_]  # exact bounds, whose errors count in ULP alone
    solved: NDArray[np.bool_]  # neither saturated nor a limit
    evaluations: NDArray[np.uint32]  # of D
    region: NDArray[np.intp]  # index into REGIONS

    def outside(self) -> int:
        """Returns the number of bounds that lie outside the exact one."""
        return int((self.relative > REFERENCE).sum())

    def wrongly_saturated(self) -> int:
        """Returns the number of bounds that differ from the exact ones in saturation."""
        return int(np.isinf(self.relative).sum())


@dataclass(frozen=True)
class Poor:
    """A bound whose relative error exceeds the promise for well-conditioned bounds."""

    spec: str
    side: int
    logp: float
    delta: float
    actual: float
    relative: float
    kappa: float
    backward: float  # distance of D at the bound from delta, in ULP of delta

    def kept(self) -> bool:
        """True if the promise for ill-conditioned bounds holds."""
        return (
            self.relative <= REFERENCE
            and self.kappa > ILL_CONDITIONED
            and self.backward <= BACKWARD
        )


# --- the comparison ----------------------------------------------------------------------------


def compare(reference: Reference) -> Measured:
    """Returns the library's bounds with their errors against a reference."""
    logp, delta = reference.logp, reference.delta
    band = bandpo.Band(reference.spec, delta)
    found = band.diagnose(logp)
    actual = np.stack([side.log_bound for side in found])
    exact = np.stack([reference.log_lower, reference.log_upper])
    relative, ulp = errors(
        actual, exact, np.stack([reference.log_lower_rest, reference.log_upper_rest])
    )
    by_p = np.searchsorted(np.log([1e-300, 1e-6, 0.5]), logp, side="right")
    by_rest = np.searchsorted([-1e-6, -1e-16, 0.0], logp, side="right")
    with np.errstate(invalid="ignore", divide="ignore"):
        # The delta that saturates is D at the end of the side, infinite if f(0) is.
        ends = np.stack([np.full_like(logp, -np.inf), -logp])
        edge = np.stack([band.divergence.between(logp, end) for end in ends])
        near = np.isfinite(edge) & (np.abs(delta - edge) <= NEAR * edge)
    near[:, logp == -np.inf] = False  # every ratio is allowed there,
    near[1, logp == 0.0] = False  # and no increase there
    return Measured(
        reference.spec,
        logp,
        delta,
        np.stack([reference.kappa_lower, reference.kappa_upper]),
        actual,
        relative,
        ulp,
        np.abs(exact) < np.finfo(np.float64).smallest_normal,
        np.stack([side.status == Status.CONVERGED for side in found]),
        np.stack([side.iterations for side in found]),
        np.where(near, len(REGIONS) - 1, by_p + by_rest),
    )


def errors(actual: Floats, nearest: Floats, rest: Floats) -> tuple[Floats, Floats]:
    """Returns relative errors, positive outside, and absolute errors in ULP of the exact bound."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        # Neighbouring doubles subtract exactly, so that errors far below one ulp remain.
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
    """Yields from an iterable and reports progress on standard error."""
    started = reported = time.monotonic()
    for done, item in enumerate(jobs, 1):
        yield item
        now = time.monotonic()
        if now - reported > 0.5 or done == total:
            sys.stderr.write(f"\r{what}: {done}/{total}  {now - started:.0f} s ")
            sys.stderr.flush()
            reported = now
    sys.stderr.write("\n")


def poor_bounds(results: Sequence[Measured]) -> list[Poor]:
    """Returns every bound that is outside or whose error exceeds the promise."""
    poor = []
    for result in results:
        spec = result.spec
        small = (result.relative >= -RELATIVE) | (result.ulp <= 1.0)
        for side, i in np.argwhere((result.relative > REFERENCE) | ~small):
            logp, delta = float(result.logp[i]), float(result.delta[i])
            actual, relative = float(result.actual[side, i]), float(result.relative[side, i])
            kappa = float(result.kappa[side, i])
            backward = abs(divergence(spec, logp, actual) - delta) / float(np.spacing(delta))
            poor.append(
                Poor(spec, int(side), logp, delta, actual, relative, kappa, float(backward))
            )
    return poor


# --- the report --------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table, the first column left-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def largest(values: Floats) -> float:
    """Returns the max absolute value, 0 for an empty array."""
    return float(np.abs(values).max(initial=0.0))


def number(value: float) -> str:
    """Returns a number with two digits."""
    return "0" if value == 0.0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def ulps(values: Floats) -> str:
    """Returns the max number of ULP."""
    worst = largest(values)
    return f"{worst:.1f}" if worst < 1e4 else number(worst)


def worst(result: Measured, side: int, here: NDArray[np.bool_]) -> tuple[str, str]:
    """Returns the max relative error, without denormal bounds, and the max error in ULP."""
    normal = here & ~result.denormal[side]
    return number(largest(result.relative[side, normal])), ulps(result.ulp[side, here])


def summary(results: Sequence[Measured]) -> str:
    """Returns the table over all regions together."""
    rows = []
    for result in results:
        everywhere = np.ones(result.logp.shape, dtype=np.bool_)
        row = [result.spec, str(result.logp.size)]
        row += [text for side in (0, 1) for text in worst(result, side, everywhere)]
        rows.append([*row, str(result.outside())])
    names = [name for side in SIDES for name in (side, "ULP")]
    return table(["divergence", "points", *names, "outside"], rows)


def by_region(results: Sequence[Measured], side: int) -> str:
    """Returns the table of one side by region."""
    rows = []
    for result in results:
        row = [result.spec]
        for region in range(len(REGIONS)):
            here = result.region[side] == region
            row.append("{} ({})".format(*worst(result, side, here)) if here.any() else "none")
        rows.append(row)
    return table(["divergence", *REGIONS], rows)


def work(results: Sequence[Measured]) -> str:
    """Returns the table of evaluations of f for a bound."""
    rows = []
    for result in results:
        row = [result.spec]
        for side in (0, 1):
            solved = 2 * result.evaluations[side, result.solved[side]]  # D is made of two f
            row += [f"{solved.mean():.1f}" if solved.size else "none", str(solved.max(initial=0))]
        rows.append(row)
    return table(["divergence", "log_lower, mean", "max", "log_upper, mean", "max"], rows)


def ill_conditioned(poor: Sequence[Poor]) -> str:
    """Returns the table of bounds that keep the promise for ill-conditioned bounds alone."""
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
    header = ["divergence", "bounds", "max error", "min condition number", "max ULP of delta"]
    return table(header, rows)


def broken_promises(poor: Sequence[Poor]) -> str:
    """Returns the table of bounds that break the promise."""
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
    """Returns (divergence, delta, bytes, error of log_upper, error of lower) of every table."""
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
    """Returns the tables of errors and of sizes, a column for each delta."""
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
    """Returns the section on exhaustive verifications, from the committed results."""
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
in [-104, 0]. The results are those of `docs/accuracy-exhaustive.json`. On two cores with AVX2 it
took 60 s for kl. For a divergence given as text it takes about ten times as long.

{table(["divergence", "delta", "values", "log_upper", "lower"], rows)}
"""


def bounds_part(results: Sequence[Measured]) -> str:
    """Returns the part on bounds."""
    poor = poor_bounds(results)
    kept = [bound_ for bound_ in poor if bound_.kept()]
    broken = [bound_ for bound_ in poor if not bound_.kept()]
    size = sum(result.logp.size for result in results)
    evaluations = max(int(result.evaluations.max()) for result in results)
    text = f"""## Bounds

| | promised | measured |
| --- | ---: | ---: |
| bounds outside the exact one | 0 | {sum(result.outside() for result in results)} |
| bounds that saturate while the exact one does not, or the reverse | 0 | \
{sum(result.wrongly_saturated() for result in results)} |
| bounds with a relative error above {RELATIVE:.0e} and above 1 ULP, condition number up to \
{ILL_CONDITIONED:.0f} | 0 | {sum(bound_.kappa <= ILL_CONDITIONED for bound_ in broken)} |
| the same above {ILL_CONDITIONED:.0f}, unless D is within {BACKWARD:.0f} ULP of delta | 0 | \
{sum(bound_.kappa > ILL_CONDITIONED for bound_ in broken)} |
| max evaluations of f for a bound | {2 * MAX_EVALUATIONS} | {2 * evaluations} |

The promise covers every built-in divergence and delta from 1e-8 to 10. It holds for p from 1e-300
to 1 - 1e-16, for p and 1 - p down to the smallest denormal number, and in the limits p = 1
(logp = 0) and p = 0 (logp = -inf). The bounds of a NaN are NaN. Every other input has bounds.
The allowance of 1 ULP is for denormal bounds, and for log_upper next to -logp.

The errors are those of log_lower and log_upper. Both bounds of {size} points were compared with
{DIGITS}-digit references, which `make reference` solves. About one in ten of them is committed in
`tests/data`, and `tests/band/test_bounds.py` evaluates the promise there. A tenth of all points
lies beyond 1e-300 or 1 - 1e-16. If the bounds of a divergence saturate, a tenth of its points has a
delta at the value that saturates one, at a float next to it, or off by 1e-2, 1e-6 or 1e-12 of it.

The table gives the max relative error, without denormal bounds, and the max error in units in the
last place (ULP) of the exact bound:

{summary(results)}

Most of the error is the move inwards by 3.6e-15 that keeps a bound inside. It is 16 to 32 ULP.

### log_lower by region

The max relative error, with the max error in ULP in brackets. A point counts in the narrowest
region that holds it. Near saturation, delta is within {NEAR:.0%} of the value from which on the
bound is -inf (log_lower) or -logp (log_upper). The other columns are without such points.

{by_region(results, 0)}

### log_upper by region

{by_region(results, 1)}

### Evaluations of f

The counts are for a bound that is neither saturated nor a limit. Each evaluation of D, in double
precision or in double-double arithmetic, counts as two of f. Newton's method evaluates f' as well,
which is not counted. That a bound takes at most {2 * MAX_EVALUATIONS} holds by construction:
`MAX_BOUND_EVALUATIONS` in `rust/band/mod.rs` is half of it.
A divergence with a closed form evaluates D to decide whether the side is saturated, and for the
condition number.

{work(results)}
"""
    if kept:
        text += f"""
### Ill-conditioned bounds

The condition number is the factor from a relative change of logp or delta to the relative change of
the bound. Just below saturation of the lower side it may exceed 1e16. Then the last bit of delta
moves the bound by more than the bound itself. Above {ILL_CONDITIONED:.0f} a bound may be off by
more than {RELATIVE:.0e}, if the exact D at it is within {BACKWARD:.0f} ULP of delta and not
above delta.
{len(kept)} bounds are such:

{ill_conditioned(kept)}
"""
    if broken:
        text += f"""
### Bounds that break the promise

An error above 1e-60 is outside the exact bound. The last column is the distance of D from delta.

{broken_promises(broken)}
"""
    return text


def tables_part(specs: Sequence[str], samples: int) -> str:
    """Returns the part on tables."""
    measured = measure_tables(specs, samples)
    error_table, size_table = by_delta(specs, measured)
    text = f"""## Tables

| | promised | measured |
| --- | ---: | ---: |
| max error of log_upper and of lower | {number(TABLE_TARGET)} | \
{number(max(max(row[3:]) for row in measured))} |
| bytes | {TABLE_BYTES} | {max(row[2] for row in measured)} |

The promise covers every built-in divergence and delta from 1e-4 to 1, where the log bound lies
within +-20. The error is the absolute one beyond one float32 ULP of the bound. Each table was
compared with the solver at {samples} float32 log-probabilities, evenly spaced in their bit patterns
over [-104, 0], and at 16 in every cell.

Max error of log_upper / of lower, by delta:

{error_table}

Bytes, by delta:

{size_table}
"""
    if EXHAUSTIVE.exists():
        text += exhaustive(EXHAUSTIVE)
    return text


def report(references: Sequence[Path], samples: int, before: str) -> str:
    """Measures, and returns the document; without samples its part on tables is the old one."""
    results = []
    for path in progress(references, len(references), "bounds"):
        results.append(compare(read_reference(path)))
    if samples:
        tables = tables_part([result.spec for result in results], samples)
    else:
        tables = before[before.index("## Tables\n") :]
    return f"""# Accuracy

Written by `python tools/make_accuracy.py` with bandpo {bandpo.__version__}.
The figures hold for the points that were measured. [numerics.md](numerics.md) gives the reasons why
other points should not differ.

{bounds_part(results)}
{tables}"""


def main() -> None:
    """Parses the command line and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument(
        "--samples",
        type=int,
        default=1_000_000,
        help="log-probs a table; 0 keeps the part of the document on tables (%(default)s)",
    )
    parser.add_argument(
        "--references", type=Path, default=FULL, help="folder of make_reference.py (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "accuracy.md")
    args = parser.parse_args()
    references = sorted(args.references.glob("band_*.csv.gz"))
    if not references:
        parser.error(f"no references in {args.references}: run make reference first")
    before = args.out.read_text(encoding="utf-8") if args.out.exists() else ""
    text = report(references, args.samples, before)
    args.out.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
