"""Writes python/bandpo/conform/vectors.safetensors: losses and gradients of every preset.

Each rule is written out again in mpmath at 50 digits, with its own numbers. Bounds come from
tests/support/reference.py. So the file is independent of the library. docs/conformance.md defines
its content. Log-probs lie on a grid on which their differences are exact in float32. No token is
next to a bound, because a table may decide either way there.

    python tools/make_vectors.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from mpmath import inf, mp, mpf
from safetensors.numpy import save

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.reference import log_bounds, to_double  # noqa: E402

FILE = ROOT / "python" / "bandpo" / "conform" / "vectors.safetensors"
FORMAT = "bandpo-conformance-1"
DIGITS = 50
ROWS, WIDTH = 4, 6
SEED = 20261127
STEP = 2.0**-12
"""Grid of the log-probs, on which sums and differences are exact in float32."""

NEAR = mpf("1e-3")
"""Min distance of a statistic from its threshold, relative to the threshold or to a scale."""

LIMIT = mpf(20)
"""Clamp of a log-ratio, on both sides, before it is exponentiated."""

CASES = (
    "float32",
    "bfloat16",
    "padding",
    "p1",
    "positive",
    "ratio89",
    "empty-row",
    "zero-advantages",
    "split",
)
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
ADVANTAGES = (1.5, -0.75, 0.5, -1.25)


class Near(Exception):  # noqa: N818 -- no error: the row is drawn again
    """A value too near to a threshold."""


def above(value: mpf, threshold: mpf, scale: mpf | None = None) -> bool:
    """True if a value is above a threshold; raises Near if rounding could decide otherwise.

    A value equal to the threshold is exact, as r = 1 is.
    """
    if value != threshold and not mp.isinf(value) and not mp.isinf(threshold):
        reach = NEAR * (abs(threshold) if scale is None else scale)
        if abs(value - threshold) < min(reach, NEAR):
            raise Near
    return bool(value > threshold)


# --- tokens ------------------------------------------------------------------------------------


def clamp(log_ratio: mpf) -> mpf:
    """A log-ratio, clamped before it is exponentiated."""
    return max(-LIMIT, min(LIMIT, log_ratio))


class Token(NamedTuple):
    """A token that counts."""

    old: mpf
    new: mpf
    rollout: mpf
    a: mpf

    @property
    def x(self) -> mpf:
        """The clamped log-ratio."""
        return clamp(self.new - self.old)

    @property
    def ratio(self) -> mpf:
        """The ratio without the clamp, which is compared with bounds."""
        return mp.exp(self.new - self.old)

    @property
    def clamped(self) -> bool:
        """True if the clamp acts."""
        return bool(abs(self.new - self.old) > LIMIT)


Row = list[Token]
Loss = tuple[mpf, mpf, bool, bool]
"""Loss of a token, its gradient, and two flags: beyond its lower, beyond its upper bound."""

Rows = Callable[[list[Row]], list[list[Loss]]]
Ends = Callable[[mpf], tuple[mpf, mpf]]
"""Bounds of the ratio at an old log-prob."""


# --- bounds ------------------------------------------------------------------------------------


def interval(lower: str, upper: str) -> Ends:
    """Constant bounds."""
    return lambda old: (mpf(lower), mpf(upper))


@cache
def _band(divergence: str, delta: str, old: mpf) -> tuple[mpf, mpf]:
    lower, upper = log_bounds(divergence, min(old, mpf(0)), float(delta))
    return mp.exp(lower), mp.exp(upper)


def band(divergence: str, delta: str) -> Ends:
    """The band of an f-divergence."""
    return lambda old: _band(divergence, delta, old)


def capped(ends: Ends, cap: int) -> Ends:
    """Bounds with a max ratio."""
    return lambda old: (ends(old)[0], min(ends(old)[1], mpf(cap)))


def widest(first: Ends, second: Ends) -> Ends:
    """The union of two intervals."""
    return lambda old: (min(first(old)[0], second(old)[0]), max(first(old)[1], second(old)[1]))


def narrowest(first: Ends, second: Ends) -> Ends:
    """The intersection of two intervals."""
    return lambda old: (max(first(old)[0], second(old)[0]), min(first(old)[1], second(old)[1]))


def dcpo(old: mpf) -> tuple[mpf, mpf]:
    """DCPO, arXiv 2509.02333, Eq. 4, with its cap."""
    p = mp.exp(min(old, mpf(0)))
    low = mp.sqrt(max(1 - 4 * mpf("0.16") / p, mpf(0)))
    return (1 + low) / 2, min((1 + mp.sqrt(1 + 4 * mpf("0.2") / p)) / 2, mpf(10))


# --- rules of a token --------------------------------------------------------------------------


def clipped(bound: mpf) -> mpf:
    """A bound, clamped, that replaces the ratio of a token beyond it."""
    return mp.exp(clamp(mp.log(bound))) if bound > 0 else mp.exp(-LIMIT)


def sides(t: Token, r: mpf, lower: mpf, upper: mpf) -> tuple[bool, bool]:
    """Two flags: the ratio is below its lower, above its upper bound."""
    return above(lower, r, min(abs(1 - lower), max(lower, r))), above(r, upper, abs(upper - 1))


def min_clip(t: Token, r: mpf, compared: mpf, ends: Ends, dual: int | None = None) -> Loss:
    """PPO, arXiv 1707.06347, Eq. 7; dual clip: arXiv 1912.09729, Eq. 5."""
    lower, upper = ends(t.old)
    below, over = sides(t, compared, lower, upper)
    low, high = t.a < 0 and below, t.a > 0 and over
    loss, slope = -t.a * r, -t.a * r
    if low or high:
        loss, slope = -t.a * clipped(lower if low else upper), mpf(0)
    elif dual is not None and t.a < 0 and above(r, mpf(dual)):
        loss, slope = -t.a * dual, mpf(0)
    return loss, slope, low, high


def of_tokens(rule: Callable[[Token, mpf], Loss], *, clamp_stops: bool = False) -> Rows:
    """A rule in which each token has its own ratio."""

    def losses(rows: list[Row]) -> list[list[Loss]]:
        made = [[rule(t, mp.exp(t.x)) for t in row] for row in rows]
        if not clamp_stops:
            return made
        return [
            [
                (f, mpf(0) if t.clamped else g, *out)
                for t, (f, g, *out) in zip(row, one, strict=True)
            ]
            for row, one in zip(rows, made, strict=True)
        ]

    return losses


def ppo(ends: Ends, dual: int | None = None) -> Rows:
    """PPO's clip on tokens."""
    return of_tokens(lambda t, r: min_clip(t, r, t.ratio, ends, dual), clamp_stops=True)


