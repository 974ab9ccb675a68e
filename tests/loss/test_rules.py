"""Published rules, written as their papers write them, against the presets of their names.

The functions ``published_...`` are oracles: from arrays of tokens to the loss of every token and
the derivative of the sum of these losses in every ``log_prob``, with the numbers of the paper
spelled out. They use nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq

pytest.importorskip("torch")

import torch

from bandpo import Band, BandpoError, Clip, Dcpo, Region
from bandpo.check import Float64Array
from bandpo.loss import PolicyLoss, policy_loss
from bandpo.presets import PRESETS, Preset, preset
from bandpo.region import Combined
from bandpo.schedule import Bapo, RegionSource
from support.tokens import wide_tokens

RULE = 1e-9
"""Relative tolerance of a loss or a gradient: the oracles subtract and find roots in double
precision as the papers write the formulas, where bounds here are good to 1e-14."""

LIMIT = 1e-12
"""Relative tolerance of a closed form that is evaluated as it stands."""

TABLE = 1.3e-6
"""Error of a loss by a table: 1e-6 of a log upper bound or of a lower bound, and the float32
ulp, 2.4e-7, of a log bound below ln 10 or 4. Relative, and for lower bounds absolute."""

TIE = 1e-9
"""Ratios within this of a bound, relatively, are ties, which rounding decides."""

BoolArray = NDArray[np.bool_]
LossAndGradient = tuple[Float64Array, Float64Array]


# --- oracles: bounds of the ratio --------------------------------------------------------------


def binary_kl(p: Float64Array, q: Float64Array) -> Float64Array:
    """DPPO, arXiv 2602.04879, Eq. 14: KL(old || new) of {this token, everything else}."""
    kl: Float64Array = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return kl


def binary_tv(p: Float64Array, q: Float64Array) -> Float64Array:
    """DPPO, arXiv 2602.04879, Eq. 13."""
    return np.asarray(np.abs(p - q))


Bounds = Callable[[Float64Array], tuple[Float64Array, Float64Array]]


def constant(lower: float, upper: float) -> Bounds:
    return lambda p: (np.full_like(p, lower), np.full_like(p, upper))


def trgppo_band(delta: float) -> Bounds:
    """arXiv 1901.10314: the roots of (1-p) ln((1-p)/(1-pr)) - p ln r = delta."""

    def residual(log_r: float, p: float) -> float:
        q = p * np.exp(log_r)
        value: float = (1 - p) * (np.log1p(-p) - np.log1p(-q)) - p * log_r - delta
        return value

    def bounds(p: Float64Array) -> tuple[Float64Array, Float64Array]:
        ends = [
            [
                brentq(residual, a, b, args=(each,), xtol=1e-300, rtol=1e-14)
                for a, b in ((-(1 + delta) / each, 0.0), (0.0, -np.log(each) - 1e-13))
            ]
            for each in p.ravel()
        ]
        lower, upper = np.exp(np.array(ends)).T.reshape(2, *p.shape)
        return lower, upper

    return bounds


def capped(bounds: Bounds, cap: float) -> Bounds:
    return lambda p: (bounds(p)[0], np.minimum(bounds(p)[1], cap))


def widened(bounds: Bounds, eps_low: float, eps_high: float) -> Bounds:
    """The relaxed variant of BandPO; with one epsilon TRGPPO's range, never below PPO's."""
    return lambda p: (
        np.minimum(bounds(p)[0], 1 - eps_low),
        np.maximum(bounds(p)[1], 1 + eps_high),
    )


def tv_band(delta: float) -> Bounds:
    """BandPO, arXiv 2603.04918, closed form of total variation, on the simplex."""
    return lambda p: (np.maximum(1 - delta / p, 0), np.minimum(1 + delta / p, 1 / p))


def chi2_band(delta: float) -> Bounds:
    """BandPO, arXiv 2603.04918, closed form of Pearson's chi-square, on the simplex."""

    def bounds(p: Float64Array) -> tuple[Float64Array, Float64Array]:
        half = np.sqrt(delta * (1 - p) / p)
        return np.maximum(1 - half, 0), np.minimum(1 + half, 1 / p)

    return bounds


def dcpo_bounds(p: Float64Array) -> tuple[Float64Array, Float64Array]:
    """arXiv 2509.02333, Eq. 4, with epsilons 0.16 and 0.2."""
    lower = 0.5 + 0.5 * np.sqrt(np.maximum(1 - 4 * 0.16 / p, 0))
    return lower, 0.5 + 0.5 * np.sqrt(1 + 4 * 0.2 / p)


