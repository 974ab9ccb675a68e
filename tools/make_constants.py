"""Computes the constants of the elementary functions and of the solver's starts.

Polynomials and digits follow from their definitions and are the same on every run. Starts come from
a fit: a new fit may differ from the sources, so the errors of the sources are measured.

    python tools/make_constants.py           prints polynomials and digits as Rust
    python tools/make_constants.py --fit     fits the starts anew and prints both errors
    python tools/make_constants.py --check   compares the sources with this file
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from mpmath import chebyfit, mp, mpf
from scipy.optimize import minimize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.reference import Divergence as Generator  # noqa: E402
from support.reference import parse  # noqa: E402

DIGITS = 60


def numbers(text: str) -> list[float]:
    """Returns the numbers in a text of Rust or C++; digits in names do not count."""
    literals = re.findall(r"(?<![\w.])-?\d[\d_]*\.?[\d_]*(?:e-?\d+)?", text)
    return [float(literal.replace("_", "")) for literal in literals]


def source_of(file: str, pattern: str) -> str:
    """Returns the group of a pattern in a source."""
    found = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise SystemExit(f"make_constants: {file} has no {pattern}")
    return found[1]


def stored(file: str, name: str) -> list[float]:
    """Returns the numbers of an array in a source."""
    array = source_of(file, rf"const {name}: \[\w+; \d+\] =\s*\[(.*?)\];")
    return numbers(array.replace("std::f64::consts::LN_2", repr(math.log(2.0))))


# --- polynomials ---------------------------------------------------------------------------------


def exp_gap(t: mpf) -> mpf:
    """Returns (e^t - 1 - t)/t^2."""
    return (mp.expm1(t) - t) / t**2 if t else mpf(1) / 2


def log_tail(z: mpf) -> mpf:
    """Returns (2 atanh(s)/s - 2)/z for z = s^2."""
    s = mp.sqrt(z)
    return (2 * mp.atanh(s) / s - 2) / z if z else mpf(2) / 3


def entropy(z: mpf) -> mpf:
    """Returns ((1+s) ln(1+s) + (1-s) ln(1-s))/z for z = s^2."""
    s = mp.sqrt(z)
    return ((1 + s) * mp.log1p(s) + (1 - s) * mp.log1p(-s)) / z if z else mpf(1)


@dataclass(frozen=True)
class Polynomial:
    """Chebyshev fit of a function, the coefficient of the highest power first."""

    file: str
    name: str
    function: Callable[[mpf], mpf]
    low: str
    high: str
    count: int
    error: float  # documented max error
    single: bool = False  # coefficients in float32
    copy: str = ""  # a file with the same coefficients in code

    def coefficients(self) -> list[float]:
        """Returns the fit, rounded."""
        fit = [
            float(c) for c in chebyfit(self.function, [mpf(self.low), mpf(self.high)], self.count)
        ]
        return [float(np.float32(c)) for c in fit] if self.single else fit

    def faults(self) -> Iterator[str]:
        """Yields a line for each difference from the sources."""
        found, expected = stored(self.file, self.name), self.coefficients()
        if self.single:
            found = [float(np.float32(c)) for c in found]
        if found != expected:
            yield f"{self.file}: {self.name} is not the fit"
        low, high = mpf(self.low), mpf(self.high)
        grid = [low + (high - low) * k / 399 for k in range(400)]
        error = max(abs(mp.polyval(found, x) - self.function(x)) for x in grid)
        if error > self.error:
            yield f"{self.file}: {self.name} is off by {mp.nstr(error, 3)}, not {self.error}"
        if self.copy:
            code = numbers((ROOT / self.copy).read_text(encoding="utf-8").replace("f;", ";"))
            if self.single:
                code = [float(np.float32(number)) for number in code]
            if not any(code[i : i + self.count] == expected for i in range(len(code))):
                yield f"{self.copy} has not the coefficients of {self.name}"

    def __str__(self) -> str:
        rows = "".join(f"    {c!r},\n" for c in self.coefficients())
        return f"const {self.name}: [f64; {self.count}] = [\n{rows}];"


POLYNOMIALS = (
    Polynomial(
        "rust/simd/exp_log.rs", "GAP", exp_gap, "-0.3469", "0.3469", 6, 4.5e-9,
        single=True, copy="cuda/math.cuh",
    ),
    Polynomial("rust/simd/exp_log.rs", "EXP_GAP", exp_gap, "-0.7", "0.7", 13, 1e-17),
    Polynomial("rust/simd/exp_log.rs", "LOG_TAIL", log_tail, "0", "0.0626", 10, 6e-17),
    Polynomial("rust/band/laws.rs", "ENTROPY", entropy, "0", "0.2501", 13, 2e-17),
    Polynomial(
        "rust/simd/exp_log.rs", "GAP_F64", exp_gap, "-0.3469", "0.3469", 11, 3e-18,
        copy="cuda/math.cuh",
    ),
)  # fmt: skip


# --- digits --------------------------------------------------------------------------------------


def parts(value: mpf, bits: int, count: int, rounding: Callable[[mpf], mpf]) -> list[float]:
    """Returns a number below 2 as a sum of ``count`` doubles, the first with ``bits`` bits."""
    scale = mpf(2) ** (bits if value < 1 else bits - 1)
    found = [float(rounding(value * scale) / scale)]
    while len(found) < count:
        found.append(float(value - mp.fsum(found)))
    return found


@dataclass(frozen=True)
class Digits:
    """Numbers with a closed form, at any precision."""

    file: str
    name: str
    values: Callable[[], list[float]]

    def faults(self) -> Iterator[str]:
        """Yields a line if the sources differ."""
        if stored(self.file, self.name) != self.values():
            yield f"{self.file}: {self.name} has other digits"

    def __str__(self) -> str:
        return f"{self.name}: {self.values()!r}"


EXACT = (
    Digits("rust/simd/exp_log.rs", "LN_2_F32", lambda: parts(mp.log(2), 10, 2, mp.nint)),
    Digits("rust/simd/exp_log.rs", "LN_2_SHORT_F64", lambda: parts(mp.log(2), 44, 2, mp.nint)),
    Digits("rust/simd/exp_log.rs", "LN_2_F64", lambda: parts(mp.log(2), 53, 2, mp.nint)),
    Digits("rust/number/dd.rs", "LN_2_PARTS", lambda: parts(mp.log(2), 33, 3, mp.floor)),
    Digits("rust/number/dd.rs", "HALF_PI_PARTS", lambda: parts(mp.pi / 2, 33, 3, mp.floor)),
    Digits(
        "rust/number/dd.rs",
        "INVERSE_FACTORIAL",
        lambda: [c for n in range(2, 13) for c in parts(1 / mp.factorial(n), 300, 2, mp.nint)],
    ),
    Digits(
        "rust/simd/pairs.rs",
        "INVERSE_ODD",
        lambda: [c for n in range(1, 11) for c in parts(mpf(1) / (2 * n + 1), 300, 2, mp.nint)],
    ),
)


# --- starts --------------------------------------------------------------------------------------


def log_loss(lost: float) -> float:
    """Returns -ln(1 - x) of a lost share x, with x limited to 0.99."""
    return -math.log1p(-min(lost, 0.99))


def kl(c: Sequence[float], w: float, g: float, radius: float) -> float:
    """Returns the start of `Kl`."""
    y = radius / w
    square = 2 * y * g
    fall = square * (c[0] * y + c[1]) + c[2] * y + math.sqrt(square)
    return math.sqrt(y * y + square + 2 / 3 * (1 + w) * y * square / fall)


def reverse_kl(c: Sequence[float], w: float, g: float, radius: float) -> float:
    """Returns the start of `ReverseKl`."""
    q = math.sqrt(2 * radius * g / w)
    s = q * w / g
    numerator = ((c[0] * s + c[1]) * s + c[2]) * s + 1
    denominator = (c[3] * s + c[4]) * s + 1
    fall = q * (q * (c[5] * s / (s + 1) + c[6]) + 1 / 6) + 1
    return log_loss(q * numerator / (denominator * fall))


def jensen_shannon(c: Sequence[float], w: float, g: float, radius: float) -> float:
    """Returns the start of `JensenShannon`."""
    slope = math.log(2) / 2
    far = 2 * radius / (slope + math.sqrt(slope * slope + radius * (c[0] * radius + 0.5)))
    square = 8 * radius * g / w
    q = math.sqrt(square)
    between = square * (c[1] * far + c[2]) + c[3] * far + q
    lost = math.sqrt(square + far * far + c[4] * far * square / between)
    return log_loss(lost / (1 + c[5] * q + c[6] * square))


class Token(NamedTuple):
    """Probability w of the outcome that shrinks, g of the other one, and a radius."""

    w: mpf
    g: mpf
    radius: mpf


def tokens(count: int = 200) -> list[Token]:
    """Returns random tokens, with log-odds within 12 and radii from 1e-4 to 0.3."""
    random = Random(0)  # noqa: S311 - sample points, not secrets
    made = []
    for _ in range(count):
        odds, radius = random.uniform(-12, 12), random.uniform(math.log(1e-4), math.log(0.3))
        made.append(Token(1 / (1 + mp.exp(odds)), 1 / (1 + mp.exp(-odds)), mp.exp(radius)))
    return made


def steps(generator: Generator, token: Token, start: float) -> Iterator[mpf]:
    """Yields the root after each step of Halley's method on ln D against ln m."""

    def residual(log_m: mpf) -> mpf:
        log, w, g = -mp.exp(log_m), token.w, token.g
        gain = -w / g * mp.expm1(log)
        d = w * generator.f(mp.exp(log), mp.expm1(log), log)
        d += g * generator.f(1 + gain, gain, mp.log1p(gain))
        return mp.log(d / token.radius)

    log_m = mp.log(start)
    while True:
        value, slope, half_bend = mp.taylor(residual, log_m, 2)
        log_m -= value * slope / (slope * slope - value * half_bend)
        yield mp.exp(log_m)