def mask(ends: Ends, *, symmetric: bool = False, penalty: str = "0") -> Rows:
    """DPPO, arXiv 2602.04879, Eq. 12 and 23; IPO of prime-rl is symmetric, with a penalty."""

    def rule(t: Token, r: mpf) -> Loss:
        below, over = sides(t, t.ratio, *ends(t.old))
        low, high = below and (symmetric or t.a < 0), over and (symmetric or t.a > 0)
        slope = mpf(0) if low or high else -t.a * r
        loss = slope * t.new + mpf(penalty) * t.x**2
        return loss, slope + (0 if t.clamped else 2 * mpf(penalty) * t.x), low, high

    return of_tokens(rule)


def weight(ends: Callable[[Token], tuple[mpf, mpf]]) -> Rows:
    """CISPO, arXiv 2506.13585, Eq. 4-5."""

    def rule(t: Token, r: mpf) -> Loss:
        lower, upper = ends(t)
        low, high = sides(t, t.ratio, lower, upper)
        slope = -t.a * (clipped(lower) if low else clipped(upper) if high else r)
        return slope * t.new, slope, low, high

    return of_tokens(rule)


def ce_gppo(t: Token, r: mpf) -> Loss:
    """CE-GPPO, arXiv 2509.20712, Eq. 8 and 10."""
    below, over = sides(t, r, mpf("0.8"), mpf("1.2"))
    low, high = t.a < 0 and below, t.a > 0 and over
    if low or high:
        loss = -t.a * (mpf("0.75") * mpf("0.8") if low else mpf("1.2"))
        return loss, loss, low, high
    return -t.a * r, mpf(0) if t.clamped else -t.a * r, low, high


def sapo(t: Token, r: mpf) -> Loss:
    """SAPO, arXiv 2511.20347: a sigmoid of the ratio times 4 / tau."""
    tau = mpf(1) if t.a > 0 else mpf("1.05")
    gate, rest = (1 / (1 + mp.exp(sign * tau * (r - 1))) for sign in (-1, 1))
    return -t.a * 4 / tau * gate, -t.a * 4 * gate * rest * r, False, above(r, mpf(2))


