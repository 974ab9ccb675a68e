"""Writes tests/data/tokens.csv.gz: tokens with the bounds, losses and gradients of every backend.

Bounds come from tests/support/reference.py at 60 digits and losses from formulas in mpmath, so that
the file is independent of the library. Log-probs and advantages are float32 numbers, so that every
backend reads the same values. No ratio is next to a bound, because a table may decide either way
there.

    python tools/make_cases.py
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from mpmath import mp, mpf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.reference import log_bounds, to_double  # noqa: E402

FILE = ROOT / "tests" / "data" / "tokens.csv.gz"
REGIONS = (("kl", 0.05), ("tv", 0.15), ("reverse-kl", 0.05), ("jensen-shannon", 0.02))
TOKENS = 250  # for each region
SEED = 20261124
NEAR = mpf("1e-4")
"""Min distance of a ratio from a bound, relative to the bound."""

LIMIT = mpf(20)  # of a log-ratio
Rule = Callable[["Token"], tuple[mpf, mpf]]


class Token:
    """A token: its bounds as ratios, its ratio r, and the quantities that the rules share."""

    def __init__(self, new: float, x: mpf, advantage: float, lower: mpf, upper: mpf) -> None:
        self.new, self.advantage = mpf(new), mpf(advantage)
        self.clamped = abs(x) > LIMIT
        self.x = max(-LIMIT, min(LIMIT, x))
        self.r, self.lower, self.upper = mp.exp(self.x), lower, upper
        self.low = advantage < 0 and self.r < lower
        self.beyond = self.low or (advantage > 0 and self.r > upper)
        self.edge = lower if advantage < 0 else upper
        # The clamp limits ratios and so the width. The min width is that of the library.
        width = 1 - lower if self.r < 1 else min(upper, mp.exp(LIMIT)) - 1
        self.width = max(width, mpf("1e-6"))


def min_clip(token: Token, dual_clip: mpf = mp.inf) -> tuple[mpf, mpf]:
    """PPO (arXiv 1707.06347, Eq. 7); dual clip: arXiv 1912.09729, Eq. 4."""
    a, r = token.advantage, token.r
    loss = -a * (min(r, token.upper) if a > 0 else min(max(r, token.lower), dual_clip))
    stopped = token.beyond or token.clamped or (a < 0 and r >= dual_clip)
    return loss, mpf(0) if stopped else loss


def mask(token: Token, truncation: mpf) -> tuple[mpf, mpf]:
    """DPPO (arXiv 2602.04879)."""
    slope = mpf(0) if token.beyond else -token.advantage * min(token.r, truncation)
    return slope * token.new, slope


def weight(token: Token) -> tuple[mpf, mpf]:
    """CISPO (arXiv 2506.13585)."""
    slope = -token.advantage * max(token.lower, min(token.r, token.upper))
    return slope * token.new, slope


def preserving(token: Token, beta_low: mpf, beta_high: mpf) -> tuple[mpf, mpf]:
    """CE-GPPO (arXiv 2509.20712)."""
    kept = (beta_low if token.low else beta_high) * token.edge
    loss = -token.advantage * (kept if token.beyond else token.r)
    return loss, mpf(0) if token.clamped and not token.beyond else loss


def symmetric_mask(token: Token) -> tuple[mpf, mpf]:
    """IPO of prime-rl (#2798)."""
    inside = token.lower <= token.r <= token.upper
    slope = -token.advantage * token.r if inside else mpf(0)
    return slope * token.new, slope


def soft_gate(token: Token, tau_positive: mpf, tau_negative: mpf) -> tuple[mpf, mpf]:
    """SAPO (arXiv 2511.20347), with the width of the region in place of 1."""
    tau, w = tau_positive if token.advantage > 0 else tau_negative, token.width
    half = tau * (token.r - 1) / (2 * w)
    loss = -token.advantage * (2 + 2 * w * mp.tanh(half)) / tau
    slope = -token.advantage * token.r * mp.sech(half) ** 2
    return loss, mpf(0) if token.clamped else slope


def quadratic(token: Token) -> tuple[mpf, mpf]:
    """SPO (arXiv 2401.16025)."""
    a, r, w = token.advantage, token.r, token.width
    loss = -a * r + abs(a) * (r - 1) ** 2 / (2 * w)
    slope = -a * r + abs(a) * r * (r - 1) / w
    return loss, mpf(0) if token.clamped else slope


RULES: dict[str, Rule] = {
    "min-clip": min_clip,
    "min-clip 3": lambda token: min_clip(token, mpf(3)),
    "mask 1.5": lambda token: mask(token, mpf("1.5")),
    "mask": lambda token: mask(token, mp.inf),
    "weight": weight,
    "gradient-preserving 0.75 0.5": lambda token: preserving(token, mpf("0.75"), mpf("0.5")),
    "mask inf 1": symmetric_mask,
    "soft-gate 1 1.05": lambda token: soft_gate(token, mpf(1), mpf("1.05")),
    "quadratic": quadratic,
}
"""Each surrogate with parameters, and its loss and gradient."""


def rows(spec: str, delta: float) -> list[list[str]]:
    """The rows of a region: any old probability, ratios around both bounds, a few clamped."""
    random = Random(f"{SEED} {spec}")  # noqa: S311
    made: list[list[str]] = []
    while len(made) < TOKENS:
        old = float(np.float32(-random.expovariate(1 / 3) * 10 ** random.uniform(-3, 0.5)))
        log_lower, log_upper = log_bounds(spec, old, delta)
        kind = random.random()
        if kind < 0.5:
            new = old + random.gauss(0, 0.5)
        elif kind < 0.95:
            bound = log_lower if random.random() < 0.5 else log_upper
            offset = 1 + random.choice((-1, 1)) * 10 ** random.uniform(-3, 0)
            new = old + float(max(mpf(-22), bound)) * offset
        else:
            new = old - 40 * random.random()
        new = float(np.float32(min(new, 0.0)))
        # A loss in float32 has its log-ratio in float32, which is exact for these tokens alone.
        x = mpf(new) - mpf(old)
        if mpf(float(np.float32(new) - np.float32(old))) != x:
            continue
        lower, upper = mp.exp(log_lower), mp.exp(log_upper)
        r = mp.exp(max(-LIMIT, min(LIMIT, x)))
        if any(abs(r - edge) < NEAR * edge for edge in (lower, upper, mpf(3), mpf("1.5"))):
            continue
        advantage = float(np.float32(random.gauss(0, 1)))
        token = Token(new, x, advantage, lower, upper)
        results = [value for rule in RULES.values() for value in rule(token)]
        numbers = [mpf(old), mpf(new), mpf(advantage), log_lower, log_upper, *results]
        made.append([spec, repr(delta), *(to_double(value).hex() for value in numbers)])
    return made


def main() -> None:
    """Writes the file."""
    mp.dps = 60
    columns = ["divergence", "delta", "old_log_prob", "log_prob", "advantage"]
    columns += ["log_lower", "log_upper"]
    columns += [f"{what} of {rule}" for rule in RULES for what in ("loss", "gradient")]
    lines = [",".join(columns), *(",".join(row) for region in REGIONS for row in rows(*region))]
    # Without a time in the header, the same lines are the same file.
    FILE.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode("ascii"), mtime=0))
    print(f"{FILE}: {len(lines) - 1} tokens")


if __name__ == "__main__":
    main()
