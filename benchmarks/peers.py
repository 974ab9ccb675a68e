"""Alternatives to bandpo, written as their users write them, neither tuned nor slowed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.availability import torch

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]

BISECTION_STEPS = 50
"""Halvings for each side, as in BandPO (arXiv 2603.04918)."""


def bisection(delta: float, logp: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (lower, upper) of the kl band by halving, all tokens at once.

    Each side is bracketed by 1 and the end of the simplex, 0 or 1/p.
    """
    p = logp.exp()
    return bisected_side(delta, p, torch.zeros_like(p)), bisected_side(delta, p, 1.0 / p)


def bisected_side(delta: float, p: Tensor, outside: Tensor) -> Tensor:
    """Returns a bound of the kl band by 50 halvings between 1 and ``outside``, in its dtype."""
    q = 1.0 - p
    inside = torch.ones_like(p)
    for _ in range(BISECTION_STEPS):
        r = 0.5 * (inside + outside)
        holds = -p * r.log() - q * ((1.0 - p * r) / q).log() <= delta
        inside, outside = torch.where(holds, r, inside), torch.where(holds, outside, r)
    return inside


def find_root(divergence: str, logp: Floats, delta: float) -> tuple[Floats, Floats]:
    """Returns (lower, upper) by scipy's vectorised root finder (Chandrupatla), default tolerances.

    Raises:
        KeyError: If ``divergence`` is none of kl, reverse-kl and jensen-shannon.
        RuntimeError: If a root was not found, because the peer would then be timed at other work.
    """
    from scipy.optimize import elementwise

    f = _GENERATORS[divergence]
    p = np.exp(logp)
    q = -np.expm1(logp)

    def excess(r: Floats, p: Floats, q: Floats) -> Floats:
        everything_else = np.maximum(1.0 - (r - 1.0) * p / q, 0.0)
        value: Floats = p * f(r) + q * f(everything_else) - delta
        return value

    one = np.ones_like(p)
    with np.errstate(divide="ignore"):  # f is infinite at an end
        lower = elementwise.find_root(excess, (np.zeros_like(p), one), args=(p, q))
        upper = elementwise.find_root(excess, (one, 1.0 / p), args=(p, q))
    if not (lower.success.all() and upper.success.all()):
        raise RuntimeError(f"find_root misses a root of {divergence}")
    return lower.x, upper.x


def _reverse_kl(u: Floats) -> Any:
    from scipy.special import xlogy

    return xlogy(u, u)


def _jensen_shannon(u: Floats) -> Any:
    from scipy.special import xlogy

    return 0.5 * (xlogy(u, u) - (u + 1.0) * np.log(0.5 * (u + 1.0)))


_GENERATORS: dict[str, Callable[[Floats], Any]] = {
    "kl": lambda u: -np.log(u),
    "reverse-kl": _reverse_kl,
    "jensen-shannon": _jensen_shannon,
}


def ppo_clip(old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Returns PPO's clipped loss alone, mean over tokens, without metrics.

    PPO: arXiv 1707.06347, equation 7; the interval is DAPO's, arXiv 2503.14476.
    """
    ratio = (log_prob - old_log_prob).clamp(-20.0, 20.0).exp()
    per_token = -torch.minimum(advantages * ratio, advantages * ratio.clamp(0.8, 1.28))
    return torch.where(mask, per_token, 0.0).sum() / mask.sum()


@cache
def compiled_ppo_clip() -> Callable[..., Tensor]:
    """Returns `ppo_clip` compiled."""
    compiled: Callable[..., Tensor] = torch.compile(ppo_clip, fullgraph=True, dynamic=False)
    return compiled