def spo(t: Token, r: mpf) -> Loss:
    """SPO, arXiv 2401.16025, Eq. 16."""
    eps = mpf("0.2")
    low, high = sides(t, r, 1 - eps, 1 + eps)
    loss = -t.a * r + abs(t.a) * (r - 1) ** 2 / (2 * eps)
    return loss, r * (-t.a + abs(t.a) * (r - 1) / eps), low, high


def topr(t: Token) -> tuple[mpf, mpf]:
    """TOPR, arXiv 2503.14286, Eq. 8, of a token."""
    return (mpf(1), mpf(1)) if t.a > 0 else (mpf(0), mpf(1))


# --- rules of a sequence or a batch ------------------------------------------------------------


def gspo(low: str, high: str) -> Rows:
    """GSPO, arXiv 2507.18071, Eq. 5-7: the clip of PPO on the geometric mean of the ratios."""

    def losses(rows: list[Row]) -> list[list[Loss]]:
        made = []
        for row in rows:
            s = mp.exp(sum((t.x for t in row), mpf(0)) / max(len(row), 1))
            made.append([min_clip(t, s, s, interval(low, high)) for t in row])
        return made

    return losses


def gmpo(rows: list[Row]) -> list[list[Loss]]:
    """GMPO, arXiv 2507.20673, Algorithm 1."""
    made = []
    for row in rows:
        outside = [sides(t, t.x + 1, mpf("0.6"), mpf("1.4")) for t in row]
        low = [t.a < 0 and below for t, (below, _) in zip(row, outside, strict=True)]
        high = [t.a > 0 and over for t, (_, over) in zip(row, outside, strict=True)]
        moved = [
            mpf("-0.4") if one else mpf("0.4") if other else t.x
            for t, one, other in zip(row, low, high, strict=True)
        ]
        mean = mp.exp(sum(moved, mpf(0)) / max(len(row), 1))
        made.append(
            [
                (-t.a * mean, mpf(0) if one or other else -t.a * mean, one, other)
                for t, one, other in zip(row, low, high, strict=True)
            ]
        )
    return made


def vespo(rows: list[Row]) -> list[list[Loss]]:
    """VESPO, arXiv 2602.10693: a gamma density of the product of the ratios, as a weight."""
    made = []
    for row in rows:
        total = max(-LIMIT, min(LIMIT, sum((t.x for t in row), mpf(0))))
        of_row = []
        for t in row:
            k, rate = (2, 3) if t.a >= 0 else (3, 2)
            slope = -t.a * mp.exp(k * total + rate * (1 - mp.exp(total)))
            of_row.append((slope * t.new, slope, False, False))
        made.append(of_row)
    return made


def cppo(rows: list[Row]) -> list[list[Loss]]:
    """CPPO, arXiv 2606.10968: a budget along the sequence, delta 0.15, w_min 0.8."""
    made = []
    for row in rows:
        moved = [abs(mp.exp(min(t.new, mpf(0))) - mp.exp(min(t.old, mpf(0)))) for t in row]
        ordered = sorted(moved)
        allowance = mpf(0)
        if row:
            place = mpf(9) * (len(row) - 1) / 10
            below = int(mp.floor(place))
            next_one = ordered[min(below + 1, len(row) - 1)]
            allowance = ordered[below] + (place - below) * (next_one - ordered[below])
        allowance = max(mpf("0.02"), min(mpf("0.04"), allowance))
        spent = weights = mpf(0)
        of_row = []
        for position, (t, distance) in enumerate(zip(row, moved, strict=True)):
            w = 1 - (1 - mpf("0.8")) * position / max(len(row) - 1, 1)
            left = min(mpf("0.15"), mpf("0.15") + allowance * weights - spent)
            dropped = above(w * distance, left, mpf("0.15"))
            low, high = dropped and t.a < 0 and t.x < 0, dropped and t.a > 0 and t.x > 0
            slope = mpf(0) if low or high else -t.a * mp.exp(t.x)
            of_row.append((slope * t.new, slope, low, high))
            spent, weights = spent + w * distance, weights + w
        made.append(of_row)
    return made


def m2po(rows: list[Row]) -> list[list[Loss]]:
    """M2PO, arXiv 2510.01161: the width whose capped second moment is 0.04, exactly."""
    squares = sorted(t.x**2 for row in rows for t in row if t.a * t.x > 0)
    n, budget = len(squares), mpf("0.04")
    lower, upper = mpf(0), mpf(inf)
    if above(sum(squares, mpf(0)), budget * n):
        below = mpf(0)
        for k, square in enumerate(squares):
            width = (budget * n - below) / (n - k)
            if width <= square:
                lower, upper = mp.exp(-mp.sqrt(width)), mp.exp(mp.sqrt(width))
                break
            below += square
    return ppo(lambda old: (lower, upper))(rows)