@dataclass(frozen=True)
class Start:
    """Fitted start of a divergence, with the figures that docs/numerics.md states."""

    divergence: str
    names: tuple[str, ...]
    formula: Callable[[Sequence[float], float, float, float], float]
    error: float  # relative, for delta up to half of the one that saturates
    settled: float  # share of the tokens that need at most two evaluations

    def constants(self) -> list[float]:
        """Returns the constants in the source, without a last 1, which normalises."""
        arrays = [stored("rust/band/laws.rs", name) for name in self.names]
        return [c for array in arrays for c in array if c != 1.0]

    def measured(self) -> tuple[list[tuple[Token, float]], float]:
        """Returns tokens with their roots, and the share of tokens that two evaluations settle."""
        generator, constants = parse(self.divergence), self.constants()
        (last_step,) = numbers(source_of("rust/band/laws.rs", r"const LAST_STEP: f64 = (.*?);"))
        solved, settled, count = [], 0, 0
        with mp.workdps(30):
            for token in tokens():
                w, g, radius = token
                greatest = w * generator.at_zero() + g * generator.f(1 / g, w / g, -mp.log(g))
                if radius >= greatest:
                    continue
                start = self.formula(constants, float(w), float(g), float(radius))
                first, second, _, root = islice(steps(generator, token, start), 4)
                count += 1
                settled += abs(mp.log(second / first)) < last_step
                if radius <= greatest / 2:
                    solved.append((token, float(root)))
        return solved, settled / count

    def max_error(self, constants: Sequence[float], solved: list[tuple[Token, float]]) -> float:
        """Returns the max relative error of a start."""
        return max(
            abs(self.formula(constants, *map(float, token)) / root - 1) for token, root in solved
        )

    def faults(self) -> Iterator[str]:
        """Yields a line for each figure that does not hold."""
        solved, settled = self.measured()
        error = self.max_error(self.constants(), solved)
        if error > self.error:
            yield f"start of {self.divergence}: off by {error:.2%}, not {self.error:.2%}"
        if settled < self.settled:
            yield f"start of {self.divergence}: {settled:.2%} settled, not {self.settled:.2%}"

    def __str__(self) -> str:
        solved, settled = self.measured()
        constants = self.constants()
        error = self.max_error(constants, solved)
        return f"start of {self.divergence}: off by {error:.2%}, {settled:.2%} settled"

    def fit(self) -> str:
        """Returns a line with new constants, whose fit begins at those in the source."""
        solved, _ = self.measured()
        options = {"maxiter": 4000, "maxfev": 4000, "xatol": 1e-6, "fatol": 1e-7}
        found = minimize(
            lambda c: self.max_error(c, solved),
            self.constants(),
            method="Nelder-Mead",
            options=options,
        )
        shown = ", ".join(f"{c:.6g}" for c in found.x)
        return f"start of {self.divergence}: off by {found.fun:.2%} with [{shown}]"


STARTS = (
    Start("kl", ("KL_START",), kl, 0.005, 1.0),
    Start(
        "reverse-kl",
        ("REVERSE_KL_NUMERATOR", "REVERSE_KL_DENOMINATOR", "REVERSE_KL_FALL"),
        reverse_kl,
        0.022,
        0.98,
    ),
    Start("jensen-shannon", ("JENSEN_SHANNON_START",), jensen_shannon, 0.032, 0.97),
)


CONSTANTS = (*POLYNOMIALS, *EXACT, *STARTS)


def main() -> int:
    """Parses the command line, then prints, fits or checks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fit", action="store_true", help="fit the starts anew")
    what.add_argument("--check", action="store_true", help="compare the sources")
    args = parser.parse_args()
    with mp.workdps(DIGITS):
        if args.check:
            faults = [fault for part in CONSTANTS for fault in part.faults()]
            print("\n".join(faults) or "the constants in the sources are these")
            return 1 if faults else 0
        for part in STARTS if args.fit else (*POLYNOMIALS, *EXACT):
            print(part)
            if isinstance(part, Start):
                print(part.fit())
    return 0


if __name__ == "__main__":
    sys.exit(main())