PUBLISHED_BOUNDS: dict[str, tuple[Bounds, float | None]] = {
    "ppo": (constant(0.8, 1.2), None),
    "dapo": (constant(0.8, 1.28), None),
    "dual-clip": (constant(0.8, 1.2), 3.0),
    "bandpo-kl": (capped(trgppo_band(0.05), 10), 10.0),
    "bandpo-tv": (capped(tv_band(0.05), 10), 10.0),
    "bandpo-chi2": (capped(chi2_band(0.05), 10), 10.0),
    "trgppo": (widened(trgppo_band(0.001), 0.1, 0.1), None),
    "dcpo": (capped(dcpo_bounds, 10), 10.0),
    "bapo": (constant(0.6, 1.2), None),  # before the first batch
}
"""The bounds of those that train by min-clip on tokens, and the ratio where dual clip acts."""


# --- oracles: losses ---------------------------------------------------------------------------


def published_min_clip(
    old_log_prob: Float64Array,
    log_prob: Float64Array,
    advantages: Float64Array,
    bounds: Bounds,
    dual_clip: float | None,
) -> LossAndGradient:
    """PPO, arXiv 1707.06347, Eq. 7, and for A < 0 dual clip, arXiv 1912.09729, Eq. 5."""
    r = np.exp(log_prob - old_log_prob)
    lower, upper = bounds(np.exp(old_log_prob))
    objective = np.minimum(r * advantages, np.clip(r, lower, upper) * advantages)
    flows = np.where(advantages > 0, r <= upper, r >= lower)
    if dual_clip is not None:
        limited = np.maximum(objective, dual_clip * advantages)
        flows &= (advantages > 0) | (r < dual_clip)
        objective = np.where(advantages < 0, limited, objective)
    return -objective, np.where(flows, -advantages * r, 0)


def published_dual_clip(
    old_log_prob: Float64Array, log_prob: Float64Array, advantages: Float64Array
) -> LossAndGradient:
    """arXiv 1912.09729, Eq. 5, with epsilon 0.2 and c = 3."""
    return published_min_clip(old_log_prob, log_prob, advantages, constant(0.8, 1.2), 3.0)


def published_dppo(
    old_log_prob: Float64Array,
    log_prob: Float64Array,
    advantages: Float64Array,
    divergence: Callable[[Float64Array, Float64Array], Float64Array],
    threshold: float,
) -> LossAndGradient:
    """arXiv 2602.04879, Eq. 12 and 23 with C infinite; the loss whose gradient Eq. 23 is."""
    p, q = np.exp(old_log_prob), np.exp(log_prob)
    away = ((advantages > 0) & (q > p)) | ((advantages < 0) & (q < p))
    kept = ~(away & (divergence(p, q) > threshold))
    weight = np.where(kept, -advantages * q / p, 0)
    return weight * log_prob, weight


def published_prime_rl_mask(
    old_log_prob: Float64Array, log_prob: Float64Array, advantages: Float64Array
) -> BoolArray:
    """PrimeIntellect-ai/prime-rl: the tokens kept, by the change of the probability alone."""
    change = np.exp(log_prob) - np.exp(old_log_prob)
    invalid = np.where(advantages > 0, change > 0.2, change < -0.2)
    return ~invalid


def published_cispo(
    old_log_prob: Float64Array, log_prob: Float64Array, advantages: Float64Array
) -> LossAndGradient:
    """MiniMax-M1, arXiv 2506.13585, Eq. 4-5, without lower bound and with at most 5."""
    weight = -np.minimum(np.exp(log_prob - old_log_prob), 5.0) * advantages
    return weight * log_prob, weight


def published_ce_gppo(
    old_log_prob: Float64Array, log_prob: Float64Array, advantages: Float64Array
) -> LossAndGradient:
    """arXiv 2509.20712, Eq. 8 and 10, with epsilon 0.2, beta1 = 0.75 and beta2 = 1."""
    delta = np.exp(log_prob - old_log_prob)
    low = (delta < 0.8) & (advantages < 0)
    high = (delta > 1.2) & (advantages > 0)
    factor = np.where(low, 0.75 * 0.8, np.where(high, 1.0 * 1.2, delta))
    return -factor * advantages, -factor * advantages