# --- corrections -------------------------------------------------------------------------------


def log_b(t: Token) -> mpf:
    """The log-ratio of old to rollout."""
    return t.old - t.rollout


def mean_of(row: Row, value: Callable[[Token], mpf]) -> mpf:
    """The mean over a row."""
    return sum(map(value, row), mpf(0)) / max(len(row), 1)


def weight_of(log_weight: mpf) -> mpf:
    """The weight whose logarithm is clamped."""
    return mp.exp(max(-LIMIT, min(LIMIT, log_weight)))


def icepop(row: Row) -> list[mpf]:
    """IcePop, arXiv 2510.18855: old/rollout, or 0 outside [0.5, 5]."""
    return [
        mpf(0) if any(sides(t, mp.exp(log_b(t)), mpf("0.5"), mpf(5))) else weight_of(log_b(t))
        for t in row
    ]


def tis(row: Row) -> list[mpf]:
    """Truncated importance sampling: min(old/rollout, 2)."""
    return [mpf(2) if above(weight_of(log_b(t)), mpf(2)) else weight_of(log_b(t)) for t in row]


def mis(row: Row) -> list[mpf]:
    """Masked importance sampling of sequences: the product, or 0 above 3."""
    total = sum(map(log_b, row), mpf(0))
    kept = not above(mp.exp(total), mpf(3))
    return [weight_of(total) if kept else mpf(0) for _ in row]


def geometric(low: str, high: str, *, weighted: bool) -> Callable[[Row], list[mpf]]:
    """A filter of sequences: the geometric mean of old/rollout has to be in a range."""

    def weights(row: Row) -> list[mpf]:
        outside = any(sides(row[0], mp.exp(mean_of(row, log_b)), mpf(low), mpf(high))) if row else 0
        return [mpf(0) if outside else weight_of(log_b(t)) if weighted else mpf(1) for t in row]

    return weights


def opsm(row: Row) -> list[mpf]:
    """Off-policy sequence masking, arXiv 2512.02556, Eq. 9, with delta 1e-4."""
    drifted = above(-mean_of(row, log_b), mpf("1e-4"))
    return [mpf(0) if drifted and row[0].a < 0 else mpf(1) for _ in row]


def bernoulli_kl(t: Token) -> mpf:
    """KL(rollout || old) of {this token, everything else}."""
    p, q = (mp.exp(min(value, mpf(0))) for value in (t.rollout, t.old))
    rest = mpf(0) if p == 1 else mpf(inf) if q == 1 else (1 - p) * mp.log((1 - p) / (1 - q))
    return p * mp.log(p / q) + rest


def flash(row: Row) -> list[mpf]:
    """FlashREINFORCE: weights of 0 for a sequence whose mean divergence is above 3e-3."""
    dropped = above(mean_of(row, bernoulli_kl), mpf("3e-3"))
    return [mpf(0) if dropped else weight_of(log_b(t)) for t in row]


def corrected(weights: Callable[[Row], list[mpf]]) -> Rows:
    """PPO's clip with weights that multiply the advantage."""

    def losses(rows: list[Row]) -> list[list[Loss]]:
        weighted = [
            [t._replace(a=t.a * w) for t, w in zip(row, weights(row), strict=True)] for row in rows
        ]
        return ppo(interval("0.8", "1.2"))(weighted)

    return losses


_IPO = mask(band("tv", "0.1"), symmetric=True, penalty="1e-3")

