"""D_f in ball arithmetic, from the formulas of f alone: what it encloses is proven.

Balls are those of python-flint (Arb; F. Johansson, IEEE Trans. Comput. 66, 2017). Nothing of the
package is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flint
from flint import arb

PRECISIONS = (192, 1024, 6000, 40_000)
"""Bits, tried until a comparison is decided. A p of 1e-300 next to 1 takes some thousand."""

Function = Callable[[Any, Any, Any], Any]
"""f of u, u - 1 and ln u, because the caller has all three without cancellation."""


class Generator(NamedTuple):
    """f, its limit at 0 (None if infinite), and the radius of f for a delta."""

    f: Function
    at_zero: Callable[[], Any] | None
    radius: Callable[[Any], Any] = lambda delta: delta


def generator(spec: str) -> Generator:
    """The generator of a name with its parameter, whose digits are those of its double."""
    name, _, text = spec.partition(":")
    c = arb(float(text)) if text else arb(0)
    if name == "alpha" and float(text) in (0.0, 1.0):
        return _PLAIN["reverse-kl" if float(text) else "kl"]
    if name == "renyi" and float(text) == 1.0:
        return _PLAIN["reverse-kl"]
    if name in ("alpha", "renyi"):
        power = Generator(
            lambda u, x, t: ((c * t).expm1() - c * x) / (c * (c - 1)),
            (lambda: 1 / c) if float(text) > 0.0 else None,
        )
        if name == "alpha":
            return power
        return power._replace(radius=lambda delta: ((c - 1) * delta).expm1() / (c * (c - 1)))
    if name == "vajda":
        return Generator(lambda u, x, t: _power(abs(x), c), lambda: arb(1))
    if name == "bwcs":
        at_zero = (lambda: 1 / (1 - c)) if float(text) < 1.0 else None
        return Generator(lambda u, x, t: x * x / (1 - c + c * u), at_zero)
    if name == "hockey-stick":
        return Generator(lambda u, x, t: _larger(u - c), lambda: arb(0))
    return _PLAIN[name]


def _power(base: Any, order: Any) -> Any:
    return base**order if base > 0 else _larger(base)


def _larger(value: Any) -> Any:
    """The larger of a ball and 0."""
    return arb.max(value, arb(0))


_PLAIN = {
    "kl": Generator(lambda u, x, t: x - t, None),
    "reverse-kl": Generator(lambda u, x, t: u * t - x, lambda: arb(1)),
    "tv": Generator(lambda u, x, t: abs(x) / 2, lambda: arb(1) / 2),
    "pearson-chi2": Generator(lambda u, x, t: x * x, lambda: arb(1)),
    "neyman-chi2": Generator(lambda u, x, t: x * x / u, None),
    "hellinger": Generator(lambda u, x, t: (t / 2).expm1() ** 2 / 2, lambda: arb(1) / 2),
    "le-cam": Generator(lambda u, x, t: x * x / (2 * (u + 1)), lambda: arb(1) / 2),
    "jensen-shannon": Generator(
        lambda u, x, t: (u * t - (u + 1) * (x / 2).log1p()) / 2, lambda: arb(2).log() / 2
    ),
    "jeffreys": Generator(lambda u, x, t: x * t, None),
    "bhattacharyya": Generator(
        lambda u, x, t: (t / 2).expm1() ** 2 / 2,
        lambda: arb(1) / 2,
        lambda delta: -(-delta).expm1(),
    ),
}


def excess(spec: str, logp: float, log_ratio: Any, delta: float) -> int | None:
    """The sign for a divergence with a name; see `excess_of`."""
    return excess_of(generator(spec), logp, log_ratio, delta)


def excess_of(law: Generator, logp: float, log_ratio: Any, delta: float) -> int | None:
    """The sign of D_f - delta at a log-ratio: 1, or -1 (0 included), or None if undecided.

    Args:
        law: The generator, which works in any precision.
        logp: Log-prob of the token.
        log_ratio: A float, or a function that gives a ball. An infinite one is the end of the
            simplex: -inf is a ratio of 0, inf one of 1/p.
        delta: Radius.
    """
    for bits in PRECISIONS:
        flint.ctx.prec = bits
        difference = _divergence(law, logp, log_ratio) - law.radius(arb(delta))
        if difference > 0:
            return 1
        if difference <= 0:
            return -1
    return None


def _divergence(law: Generator, logp: float, log_ratio: Any) -> Any:
    p, rest = arb(logp).exp(), -arb(logp).expm1()
    infinite = isinstance(log_ratio, float) and math.isinf(log_ratio)
    if infinite and log_ratio < 0.0:
        if law.at_zero is None:
            return arb("inf")
        other = -rest.log()  # the other outcome takes all
        return p * law.at_zero() + rest * law.f(other.exp(), other.expm1(), other)
    if infinite:
        if law.at_zero is None:
            return arb("inf")
        t = -arb(logp)
        return p * law.f(t.exp(), t.expm1(), t) + rest * law.at_zero()
    t = log_ratio() if callable(log_ratio) else arb(log_ratio)
    x = t.expm1()
    other = -p * x / rest
    return p * law.f(t.exp(), x, t) + rest * law.f(1 + other, other, other.log1p())
