"""The equal-price region at 60 significant digits, from its definition; see `support.reference`.

A token of old probability p whose ratio becomes r leaves the ratio c = (1 - r p)/(1 - p) to all
others. The price of that is f'(r) - f'(c). The derivatives are written out here, as a textbook
would, and the root is bracketed on the price alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from mpmath import inf, mp, mpf

from support.reference import DIGITS, _bracket, _log_ratio, _root, _sides

Slope = Callable[[mpf, mpf, mpf], mpf]
"""f' of (u, u - 1, ln u)."""


class Derivative(NamedTuple):
    """f' with its limits at 0 and at infinity."""

    at: Slope
    at_zero: Callable[[], mpf]
    at_infinity: Callable[[], mpf]


def _sign(x: mpf) -> mpf:
    return mpf((x > 0) - (x < 0))


def _alpha(a: mpf) -> Derivative:
    if a == 0:
        return derivative("kl")
    if a == 1:
        return derivative("reverse-kl")
    return Derivative(
        lambda u, x, t: mp.expm1((a - 1) * t) / (a - 1),
        (lambda: -1 / (a - 1)) if a > 1 else (lambda: -inf),
        (lambda: 1 / (1 - a)) if a < 1 else (lambda: inf),
    )


def _vajda(k: mpf) -> Derivative:
    return Derivative(
        lambda u, x, t: _sign(x) * k * abs(x) ** (k - 1),
        lambda: -k,
        (lambda: mpf(1)) if k == 1 else (lambda: inf),
    )


def _bwcs(weight: mpf) -> Derivative:
    # (x^2/d)' = (2 x d - l x^2)/d^2
    return Derivative(
        lambda u, x, t: (
            (2 * x * (1 - weight + weight * u) - weight * x * x) / (1 - weight + weight * u) ** 2
        ),
        (lambda: -(2 - weight) / (1 - weight) ** 2) if weight < 1 else (lambda: -inf),
        (lambda: 1 / weight) if weight > 0 else (lambda: inf),
    )


_PLAIN: dict[str, Derivative] = {
    "kl": Derivative(lambda u, x, t: 1 - 1 / u, lambda: -inf, lambda: mpf(1)),
    "reverse-kl": Derivative(lambda u, x, t: t, lambda: -inf, lambda: inf),
    "hellinger": Derivative(
        lambda u, x, t: -mp.expm1(-t / 2) / 2, lambda: -inf, lambda: mpf(1) / 2
    ),
    "le-cam": Derivative(
        lambda u, x, t: x * (u + 3) / (2 * (u + 1) ** 2), lambda: mpf(-3) / 2, lambda: mpf(1) / 2
    ),
    "jensen-shannon": Derivative(
        lambda u, x, t: (t - mp.log1p(x / 2)) / 2, lambda: -inf, lambda: mp.log(2) / 2
    ),
    "jeffreys": Derivative(lambda u, x, t: t + 1 - 1 / u, lambda: -inf, lambda: inf),
}


@cache
def derivative(spec: str) -> Derivative:
    """f' of a spec such as "kl" or "alpha:0.5", without kinks."""
    name, _, parameter = spec.partition(":")
    if name in _PLAIN:
        return _PLAIN[name]
    value = mpf(float(parameter or 0))
    if name in ("alpha", "renyi"):
        return _alpha(value)
    if name == "bhattacharyya":
        return _PLAIN["hellinger"]
    if name == "vajda":
        return _vajda(value)
    weight = {"pearson-chi2": mpf(0), "neyman-chi2": mpf(1), "bwcs": value}[name]
    return _bwcs(weight)


def _price(f: Derivative, shrink: mpf, grow: mpf, w: mpf) -> mpf:
    """The price when the outcome of probability `shrink` is scaled by e^w."""
    x = mp.expm1(w) if w > -inf else mpf(-1)
    x_grow = -x * shrink / grow
    of_grown = f.at(1 + x_grow, x_grow, mp.log1p(x_grow))
    return of_grown - (f.at_zero() if w == -inf else f.at(mp.exp(w), x, w))


def price(spec: str, logp: float, log_ratio: float | mpf, precision: int = 800) -> mpf:
    """f'(r) - f'(c) at a log-ratio inside the simplex, at a working precision."""
    f = derivative(spec)
    with mp.workdps(precision):
        _, rest = _sides(mpf(logp), False)
        b = mpf(log_ratio)
        left = -mp.expm1(mpf(logp) + b)
        c = left / rest
        return f.at(mp.exp(b), mp.expm1(b), b) - f.at(c, (left - rest) / rest, mp.log(c))


class Bound(NamedTuple):
    """A log bound, and its condition number in (logp, price)."""

    log_ratio: mpf
    condition: float


def bound(spec: str, logp: float, w: float, upper: bool, digits: int = DIGITS) -> Bound:
    """One end of {price <= w}: exactly -logp or -inf where the end of the simplex is inside."""
    f = derivative(spec)
    # Where w is a limit of f', the terms that decide are of the order of sqrt(p) or p.
    precision = digits + 40 + 2 * int(abs(logp) / 2.3) + 2 * int(abs(mp.log10(abs(mpf(logp)))))
    with mp.workdps(precision):
        lp, target = mpf(logp), mpf(w)
        shrink, grow = _sides(lp, upper)
        if _price(f, shrink, grow, -inf) <= target:
            return Bound(-lp if upper else -inf, 1.0)

        def excess(v: mpf) -> mpf:
            value = _price(f, shrink, grow, -mp.exp(v))
            return (value - target) / (value + target)

        v = _root(excess, *_bracket(excess), mpf(10) ** -(digits + 6))
        slack = mpf(10) ** -(digits + 4)
        assert excess(v - slack) <= 0 < excess(v + slack)
        root = -mp.exp(v)
        log_ratio = _log_ratio(lp, root, upper)
        # |d ln b / d ln w| + |d ln b / d ln logp|, by differences.
        h = mpf(10) ** -(digits // 2)

        def by_root(of: Callable[[mpf], mpf]) -> mpf:
            return (of(root * (1 + h)) - of(root * (1 - h))) / (2 * h)

        def by_logp(of: Callable[[mpf], mpf]) -> mpf:
            return (of(lp * (1 + h)) - of(lp * (1 - h))) / (2 * h)

        slope = by_root(lambda m: _log_ratio(lp, m, upper)) / by_root(
            lambda m: _price(f, shrink, grow, m)
        )
        of_price = slope * target
        of_logp = by_logp(lambda at: _log_ratio(at, root, upper)) - slope * by_logp(
            lambda at: _price(f, *_sides(at, upper), root)
        )
        condition = float((abs(of_price) + abs(of_logp)) / abs(log_ratio))
        return Bound(log_ratio, condition)
