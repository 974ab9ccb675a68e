"""Rules of trainers and later papers, in plain loops over the tokens, against the presets.

The functions ``published_...`` are oracles: from the tokens of one sequence to the loss of each and
its derivative in their ``log_prob``, with the numbers spelled out. Sequences differ in length; the
package gets them padded and packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from bandpo.check import BoolArray, Float64Array
from bandpo.loss import PolicyLoss, PolicyLossResult
from bandpo.presets import PRESETS, preset
from bandpo.schedule import SecondMoment

RULE = 1e-9
"""Relative tolerance of a loss or a gradient, as in test_rules.py: an oracle subtracts 1 from a
ratio as it is published, so that next to 1 it has lost digits."""


class Sampled(NamedTuple):
    """The tokens of one sequence that count."""

    old: list[float]
    new: list[float]
    rollout: list[float]
    advantage: float

    def __len__(self) -> int:
        return len(self.old)


TokenLosses: TypeAlias = list[tuple[float, float]]
"""Loss and gradient of each token."""


class Drawn(NamedTuple):
    """Sequences of different lengths, side by side, and which of their tokens count."""

    old: Float64Array
    new: Float64Array
    rollout: Float64Array
    advantages: Float64Array
    mask: BoolArray
    lengths: list[int]

    def sequences(self) -> Iterator[Sampled]:
        for row, length in enumerate(self.lengths):
            counts = np.flatnonzero(self.mask[row, :length])
            old, new, rollout = (column[row, counts].tolist() for column in self[:3])
            yield Sampled(old, new, rollout, float(self.advantages[row]))


def drawn(seed: int, step: float, drift: float) -> Drawn:
    """60 sequences of 1 to 14 tokens, of which some are masked; NaN in what does not count.

    Steps from the old to the new policy, and from the rollout policy to the old one, are mostly
    small, and some are five times the scale.
    """
    rng = np.random.default_rng(seed)
    rows, width = 60, 14
    shape = rows, width
    lengths = rng.integers(1, width + 1, rows)
    rollout = -np.logaddexp(0.0, -rng.uniform(-4.0, 3.0, shape))

    def moved(start: Float64Array, scale: float) -> Float64Array:
        size = scale * rng.choice((0.3, 1.0, 5.0), shape, p=(0.6, 0.3, 0.1))
        return np.asarray(np.minimum(start + size * rng.normal(0.0, 1.0, shape), -1e-3))

    old = moved(rollout, drift)
    new = moved(old, step)
    mask = (rng.random(shape) < 0.85) & (np.arange(width) < lengths[:, None])
    mask[7] = False  # a sequence without a token that counts
    for column in (old, new, rollout):
        column[~mask] = math.nan
    advantages = rng.normal(0.0, 1.0, rows)
    advantages[11] = 0.0
    return Drawn(old, new, rollout, advantages, mask, [int(n) for n in lengths])


# --- oracles: losses ---------------------------------------------------------------------------


def away(advantage: float, r: float) -> bool:
    """A token has moved with its advantage."""
    return advantage * (r - 1.0) > 0.0


def masked(sampled: Sampled, keeps: Callable[[float, float, float], bool]) -> TokenLosses:
    """-A sg(r) ln pi of a token that is kept, whose gradient is that of -A r; 0 of the others.

    Args:
        sampled: The tokens.
        keeps: From p, q and A to whether a token is kept.
    """
    found = []
    for old, new in zip(sampled.old, sampled.new, strict=True):
        p, q = math.exp(old), math.exp(new)
        kept = keeps(p, q, sampled.advantage)
        gradient = -sampled.advantage * q / p if kept else 0.0
        found.append((gradient * new, gradient))
    return found


def published_ipo(sampled: Sampled, eps: float, kl_tau: float) -> TokenLosses:
    """prime-rl, ipo_loss_fn: dropped if abs(q - mu) > eps, and kl_tau (ln r)^2 on every token."""
    kept = masked(sampled, lambda p, q, _: not abs(q - p) > eps)
    found = []
    for (loss, gradient), old, new in zip(kept, sampled.old, sampled.new, strict=True):
        log_ratio = new - old
        found.append((loss + kl_tau * log_ratio**2, gradient + 2.0 * kl_tau * log_ratio))
    return found


def published_one_sided_tv(sampled: Sampled) -> TokenLosses:
    """prime-rl before IPO: dropped above +0.2 for A > 0 and below -0.2 otherwise."""
    return masked(sampled, lambda p, q, a: not (q - p > 0.2 if a > 0.0 else q - p < -0.2))


def bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1.0 - p) * math.log((1.0 - p) / (1.0 - q))


def published_kpop(sampled: Sampled) -> TokenLosses:
    """KPop: kept while both Bernoulli divergences are at most phi = 0.1."""
    return masked(sampled, lambda p, q, _: max(bernoulli_kl(p, q), bernoulli_kl(q, p)) <= 0.1)


def published_icepop_loss(sampled: Sampled) -> TokenLosses:
    """prime-rl #3526: kept while 0.2 <= pi/mu <= 5."""
    return masked(sampled, lambda p, q, _: 0.2 <= q / p <= 5.0)