def published_gspo(
    old_log_prob: Float64Array, log_prob: Float64Array, advantages: Float64Array, mask: BoolArray
) -> LossAndGradient:
    """arXiv 2507.18071, Eq. 5-7, with 3e-4 and 4e-4; one loss a sequence, on all its tokens.

    Advantages are [B, 1]. The derivative of a sequence's n equal losses in each log-prob is n times
    1/n of that of one loss in the mean.
    """
    n = mask.sum(1, keepdims=True)
    s = np.exp(np.where(mask, log_prob - old_log_prob, 0).sum(1, keepdims=True) / n)
    objective = np.minimum(s * advantages, np.clip(s, 1 - 3e-4, 1 + 4e-4) * advantages)
    flows = np.where(advantages > 0, s <= 1 + 4e-4, s >= 1 - 3e-4)
    gradient = np.where(flows, -advantages * s, 0)
    return np.where(mask, -objective, 0), np.where(mask, gradient, 0)


def published_gmpo(
    old_log_prob: Float64Array, log_prob: Float64Array, advantages: Float64Array, mask: BoolArray
) -> LossAndGradient:
    """arXiv 2507.20673, Algorithm 1, with epsilon 0.4; one loss a sequence, on all its tokens.

    Advantages are [B, 1]. As to the derivative see `published_gspo`.
    """
    sign = np.where(advantages > 0, 1, -1)
    signed = sign * (log_prob - old_log_prob)
    smaller = sign * np.minimum(signed, np.clip(signed, -0.4, 0.4))
    n = mask.sum(1, keepdims=True)
    ratio = np.exp(np.where(mask, smaller, 0).sum(1, keepdims=True) / n)
    loss = np.broadcast_to(-advantages * ratio, mask.shape)
    return np.where(mask, loss, 0), np.where(mask & (signed <= 0.4), loss, 0)


# --- presets as arrays -------------------------------------------------------------------------


def region_of(found: Preset) -> Region:
    region = found.region.region if isinstance(found.region, RegionSource) else found.region
    assert isinstance(region, Region)
    return region


def rollout_of(found: Preset, old_log_prob: Float64Array) -> dict[str, Any]:
    """The argument that a preset with a correction needs: log-probs of another policy."""
    if found.correction is None:
        return {}
    moved = np.random.default_rng(0).normal(0.0, 0.3, old_log_prob.shape)
    return {"rollout_log_prob": torch.from_numpy(np.minimum(old_log_prob + moved, 0.0))}


def by_preset(
    found: Preset,
    old_log_prob: Float64Array,
    log_prob: Float64Array,
    advantages: Float64Array,
    mask: BoolArray,
) -> LossAndGradient:
    """Loss of every token and gradient of their sum, by the loss that a preset's arguments make."""
    arguments = {**found.arguments(), "loss_agg_mode": "token-sum"}
    old, new, advantage, valid = map(
        torch.from_numpy, (old_log_prob, log_prob, np.ascontiguousarray(advantages), mask)
    )
    results = []
    for backend in ("native", "torch"):
        leaf = new.clone().requires_grad_()
        result = policy_loss(
            old,
            leaf,
            advantage,
            valid,
            **arguments,
            **rollout_of(found, old_log_prob),
            exact=True,
            backend=backend,
        )
        (gradient,) = torch.autograd.grad(result.loss, leaf)
        results.append((result.per_token.detach().numpy(), gradient.numpy()))
    assert_same(*results)
    return results[0]


# --- tokens ------------------------------------------------------------------------------------


def sequences(seed: int, step: float) -> tuple[Float64Array, Float64Array, Float64Array, BoolArray]:
    """Tokens with one advantage a row, which no clamp touches and whose new p is below 1."""
    old, new, advantages, mask = wide_tokens(
        (6, 50), seed, logits=(-7, 4), step=step, factors=(0.1, 1.0, 3.0)
    )
    new = np.where((new < -1e-3) & (np.abs(new - old) < 20), new, old)
    advantages = advantages[:, :1]
    advantages[:2] = [[1.5], [-0.5]]
    return old, new, advantages, mask


def assert_same(actual: LossAndGradient, expected: LossAndGradient) -> None:
    for found, published in zip(actual, expected, strict=True):
        np.testing.assert_allclose(found, published, rtol=RULE, atol=0)


# --- presets -----------------------------------------------------------------------------------


