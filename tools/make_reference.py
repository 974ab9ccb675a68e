"""Solves reference bounds at 60 digits: the full set, and the part of it that is committed.

tests/support/reference.py finds the roots of the Csiszar f-divergence of the two-outcome split
(BandPO, arXiv 2603.04918), and proves the digits of each at doubled precision. The full set goes to
build/reference, in a file band_<spec>.csv.gz for each divergence. The fixed points and every
eleventh of the others go to tests/data. The points depend on the spec, the seed and --points alone,
so that the same command writes the same rows.

    python tools/make_reference.py
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import time
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from math import inf, nextafter
from multiprocessing import Pool
from multiprocessing.pool import Pool as PoolType
from pathlib import Path
from random import Random

from mpmath import isinf, mp, mpf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.reference import DIGITS, bound, condition, parse, saturation, to_double  # noqa: E402

# Every family, with parameters in the middle and at or next to the ends of their range.
# fmt: off
SPECS = [
    "kl", "reverse-kl", "tv", "pearson-chi2", "neyman-chi2", "hellinger", "le-cam",
    "jensen-shannon", "jeffreys", "bhattacharyya", "alpha:-3", "alpha:-0.5", "alpha:0.001",
    "alpha:0.5", "alpha:0.999", "alpha:1.5", "alpha:4", "renyi:0.5", "renyi:2", "renyi:3.5",
    "vajda:1", "vajda:1.5", "vajda:4", "bwcs:0.3", "bwcs:0.99", "hockey-stick:1",
    "hockey-stick:1.2", "hockey-stick:4",
]
# fmt: on
FULL, COMMITTED = ROOT / "build" / "reference", ROOT / "tests" / "data"
EVERY = 11
"""Step through the points that are not fixed; it divides no period of them."""
SEED = 20260304
DELTA_LOW, DELTA_HIGH = 1e-8, 10.0
COLUMNS = "logp,delta,log_lower,log_upper,log_lower_rest,log_upper_rest,kappa_lower,kappa_upper"
Point = tuple[float, float]


def log_of(p: float | mpf) -> float:
    """Returns ln p correctly rounded, the same on every platform."""
    with mp.workdps(50):
        return to_double(mp.log(p))


def log_of_complement(q: float | mpf) -> float:
    """Returns ln(1 - q) correctly rounded."""
    with mp.workdps(50):
        return to_double(mp.log1p(-mpf(q)))


def log_uniform(low: float, high: float, s: float) -> mpf:
    """Returns the point at the fraction s of [low, high] on a log scale."""
    with mp.workdps(50):
        return mpf(low) * (mpf(high) / mpf(low)) ** mpf(s)


def rare(s: float) -> float:
    """Log-prob with p log-uniform in [1e-300, 0.5]."""
    return log_of(log_uniform(1e-300, 0.5, s))


def sure(s: float) -> float:
    """Log-prob with 1 - p log-uniform in [1e-16, 0.5]."""
    return log_of_complement(log_uniform(1e-16, 0.5, s))


def ordinary(s: float) -> float:
    """Log-prob of a language model: logit uniform, p in [1e-8, 1 - 1e-8]."""
    with mp.workdps(50):
        top = mp.log(mpf(1e8) - 1)
        return to_double(-mp.log1p(mp.exp(top * (1 - 2 * mpf(s)))))


def strata(random: Random, count: int) -> list[float]:
    """Returns one draw from each of `count` equal parts of [0, 1), in random order."""
    draws = [((i + random.random()) / count, random.random()) for i in range(count)]
    return [s for s, _ in sorted(draws, key=lambda draw: draw[1])]


def corner_points() -> list[Point]:
    """Both ends and the middle of delta, at the ends, the middle and the limits of log-probs.

    -5e-324 and -1e-310 are subnormal; -745 and -720 have a subnormal probability.
    """
    log_probs = [log_of(1e-300), log_of(1e-8), log_of(0.5), log_of_complement(1e-8), -1e-16]
    log_probs += [0.0, -5e-324, -1e-310, -1e-308, -1e-100, -710.0, -720.0, -745.0, -1000.0, -inf]
    return [(log_prob, d) for log_prob in log_probs for d in (DELTA_LOW, 0.05, DELTA_HIGH)]


def known_points() -> list[Point]:
    """Round probabilities at delta = 0.05 and two others."""
    probs = (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99)
    return [(log_of(p), d) for d in (0.05, 0.01, 0.2) for p in probs]


def fixed_points() -> list[Point]:
    """Returns the points that every divergence has."""
    return corner_points() + known_points()


def edge_points(spec: str, random: Random, count: int) -> Iterator[Point]:
    """Yields points with delta at, just below and just above saturation, of both bounds."""
    if isinf(parse(spec).at_zero()):
        return  # no bound saturates
    offsets = [sign * size for size in (1e-2, 1e-6, 1e-12) for sign in (-1, 1)]
    made = 0
    while made < count:
        log_prob = (ordinary, rare, sure)[made % 3](random.random())
        edge = to_double(saturation(spec, log_prob, upper=made % 2 == 0))
        if not DELTA_LOW < edge < DELTA_HIGH:
            # The edge is out of range. An ordinary probability does not depend on `made`.
            log_prob = ordinary(random.random())
            edge = to_double(saturation(spec, log_prob, upper=made % 2 == 0))
            if not DELTA_LOW < edge < DELTA_HIGH:
                continue
        kind = (made // 2) % (len(offsets) + 3)
        if kind < len(offsets):
            delta = edge * (1 + offsets[kind])
        else:
            delta = (edge, nextafter(edge, 0), nextafter(edge, inf))[kind - len(offsets)]
        yield log_prob, min(max(delta, DELTA_LOW), DELTA_HIGH)
        made += 1


def limit_points(spec: str, random: Random, count: int) -> Iterator[Point]:
    """Yields points at p = 1, one in eight next to the delta that saturates there."""
    edge = to_double(saturation(spec, 0.0, upper=False))
    offsets = [sign * size for size in (1e-2, 1e-6, 1e-12) for sign in (-1, 1)]
    deltas = [edge * (1 + offset) for offset in offsets]
    around = cycle([edge, nextafter(edge, 0), nextafter(edge, inf), *deltas])
    for i, t in enumerate(strata(random, count)):
        delta = next(around) if i % 8 == 0 and edge <= DELTA_HIGH else None
        yield 0.0, delta or to_double(log_uniform(DELTA_LOW, DELTA_HIGH, t))


def far_points(random: Random, count: int) -> Iterator[Point]:
    """Yields points beyond 1e-300 and 1 - 1e-16: 1 - p or p log-uniform to the min double."""
    for i, t in enumerate(strata(random, count)):
        s = random.random()
        if i % 2:
            log_prob = log_of_complement(log_uniform(5e-324, 1e-16, s))
        else:
            log_prob = log_of(log_uniform(5e-324, 1e-300, s))
        yield log_prob, to_double(log_uniform(DELTA_LOW, DELTA_HIGH, t))


def points(spec: str, count: int) -> list[Point]:
    """Returns the stratified sample of a spec.

    The fixed points come first. Then follow points next to saturation (a tenth), points beyond
    1e-300 and 1 - 1e-16 (a tenth) and points at the limit p = 1 (a fiftieth). The rest is a fifth
    rare tokens, a fifth sure tokens, and ordinary tokens.
    """
    random = Random(SEED ^ zlib.crc32(spec.encode()))  # noqa: S311 - sample points, not secrets
    sample = fixed_points()
    sample += edge_points(spec, random, count // 10)
    sample += far_points(random, count // 10)
    sample += limit_points(spec, random, count // 50)
    left = max(count - len(sample), 0)
    sizes = {rare: left // 5, sure: left // 5}
    sizes[ordinary] = left - sum(sizes.values())
    for log_prob, size in sizes.items():
        for s, t in zip(strata(random, size), strata(random, size), strict=True):
            sample.append((log_prob(s), to_double(log_uniform(DELTA_LOW, DELTA_HIGH, t))))
    return sample[:count]


def split(value: mpf) -> tuple[str, str]:
    """Returns the nearest finite float64 and the float64 nearest to the rest, as hex."""
    if isinf(value):
        return float(value).hex(), "0x0.0p+0"
    nearest = to_double(value)
    if abs(nearest) == inf:  # beyond the doubles: the last one stands for it
        return (nextafter(inf, 0.0) if nearest > 0 else -nextafter(inf, 0.0)).hex(), "0x0.0p+0"
    return nearest.hex(), to_double(mp.fsub(value, nearest, exact=True)).hex()


def solve(spec: str, log_prob: float, delta: float, upper: bool) -> tuple[mpf, float]:
    """Returns one log bound and its condition number; the bounds of -inf are infinite."""
    if log_prob == -inf:
        return (inf if upper else -inf), inf
    value, w = bound(spec, log_prob, delta, upper)
    return value, float(condition(spec, log_prob, delta, upper, w))


def row(spec: str, point: Point) -> str:
    """Returns the CSV row of one point."""
    (lower, kappa_lower), (upper, kappa_upper) = (
        solve(spec, *point, side) for side in (False, True)
    )
    (low, low_rest), (high, high_rest) = split(lower), split(upper)
    kappas = (f"{kappa:.3g}" for kappa in (kappa_lower, kappa_upper))
    return ",".join([point[0].hex(), point[1].hex(), low, high, low_rest, high_rest, *kappas])


def header(spec: str) -> str:
    """Returns the comment lines and the line of column names."""
    return "\n".join(
        [
            f"# python tools/make_reference.py: {spec}, {DIGITS} digits",
            f"# f(u) = {parse(spec).text}",
            "# {r: p f(r) + (1 - p) f((1 - r p) / (1 - p)) <= delta} = [e^log_lower, e^log_upper],"
            " p = e^logp",
            "# logp and delta are exact; *_rest: exact log bound minus its float64",
            "# kappa: |d ln|L| / d ln|logp|| + |d ln|L| / d ln delta|, L the log bound",
            COLUMNS,
        ]
    )


def write(path: Path, spec: str, rows: list[str]) -> None:
    """Writes one compressed file, without the name and the time that gzip adds."""
    text = "\n".join([header(spec), *rows]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=9, mtime=0) as packed,
    ):
        packed.write(text.encode("ascii"))


def make(spec: str, count: int, pool: PoolType) -> None:
    """Solves the points of one spec and writes its two files."""
    sample = points(spec, count)
    started = reported = time.monotonic()
    rows = []
    for line in pool.imap(partial(row, spec), sample, chunksize=32):
        rows.append(line)
        now = time.monotonic()
        if now - reported > 0.5 or len(rows) == len(sample):
            sys.stderr.write(f"\r{spec}: {len(rows)}/{len(sample)}  {now - started:.0f} s ")
            sys.stderr.flush()
            reported = now
    sys.stderr.write("\n")
    name = f"band_{spec.replace(':', '_')}.csv.gz"
    fixed = len(fixed_points())
    write(FULL / name, spec, rows)
    write(COMMITTED / name, spec, rows[:fixed] + rows[fixed::EVERY])


def main() -> None:
    """Parses the command line and writes two files for each spec."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--spec", action="append", help="divergence; repeatable (all)")
    parser.add_argument("--points", type=int, default=10_000, help="points each (%(default)s)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)"
    )
    args = parser.parse_args()
    for spec in args.spec or []:
        try:
            parse(spec)
        except ValueError as error:
            parser.error(str(error))
    with Pool(args.workers) as pool:
        for spec in args.spec or SPECS:
            make(spec, args.points, pool)


if __name__ == "__main__":
    main()