def published_sapo(sampled: Sampled) -> TokenLosses:
    """arXiv 2511.20347: -A (4/tau) sigmoid(tau (r - 1)), tau 1.0 for A > 0 and 1.05 otherwise."""
    a = sampled.advantage
    tau = 1.0 if a > 0.0 else 1.05
    found = []
    for old, new in zip(sampled.old, sampled.new, strict=True):
        r = math.exp(new - old)
        gate, rest = (1.0 / (1.0 + math.exp(sign * tau * (r - 1.0))) for sign in (-1, 1))
        found.append((-a * 4.0 / tau * gate, -a * 4.0 * gate * rest * r))
    return found


def published_spo(sampled: Sampled) -> TokenLosses:
    """arXiv 2401.16025, Eq. 16: -(r A - abs(A) (r - 1)^2 / (2 eps)), eps = 0.2."""
    a = sampled.advantage
    found = []
    for old, new in zip(sampled.old, sampled.new, strict=True):
        r = math.exp(new - old)
        loss = -(r * a - abs(a) * (r - 1.0) ** 2 / (2.0 * 0.2))
        found.append((loss, -(a - abs(a) * (r - 1.0) / 0.2) * r))
    return found


def published_cppo(sampled: Sampled) -> TokenLosses:
    """CPPO as its authors coded it, with delta 0.15, w_min 0.8 and delta_b in [0.02, 0.04]."""
    a, n = sampled.advantage, len(sampled)
    moved = [math.exp(new) - math.exp(old) for old, new in zip(*sampled[:2], strict=True)]
    allowance = min(max(float(np.quantile(np.abs(moved), 0.9)), 0.02), 0.04) if n else 0.0
    spent = weights = 0.0
    found = []
    for t, (old, new) in enumerate(zip(sampled.old, sampled.new, strict=True), 1):
        w, r = 1.0 - (1.0 - 0.8) * (t - 1) / max(n - 1, 1), math.exp(new - old)
        d = abs(moved[t - 1])
        kept = not away(a, r) or w * d <= min(0.15, 0.15 + allowance * weights - spent)
        gradient = -a * r if kept else 0.0
        found.append((gradient * new, gradient))
        spent, weights = spent + w * d, weights + w
    return found


def published_topr(sampled: Sampled) -> TokenLosses:
    """TOPR as in ROLL: -A ln pi where A > 0, else -sg(clamp(r, 0, 1)) A ln pi."""
    a = sampled.advantage
    found = []
    for old, new in zip(sampled.old, sampled.new, strict=True):
        weight = 1.0 if a > 0.0 else min(math.exp(new - old), 1.0)
        found.append((-weight * a * new, -weight * a))
    return found


def published_gpg(sampled: Sampled) -> TokenLosses:
    """arXiv 2504.02546: -A ln pi."""
    return [(-sampled.advantage * new, -sampled.advantage) for new in sampled.new]