def test_presets_have_these_names_and_arguments() -> None:
    assert list(PRESETS) == [
        *("ppo", "dapo", "dual-clip", "bandpo-kl", "bandpo-tv", "bandpo-chi2", "trgppo"),
        *("dppo-tv", "dppo-kl", "prime-rl", "prime-rl-2026-04", "prime-rl-2026-09", "ipo"),
        *("kpop", "icepop", "prime-rl-icepop", "tis", "mis", "geo-mask", "seq-mask-tis"),
        *("opsm", "flash-reinforce", "sapo", "spo", "cppo", "m2po", "topr", "gpg"),
        *("dcpo", "cispo", "ce-gppo", "gmpo", "gspo", "luspo", "vespo", "bapo"),
    ]
    assert len(PRESETS) == 36
    for name in PRESETS:
        found = preset(name)
        assert found.name == name
        arguments = found.arguments()
        assert replace(found, **arguments) == found
        assert sorted(arguments) == sorted(
            [
                *("region", "surrogate", "dual_clip", "ratio_level", "loss_agg_mode"),
                *("log_ratio_penalty", "correction"),
            ]
        )


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BandpoError, match=r"one of ppo, dapo, .*, bapo, got 'grpo2'"):
        preset("grpo2")


def test_every_bapo_preset_has_a_controller_of_its_own() -> None:
    one, other = preset("bapo").region, preset("bapo").region
    assert isinstance(one, Bapo)
    one.step([-1.0], [0.0], [-1.0])
    assert isinstance(other, Bapo)
    assert other.region == Clip(0.4, 0.2) != one.region
    assert region_of(PRESETS["bapo"]) == other.region


@pytest.mark.parametrize("name", PUBLISHED_BOUNDS)
def test_bounds_of_presets_are_the_published_ones(name: str) -> None:
    bounds, dual_clip = PUBLISHED_BOUNDS[name]
    found = preset(name)
    assert (found.surrogate, found.ratio_level) == ("min-clip", "token")
    assert found.dual_clip == dual_clip
    p = np.concatenate([np.logspace(-4, -0.01, 200), [0.2 / 90, 0.05 / 9]])
    lower, upper = region_of(found).bounds(np.log(p))
    expected_lower, expected_upper = bounds(p)
    # Lower bounds below the range of doubles are checked by the reference files.
    seen = expected_lower > 1e-280
    np.testing.assert_allclose(lower[seen], expected_lower[seen], rtol=RULE, atol=0)
    np.testing.assert_array_less(lower[~seen], 1e-280)
    np.testing.assert_allclose(upper, expected_upper, rtol=RULE, atol=0)


@pytest.mark.parametrize("name", PUBLISHED_BOUNDS)
def test_min_clip_presets_have_the_published_loss(name: str) -> None:
    bounds, dual_clip = PUBLISHED_BOUNDS[name]
    old, new, advantages, mask = sequences(11, 0.8)
    published = published_min_clip(old, new, advantages, bounds, dual_clip)
    expected = tuple(np.where(mask, part, 0) for part in published)
    found = preset(name)
    assert_same(by_preset(found, old, new, advantages, mask), (expected[0], expected[1]))

    # And the loss that is trained with, by the exact solver.
    log_prob = torch.from_numpy(new).requires_grad_()
    result = policy_loss(
        torch.from_numpy(old),
        log_prob,
        torch.from_numpy(advantages),
        torch.from_numpy(mask),
        region=region_of(found),
        dual_clip=found.dual_clip,
        loss_agg_mode="token-sum",
        exact=True,
    )
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert log_prob.grad is not None
    assert_same(
        (result.per_token.detach().numpy(), log_prob.grad.numpy()), (expected[0], expected[1])
    )


