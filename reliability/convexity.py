"""Random expressions: those that are accepted, against proofs that a function is not convex.

A formula is made as a tree, which is written as text for the package and evaluated in ball
arithmetic (python-flint) at some hundred exact points. If a chord lies below f between its ends by
more than the balls, f is not convex: that is a proof, whatever the package found. A refused f
without such a point is counted by the reason, and those that may be convex are listed.

    python -m reliability.convexity --cases 100000
    python -c "from reliability.convexity import run; print(*run(3000).unexplained, sep='; ')"
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flint
import numpy as np
from flint import arb

from bandpo import Divergence
from bandpo.error import InvalidValueError
from reliability.result import Row, run_cases

SEED = 20260304
BITS = 256
BESIDE_BITS = 4096
"""Precision of the points beside a place that a refusal names. Their chords differ by little."""
HALVINGS = 50
"""Halvings of the distance between these points, towards a kink."""
SHARE_OF_FAR = 0.3
"""Share of the formulas whose f'' is small far from 1."""
SMALL = (1e-3, 1e-6, 1e-9, 1e-12, 1e-30)
"""Factors of a term that may outweigh the others."""
MIN_KINK = 1e-12
"""Min factor of a term with a kink. At a kink the slope may fall by the rounding of decimals."""


class Formula(NamedTuple):
    """A text, and the same function of balls."""

    text: str
    at: Callable[[Any], Any]


def _number(rng: np.random.Generator) -> float:
    return float(f"{rng.choice([rng.uniform(0.1, 3.0), 1.0, 2.0, rng.uniform(0.5, 1.5)]):.3g}")


def _lines(c: float, a: float) -> list[Formula]:
    """Convex functions that approach a line far from 1, so that their f'' hides nothing there."""
    ball, other = arb(c), arb(a)
    return [
        Formula(f"abs(u-{c})", lambda u: abs(u - ball)),
        Formula(f"max(u-{c},0)", lambda u: arb.max(u - ball, arb(0))),
        Formula(f"max({c}-u,{a}*(u-{c}))", lambda u: arb.max(ball - u, other * (u - ball))),
        Formula(f"u^-{c}", lambda u: (-ball * u.log()).exp()),
        Formula("1/u", lambda u: 1 / u),
        Formula(f"exp(-{c}*u)", lambda u: (-ball * u).exp()),
        Formula(f"(u-{c})^2/(u+{a})", lambda u: (u - ball) ** 2 / (u + other)),
        Formula(f"sqrt((u-1)^2+{c})", lambda u: ((u - 1) ** 2 + ball).sqrt()),
        Formula(f"u**{c}**0.5", lambda u: (ball ** arb(0.5) * u.log()).exp()),
        # The balls of exp overflow where ln(1+exp(x)) = x + ln(1+exp(-x)) does not.
        Formula(f"ln(1+exp({c}*u))", lambda u: ball * u + (1 + (-ball * u).exp()).log()),
    ]


def _slow(c: float, a: float) -> list[Formula]:
    """Functions that grow less than a line, most of them concave: they may decide far from 1."""
    ball, other = arb(c), arb(a)
    return [
        Formula("-ln(u)", lambda u: -u.log()),
        Formula("-sqrt(u)", lambda u: -u.sqrt()),
        Formula(f"u^{c}", lambda u: (ball * u.log()).exp()),
        Formula(f"ln(1+u*{c})", lambda u: (1 + u * ball).log()),
        Formula(f"abs(ln(u)-{c}+1)", lambda u: abs(u.log() - ball + 1)),
        Formula(f"min(u,{c})", lambda u: arb.min(u, ball)),
        Formula(f"ln({a}+ln(1+u*{c}))", lambda u: (other + (1 + u * ball).log()).log()),
        Formula(f"sqrt(u+{c})", lambda u: (u + ball).sqrt()),
        Formula(f"u/(u+{c})", lambda u: u / (u + ball)),
        Formula(f"u^2/(u^2+{c})", lambda u: u * u / (u * u + ball)),
    ]


def _others(rng: np.random.Generator, c: float) -> list[Formula]:
    """Functions with one scale."""
    ball = arb(c)
    sharp = float(rng.choice([1.0, 100.0, 1e4]))
    return [
        Formula("u*ln(u)", lambda u: u * u.log()),
        Formula(f"(u-{c})^2", lambda u: (u - ball) ** 2),
        Formula(f"cos({c}*u)", lambda u: (ball * u).cos()),
        # A dent of a width down to 0.01.
        Formula(f"exp(-{sharp}*(u-{c})^2)", lambda u: (-arb(sharp) * (u - ball) ** 2).exp()),
    ]


def _atom(rng: np.random.Generator) -> Formula:
    """A convex function in most cases."""
    c, a = _number(rng), _number(rng)
    return _one(rng, [*_lines(c, a), *_slow(c, a), *_others(rng, c)])


def _one(rng: np.random.Generator, kinds: list[Formula]) -> Formula:
    return kinds[int(rng.integers(0, len(kinds)))]


def formula(rng: np.random.Generator) -> Formula:
    """A sum of functions, some of them subtracted, less its value at 1."""
    parts, signs = [], []
    if rng.random() < SHARE_OF_FAR:
        # Two that approach a line, and one far below them that may outweigh them at last.
        for kinds, size in ((_lines, 1.0), (_lines, 1.0), (_slow, float(rng.choice(SMALL)))):
            part = _one(rng, kinds(_number(rng), _number(rng)))
            if "abs" in part.text or "min" in part.text:
                size = max(size, MIN_KINK)
            parts.append((part, float(f"{_number(rng) * size:.3g}")))
            signs.append(-1 if kinds is _slow and rng.random() < 0.5 else 1)
    else:
        for _ in range(int(rng.integers(1, 5))):
            part, factor = _atom(rng), _number(rng)
            if rng.random() < 0.15:
                part = _composed(rng, part)
            size = rng.choice([1.0, 1.0, 1.0, 1e-3, 1e-9])
            parts.append((part, float(f"{factor * size:.3g}")))
            signs.append(-1 if rng.random() < 0.12 else 1)
    text = "".join(
        f"{'-' if sign < 0 else '+'}{factor!r}*({part.text})"
        for sign, (part, factor) in zip(signs, parts, strict=True)
    )

    def at(u: Any) -> Any:
        total = arb(0)
        for sign, (part, factor) in zip(signs, parts, strict=True):
            total = total + sign * arb(factor) * part.at(u)
        return total

    flint.ctx.prec = BITS
    value = float(at(arb(1)).mid())
    return Formula(f"{text}-({value!r})", lambda u: at(u) - arb(value))


def _composed(rng: np.random.Generator, part: Formula) -> Formula:
    other = _atom(rng)
    if rng.random() < 0.5:
        return Formula(f"max({part.text},{other.text})", lambda u: arb.max(part.at(u), other.at(u)))
    return Formula(f"({part.text})*({other.text})", lambda u: part.at(u) * other.at(u))


def _points(rng: np.random.Generator, text: str) -> list[arb]:
    """Exact points: far ones, ordinary ones, and pairs beside each number of the text."""
    far = np.exp(rng.uniform(-300.0, 300.0, 12))
    near = np.exp(rng.normal(0.0, 1.0, 24))
    at_one = 1.0 + rng.normal(size=10) * 10.0 ** rng.uniform(-9, -1, 10)
    numbers = np.array([float(number) for number in re.findall(r"\d+\.?\d*(?:e-?\d+)?", text)])
    numbers = numbers[(numbers > 1e-9) & (numbers < 1e6)]
    steps = np.array([-1e-2, -1e-3, -1e-9, 0.0, 1e-9, 1e-3, 1e-2])
    beside = (numbers[:, None] * (1.0 + steps)).ravel()
    found = np.unique(np.concatenate([far, near, at_one, beside]))
    return [arb(float(u)) for u in found[found > 0.0]]


def _beside(message: str) -> Iterator[list[arb]]:
    """Three exact points around each place that a refusal names."""
    for power, number in re.findall(r"(?:u = |to )(e\^)?(-?[\d.]+(?:e-?\d+)?)", message):
        place = arb(float(number)).exp().mid() if power else arb(float(number))
        for step in (0.5, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-9):
            yield [(place * arb(1 + side * step)).mid() for side in (-1, 0, 1)]


def _closer(law: Formula, points: list[arb]) -> list[arb]:
    """Three points at half the distance, where the slope rises least: a kink is between them."""
    a, b, c = points
    left, right = ((a + b) / 2).mid(), ((b + c) / 2).mid()
    values = {id(u): law.at(u) for u in (a, left, b, right, c)}

    def rise(x: arb, y: arb, z: arb) -> float:
        fx, fy, fz = (values[id(u)] for u in (x, y, z))
        return float(((fz - fy) / (z - y) - (fy - fx) / (y - x)).mid())

    return list(min([(a, left, b), (left, b, right), (b, right, c)], key=lambda of: rise(*of)))


def counterexample(law: Formula, points: list[arb]) -> tuple[float, float, float] | None:
    """Three points that prove that f is not convex: the middle one is above the chord."""
    values = [law.at(u) for u in points]
    whole = [(u, v) for u, v in zip(points, values, strict=True) if v.is_finite()]
    for (a, fa), (b, fb), (c, fc) in zip(whole, whole[1:], whole[2:], strict=False):
        if (fb - fa) * (c - b) > (fc - fb) * (b - a):
            return float(a), float(b), float(c)
    return None


def _proof(law: Formula, points: list[arb], message: str) -> bool:
    """True if chords at the points, or at the places of the message, prove that f is not convex."""
    flint.ctx.prec = BITS
    if counterexample(law, points):
        return True
    flint.ctx.prec = BESIDE_BITS
    for beside in _beside(message):
        for _ in range(HALVINGS):
            if counterexample(law, beside):
                return True
            beside = _closer(law, beside)
    return False


REASONS = (
    ("its value at 1", "must be 0"),
    ("a slope that falls", "its slope falls"),
    ("a jump or a pole", "convex and finite"),
    ("not finite", "must be finite"),
    ("linear", "is linear"),
    ("a limit that has to be given", "cannot be determined"),
    ("too long to judge", "too long to judge"),
    ("text", "column"),
)
"""Kinds of refusals, by a part of their message."""


class Found(NamedTuple):
    """Counts of a run."""

    accepted: int
    missed: list[tuple[str, tuple[float, float, float]]]
    """Accepted formulas with three points that prove that they are not convex."""
    disproved: int
    refused: Counter[str]
    unexplained: list[tuple[str, str]]
    """Refused formulas without a counterexample: text and message."""


def run(cases: int, seed: int = SEED) -> Found:
    """Judges random formulas."""
    rng = np.random.default_rng(seed)
    accepted, disproved, refused = 0, 0, Counter[str]()
    unexplained, missed = [], []
    for _ in range(cases):
        flint.ctx.prec = BITS
        law = formula(rng)
        points = _points(rng, law.text)
        try:
            Divergence.from_expression(law.text)
        except InvalidValueError as error:
            message = str(error).rpartition('": ')[2]
            kind = next((name for name, part in REASONS if part in message), message)
            refused[kind] += 1
            is_disproved = _proof(law, points, message)
            disproved += is_disproved
            if not is_disproved:
                unexplained.append((law.text, message))
            continue
        accepted += 1
        proof = counterexample(law, points)
        if proof is not None:
            missed.append((law.text, proof))
    return Found(accepted, missed, disproved, refused, unexplained)


def convexity(cases: int, seed: int = SEED) -> Iterator[Row]:
    """Rows of random formulas."""
    found = run(cases, seed)
    missed = [f"{text} at {points}" for text, points in found.missed]
    accepted = {"proven not to be convex": len(missed)}
    yield Row("formulas accepted", found.accepted, accepted, missed)
    kinds = Counter(
        next((name for name, part in REASONS if part in message), message)
        for _, message in found.unexplained
    )
    refused = {f"for {kind} without such a proof": count for kind, count in kinds.most_common()}
    proven = {"proven not to be convex": found.disproved}
    yield Row("formulas refused", sum(found.refused.values()), {**proven, **refused})


if __name__ == "__main__":
    run_cases("convexity", __doc__, convexity, cases=100_000, seed=SEED, of="formulas")