def published_luspo(sampled: Sampled) -> TokenLosses:
    """arXiv 2602.05261: GSPO's clip of the geometric ratio with 2e-3 and 2.5e-3, on every token.

    The loss of a sequence is the one of GSPO times its length, whose derivative in each log-prob
    is 1/n of that: the sum of n equal losses.
    """
    a, n = sampled.advantage, len(sampled)
    s = math.exp(math.fsum(new - old for old, new in zip(*sampled[:2], strict=True)) / max(n, 1))
    clipped = min(max(s, 1.0 - 2e-3), 1.0 + 2.5e-3)
    flows = s <= 1.0 + 2.5e-3 if a > 0.0 else s >= 1.0 - 2e-3
    return [(-min(s * a, clipped * a), -a * s if flows else 0.0)] * n


def published_vespo(sampled: Sampled) -> TokenLosses:
    """arXiv 2602.10693: -phi(W) A ln pi, phi = e^lam W^k e^(-lam W), W of the sequence."""
    a = sampled.advantage
    k, lam = (2.0, 3.0) if a >= 0.0 else (3.0, 2.0)
    w = math.exp(math.fsum(new - old for old, new in zip(*sampled[:2], strict=True)))
    phi = math.exp(lam + k * math.log(w) - lam * w)
    return [(-phi * a * new, -phi * a) for new in sampled.new]


# --- oracles: corrections, of w = old/rollout, with the clip of PPO ------------------------------

Weights: TypeAlias = Callable[[Sampled], list[float]]


def ratios(sampled: Sampled) -> list[float]:
    return [math.exp(old - mu) for old, mu in zip(sampled.old, sampled.rollout, strict=True)]


def published_icepop(sampled: Sampled) -> list[float]:
    """arXiv 2510.18855, with 0.5 and 5: M(w) = w inside, 0 outside."""
    return [w if 0.5 <= w <= 5.0 else 0.0 for w in ratios(sampled)]


def published_tis(sampled: Sampled) -> list[float]:
    """min(w, 2)."""
    return [min(w, 2.0) for w in ratios(sampled)]


def published_mis(sampled: Sampled) -> list[float]:
    """TRL, sequence_mask: the product of a sequence, if it is at most 3."""
    product = math.prod(ratios(sampled))
    return [product if product <= 3.0 else 0.0] * len(sampled)


def geometric_mean(sampled: Sampled) -> float:
    return math.prod(ratios(sampled)) ** (1.0 / max(len(sampled), 1))


def published_geo_mask(sampled: Sampled) -> list[float]:
    """SkyRL, geo_mask_low and geo_mask_high: a sequence with another geometric mean has no loss."""
    return [1.0 if 0.99 <= geometric_mean(sampled) <= 1.01 else 0.0] * len(sampled)


def published_seq_mask_tis(sampled: Sampled) -> list[float]:
    """NeMo-RL: the same, but tokens that are left keep the weight of each."""
    inside = 0.999 <= geometric_mean(sampled) <= 1.002
    return [w if inside else 0.0 for w in ratios(sampled)]


def published_opsm(sampled: Sampled) -> list[float]:
    """DeepSeek-V3.2, arXiv 2512.02556, Eq. 9: mean ln(mu/old) above delta and A < 0 goes."""
    n = max(len(sampled), 1)
    mean = math.fsum(mu - old for old, mu in zip(sampled.old, sampled.rollout, strict=True)) / n
    return [0.0 if sampled.advantage < 0.0 and mean > 1e-4 else 1.0] * len(sampled)


def published_flash_reinforce(sampled: Sampled) -> list[float]:
    """OpenRLHF #1339: mean Bernoulli KL(rollout || old) of a sequence at most 3e-3."""
    divergences = [
        bernoulli_kl(math.exp(mu), math.exp(old))
        for old, mu in zip(sampled.old, sampled.rollout, strict=True)
    ]
    mean = math.fsum(divergences) / max(len(sampled), 1)
    return [w if mean <= 3e-3 else 0.0 for w in ratios(sampled)]


def min_clipped(sampled: Sampled, lower: float, upper: float) -> TokenLosses:
    """PPO, arXiv 1707.06347, Eq. 7."""
    a = sampled.advantage
    found = []
    for old, new in zip(sampled.old, sampled.new, strict=True):
        r = math.exp(new - old)
        gain = min(r * a, min(max(r, lower), upper) * a)
        flows = r <= upper if a > 0.0 else r >= lower
        found.append((-gain, -a * r if flows else 0.0))
    return found