def test_dual_clip_acts_where_it_was_published() -> None:
    old, new, advantages, mask = sequences(12, 0.8)
    loss, gradient = published_dual_clip(old, new, advantages)
    ratio = np.exp(new - old)
    acts = (advantages < 0) & (ratio > 3)
    assert acts[mask].any()
    assert (gradient[acts] == 0).all()
    np.testing.assert_allclose(loss[acts], np.broadcast_to(-3 * advantages, acts.shape)[acts])
    expected = np.where(mask, loss, 0), np.where(mask, gradient, 0)
    assert_same(by_preset(preset("dual-clip"), old, new, advantages, mask), expected)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_the_same_loss_by_table_and_by_solver(name: str) -> None:
    """As a user calls them: no `exact`, any backend."""
    old, new, advantages, mask = sequences(15, 0.8)
    found = preset(name)
    if found.ratio_level == "sequence":
        new = old + 1e-3 * (new - old)
    if isinstance(found.region, (Region, RegionSource)):
        log_bounds = np.stack(region_of(found).log_bounds(old))
        # A gradient jumps at a bound, which a table has to within 1e-6.
        mask &= (np.abs(new - old - log_bounds) > 1e-5).all(0)
    by_solver = by_preset(found, old, new, advantages, mask)
    for backend in ("native", "torch"):
        leaf = torch.from_numpy(new).requires_grad_()
        rule = PolicyLoss(**{**found.arguments(), "loss_agg_mode": "token-sum"}, backend=backend)
        old_log_prob, advantage, valid = map(torch.from_numpy, (old, advantages, mask))
        result = rule(old_log_prob, leaf, advantage, valid, **rollout_of(found, old))
        (gradient,) = torch.autograd.grad(result.loss, leaf)
        actual = result.per_token.detach().numpy(), gradient.numpy()
        for found_by_table, exact in zip(actual, by_solver, strict=True):
            np.testing.assert_allclose(
                found_by_table, exact, rtol=TABLE, atol=TABLE * np.abs(advantages).max()
            )


@pytest.mark.parametrize(
    ("name", "divergence", "threshold"),
    [
        ("dppo-tv", binary_tv, 0.15),
        ("dppo-kl", binary_kl, 0.05),
        ("prime-rl-2026-04", binary_tv, 0.2),
    ],
)
def test_masks_are_the_clip_sets_of_bands(
    name: str, divergence: Callable[[Float64Array, Float64Array], Float64Array], threshold: float
) -> None:
    """10^5 tokens, no disagreement: on the mask by divergences, and by `contains` and bounds."""
    old, new, advantages, _ = wide_tokens(200_000, 3, logits=(-9, 7))
    clear = (new < -1e-7) & (np.abs(new - old) < 20)  # where the loss clamps no log-ratio
    clear[clear] &= np.abs(divergence(np.exp(old[clear]), np.exp(new[clear])) / threshold - 1) > TIE
    old, new, advantages = old[clear], new[clear], advantages[clear]
    assert old.size >= 100_000
    loss, gradient = published_dppo(old, new, advantages, divergence, threshold)
    kept = gradient != 0
    assert 0.05 < np.mean(~kept) < 0.9, "both answers are common"
    if name == "prime-rl-2026-04":
        np.testing.assert_array_equal(kept, published_prime_rl_mask(old, new, advantages))

    found = preset(name)
    region = region_of(found)
    log_ratio = new - old
    away = np.sign(log_ratio) == np.sign(advantages)
    assert np.count_nonzero((region.contains(old, log_ratio) | ~away) != kept) == 0
    log_lower, log_upper = region.log_bounds(old)
    inside = np.where(advantages > 0, log_ratio <= log_upper, log_ratio >= log_lower)
    assert np.count_nonzero(inside != kept) == 0
    actual = by_preset(found, old, new, advantages, np.ones_like(kept))
    assert_same(actual, (loss, gradient))


def test_cispo_has_the_published_loss() -> None:
    old, new, advantages, mask = sequences(13, 1.5)
    loss, gradient = published_cispo(old, new, advantages)
    assert (np.exp(new - old) > 5)[mask].any()
    expected = np.where(mask, loss, 0), np.where(mask, gradient, 0)
    assert_same(by_preset(preset("cispo"), old, new, advantages, mask), expected)


def test_ce_gppo_has_the_published_loss() -> None:
    old, new, advantages, mask = sequences(14, 0.5)
    loss, gradient = published_ce_gppo(old, new, advantages)
    expected = np.where(mask, loss, 0), np.where(mask, gradient, 0)
    assert_same(by_preset(preset("ce-gppo"), old, new, advantages, mask), expected)


def test_gspo_has_the_published_loss() -> None:
    seen = set()
    for seed in range(8):
        old, new, advantages, mask = sequences(seed, 1e-3)
        loss, gradient = published_gspo(old, new, advantages, mask)
        assert_same(by_preset(preset("gspo"), old, new, advantages, mask), (loss, gradient))
        stopped = (gradient == 0).all(1)
        seen |= set(zip((advantages[:, 0] > 0).tolist(), stopped.tolist(), strict=True))
    assert len(seen) == 4, "sequences of both signs are clipped and are not"


