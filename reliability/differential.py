"""Bounds against ball arithmetic, losses against each other and float64, levels against each other.

python -m reliability.differential --bounds 1000000 --losses 100000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from bandpo import Band, Clip, Divergence, _core
from reliability.intervals import excess
from reliability.result import Row, write

SEED = 20260304

NAMES = (
    *("kl", "reverse-kl", "tv", "pearson-chi2", "neyman-chi2", "hellinger", "le-cam"),
    *("jensen-shannon", "jeffreys", "bhattacharyya"),
)

NORMAL = sys.float_info.min
"""Min delta that keeps all of its digits."""

TIGHT = 1e-14
"""Relative distance of a bound from the exact one, by docs/accuracy.md, if well-conditioned."""


# --- bounds -------------------------------------------------------------------------------------


def _spec(rng: np.random.Generator) -> str:
    kind = int(rng.integers(0, 15))
    if kind < 10:
        return NAMES[kind]
    parameter = {
        10: lambda: f"alpha:{rng.choice([rng.uniform(-4, 5), rng.normal(0, 1e-3), 2.0, -1.0])!r}",
        11: lambda: f"renyi:{rng.choice([rng.uniform(0.05, 5), 2.0, 1 + rng.normal(0, 1e-3)])!r}",
        12: lambda: f"vajda:{rng.choice([1.0, 2.0, rng.uniform(1.01, 5)])!r}",
        13: lambda: f"bwcs:{rng.choice([0.0, 1.0, rng.uniform(0, 1)])!r}",
        14: lambda: f"hockey-stick:{rng.choice([1.0, rng.uniform(1, 5)])!r}",
    }
    return parameter[kind]().replace("np.float64(", "").replace(")", "")


def _logp(rng: np.random.Generator, count: int) -> Any:
    """Ordinary, rare and sure tokens, and the smallest of both kinds."""
    kind = rng.integers(0, 5, count)
    ordinary = -rng.exponential(3.0, count)
    rare = -rng.uniform(1.0, 690.0, count)
    sure = -(10.0 ** rng.uniform(-17.0, 0.0, count))
    tiny = -(10.0 ** rng.uniform(-307.0, -17.0, count))
    subnormal = -5e-324 * np.exp2(rng.integers(0, 52, count))
    logp = np.choose(kind, [ordinary, rare, sure, tiny, subnormal])
    return np.minimum(logp, -5e-324)


def _deltas(rng: np.random.Generator, spec: str, logp: Any) -> Any:
    """Deltas of all sizes; some saturate a side within a few floats, and some are subnormal."""
    count = len(logp)
    delta = 10.0 ** rng.uniform(-8.0, 1.0, count)
    kind = rng.integers(0, 6, count)
    divergence = Divergence(spec)
    with np.errstate(all="ignore"):
        for end, ratios in ((0, np.full(count, -np.inf)), (1, -logp)):
            edge = divergence.between(logp, ratios) * (1.0 + rng.integers(-3, 4, count) * 2.0**-52)
            usable = (kind == end) & np.isfinite(edge) & (edge > 0.0)
            delta[usable] = edge[usable]
    delta[kind == 2] = (5e-324 * 2.0 ** rng.integers(0, 60, count))[kind == 2]
    return delta


def bounds(cases: int, seed: int = SEED) -> Row:
    """Both bounds of random f, delta and p: inside, and next to the edge.

    Deltas from 1e-8 to 10 are those of the promise in docs/accuracy.md; smaller ones, subnormal
    among them, are counted apart.

    Raises:
        AssertionError: If a bound of the promise is outside the exact one, or saturates where the
            exact one does not.
    """
    rng = np.random.default_rng(seed)
    done, undecided, farther = 0, 0, 0
    outside = dict.fromkeys(("normal", "subnormal"), (0, 0, 0.0))
    while done < cases:
        spec, count = _spec(rng), min(200, cases - done)
        logp = _logp(rng, count)
        delta = _deltas(rng, spec, logp)
        log_lower, log_upper = Band(spec, delta).log_bounds(logp)
        for place in range(count):
            case = spec, float(logp[place]), float(delta[place])
            promised = 1e-8 <= case[2] <= 10.0
            name = "normal" if case[2] >= NORMAL else "subnormal"
            sides, found, size = outside[name]
            outside[name] = sides + 2 * (not promised), found, size
            for side, bound in (("lower", log_lower[place]), ("upper", log_upper[place])):
                inside = _inside(case, side, float(bound))
                undecided += inside is None
                if inside is False:
                    assert not promised, (case, side, bound, "outside")
                    sides, found, size = outside[name]
                    outside[name] = sides, found + 1, max(size, _excess_of(case, float(bound)))
                elif promised:
                    farther += _is_far(case, side, float(bound))
        done += count
    return Row(
        "sides of exact bounds in ball arithmetic",
        2 * cases,
        f"delta from 1e-8 to 10: 0 outside, {farther} farther than {TIGHT:g} of the bound (of a "
        "large condition number or next to saturation); "
        + "".join(
            f"other {name} deltas: {found} of {sides} outside, by up to {size:.0e} of the bound; "
            for name, (sides, found, size) in outside.items()
        )
        + f"{undecided} undecided at 40000 bits",
    )


def _is_saturated(logp: float, side: str, bound: float) -> bool:
    return bound == -math.inf if side == "lower" else bound >= -logp


def _inside(case: tuple[str, float, float], side: str, bound: float) -> bool | None:
    """Whether a bound is inside the exact one; None if that is undecided."""
    spec, logp, delta = case
    end = -math.inf if side == "lower" else math.inf
    sign = excess(spec, logp, end if _is_saturated(logp, side, bound) else bound, delta)
    return None if sign is None else sign < 0


def _is_far(case: tuple[str, float, float], side: str, bound: float) -> bool:
    """True if the point `TIGHT` and a denormal farther out is still inside."""
    spec, logp, delta = case
    if _is_saturated(logp, side, bound):
        return False
    from flint import arb

    def outer() -> Any:
        return arb(bound) * (1 + arb(TIGHT)) + arb(math.copysign(5e-324, bound))

    if side == "upper" and bound * (1.0 + TIGHT) + 5e-324 >= -logp:
        return False
    return excess(spec, logp, outer, delta) == -1


def _excess_of(case: tuple[str, float, float], bound: float) -> float:
    """A relative distance inwards at which a bound that is outside is inside."""
    from flint import arb

    for power in range(-16, 0):
        for digit in (1.0, 3.0):
            share = digit * 10.0**power
            if excess(case[0], case[1], lambda: arb(bound) * (1 - arb(share)), case[2]) == -1:  # noqa: B023
                return share
    return 1.0


# --- losses -------------------------------------------------------------------------------------

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")


def losses(cases: int, seed: int = SEED) -> Row:
    """Losses and gradients: native against torch, and both in float64 against formulas in numpy.

    Raises:
        AssertionError: If two differ.
    """
    import torch

    from bandpo.loss import policy_loss

    rng = np.random.default_rng(seed)
    regions = Band("kl", 0.05).cap(10), Band("tv", 0.1), Clip(0.2, 0.28), Band("pearson-chi2", 1)
    compared = 0
    for number in range(cases):
        given, options, dtype = _batch(rng, regions)
        results = []
        for backend in ("native", "torch"):
            leaf = given["log_prob"].detach().requires_grad_()
            result = policy_loss(
                **{**given, "log_prob": leaf}, backend=backend, exact=True, **options
            )
            (gradient,) = torch.autograd.grad(result.loss, leaf)
            results.append((result.loss.detach().double(), gradient.double()))
        # The rounding of a float32 sum of up to 60 terms, and of a cancelling soft gate.
        rtol = 2e-5 if dtype != torch.float64 else 1e-11
        scale = float(results[1][1].abs().nan_to_num(0.0, 0.0, 0.0).sum()) + 1e-30
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(
                found, wanted, rtol=rtol, atol=rtol * scale, equal_nan=True,
                msg=lambda text: f"case {number}, {options}: {text}",  # noqa: B023
            )  # fmt: skip
        if dtype == torch.float64 and (wanted := _formula(given, options)) is not None:
            compared += 1
            for found, number_wanted in zip(results[0], wanted, strict=True):
                np.testing.assert_allclose(
                    found.numpy(), number_wanted, rtol=1e-9, atol=1e-9 * scale,
                    err_msg=f"case {number}, {options}",
                )  # fmt: skip
    return Row(
        "random batches, native against torch",
        cases,
        f"losses and gradients agree; {compared} of them also with formulas in numpy",
    )


def _batch(rng: np.random.Generator, regions: tuple[Any, ...]) -> tuple[dict[str, Any], Any, Any]:
    import torch

    from support.formulas import FORMULAS

    rows, width = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    packed = rng.random() < 0.25
    shape = (rows * width,) if packed else (rows, width)
    dtype = (torch.float32, torch.float64)[int(rng.integers(0, 2))]
    old = -rng.exponential(3.0, shape)
    new = np.minimum(old + rng.laplace(0.0, 0.5, shape), 0.0)
    advantages = rng.normal(0.0, 1.0, shape)
    mask = rng.random(shape) < 0.8
    if rng.random() < 0.3:
        old[rng.random(shape) < 0.1] = 0.0
        new[rng.random(shape) < 0.1] -= 30.0
        for column in (old, new, advantages):
            column[~mask & (rng.random(shape) < 0.5)] = rng.choice([np.nan, np.inf, -np.inf])
    if rng.random() < 0.1:
        mask[...] = False
    tensor = {
        "old_log_prob": torch.from_numpy(old).to(dtype),
        "log_prob": torch.from_numpy(new).to(dtype),
        "advantages": torch.from_numpy(advantages).to(dtype),
        "response_mask": torch.from_numpy(mask),
    }
    if rng.random() < 0.2:  # another layout
        tensor = {
            name: value.t().contiguous().t() if value.dim() == 2 else value
            for name, value in tensor.items()
        }
    if rng.random() < 0.2:
        weights = rng.exponential(1.0, shape) * (rng.random(shape) < 0.9)
        tensor["rollout_is_weights"] = torch.from_numpy(weights).to(dtype)
    if packed:
        tensor["cu_seqlens"] = torch.arange(0, rows * width + 1, width)
    region = regions[int(rng.integers(0, len(regions)))]
    level = "token"
    if rng.random() < 0.2:
        level = ("geometric-mean", "sequence")[int(isinstance(region, Clip))]
    names = ("min-clip", "min-clip", *FORMULAS)
    name = names[int(rng.integers(0, len(names)))]
    if level == "geometric-mean":
        name = "min-clip"
    surrogate = "min-clip" if name == "min-clip" else FORMULAS[name][0]
    options: dict[str, Any] = {
        "region": region,
        "surrogate": surrogate,
        "ratio_level": level,
        "loss_agg_mode": MODES[int(rng.integers(0, 4))],
    }
    if name == "min-clip" and level != "geometric-mean" and rng.random() < 0.3:
        options["dual_clip"] = 3.0
    return tensor, options, dtype


def _formula(given: dict[str, Any], options: Any) -> tuple[Any, Any] | None:
    """Loss and gradient of a batch at the level of tokens, or None at another level."""
    from support.batches import Batch
    from support.formulas import FORMULAS, BoundedTokens, min_clip

    if options["ratio_level"] != "token":
        return None
    names = ("old_log_prob", "log_prob", "advantages", "response_mask")
    batch = Batch(*[given[name] for name in names])
    valid = batch.response_mask.numpy()
    with np.errstate(all="ignore"):
        clean = [tensor.masked_fill(~batch.response_mask, 0.0) for tensor in batch[:3]]
        weight = given.get("rollout_is_weights")
        if weight is not None:
            clean[2] = clean[2] * weight.masked_fill(~batch.response_mask, 0.0)
        cleaned = Batch(clean[0], clean[1], clean[2], batch.response_mask)
        tokens = BoundedTokens.of(cleaned, options["region"])
        surrogate = options["surrogate"]
        if surrogate == "min-clip":
            loss, gradient = min_clip(tokens, options.get("dual_clip", math.inf))
        else:
            law = next(law for kind, law in FORMULAS.values() if kind == surrogate)
            loss, gradient = law(tokens)
    if "cu_seqlens" in given:
        rows = len(given["cu_seqlens"]) - 1
        loss, gradient, valid = (each.reshape(rows, -1) for each in (loss, gradient, valid))
    share = _shares(valid, options["loss_agg_mode"])
    total = (np.where(valid, loss, 0.0) * share).sum()
    return total, (np.where(valid, gradient, 0.0) * share).reshape(batch.log_prob.shape)


def _shares(valid: Any, mode: str) -> Any:
    """What each token's loss is multiplied by."""
    tokens = valid.sum(axis=1, keepdims=True)
    sequences = max(1, int((tokens > 0).sum()))
    if mode == "token-sum":
        return np.ones(valid.shape)
    if mode == "token-mean":
        return np.full(valid.shape, 1.0 / max(1, valid.sum()))
    if mode == "seq-mean-token-sum":
        return np.full(valid.shape, 1.0 / sequences)
    return np.broadcast_to(1.0 / np.maximum(tokens, 1) / sequences, valid.shape)