def corrected(weights: Weights) -> Callable[[Sampled], TokenLosses]:
    def published(sampled: Sampled) -> TokenLosses:
        tokens = zip(min_clipped(sampled, 0.8, 1.2), weights(sampled), strict=True)
        return [(w * loss, w * gradient) for (loss, gradient), w in tokens]

    return published


# --- oracles: from tokens to the loss of a batch -------------------------------------------------

Factors: TypeAlias = Callable[[Sequence[int]], list[float]]


def token_mean(lengths: Sequence[int]) -> list[float]:
    return [1.0 / sum(lengths)] * len(lengths)


def seq_mean_token_mean(lengths: Sequence[int]) -> list[float]:
    some = sum(n > 0 for n in lengths)
    return [1.0 / max(n, 1) / some for n in lengths]


def seq_mean_token_sum(lengths: Sequence[int]) -> list[float]:
    return [1.0 / sum(n > 0 for n in lengths)] * len(lengths)


class Published(NamedTuple):
    """A rule, how its tokens are averaged, and at which steps and drifts it drops some tokens."""

    losses: Callable[[Sampled], TokenLosses]
    factors: Factors = token_mean
    step: float = 0.5
    drift: float = 0.3


PUBLISHED = {
    "prime-rl": Published(lambda sampled: published_ipo(sampled, 0.1, 1e-3)),
    "ipo": Published(lambda sampled: published_ipo(sampled, 0.1, 1e-3)),
    "prime-rl-2026-04": Published(published_one_sided_tv),
    "prime-rl-2026-09": Published(lambda sampled: published_ipo(sampled, 0.3, 0.0), step=1.0),
    "kpop": Published(published_kpop),
    "prime-rl-icepop": Published(published_icepop_loss, step=1.0),
    "sapo": Published(published_sapo, seq_mean_token_mean),
    "spo": Published(published_spo),
    "cppo": Published(published_cppo, step=0.3),
    "topr": Published(published_topr),
    "gpg": Published(published_gpg),
    "luspo": Published(published_luspo, seq_mean_token_sum, step=0.003),
    "vespo": Published(published_vespo, step=0.2),
    "icepop": Published(corrected(published_icepop)),
    "tis": Published(corrected(published_tis)),
    "mis": Published(corrected(published_mis)),
    "geo-mask": Published(corrected(published_geo_mask), drift=0.02),
    "seq-mask-tis": Published(corrected(published_seq_mask_tis), drift=0.003),
    "opsm": Published(corrected(published_opsm)),
    "flash-reinforce": Published(
        corrected(published_flash_reinforce), seq_mean_token_mean, drift=0.1
    ),
}
"""Every preset of a trainer or a later paper but M2PO, which learns from a batch first."""

DROPS = set(PUBLISHED) - {"sapo", "spo", "topr", "gpg", "vespo"}
"""Those in which some tokens have no gradient."""


# --- the package on the same tokens --------------------------------------------------------------


def padded_and_packed(tokens: Drawn, **rule: Any) -> Iterator[tuple[str, Any, Float64Array]]:
    """The result of a loss and its gradient at the tokens that count, for both layouts."""
    kept = np.arange(tokens.mask.shape[1]) < np.asarray(tokens.lengths)[:, None]
    for layout in ("padded", "packed"):
        columns = [torch.from_numpy(column) for column in (*tokens[:3], tokens.mask)]
        advantages = torch.from_numpy(tokens.advantages)[:, None]
        options: dict[str, Any] = {}
        if layout == "packed":
            advantages = advantages.expand(kept.shape)[torch.from_numpy(kept)]
            columns = [column[torch.from_numpy(kept)] for column in columns]
            offsets = np.concatenate([[0], np.cumsum(tokens.lengths)])
            options["cu_seqlens"] = torch.from_numpy(offsets)
        old, new, rollout, mask = columns
        module = PolicyLoss(**rule)
        if module.correction is not None:
            options["rollout_log_prob"] = rollout
        leaf = new.clone().requires_grad_()
        result = module(old, leaf, advantages, mask, **options)
        (gradient,) = torch.autograd.grad(result.loss, leaf)
        assert not gradient[~mask].any()
        yield layout, result, gradient[mask].numpy()