def test_gmpo_has_the_published_loss() -> None:
    old, new, advantages, mask = sequences(15, 0.5)
    loss, gradient = published_gmpo(old, new, advantages, mask)
    stopped = mask & (gradient == 0)
    assert 0 < stopped.sum() < mask.sum()
    assert_same(by_preset(preset("gmpo"), old, new, advantages, mask), (loss, gradient))


# --- equivalences ------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.1, 0.2, 0.28, 1.0])
def test_the_upper_bound_of_a_clip_is_a_limit_of_hockey_sticks(eps: float) -> None:
    """For p <= 1/(1+eps), and as delta falls to 0, of ``hockey-stick:1+eps``."""
    p = np.concatenate([np.logspace(-3, np.log10(1 / (1 + eps)), 50)[:-1], [1 / (1 + eps)]])
    _, clip = Clip(eps).bounds(np.log(p))
    gap = np.inf
    for delta in [1e-4, 1e-6, 1e-8, 1e-10]:
        _, upper = Band(f"hockey-stick:{1 + eps!r}", delta).bounds(np.log(p))
        np.testing.assert_allclose(
            upper, np.minimum(1 + eps + delta / p, 1 / p), rtol=LIMIT, atol=0
        )
        nearer = np.max(np.abs(upper - clip))
        assert nearer <= delta / p.min() * (1 + LIMIT) + LIMIT
        assert nearer < gap
        gap = nearer
    beyond = np.linspace(1 / (1 + eps) + 1e-3, 1, 20)
    _, upper = Band(f"hockey-stick:{1 + eps!r}", 1e-10).bounds(np.log(beyond))
    np.testing.assert_allclose(upper, 1 / beyond, rtol=LIMIT, atol=0)


def test_trgppo_is_the_band_of_kl_united_with_ppos_clip() -> None:
    region = preset("trgppo").region
    assert region == Band("kl", 0.001) | Clip(0.1)
    assert isinstance(region, Combined)
    # Its core is BandPO's band for KL without the cap, at its own radius.
    core = preset("bandpo-kl").region
    assert isinstance(core, Combined)
    assert core == core.parts[0].cap(10)
    assert core.parts[0] == Band("kl", 0.05)
    logp = np.linspace(-12, -1e-3, 500)
    united, band = (Band("kl", 0.05) | Clip(0.1)).bounds(logp), core.parts[0].bounds(logp)
    np.testing.assert_array_equal(united[0], np.minimum(band[0], Clip(0.1).bounds(logp)[0]))
    np.testing.assert_array_equal(united[1], np.maximum(band[1], Clip(0.1).bounds(logp)[1]))
    middle = (logp > -6) & (logp < -0.05)  # where the plain equation has its root bracketed
    expected = trgppo_band(0.05)(np.exp(logp[middle]))[1]
    np.testing.assert_allclose(band[1][middle], expected, rtol=RULE, atol=0)


@pytest.mark.parametrize(("spec", "published"), [("tv", tv_band), ("pearson-chi2", chi2_band)])
def test_union_with_a_clip_is_the_relaxed_variant(
    spec: str, published: Callable[[float], Bounds]
) -> None:
    """BandPO, arXiv 2603.04918: bounds widened to clip-higher where they are narrower."""
    p = np.logspace(-4, 0, 300)[:-1]
    relaxed = Band(spec, 0.05).at_least(0.2, 0.28)
    lower, upper = relaxed.bounds(np.log(p))
    expected_lower, expected_upper = widened(published(0.05), 0.2, 0.28)(p)
    np.testing.assert_allclose(lower, expected_lower, rtol=RULE, atol=0)
    np.testing.assert_allclose(upper, expected_upper, rtol=RULE, atol=0)


def test_dcpo_is_the_set_of_its_inequality() -> None:
    """arXiv 2509.02333, Eq. 3: |(r - 1) r| p <= eps around r = 1."""
    rng = np.random.default_rng(8)
    logp, log_ratio = -rng.exponential(2, 100_000), rng.normal(0, 1, 100_000)
    p, r = np.exp(logp), np.exp(log_ratio)
    value = np.abs(r - 1) * r * p / np.where(r > 1, 0.2, 0.16)
    # The inequality holds again below the lower of two roots, which is not around 1.
    inside = (value <= 1) & (r >= 0.5)
    clear = (np.abs(value - 1) > TIE) & (np.abs(r - 0.5) > TIE)
    np.testing.assert_array_equal(Dcpo().contains(logp, log_ratio)[clear], inside[clear])
