"""Losses of the backends against each other, and in float64 against formulas in numpy.

python -m reliability.losses --cases 1000000
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from bandpo import Band, Clip
from bandpo.surrogate import LOG_RATIO_LIMIT
from reliability.result import Row, run_cases
from reliability.tokens import SEED

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")


def losses(cases: int, seed: int = SEED) -> Iterator[Row]:
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
        if _name_of(options["surrogate"]) in ("soft-gate", "quadratic"):
            scale += _unclipped_size(given)
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
    found = {"where the backends differ": 0, "compared with formulas in numpy as well": compared}
    yield Row("random batches, native against torch", cases, found)


def _name_of(surrogate: Any) -> str:
    return surrogate if isinstance(surrogate, str) else str(surrogate.name)


def _unclipped_size(given: dict[str, Any]) -> float:
    """Size of a gradient without its factor, to which the rounding of that factor is relative."""
    new, old, advantages, mask = (
        given[name].double() for name in ("log_prob", "old_log_prob", "advantages", "response_mask")
    )
    size = advantages.abs() * (new - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    size = size * given.get("rollout_is_weights", mask).double()
    total: float = size[mask.bool()].nan_to_num(0.0).sum().item()
    return total / int(mask.numel())


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


if __name__ == "__main__":
    run_cases("losses", __doc__, losses, cases=1_000_000, seed=SEED, of="batches")