RULES: dict[str, Rows] = {
    "ppo": ppo(interval("0.8", "1.2")),
    "dapo": ppo(interval("0.8", "1.28")),
    "dual-clip": ppo(interval("0.8", "1.2"), 3),
    "bandpo-kl": ppo(capped(band("kl", "0.05"), 10), 10),
    "bandpo-tv": ppo(capped(band("tv", "0.05"), 10), 10),
    "bandpo-chi2": ppo(capped(band("pearson-chi2", "0.05"), 10), 10),
    "trgppo": ppo(widest(band("kl", "0.001"), interval("0.9", "1.1"))),
    "dppo-tv": mask(band("tv", "0.15")),
    "dppo-kl": mask(band("kl", "0.05")),
    "prime-rl": _IPO,
    "prime-rl-2026-04": mask(band("tv", "0.2")),
    "prime-rl-2026-09": mask(band("tv", "0.3"), symmetric=True),
    "ipo": _IPO,
    "kpop": mask(narrowest(band("kl", "0.1"), band("reverse-kl", "0.1")), symmetric=True),
    "icepop": corrected(icepop),
    "prime-rl-icepop": mask(interval("0.2", "5"), symmetric=True),
    "tis": corrected(tis),
    "mis": corrected(mis),
    "geo-mask": corrected(geometric("0.99", "1.01", weighted=False)),
    "seq-mask-tis": corrected(geometric("0.999", "1.002", weighted=True)),
    "opsm": corrected(opsm),
    "flash-reinforce": corrected(flash),
    "sapo": of_tokens(sapo, clamp_stops=True),
    "spo": of_tokens(spo, clamp_stops=True),
    "cppo": cppo,
    "m2po": m2po,
    "topr": weight(topr),
    "gpg": weight(lambda t: (mpf(1), mpf(1))),
    "dcpo": ppo(dcpo, 10),
    "cispo": weight(lambda t: (mpf(0), mpf(5))),
    "ce-gppo": of_tokens(ce_gppo),
    "gmpo": gmpo,
    "gspo": gspo("0.9997", "1.0004"),
    "luspo": gspo("0.998", "1.0025"),
    "vespo": vespo,
    "bapo": ppo(interval("0.6", "1.2")),
}
"""The rule of every preset, of bapo the one that its controller begins with."""


# --- batches -----------------------------------------------------------------------------------


class CaseArrays(NamedTuple):
    """Arrays [ROWS, WIDTH]; masked tokens may hold any value."""

    old_log_prob: np.ndarray
    log_prob: np.ndarray
    rollout_log_prob: np.ndarray
    advantages: np.ndarray
    response_mask: np.ndarray

    def rows(self) -> list[Row]:
        """The tokens that count."""
        columns = (self.old_log_prob, self.log_prob, self.rollout_log_prob, self.advantages)
        return [
            [Token(*(mpf(float(c[i, j])) for c in columns)) for j in range(WIDTH) if mask[j]]
            for i, mask in enumerate(self.response_mask)
        ]


MEANS = (1.6e-4, -1.2e-3, 0.11, -0.18)
"""Mean log-ratios of the rows of a plain batch, inside and outside the bounds of sequences."""

DRIFTS = (4e-4, 6e-3, -0.02, -0.15)
"""Mean log-ratios of old to rollout, likewise."""


def drawn(random: Random) -> list[list[list[float]]]:
    """Old, new and rollout log-probs on the grid, with MEANS and DRIFTS."""
    values: list[list[list[float]]] = [[], [], []]
    for i in range(ROWS):
        old = [-(10 ** random.uniform(-2.0, 0.9)) for _ in range(WIDTH)]
        step, drift = (
            [random.gauss(0.0, scale) for _ in range(WIDTH)]
            for scale in (0.6, (0.02, 0.02, 0.9, 0.3)[i])
        )
        for each, mean in ((step, MEANS[i]), (drift, DRIFTS[i])):
            each[:] = [round(value / STEP) * STEP for value in each]
            each[-1] += round((mean * WIDTH - sum(each)) / STEP) * STEP
        old = [round(value / STEP) * STEP for value in old]
        # A probability stays below 1.
        old = [min(o, -max(s, -d, 0.0) - STEP) for o, s, d in zip(old, step, drift, strict=True)]
        for kept, moved in zip(values, ([0.0] * WIDTH, step, [-d for d in drift]), strict=True):
            kept.append([o + m for o, m in zip(old, moved, strict=True)])
    return values


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 numbers, in float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def batch_of(case: str, random: Random) -> CaseArrays:
    """The batch of a case."""
    old, new, rollout = (np.array(each, dtype=np.float32) for each in drawn(random))
    advantages = np.repeat(np.array(ADVANTAGES, dtype=np.float32)[:, None], WIDTH, 1)
    valid = np.ones((ROWS, WIDTH), dtype=np.uint8)
    if case == "bfloat16":
        old, new, rollout = map(bfloat16, (old, new, rollout))
    elif case == "padding":
        for i, j in ((0, 4), (0, 5), (1, 0), (3, 2), (3, 5)):
            valid[i, j] = 0
        poison = (np.nan, np.inf, -np.inf, np.nan, np.inf)
        for array, shift in ((old, 0), (new, 1), (rollout, 2), (advantages, 3)):
            array[valid == 0] = np.roll(poison, shift)
    elif case == "p1":
        for i, j in ((0, 0), (1, 1), (2, 2), (3, 3)):
            old[i, j] = new[i, j] = rollout[i, j] = 0.0
        for i, j in ((0, 1), (1, 2)):
            old[i, j] = rollout[i, j] = 0.0
            new[i, j] = -0.375
        for i, j in ((2, 3), (3, 4)):
            old[i, j] = rollout[i, j] = -1.5
            new[i, j] = 0.0
    elif case == "positive":
        for i, j in ((0, 0), (1, 1), (2, 2), (3, 3)):
            old[i, j] = new[i, j] = rollout[i, j] = 2 * STEP
        for i, j in ((0, 1), (1, 2)):
            old[i, j] = rollout[i, j] = STEP
            new[i, j] = 9 * STEP
        for i, j in ((2, 3), (3, 4)):
            old[i, j] = rollout[i, j] = -0.75
            new[i, j] = 4 * STEP
    elif case == "ratio89":
        for i, sign in enumerate((1, 1, -1, -1)):
            old[i, 2], new[i, 2] = (-90.5, -1.5) if sign > 0 else (-1.5, -90.5)
            rollout[i, 2] = old[i, 2]
        rollout[2, 4], rollout[3, 4] = old[2, 4] - 89, old[3, 4] - 89
    elif case == "empty-row":
        valid[2] = 0
    elif case == "zero-advantages":
        advantages[:] = 0.0
    return CaseArrays(old, new, rollout, advantages, valid)


