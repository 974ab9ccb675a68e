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


class Formula(NamedTuple):
    """A text, and the same function of balls."""

    text: str
    at: Callable[[Any], Any]


def _number(rng: np.random.Generator) -> float:
    return float(f"{rng.choice([rng.uniform(0.1, 3.0), 1.0, 2.0, rng.uniform(0.5, 1.5)]):.3g}")


def _atom(rng: np.random.Generator) -> Formula:
    """A convex function in most cases."""
    c, a = _number(rng), _number(rng)
    ball = arb(c)
    kinds: list[Callable[[], Formula]] = [
        lambda: Formula("u*ln(u)", lambda u: u * u.log()),
        lambda: Formula("-ln(u)", lambda u: -u.log()),
        lambda: Formula(f"(u-{c})^2", lambda u: (u - ball) ** 2),
        lambda: Formula(f"abs(u-{c})", lambda u: abs(u - ball)),
        lambda: Formula(f"max(u-{c},0)", lambda u: arb.max(u - ball, arb(0))),
        lambda: Formula(f"max({c}-u,{a}*(u-{c}))",
                        lambda u: arb.max(ball - u, arb(a) * (u - ball))),
        lambda: Formula(f"u^{c}", lambda u: (ball * u.log()).exp()),
        lambda: Formula(f"u^-{c}", lambda u: (-ball * u.log()).exp()),
        lambda: Formula("1/u", lambda u: 1 / u),
        lambda: Formula("-sqrt(u)", lambda u: -u.sqrt()),
        lambda: Formula(f"exp(-{c}*u)", lambda u: (-ball * u).exp()),
        lambda: Formula(f"(u-{c})^2/(u+{a})", lambda u: (u - ball) ** 2 / (u + arb(a))),
        lambda: Formula(f"abs(ln(u)-{c}+1)", lambda u: abs(u.log() - ball + 1)),
        lambda: Formula(f"cos({c}*u)", lambda u: (ball * u).cos()),
        lambda: Formula(f"min(u,{c})", lambda u: arb.min(u, ball)),
        lambda: Formula(f"sqrt((u-1)^2+{c})", lambda u: ((u - 1) ** 2 + ball).sqrt()),
        lambda: Formula(f"u**{c}**0.5", lambda u: (arb(c) ** arb(0.5) * u.log()).exp()),
        lambda: Formula(f"ln(1+u*{c})", lambda u: (1 + u * ball).log()),
    ]  # fmt: skip
    return kinds[int(rng.integers(0, len(kinds)))]()


def formula(rng: np.random.Generator) -> Formula:
    """A sum of atoms, some of them subtracted, less its value at 1."""
    parts, signs = [], []
    for _ in range(int(rng.integers(1, 5))):
        part, factor = _atom(rng), _number(rng)
        if rng.random() < 0.15:
            part = _composed(rng, part)
        sign = -1 if rng.random() < 0.12 else 1
        small = rng.choice([1.0, 1.0, 1.0, 1e-3, 1e-9])
        parts.append((part, float(f"{factor * small:.3g}")))
        signs.append(sign)
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


def _points(rng: np.random.Generator, text: str) -> list[float]:
    """Exact points: far ones, ordinary ones, and pairs beside each number of the text."""
    far = np.exp(rng.uniform(-300.0, 300.0, 8))
    near = np.exp(rng.normal(0.0, 1.0, 24))
    at_one = 1.0 + rng.normal(size=10) * 10.0 ** rng.uniform(-9, -1, 10)
    numbers = np.array([float(number) for number in re.findall(r"\d+\.?\d*(?:e-?\d+)?", text)])
    numbers = numbers[(numbers > 1e-9) & (numbers < 1e6)]
    steps = np.array([-1e-3, -1e-9, 0.0, 1e-9, 1e-3])
    beside = (numbers[:, None] * (1.0 + steps)).ravel()
    found = np.unique(np.concatenate([far, near, at_one, beside]))
    return [float(u) for u in found[found > 0.0]]


def counterexample(law: Formula, points: list[float]) -> tuple[float, float, float] | None:
    """Three points that prove that f is not convex: the middle one is above the chord."""
    flint.ctx.prec = BITS
    values = [law.at(arb(u)) for u in points]
    whole = [(u, v) for u, v in zip(points, values, strict=True) if v.is_finite()]
    for (a, fa), (b, fb), (c, fc) in zip(whole, whole[1:], whole[2:], strict=False):
        left, right = arb(b) - arb(a), arb(c) - arb(b)
        if (fb - fa) * right > (fc - fb) * left:
            return a, b, c
    return None


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
        law = formula(rng)
        proof = counterexample(law, _points(rng, law.text))
        try:
            Divergence.from_expression(law.text)
        except InvalidValueError as error:
            message = str(error)
            kind = next((name for name, part in REASONS if part in message), message)
            refused[kind] += 1
            disproved += proof is not None
            if proof is None:
                unexplained.append((law.text, message))
            continue
        accepted += 1
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
