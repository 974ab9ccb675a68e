"""Write 60-digit reference bounds to tests/data/band_<spec>.csv.

Truth comes from tests/reference.py, which finds the roots of the Csiszar f-divergence of the
two-outcome split (BandPO, arXiv 2603.04918). Every bound is computed twice, the second time with
twice the digits, and both must agree. The points depend on the spec, the seed and --points alone,
so that the same command writes the same bytes.

    python tools/make_reference.py --spec kl --spec alpha:0.5 --points 300
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from collections.abc import Iterator
from functools import partial
from math import inf, nextafter
from multiprocessing import Pool
from pathlib import Path
from random import Random

from mpmath import isinf, mp, mpf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from reference import bound, condition, parse, saturation, to_double

SEED = 20260304
DELTA_LOW, DELTA_HIGH = 1e-8, 10.0
COLUMNS = "logp,delta,log_lower,log_upper,log_lower_rest,log_upper_rest,kappa_lower,kappa_upper"
Point = tuple[float, float]


def log_of(p: float | mpf) -> float:
    """Return ln p correctly rounded, the same on every platform."""
    with mp.workdps(50):
        return to_double(mp.log(p))


def log_of_complement(q: float | mpf) -> float:
    """Return ln(1 - q) correctly rounded."""
    with mp.workdps(50):
        return to_double(mp.log1p(-mpf(q)))


def log_uniform(low: float, high: float, s: float) -> mpf:
    """Return the point at the fraction s of [low, high] on a log scale."""
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
    """Return one draw from each of `count` equal parts of [0, 1), in random order."""
    draws = [((i + random.random()) / count, random.random()) for i in range(count)]
    return [s for s, _ in sorted(draws, key=lambda draw: draw[1])]


def corner_points() -> list[Point]:
    """Both ends of delta at the ends and at the middle of the log-probs."""
    log_probs = [log_of(1e-300), log_of(1e-8), log_of(0.5), log_of_complement(1e-8), -1e-16]
    return [(log_prob, d) for log_prob in log_probs for d in (DELTA_LOW, DELTA_HIGH)]


def known_points() -> list[Point]:
    """Probabilities one would look up in a table, at delta = 0.05 and two others."""
    probs = (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99)
    return [(log_of(p), d) for d in (0.05, 0.01, 0.2) for p in probs]


def edge_points(spec: str, random: Random, count: int) -> Iterator[Point]:
    """Yield points with delta at, just below and just above saturation, of both bounds."""
    if isinf(parse(spec).at_zero()):
        return  # nothing saturates
    offsets = [sign * size for size in (1e-2, 1e-6, 1e-12) for sign in (-1, 1)]
    made = 0
    while made < count:
        log_prob = (ordinary, rare, sure)[made % 3](random.random())
        edge = to_double(saturation(spec, log_prob, upper=made % 2 == 0))
        if not DELTA_LOW < edge < DELTA_HIGH:
            # No point here. Ordinary probabilities do not depend on `made`, so try one of them.
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


def points(spec: str, count: int) -> list[Point]:
    """Return the stratified sample of a spec: fixed points, edges, then three kinds of token."""
    random = Random(SEED ^ zlib.crc32(spec.encode()))  # noqa: S311 - sample points, not secrets
    sample = corner_points() + known_points()
    sample += edge_points(spec, random, count // 10)
    left = max(count - len(sample), 0)
    sizes = {rare: left // 5, sure: left // 5}
    sizes[ordinary] = left - sum(sizes.values())
    for log_prob, size in sizes.items():
        for s, t in zip(strata(random, size), strata(random, size), strict=True):
            sample.append((log_prob(s), to_double(log_uniform(DELTA_LOW, DELTA_HIGH, t))))
    return sample[:count]


def split(value: mpf) -> tuple[str, str]:
    """Return the nearest float64 and the float64 nearest to what remains, as hex."""
    nearest = to_double(value)
    rest = 0.0 if isinf(value) else to_double(mp.fsub(value, nearest, exact=True))
    return ("-inf" if isinf(value) else nearest.hex()), rest.hex()


def row(spec: str, digits: int, point: Point) -> str:
    """Return the CSV row of one point, proven by a second solution with twice the digits."""
    log_prob, delta = point
    values, rests, kappas = [], [], []
    for upper in (False, True):
        log_ratio, w = bound(spec, log_prob, delta, upper, digits)
        again, _ = bound(spec, log_prob, delta, upper, 2 * digits)
        with mp.workdps(3 * digits):
            if log_ratio != again and abs(log_ratio / again - 1) > mpf(10) ** -digits:
                raise ArithmeticError(f"{spec} at {log_prob!r}, {delta!r}: {log_ratio} {again}")
        value, rest = split(log_ratio)
        values.append(value)
        rests.append(rest)
        kappas.append(f"{float(condition(spec, log_prob, delta, upper, w)):.3g}")
    return ",".join([log_prob.hex(), delta.hex(), *values, *rests, *kappas])


def header(spec: str, count: int, digits: int) -> str:
    """Return the comment lines and the line of column names."""
    return "\n".join(
        [
            f"# python tools/make_reference.py --spec {spec} --points {count} --digits {digits}",
            f"# {digits} digits; every bound agreed with a second solution to {2 * digits} digits",
            f"# f(u) = {parse(spec).text}",
            "# {r: p f(r) + (1 - p) f((1 - r p) / (1 - p)) <= delta} = [e^log_lower, e^log_upper],"
            " p = e^logp",
            "# logp and delta are exact; *_rest: exact log bound minus its float64",
            "# kappa: |d ln|L| / d ln|logp|| + |d ln|L| / d ln delta|, L the log bound",
            COLUMNS,
        ]
    )


def write(spec: str, count: int, digits: int, out: Path, workers: int) -> Path:
    """Write the file of one spec and return its path."""
    sample = points(spec, count)
    started = time.monotonic()
    rows = []
    with Pool(workers) as pool:
        for line in pool.imap(partial(row, spec, digits), sample, chunksize=4):
            rows.append(line)
            if len(rows) % 25 == 0 or len(rows) == len(sample):
                seconds = time.monotonic() - started
                sys.stderr.write(f"\r{spec}: {len(rows)}/{len(sample)}  {seconds:.0f} s ")
                sys.stderr.flush()
    path = out / f"band_{spec.replace(':', '_')}.csv"
    text = "\n".join([header(spec, count, digits), *rows]) + "\n"
    path.write_text(text, encoding="ascii", newline="\n")
    sys.stderr.write(f" {path} {len(text)} bytes\n")
    return path


def main() -> None:
    """Parse the command line and write one file per spec."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--spec", action="append", required=True, help="divergence; repeatable")
    parser.add_argument("--points", type=int, default=1000, help="rows per file (%(default)s)")
    parser.add_argument("--digits", type=int, default=60, help="digits of truth (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("tests/data"), help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    args = parser.parse_args()
    for spec in args.spec:
        try:
            parse(spec)
        except ValueError as error:
            parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    for spec in args.spec:
        write(spec, args.points, args.digits, args.out, args.workers)


if __name__ == "__main__":
    main()