# --- levels of vector instructions --------------------------------------------------------------

LEVELS = ("portable", "avx2", "avx512")


def levels(cases: int, seed: int = SEED) -> Row:
    """Bounds, lookups, losses and gradients under each level of instructions.

    Raises:
        AssertionError: If the bits differ.
    """
    found = {level: _bits_under(level, cases, seed) for level in LEVELS}
    assert len({ran["losses"] for ran in found.values()}) == 1, found
    # Without fused multiply-adds the scalar solver takes every token, see rust/simd/mod.rs.
    assert found["avx2"]["bounds"] == found["avx512"]["bounds"], found
    return Row(
        "tokens under each BANDPO_SIMD",
        cases * len(LEVELS),
        "lookups, losses and gradients equal bit for bit, exact bounds those of the vectors; "
        f"avx512 ran as {found['avx512']['ran']}",
    )


def _bits_under(level: str, cases: int, seed: int) -> dict[str, str]:
    code = f"from reliability.differential import print_bits; print_bits({cases}, {seed})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BANDPO_SIMD": level, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    digests: dict[str, str] = json.loads(done.stdout)
    return digests


def print_bits(cases: int, seed: int) -> None:
    """Prints a digest of bounds, lookups, losses and gradients of so many tokens."""
    rng = np.random.default_rng(seed)
    losses, exact = hashlib.sha256(), hashlib.sha256()
    for part in _parts(cases):
        logp = _logp(rng, part)
        for spec in (*NAMES, "alpha:0.5", "vajda:1.5", "bwcs:0.3", "hockey-stick:1.2", "renyi:2"):
            for bound in Band(spec, 0.05).log_bounds(logp[: max(1, part // 16)]):
                exact.update(bound.tobytes())
        for spec in ("kl", "tv", "renyi:2"):
            for bound in Band(spec, 0.05).table().log_bounds(logp.astype(np.float32)):
                losses.update(bound.tobytes())
        losses.update(_loss_bits(logp, rng))
    ran = _core.simd_level()
    print(json.dumps({"losses": losses.hexdigest(), "bounds": exact.hexdigest(), "ran": ran}))


def _loss_bits(logp: Any, rng: np.random.Generator) -> bytes:
    try:
        import torch
    except ImportError:
        return b""
    from bandpo.loss import policy_loss

    bits = b""
    for dtype in (torch.float32, torch.float64):
        old = torch.from_numpy(logp).to(dtype)
        new = (old + torch.from_numpy(rng.laplace(0.0, 0.5, len(logp))).to(dtype)).clamp(max=0.0)
        advantages = torch.from_numpy(rng.normal(size=len(logp))).to(dtype)
        for surrogate in ("min-clip", "weight", "mask", "gradient-preserving", "soft-gate"):
            leaf = new.detach().requires_grad_()
            region = Band("kl", 0.05).cap(10)
            result = policy_loss(
                old, leaf, advantages, torch.ones_like(old), region=region,
                surrogate=surrogate, backend="native",
                cu_seqlens=torch.tensor([0, len(logp)]),
            )  # fmt: skip
            bits += torch.autograd.grad(result.loss, leaf)[0].numpy().tobytes()
    return bits


def _parts(cases: int) -> Iterator[int]:
    while cases > 0:
        yield min(cases, 2**16)
        cases -= 2**16


def main() -> None:
    """Runs all parts and writes their counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bounds", type=int, default=500_000, help="bounds have two sides each")
    parser.add_argument("--losses", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=SEED)
    parsed = parser.parse_args()
    rows = [
        bounds(parsed.bounds, parsed.seed),
        losses(parsed.losses, parsed.seed),
        levels(parsed.tokens, parsed.seed),
    ]
    counts = f"--bounds {parsed.bounds} --losses {parsed.losses} --tokens {parsed.tokens}"
    write("differential", f"python -m reliability.differential {counts}", rows)


if __name__ == "__main__":
    main()