# --- results -----------------------------------------------------------------------------------


def rounded(value: mpf) -> float:
    """The nearest double, 0 below them, because `to_double` would form a huge denominator there."""
    return 0.0 if abs(value) < mpf(2) ** -1100 else to_double(value)


def weights_of(mode: str, lengths: list[int]) -> list[mpf]:
    """The weight of a token of each row."""
    tokens, sequences = max(sum(lengths), 1), max(sum(length > 0 for length in lengths), 1)
    each: dict[str, Callable[[int], mpf]] = {
        "token-mean": lambda n: mpf(1) / tokens,
        "token-sum": lambda n: mpf(1),
        "seq-mean-token-sum": lambda n: mpf(1) / sequences,
        "seq-mean-token-mean": lambda n: mpf(1) / sequences / max(n, 1),
        "seq-mean-token-sum-norm": lambda n: mpf(1) / sequences / WIDTH,
    }
    return [each[mode](n) for n in lengths]


def results(batch: CaseArrays, losses: list[list[Loss]]) -> Iterator[tuple[str, np.ndarray]]:
    """The fields of a preset on a batch."""
    lengths = [len(row) for row in losses]
    for mode in MODES:
        weights = weights_of(mode, lengths)
        terms = [w * one[0] for w, row in zip(weights, losses, strict=True) for one in row]
        gradient = np.zeros((ROWS, WIDTH))
        gradient[batch.response_mask != 0] = [
            rounded(w * one[1]) for w, row in zip(weights, losses, strict=True) for one in row
        ]
        sums = [rounded(sum(values, mpf(0))) for values in (terms, map(abs, terms))]
        yield f"{mode}/loss", np.array(sums)
        yield f"{mode}/gradient", gradient
    flat = [one for row in losses for one in row]
    kept = sum(np.float32(rounded(one[1])) != 0 for one in flat)
    counts = [sum(one[2] for one in flat), sum(one[3] for one in flat), kept, len(flat)]
    yield "any/counts", np.array(counts, dtype=np.int32)


def of_case(case: str, seed: str) -> dict[str, np.ndarray]:
    """All tensors of a case, drawn again while a token is next to a threshold."""
    for attempt in range(200):
        batch = batch_of(case, Random(f"{seed} {attempt}"))  # noqa: S311
        rows = batch.rows()
        made = {f"inputs/{case}/any/{name}": array for name, array in batch._asdict().items()}
        try:
            for name, rule in RULES.items():
                for field, array in results(batch, rule(rows)):
                    made[f"{name}/{case}/{field}"] = array
        except Near:
            continue
        return made
    raise RuntimeError(f"no batch of {case} is clear of all thresholds")


def main() -> None:
    """Writes the file."""
    mp.dps = DIGITS
    made: dict[str, np.ndarray] = {}
    for case in CASES:
        seed = "float32" if case == "split" else case
        made.update(of_case(case, f"{SEED} {seed}"))
        print(case, flush=True)
    FILE.write_bytes(save(made, {"format": FORMAT}))
    print(f"{FILE}: {len(RULES)} rules, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
