"""The band at 60 significant digits, from its definition: slow, and independent of the library.

A token of old probability p whose ratio becomes r keeps the two-outcome f-divergence (Csiszar)

    D_f(p, r) = p f(r) + (1 - p) f((1 - r p) / (1 - p))

and the band (BandPO, arXiv 2603.04918) is the set of ratios with D_f(p, r) <= delta inside the
simplex 0 <= r <= 1/p. Both ends are found by bracketing and root finding on D_f alone. No closed
form, no expansion and no symmetry of the band is used; those are checks in `self_test`.

`python tests/support/reference.py` runs the self-test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from random import Random
from typing import NamedTuple

from mpmath import inf, isinf, log10, mp, mpf

DIGITS = 60
_MAX_PRECISION = 40_000  # decimal digits
# Agreement of delta with saturation to about this many digits is taken for equality. It does
# happen: for reverse-kl and every renyi the upper saturation is -log_prob, itself a float.
_TIE_PRECISION = 1500

# f takes (u, u - 1, ln u), because the caller has all three without cancellation.
Function = Callable[[mpf, mpf, mpf], mpf]


class Divergence(NamedTuple):
    """A generator f and the change of units between delta and the value of D_f.

    `at_zero` is f(0) and `slope_at_infinity` is f'(inf) = lim f(u)/u. They are functions, as are
    the unit changes, so that they are evaluated at the current precision.
    """

    text: str
    f: Function
    at_zero: Callable[[], mpf]
    slope_at_infinity: Callable[[], mpf]
    radius: Callable[[mpf], mpf]  # delta in the divergence's own units -> value of D_f
    own: Callable[[mpf], mpf]  # the inverse of radius


def _same(value: mpf) -> mpf:
    return value


def _f_divergence(
    text: str, f: Function, at_zero: Callable[[], mpf], slope_at_infinity: Callable[[], mpf]
) -> Divergence:
    return Divergence(text, f, at_zero, slope_at_infinity, _same, _same)


def _alpha(a: mpf) -> Divergence:
    """Cressie-Read power divergence; a = 0 and a = 1 are its limits KL and reverse KL."""
    if a == 0:
        return parse("kl")
    if a == 1:
        return parse("reverse-kl")
    return _f_divergence(
        f"(u^a - 1 - a (u - 1)) / (a (a - 1)), a = {float(a)!r}",
        lambda u, x, t: (mp.expm1(a * t) - a * x) / (a * (a - 1)),
        (lambda: 1 / a) if a > 0 else (lambda: inf),
        (lambda: 1 / (1 - a)) if a < 1 else (lambda: inf),
    )


def _renyi(a: mpf) -> Divergence:
    """Renyi divergence of new from old, ln(1 + a (a - 1) D_alpha) / (a - 1); a = 1 is KL."""
    base = _alpha(a)
    if a == 1:
        return base
    return Divergence(
        base.text + "; delta' = (e^((a - 1) delta) - 1) / (a (a - 1))",
        base.f,
        base.at_zero,
        base.slope_at_infinity,
        lambda delta: mp.expm1((a - 1) * delta) / (a * (a - 1)),
        lambda value: mp.log1p(a * (a - 1) * value) / (a - 1),
    )


def _bhattacharyya() -> Divergence:
    """Bhattacharyya distance -ln(sum sqrt(old new)) = -ln(1 - hellinger)."""
    base = parse("hellinger")
    return Divergence(
        base.text + "; delta' = 1 - e^-delta",
        base.f,
        base.at_zero,
        base.slope_at_infinity,
        lambda delta: -mp.expm1(-delta),
        lambda value: -mp.log1p(-value),
    )


def _vajda(k: mpf) -> Divergence:
    return _f_divergence(
        f"|u - 1|^k, k = {float(k)!r}",
        lambda u, x, t: abs(x) ** k,
        lambda: mpf(1),
        lambda: mpf(1) if k == 1 else inf,
    )


def _bwcs(weight: mpf) -> Divergence:
    return _f_divergence(
        f"(u - 1)^2 / (1 - l + l u), l = {float(weight)!r}",
        lambda u, x, t: x * x / (1 - weight + weight * u),
        (lambda: 1 / (1 - weight)) if weight < 1 else (lambda: inf),
        (lambda: 1 / weight) if weight > 0 else (lambda: inf),
    )


def _hockey_stick(g: mpf) -> Divergence:
    return _f_divergence(
        f"max(u - g, 0), g = {float(g)!r}",
        lambda u, x, t: max(u - g, mpf(0)),
        lambda: mpf(0),
        lambda: mpf(1),
    )


_PLAIN: dict[str, tuple[str, Function, Callable[[], mpf], Callable[[], mpf]]] = {
    "kl": ("-ln u + u - 1", lambda u, x, t: x - t, lambda: inf, lambda: mpf(1)),
    "reverse-kl": ("u ln u - u + 1", lambda u, x, t: u * t - x, lambda: mpf(1), lambda: inf),
    "tv": ("|u - 1| / 2", lambda u, x, t: abs(x) / 2, lambda: mpf(1) / 2, lambda: mpf(1) / 2),
    "pearson-chi2": ("(u - 1)^2", lambda u, x, t: x * x, lambda: mpf(1), lambda: inf),
    "neyman-chi2": ("(u - 1)^2 / u", lambda u, x, t: x * x / u, lambda: inf, lambda: mpf(1)),
    "hellinger": (
        "(sqrt(u) - 1)^2 / 2",
        lambda u, x, t: mp.expm1(t / 2) ** 2 / 2,
        lambda: mpf(1) / 2,
        lambda: mpf(1) / 2,
    ),
    "le-cam": (
        "(u - 1)^2 / (2 (u + 1))",
        lambda u, x, t: x * x / (2 * (u + 1)),
        lambda: mpf(1) / 2,
        lambda: mpf(1) / 2,
    ),
    "jensen-shannon": (
        "(u ln u - (u + 1) ln((u + 1) / 2)) / 2",
        lambda u, x, t: (u * t - (u + 1) * mp.log1p(x / 2)) / 2,
        lambda: mp.log(2) / 2,
        lambda: mp.log(2) / 2,
    ),
    "jeffreys": ("(u - 1) ln u", lambda u, x, t: x * t, lambda: inf, lambda: inf),
}

# name: (constructor, min parameter, max parameter)
_WITH_PARAMETER: dict[str, tuple[Callable[[mpf], Divergence], mpf, mpf]] = {
    "alpha": (_alpha, -inf, inf),
    "renyi": (_renyi, mpf(0), inf),
    "vajda": (_vajda, mpf(1), inf),
    "bwcs": (_bwcs, mpf(0), mpf(1)),
    "hockey-stick": (_hockey_stick, mpf(1), inf),
}


@cache
def parse(spec: str) -> Divergence:
    """Return the divergence of a spec such as "kl" or "alpha:0.5".

    The parameter is read as a float64 and taken exactly, as the library does.
    """
    name, _, parameter = spec.partition(":")
    if name in _PLAIN and not parameter:
        return _f_divergence(*_PLAIN[name])
    if name == "bhattacharyya" and not parameter:
        return _bhattacharyya()
    if name in _WITH_PARAMETER and parameter:
        make, low, high = _WITH_PARAMETER[name]
        value = mpf(float(parameter))
        if low <= value <= high and not isinf(value) and (name, value) != ("renyi", 0):
            return make(value)
    raise ValueError(f"unknown divergence {spec!r}")


def _split(log_prob: mpf) -> tuple[mpf, mpf]:
    """Return p and 1 - p, each to full relative precision."""
    return mp.exp(log_prob), -mp.expm1(log_prob)


def _check(log_prob: mpf, delta: mpf) -> None:
    if not -inf < log_prob <= 0:
        raise ValueError(f"log_prob must be finite and at most 0, got {log_prob}")
    if not 0 < delta < inf:
        raise ValueError(f"delta must be finite and positive, got {delta}")


# --- the divergence, by definition -------------------------------------------------------------


def _definition(div: Divergence, log_prob: mpf, log_ratio: mpf) -> mpf:
    """D_f(p, r) at the working precision, or infinity outside the simplex."""
    p, rest = _split(log_prob)
    if rest == 0:
        return inf if log_ratio > 0 else _value(div, p, rest, log_ratio)
    if log_ratio == -inf:
        return p * div.at_zero() + rest * div.f(1 / rest, p / rest, -mp.log(rest))
    log_new = mp.fadd(log_prob, log_ratio, exact=True)
    if log_new > 0:
        return inf
    ratio = mp.exp(log_ratio)
    of_token = p * div.f(ratio, mp.expm1(log_ratio), log_ratio)
    if log_new == 0:
        return of_token + rest * div.at_zero()
    new_rest = -mp.expm1(log_new)  # 1 - r p
    of_rest = div.f(new_rest / rest, (new_rest - rest) / rest, mp.log(new_rest) - mp.log(rest))
    return of_token + rest * of_rest


def divergence(
    spec: str, log_prob: float | mpf, log_ratio: float | mpf, digits: int = DIGITS
) -> mpf:
    """Return D_f(p, r) = p f(r) + (1 - p) f((1 - r p) / (1 - p)) to `digits` digits.

    At p = 1 that is its limit, f(r) + (1 - r) f'(inf).

    Renyi and Bhattacharyya come in their own units, so that `divergence <= delta` is the band for
    every spec. Outside the simplex the result is infinity.
    """
    div = parse(spec)
    lp, lr = mpf(log_prob), mpf(log_ratio)
    _check(lp, mpf(1))
    # D is of the order (r - 1)^2 but made of terms of the order r - 1, and near p = 1 of terms
    # that are larger by 1/(1 - p).
    small = min(mp.mag(lr) if lr and lr > -inf else 0, 0) + min(mp.mag(lp) if lp else 0, 0)
    precision = digits + 20 - 2 * int(0.30103 * small)
    previous: mpf | None = None
    while precision <= _MAX_PRECISION:
        with mp.workdps(precision):
            value = div.own(_definition(div, lp, lr))
            if isinf(value):
                return inf
            if previous is not None and abs(value - previous) <= abs(value) * mpf(10) ** -(
                digits + 3
            ):
                with mp.workdps(digits + 10):
                    return +value
            previous = value
        precision *= 2
    raise ArithmeticError(f"no stable value of {spec} at {log_prob!r}, {log_ratio!r}")


# --- the bounds --------------------------------------------------------------------------------
#
# At either bound one outcome loses probability: the token at the lower one, everything else at the
# upper one. Let it shrink by the factor e^w, w < 0; the other grows to 1 + (1 - e^w) shrink/grow.
# D rises from 0 as w falls from 0 to -inf, and v = ln(-w) is of moderate size for every float
# input: it resolves log r = -1e290 as well as 1 - r p = e^(-1e15). In the limit of an outcome of no
# probability, grow = 0, what it gains has the divergence (1 - e^w) f'(inf).


def _value(div: Divergence, shrink: mpf, grow: mpf, w: mpf) -> mpf:
    """D_f when the outcome of probability `shrink` is scaled by e^w."""
    if w == -inf:
        return _saturation(div, shrink, grow)
    x = mp.expm1(w)
    if grow == 0:
        lost = -x * div.slope_at_infinity() if x else mpf(0)
        return div.f(mp.exp(w), x, w) + lost
    x_grow = -x * shrink / grow
    return shrink * div.f(mp.exp(w), x, w) + grow * div.f(1 + x_grow, x_grow, mp.log1p(x_grow))


def _sides(log_prob: mpf, upper: bool) -> tuple[mpf, mpf]:
    p, rest = _split(log_prob)
    return (rest, p) if upper else (p, rest)


def saturation(spec: str, log_prob: float | mpf, upper: bool, digits: int = DIGITS) -> mpf:
    """Return the delta from which on a bound lies on the edge of the simplex: D at r = 1/p or 0.

    It is in the units of delta, and infinite where f(0) is.
    """
    div = parse(spec)
    lp = mpf(log_prob)
    _check(lp, mpf(1))
    with mp.workdps(digits + 30):
        return div.own(_saturation(div, *_sides(lp, upper)))


def _saturation(div: Divergence, shrink: mpf, grow: mpf) -> mpf:
    if grow == 0:
        return div.at_zero() + div.slope_at_infinity()
    odds = shrink / grow  # the other outcome grows to 1 / grow = 1 + odds
    return shrink * div.at_zero() + grow * div.f(1 + odds, odds, mp.log1p(odds))


def _root(fn: Callable[[mpf], mpf], low: mpf, high: mpf, tolerance: mpf) -> mpf:
    """Chandrupatla's bracketed root finder: inverse quadratic where safe, else bisection."""
    b, a = low, high
    fb, fa = fn(b), fn(a)
    if (fa > 0) == (fb > 0):
        raise ArithmeticError("the bracket holds no sign change")
    step = mpf(1) / 2
    while True:
        x = a + step * (b - a)
        fx = fn(x)
        if (fx > 0) == (fa > 0):
            c, fc = a, fa
        else:
            c, fc, b, fb = b, fb, a, fa
        a, fa = x, fx
        best = a if abs(fa) < abs(fb) else b
        if fa == 0 or abs(b - a) <= tolerance:
            return best
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        if phi * phi < xi and (1 - phi) * (1 - phi) < 1 - xi:
            step = fa / (fb - fa) * fc / (fb - fc)
            step += (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        else:
            step = mpf(1) / 2
        # A step of at least the tolerance makes both ends of the bracket close in.
        margin = tolerance / (4 * abs(b - a))
        step = min(max(step, margin), 1 - margin)


def _bracket(fn: Callable[[mpf], mpf]) -> tuple[mpf, mpf]:
    """Walk from v = 0 with doubling steps to a sign change of a rising function."""
    inner = mpf(0)
    step = mpf(-1) if fn(inner) > 0 else mpf(1)
    while True:
        outer = inner + step
        if (fn(outer) > 0) == (step > 0):
            return (inner, outer) if step > 0 else (outer, inner)
        inner, step = outer, 2 * step


def _attempt(
    div: Divergence, log_prob: mpf, delta: mpf, upper: bool, digits: int, precision: int
) -> mpf | None:
    """Solve at one working precision; None when that precision proves too low."""
    with mp.workdps(precision):
        shrink, grow = _sides(log_prob, upper)
        radius = div.radius(delta)
        edge = _saturation(div, shrink, grow)
        if abs(edge - radius) <= radius * mpf(10) ** (20 - precision):
            # The side is undecided. D = delta at the edge belongs to the band.
            return -inf if precision >= _TIE_PRECISION else None
        if edge < radius:
            return -inf

        def excess(v: mpf) -> mpf:
            # Bounded, so that a value of 1e300 at a far end does not mislead the interpolation.
            value = _value(div, shrink, grow, -mp.exp(v))
            return (value - radius) / (value + radius)

        v = _root(excess, *_bracket(excess), mpf(10) ** -(digits + 6))
    with mp.workdps(2 * precision):
        # The proof of the digits: at doubled precision D passes delta within a relative 10^-digits.
        shrink, grow = _sides(log_prob, upper)
        radius = div.radius(delta)
        slack = mpf(10) ** -(digits + 4)
        inside = _value(div, shrink, grow, -mp.exp(v - slack)) <= radius
        outside = _value(div, shrink, grow, -mp.exp(v + slack)) > radius
        return -mp.exp(v) if inside and outside else None


def _log_shrink(div: Divergence, log_prob: mpf, delta: mpf, upper: bool, digits: int) -> mpf:
    """Return w at the bound (-inf where it is saturated) to `digits` proven digits."""
    precision = digits + 30 + max(0, -int(log10(delta)))
    while precision <= _MAX_PRECISION:
        w = _attempt(div, log_prob, delta, upper, digits, precision)
        if w is not None:
            return w
        precision *= 2
    raise ArithmeticError(f"undecided at log_prob {log_prob}, delta {delta}")


def _log_ratio(log_prob: mpf, w: mpf, upper: bool) -> mpf:
    """The log-ratio of the token when the shrinking outcome is scaled by e^w."""
    if not upper:
        return w
    if w == -inf:
        return -log_prob
    rest, p = _sides(log_prob, upper)
    return mp.log1p(-mp.expm1(w) * rest / p)


def log_bounds(
    spec: str, log_prob: float | mpf, delta: float | mpf, digits: int = DIGITS
) -> tuple[mpf, mpf]:
    """Return (log_lower, log_upper) of the band to `digits` significant digits.

    `log_prob` and `delta` are taken exactly. A saturated upper bound is exactly -log_prob and a
    saturated lower one exactly -inf (BandPO's simplex saturation).
    """
    bounds = []
    for upper in (False, True):
        log_ratio, _ = bound(spec, log_prob, delta, upper, digits)
        bounds.append(log_ratio)
    return bounds[0], bounds[1]


def bound(
    spec: str, log_prob: float | mpf, delta: float | mpf, upper: bool, digits: int = DIGITS
) -> tuple[mpf, mpf]:
    """Return one log bound and w, the log of the factor of the outcome that shrinks there.

    At log_prob = 0 that is the limit: 0 for the upper one, and for the lower one 0 where f'(inf) is
    infinite.
    """
    div = parse(spec)
    lp, d = mpf(log_prob), mpf(delta)
    _check(lp, d)
    if lp == 0 and (upper or isinf(div.slope_at_infinity())):
        return mpf(0), mpf(0)
    w = _log_shrink(div, lp, d, upper, digits)
    with mp.workdps(digits + 10):
        return (-lp if upper else -inf) if isinf(w) else _log_ratio(lp, w, upper), w


def condition(spec: str, log_prob: float | mpf, delta: float | mpf, upper: bool, w: mpf) -> mpf:
    """Return the condition number of |log bound| in (|log_prob|, delta), given w from `bound`.

    That is |d ln|L| / d ln|log_prob|| + |d ln|L| / d ln delta| by implicit differentiation of
    D(log_prob, w) = delta, with central differences. A saturated upper bound has 1, a saturated
    lower one infinity, one that is 0 whatever delta (p = 1) has 0.
    """
    div = parse(spec)
    lp, d = mpf(log_prob), mpf(delta)
    if isinf(w):
        return mpf(1) if upper else inf
    if w == 0:
        return mpf(0)
    with mp.workdps(100):
        h = mpf(10) ** -25

        def value(log_p: mpf, log_factor: mpf) -> mpf:
            return div.own(_value(div, *_sides(log_p, upper), log_factor))

        def by_log_prob(fn: Callable[[mpf, mpf], mpf]) -> mpf:
            return (fn(lp * (1 + h), w) - fn(lp * (1 - h), w)) / (2 * h)

        def by_w(fn: Callable[[mpf, mpf], mpf]) -> mpf:
            return (fn(lp, w * (1 + h)) - fn(lp, w * (1 - h))) / (2 * h)

        def log_ratio(log_p: mpf, log_factor: mpf) -> mpf:
            return _log_ratio(log_p, log_factor, upper)

        slope = by_w(log_ratio) / by_w(value)
        of_delta = slope * d
        of_log_prob = by_log_prob(log_ratio) - slope * by_log_prob(value)
        return (abs(of_delta) + abs(of_log_prob)) / abs(log_ratio(lp, w))


def to_double(value: mpf) -> float:
    """Round to the nearest float64, ties to even, subnormals and overflow to infinity included."""
    if isinf(value):
        return float(value)
    sign, mantissa, exponent, _ = value._mpf_
    magnitude = int(mantissa) * Fraction(2) ** exponent  # true division of integers rounds once
    try:
        nearest = float(magnitude)
    except OverflowError:
        nearest = float("inf")
    return -nearest if sign else nearest


# --- self-test ---------------------------------------------------------------------------------

# fmt: off
SPECS = [
    "kl", "reverse-kl", "tv", "pearson-chi2", "neyman-chi2", "hellinger", "le-cam",
    "jensen-shannon", "jeffreys", "alpha:-3", "alpha:-1", "alpha:-0.5", "alpha:0", "alpha:0.5",
    "alpha:1", "alpha:1.5", "alpha:2", "alpha:3", "alpha:4", "renyi:0.5", "renyi:1", "renyi:2",
    "bhattacharyya", "vajda:1", "vajda:1.5", "vajda:3", "bwcs:0", "bwcs:0.3", "bwcs:1",
    "hockey-stick:1", "hockey-stick:1.2", "hockey-stick:3",
]
# fmt: on

# KL at delta = 0.05: p, lower, upper as published with seven digits (lower of 1e-4 with five).
_ANCHORS = """
    1e-4  2.6211e-218 494.6039    1e-3 7.099e-23  53.54809   0.01 0.002497386 7.809846
    0.05  0.1620217   2.981250    0.1  0.3127840  2.200786   0.3  0.5708725   1.515323
    0.5   0.6915157   1.308484    0.8  0.8205804  1.131015   0.95 0.8957237   1.044104
    0.99  0.9312137   1.010076
"""


def _closed_form(spec: str, p: mpf, d: mpf) -> tuple[mpf, mpf] | None:
    """Return (lower, upper) from a closed form, or None where none is known."""
    div = parse(spec)
    name, _, parameter = spec.partition(":")
    top = 1 / p
    if name in ("tv", "vajda"):
        k = mpf(float(parameter)) if parameter else mpf(1)
        d = d if parameter else 2 * d
        x = (d / (p * (1 + (p / (1 - p)) ** (k - 1)))) ** (1 / k)
        low, high = 1 - x, 1 + x
    elif name in ("hellinger", "bhattacharyya") or spec in ("alpha:0.5", "renyi:0.5"):
        scale = 4 if "0.5" in spec else 1  # alpha:0.5 is four times hellinger
        turn, theta = mp.acos(max(1 - div.radius(d) / scale, mpf(0))), mp.asin(mp.sqrt(p))
        low = mp.sin(max(theta - turn, mpf(0))) ** 2 / p
        high = mp.sin(min(theta + turn, mp.pi / 2)) ** 2 / p
    elif name == "hockey-stick":
        g = mpf(float(parameter))
        low, high = (1 - g * (1 - p) - d) / p, g + d / p
    else:
        # f is `scale` times the bwcs generator with weight l
        family = {
            "pearson-chi2": (0, 1),
            "neyman-chi2": (1, 1),
            "le-cam": (0.5, 0.25),
            "alpha:2": (0, 0.5),
            "renyi:2": (0, 0.5),
            "alpha:-1": (1, 0.5),
        }
        if name == "bwcs":
            family[spec] = (float(parameter), 1)
        if spec not in family:
            return None
        weight, d = mpf(family[spec][0]), div.radius(d) / family[spec][1]
        root = mp.sqrt(d * (d * weight**2 + 4 * p * (1 - p)))
        middle, under = d * weight * (1 - 2 * p), 2 * p * (1 + d * weight**2)
        low, high = 1 + (middle - root) / under, 1 + (middle + root) / under
    return max(low, mpf(0)), min(high, top)


def _plain_bisection(spec: str, log_prob: mpf, delta: mpf, upper: bool) -> mpf:
    """The log bound by 260 halvings of the log-ratio, on the definition alone."""
    edge = -log_prob if upper else mpf(-200_000)
    if divergence(spec, log_prob, -log_prob if upper else -inf) <= delta:
        return edge if upper else -inf
    inside, outside = mpf(0), edge
    for _ in range(260):
        middle = (inside + outside) / 2
        if divergence(spec, log_prob, middle) <= delta:
            inside = middle
        else:
            outside = middle
    return inside


def _agreement(first: mpf, second: mpf) -> mpf:
    """Return the number of decimal digits to which two values agree (1000 when equal)."""
    if first == second:
        return mpf(1000)
    return -log10(abs(first - second) / max(abs(first), abs(second)))


def _inputs(random: Random, count: int) -> list[tuple[float, float]]:
    """Draw (log_prob, delta) in turn from rare, sure and ordinary tokens."""
    points = []
    for i in range(count):
        s = random.random()
        if i % 3 == 0:
            log_prob = -690 * s - 1e-3
        elif i % 3 == 1:
            log_prob = -(10.0 ** (-16 * s))
        else:
            log_prob = to_double(-mp.log1p(mp.exp(mpf(36 * s - 18))))
        points.append((log_prob, 10.0 ** (9 * random.random() - 8)))
    return points


def _condition_by_bounds(spec: str, log_prob: float, delta: float, upper: bool) -> mpf:
    """The condition number from central differences of the bounds themselves."""
    h = mpf(10) ** -20

    def log_size(lp: mpf, d: mpf) -> mpf:
        return mp.log(abs(bound(spec, lp, d, upper)[0]))

    lp, d = mpf(log_prob), mpf(delta)
    of_log_prob = log_size(lp * (1 + h), d) - log_size(lp * (1 - h), d)
    of_delta = log_size(lp, d * (1 + h)) - log_size(lp, d * (1 - h))
    return (abs(of_log_prob) + abs(of_delta)) / (2 * h)


def self_test(report: Callable[[str], object]) -> None:
    """Check the anchors, f(0), closed forms, the mirror identity, residuals and bisection."""
    random = Random(7)  # noqa: S311 - sample points, not secrets
    mp.dps = 120

    numbers = _ANCHORS.split()
    for p, low, high in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
        bounds = log_bounds("kl", mp.log(mpf(p)), 0.05)
        for text, value in zip((low, high), bounds, strict=True):
            size = len(text.split("e")[0].replace(".", "").lstrip("0"))
            assert mp.nstr(mp.exp(value), size, strip_zeros=False) == mp.nstr(
                mpf(text), size, strip_zeros=False
            ), (p, text)
    report("kl anchors at delta 0.05: all printed digits of 10 x 2 bounds")

    for spec in SPECS:
        div, u = parse(spec), mpf(10) ** -100
        near, at = div.f(u, u - 1, mp.log(u)), div.at_zero()
        assert near > 100 if isinf(at) else abs(near - at) < mpf(10) ** -45, spec
        far, slope = div.f(1 / u, 1 / u - 1, -mp.log(u)) * u, div.slope_at_infinity()
        assert far > 100 if isinf(slope) else abs(far - slope) < mpf(10) ** -45, spec
        assert abs(div.own(div.radius(mpf("0.05"))) - mpf("0.05")) < mpf(10) ** -100, spec
    report(f"f(0), f'(inf) and units: {len(SPECS)} specs")

    worst, count = mpf(1000), 0
    nearly = -(mpf(10) ** -401)  # log p so near 0 that the limit is reached to 60 digits
    for spec in SPECS:
        for delta in (1e-8, 1e-3, 0.05, 0.4, 10.0):
            limit, close = bound(spec, 0.0, delta, False)[0], bound(spec, nearly, delta, False)[0]
            if limit == 0:  # reached like sqrt(1 - p), or like 1/ln(1/(1 - p)): at least falling
                farther = bound(spec, -(mpf(10) ** -80), delta, False)[0]
                assert farther < close < 0, (spec, delta)
                continue
            assert isinf(limit) == isinf(close), (spec, delta)
            worst, count = min(worst, _agreement(limit, close)), count + 1
    assert worst > 58, worst
    report(f"the limit p = 1: {count} bounds, worst agreement {float(worst):.1f} digits")

    worst, count = mpf(1000), 0
    for spec in SPECS:
        for log_prob, delta in _inputs(random, 30):
            with mp.workdps(900):  # p reaches 1e-300: the forms below cancel that far
                closed = _closed_form(spec, mp.exp(mpf(log_prob)), mpf(delta))
                if closed is None:
                    break
                logs = [mp.log(value) if value else -inf for value in closed]
            for expected, value in zip(logs, log_bounds(spec, log_prob, delta), strict=True):
                worst, count = min(worst, _agreement(expected, value)), count + 1
    assert worst > 58, worst
    report(f"closed forms: {count} bounds, worst agreement {float(worst):.1f} digits")

    worst, count = mpf(1000), 0
    for spec in SPECS:
        for log_prob, delta in _inputs(random, 12):
            with mp.workdps(700):
                p, other = mp.exp(mpf(log_prob)), mp.log(-mp.expm1(mpf(log_prob)))
            high, low = log_bounds(spec, log_prob, delta)[1], log_bounds(spec, other, delta)[0]
            total = mp.exp(log_prob + high) + (1 - p) * mp.exp(low)
            worst, count = min(worst, _agreement(total, mpf(1))), count + 1
    assert worst > 55, worst
    report(f"mirror p upper(p) + (1-p) lower(1-p) = 1: {count} points, {float(worst):.1f} digits")

    count = 0
    for spec in SPECS:
        for log_prob, delta in _inputs(random, 12):
            for value in log_bounds(spec, log_prob, delta):
                step = abs(value) * mpf(10) ** -59
                if isinf(value):
                    assert divergence(spec, log_prob, value) <= delta, (spec, log_prob, delta)
                    continue
                sign = 1 if value > 0 else -1
                inside = divergence(spec, log_prob, value - sign * step)
                outside = divergence(spec, log_prob, value + sign * step)
                assert inside <= delta < outside, (spec, log_prob, delta)
                count += 1
    report(f"definition: D crosses delta within 1e-59 of {count} bounds")

    worst, count = mpf(1000), 0
    for spec in SPECS:
        for log_prob, delta in _inputs(random, 3)[1:]:
            for upper, value in zip((False, True), log_bounds(spec, log_prob, delta), strict=True):
                # Halving starts at log r = -200 000; bounds far below are left to the check above.
                if isinf(value) or value > -100_000:
                    plain = _plain_bisection(spec, mpf(log_prob), mpf(delta), upper)
                    worst, count = min(worst, _agreement(plain, value)), count + 1
    assert worst > 55, worst
    report(f"plain bisection of the definition: {count} bounds, {float(worst):.1f} digits")

    worst, count = mpf(1000), 0
    for spec in SPECS:
        for log_prob, delta in _inputs(random, 12):
            twice = log_bounds(spec, log_prob, delta, 2 * DIGITS)
            for first, second in zip(log_bounds(spec, log_prob, delta), twice, strict=True):
                worst, count = min(worst, _agreement(first, second)), count + 1
    assert worst > 60, worst
    report(f"doubled precision: {count} bounds, worst agreement {float(worst):.1f} digits")

    count = 0
    for spec in ("reverse-kl", "tv", "pearson-chi2", "jensen-shannon", "hellinger", "vajda:3"):
        for log_prob, _ in _inputs(random, 9):
            for upper in (False, True):
                with mp.workdps(120):
                    edge = saturation(spec, log_prob, upper, 110)
                    assert not isinf(bound(spec, log_prob, edge * (1 - mpf(10) ** -30), upper)[1])
                    assert isinf(bound(spec, log_prob, edge * (1 + mpf(10) ** -30), upper)[1])
                    count += 2
    for spec in ("reverse-kl", "renyi:0.5", "renyi:2"):  # exact ties belong to the band
        assert log_bounds(spec, -0.25, 0.25)[1] == 0.25, spec
    report(f"saturation: {count} bounds on the right side at 1e-30 from the edge")

    worst, count = mpf(1000), 0
    for spec in SPECS:
        for log_prob, delta in _inputs(random, 3):
            for upper in (False, True):
                value, w = bound(spec, log_prob, delta, upper)
                if not isinf(w):
                    kappa = condition(spec, log_prob, delta, upper, w)
                    by_bounds = _condition_by_bounds(spec, log_prob, delta, upper)
                    worst, count = min(worst, _agreement(kappa, by_bounds)), count + 1
    assert worst > 6, worst
    report(f"condition numbers: {count} bounds, worst agreement {float(worst):.1f} digits")


if __name__ == "__main__":
    self_test(lambda line: sys.stdout.write(f"ok  {line}\n"))