def assert_published(
    tokens: Drawn,
    losses: Callable[[Sampled], TokenLosses],
    factors: Factors,
    **rule: Any,
) -> Float64Array:
    """Loss and gradient are the published ones in both layouts; returns the gradient."""
    by_sequence = [losses(sampled) for sampled in tokens.sequences()]
    lengths = [len(sampled) for sampled in tokens.sequences()]
    each = np.concatenate([np.reshape(found, (-1, 2)) for found in by_sequence])
    weights = np.concatenate(
        [np.full(n, factor) for n, factor in zip(lengths, factors(lengths), strict=True)]
    )
    loss, gradient = each.T
    found: PolicyLossResult
    for layout, found, of_tokens in padded_and_packed(tokens, **rule):
        np.testing.assert_allclose(of_tokens, weights * gradient, rtol=RULE, atol=0, err_msg=layout)
        counts = found.per_token != 0.0
        np.testing.assert_allclose(
            found.per_token[counts].detach().numpy(), loss[loss != 0.0], rtol=RULE, atol=0
        )
        # Of a sum, whose terms have both signs.
        size = np.abs(weights * loss).sum()
        np.testing.assert_allclose(found.loss.item(), (weights * loss).sum(), atol=RULE * size)
    return np.asarray(gradient)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_loss_and_gradient(name: str, backend: str) -> None:
    published = PUBLISHED[name]
    for seed in range(3):
        tokens = drawn(seed, published.step, published.drift)
        gradient = assert_published(
            tokens,
            published.losses,
            published.factors,
            **preset(name).arguments(),
            backend=backend,
            exact=True,
        )
        moved = np.repeat(tokens.advantages, tokens.mask.sum(1)) != 0.0
        dropped = (gradient[moved] == 0.0).mean()
        if name in DROPS and name not in ("prime-rl", "ipo"):  # whose penalty acts on every token
            assert 0.02 < dropped < 0.9, "some tokens are dropped and some are not"
        else:
            assert dropped == 0.0


def test_m2po_clips_at_the_width_whose_second_moment_is_the_budget(backend: str) -> None:
    """arXiv 2510.01161: harmful tokens alone, capped at T, have a mean square of 0.04."""
    found = preset("m2po")
    tokens = drawn(5, 0.6, 0.3)
    assert isinstance(found.region, SecondMoment)
    advantages = np.broadcast_to(tokens.advantages[:, None], tokens.mask.shape)[tokens.mask]
    log_ratio = (tokens.new - tokens.old)[tokens.mask]
    found.region.update(advantages, log_ratio)

    harmful = [x for a, x in zip(advantages, log_ratio, strict=True) if away(a, math.exp(x))]
    low, high = 0.0, max(abs(x) for x in harmful)
    for _ in range(200):
        middle = (low + high) / 2.0
        moment = math.fsum(min(x * x, middle * middle) for x in harmful) / len(harmful)
        low, high = (middle, high) if moment <= 0.04 else (low, middle)
    gradient = assert_published(
        tokens,
        lambda sampled: min_clipped(sampled, math.exp(-low), math.exp(low)),
        token_mean,
        **found.arguments(),
        backend=backend,
    )
    assert 0.02 < (gradient == 0.0).mean() < 0.5


def test_m2po_clips_nothing_before_its_first_batch(backend: str) -> None:
    assert_published(
        drawn(6, 0.6, 0.3),
        lambda sampled: min_clipped(sampled, 0.0, math.inf),
        token_mean,
        **preset("m2po").arguments(),
        backend=backend,
    )


def test_every_preset_of_a_trainer_is_held_to_a_formula() -> None:
    earlier = {
        *("ppo", "dapo", "dual-clip", "bandpo-kl", "bandpo-tv", "bandpo-chi2", "trgppo"),
        *("dppo-tv", "dppo-kl", "dcpo", "cispo", "ce-gppo", "gmpo", "gspo", "bapo"),
    }
    assert set(PUBLISHED) | {"m2po"} == set(PRESETS) - earlier
