"""Bernoulli divergences of tokens, in plain torch.

A compiler can fuse them, and no value leaves the device. The bands of `bandpo.Band` are solved
elsewhere; here the divergence itself is a number to average or to add up over a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from bandpo.check import check_name
from bandpo.region.budget import DIVERGENCES


def bernoulli_divergence(
    name: str, old_log_prob: torch.Tensor, log_prob: torch.Tensor
) -> torch.Tensor:
    """Returns D_f of {this token, everything else}, ``p f(q/p) + (1-p) f((1-q)/(1-p))``.

    p and q are the probabilities, ``f`` as `bandpo.Divergence` normalises it, so that "kl" is
    KL(old || new). Every term is at least 0 and has all its digits, also near ``q = p`` and where p
    or q is near 0 or 1. An infinite log-prob gives the limit, and a NaN gives NaN. Log-probs above
    0, which rounding makes, are read as 0.

    Args:
        name: One of `DIVERGENCES`.
        old_log_prob: Log-probabilities ln p, float32 or float64, without gradient.
        log_prob: ln q, likewise; the two broadcast.

    Returns:
        D, in the dtype given; 0 or inf if the exact D is beyond its range.

    Raises:
        InvalidValueError: If the name is none of these.
    """
    check_name("divergence", name, DIVERGENCES)
    old, new = old_log_prob.clamp(max=0.0), log_prob.clamp(max=0.0)
    token, rest = _outcomes(old, new)
    term = _TERMS[name]
    return term(token) + term(rest)


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Returns ``e^x - 1 - x`` of log-ratios x, at least 0, by its series where it cancels."""
    near = log_ratio.abs() < _NEAR
    z = torch.where(near, log_ratio, 0.0)
    first, *rest = _SERIES if z.dtype == torch.float64 else _SERIES[6:]
    series = torch.full_like(z, first)
    for coefficient in rest:
        series.mul_(z).add_(coefficient)  # in place, because memory takes most of the time
    # An infinite one would be taken from itself; before this limit e^x is infinite.
    far = log_ratio.expm1() - log_ratio.clamp(max=1000.0)
    return torch.where(near, z * z * series, far)


_NEAR = 0.5
"""Below it, the series of ``e^x - 1 - x`` up to ``x^15`` has a relative error of 6e-18, and up to
``x^9`` of 2.2e-9.
"""

_SERIES = tuple(1.0 / math.factorial(k) for k in range(15, 1, -1))


class _Outcome(NamedTuple):
    """One of the two outcomes: two probabilities, their logarithms, and ln new/old."""

    old: torch.Tensor
    new: torch.Tensor
    log_old: torch.Tensor
    log_new: torch.Tensor
    log_ratio: torch.Tensor  # ln new/old, also next to 0 with all digits

    def swapped(self) -> _Outcome:
        return _Outcome(self.new, self.old, self.log_new, self.log_old, -self.log_ratio)


def _outcomes(old: torch.Tensor, new: torch.Tensor) -> tuple[_Outcome, _Outcome]:
    """The token and everything else."""
    same = old == new  # also where both are infinite, whose difference is NaN
    x = torch.where(same, 0.0, new - old)
    rest_old, rest_new = -old.expm1(), -new.expm1()
    # (1-q)/(1-p) - 1, in which nothing cancels next to 0.
    growth = torch.where(same, 0.0, -x.expm1() / old.abs().expm1())
    # From -1/2 down, the quotient has more digits.
    log_rest_ratio = torch.where(
        growth > -0.5, growth.log1p(), torch.where(same, 0.0, (rest_new / rest_old).log())
    )
    # Odds that overflow: p is 0 or next to it, and nothing cancels.
    rare = old < 1.0 - math.log(torch.finfo(old.dtype).max)
    far = torch.where(same, 0.0, _log_rest(new) - _log_rest(old))
    log_rest_ratio = torch.where(rare, far, log_rest_ratio)
    token = _Outcome(old.exp(), new.exp(), old, new, x)
    return token, _Outcome(rest_old, rest_new, _log_rest(old), _log_rest(new), log_rest_ratio)


def _log_rest(log_prob: torch.Tensor) -> torch.Tensor:
    """Returns ``ln(1 - p)``."""
    near_1 = log_prob > -math.log(2.0)
    small = torch.where(near_1, -1.0, log_prob)
    return torch.where(near_1, (-log_prob.expm1()).log(), (-small.exp()).log1p())


def _tv(outcome: _Outcome) -> torch.Tensor:
    larger = torch.maximum(outcome.old, outcome.new)
    return larger * (-(-outcome.log_ratio.abs()).expm1()) / 2.0


def _kl(outcome: _Outcome) -> torch.Tensor:
    """``old (u - 1 - ln u)``, in which ``old u`` is new: u itself may overflow."""
    old, new, _, _, x = outcome
    weighted = torch.where(old == 0.0, 0.0, old * x)  # x may be infinite
    grown = new * (-(-x).expm1()) - weighted
    # An old that underflowed must not meet the infinity.
    fallen = torch.where(x == -math.inf, math.inf, old * k3(x.clamp(max=1.0)))
    return torch.where(x > 1.0, grown, fallen)


def _hellinger(outcome: _Outcome) -> torch.Tensor:
    larger = torch.maximum(outcome.old, outcome.new)
    return larger * (outcome.log_ratio.abs() / -2.0).expm1().square() / 2.0


def _pearson(outcome: _Outcome) -> torch.Tensor:
    """``old (u - 1)^2``, for ``u > 1`` as ``(new (1 - 1/u))^2 / old``: u may overflow."""
    old, new, _, log_new, x = outcome
    moved = new * (-x).expm1()
    # A quotient by less than that loses digits or overflows, an exponential only digits.
    far = old < torch.finfo(old.dtype).tiny
    grown = torch.where(far, (log_new + x).exp() * (-x).expm1().square(), moved * (moved / old))
    return torch.where(x > 0.0, grown, old * x.clamp(max=0.0).expm1().square())


def _jensen_shannon(outcome: _Outcome) -> torch.Tensor:
    """``M h(z) / 2`` with M = (old + new)/2, old = M(1-z), new = M(1+z).

    h(z) = (1-z) ln(1-z) + (1+z) ln(1+z) = z x + ln(1 - z^2), because z = tanh(x/2).
    """
    middle = (outcome.old + outcome.new) / 2.0
    x = outcome.log_ratio.abs()
    z = (x.clamp(max=1.0) / 2.0).tanh()
    near = z * x + (-z.square()).log1p()
    e = (-x).exp()
    weighted = torch.where(e == 0.0, 0.0, x * e)
    far = 2.0 * (math.log(2.0) - e.log1p() - weighted / (1.0 + e))
    return middle * torch.where(x < 1.0, near, far) / 2.0


_TERMS: dict[str, Callable[[_Outcome], torch.Tensor]] = {
    "tv": _tv,
    "kl": _kl,
    "reverse-kl": lambda outcome: _kl(outcome.swapped()),
    "hellinger": _hellinger,
    "pearson-chi2": _pearson,
    "neyman-chi2": lambda outcome: _pearson(outcome.swapped()),
    "jensen-shannon": _jensen_shannon,
}
