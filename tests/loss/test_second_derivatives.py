"""Second derivatives of the surrogates whose gradient bends, and compilation of all new ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
from bandpo.error import InvalidValueError
from bandpo.loss import policy_loss
from bandpo.surrogate import GammaWeight, Mask, SoftGate
from support.batches import Batch, random_batch

BENDING = ["soft-gate", "quadratic", SoftGate(2.0, 0.5)]
REGIONS = [bandpo.Clip(0.2, 0.4), bandpo.Clip(1.0, 1.0), bandpo.Band("kl", 0.05)]

STEP = 1e-5
"""Step of central differences, whose error is STEP^2 times a third derivative of the gradient."""

DIFFERENCES = 1e-6
"""Error of central differences: STEP^2 = 1e-10 times derivatives of up to 1 / width^3, and
rounding of 1e-16 / STEP."""

# Warnings of torch itself, on the first import of its compiler or its forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def losses(batch: Batch, log_prob: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"loss_agg_mode": "token-sum", "exact": True, **options}
    return batch._replace(log_prob=log_prob).loss(**options).loss


def smooth_batch(shape: tuple[int, int]) -> Batch:
    """Tokens that have moved by at least 100 steps, because the width jumps at r = 1."""
    batch = random_batch(shape, dtype=torch.float64)
    moved = batch.log_prob - batch.old_log_prob
    apart = torch.where(moved >= 0.0, moved.clamp(0.05, 1.0), moved.clamp(-1.0, -0.05))
    return batch._replace(log_prob=batch.old_log_prob + apart)


@pytest.mark.parametrize("region", REGIONS, ids=str)
@pytest.mark.parametrize("surrogate", BENDING, ids=str)
def test_those_of_torch_are_differences_of_gradients(surrogate: Any, region: bandpo.Region) -> None:
    batch = smooth_batch((4, 10))
    options: dict[str, Any] = {"region": region, "surrogate": surrogate, "backend": "torch"}
    leaf = batch.log_prob.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses(batch, leaf, **options), leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), leaf)  # which is diagonal

    def gradient_at(log_prob: torch.Tensor) -> torch.Tensor:
        at = log_prob.clone().requires_grad_()
        return torch.autograd.grad(losses(batch, at, **options), at)[0]

    up, down = (gradient_at(batch.log_prob + step) for step in (STEP, -STEP))
    size = batch.advantages.abs() * (batch.log_prob - batch.old_log_prob).exp() / STEP * 1e-14
    wanted = (up - down) / (2.0 * STEP)
    error = (second - wanted).abs()
    assert bool((error <= DIFFERENCES * (1.0 + wanted.abs()) + size).all())
    assert bool(second[batch.response_mask].any())
    assert not second[~batch.response_mask].any()


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("surrogate", BENDING, ids=str)
def test_a_compiled_backend_refuses_them(surrogate: Any, anchored: bool) -> None:
    """In every aggregation, because the mean has a path of its own."""
    batch = smooth_batch((4, 10))
    options: dict[str, Any] = {"region": REGIONS[0], "surrogate": surrogate, "backend": "native"}
    if anchored:
        options["anchor_log_prob"] = batch.old_log_prob - 0.1
    for mode in ("token-sum", "token-mean", "seq-mean-token-mean"):
        leaf = batch.log_prob.clone().requires_grad_()
        loss = losses(batch, leaf, **options, loss_agg_mode=mode)
        with pytest.raises(InvalidValueError, match="backend must be 'torch' for second derivat"):
            torch.autograd.grad(loss, leaf, create_graph=True)
    leaf = batch.log_prob.clone().requires_grad_()
    per_token = batch._replace(log_prob=leaf).loss(**options).per_token
    with pytest.raises(InvalidValueError, match=f"surrogate '{per_token_name(surrogate)}'"):
        torch.autograd.grad(per_token.sum(), leaf, create_graph=True)
    (first,) = torch.autograd.grad(losses(batch, leaf, **options), leaf)  # the first one is right
    assert bool(first.any())


def per_token_name(surrogate: Any) -> str:
    return surrogate if isinstance(surrogate, str) else str(surrogate.name)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("surrogate", BENDING, ids=str)
def test_a_hessian_is_right_with_every_backend(
    surrogate: Any, anchored: bool, backend: str
) -> None:
    batch = smooth_batch((2, 5))
    batch.response_mask[:, :4] = True
    options: dict[str, Any] = {"region": REGIONS[0], "surrogate": surrogate}
    if anchored:
        options["anchor_log_prob"] = batch.old_log_prob - 0.02
    hessian = torch.func.hessian(lambda x: losses(batch, x, **options, backend=backend))
    found = hessian(batch.log_prob).reshape(10, 10)
    leaf = batch.log_prob.clone().requires_grad_()
    loss = losses(batch, leaf, **options, backend="torch")
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    rows = [
        torch.autograd.grad(entry, leaf, retain_graph=True)[0].reshape(-1)
        for entry in gradient.reshape(-1)
    ]
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-10, atol=1e-12)
    assert bool(found.diagonal().any())
    off = found - torch.diag(found.diagonal())
    assert not off.any()


def test_the_second_derivative_of_spo_is_its_formula(backend: str) -> None:
    """d/dx of -A r (1 - s (r - 1) / w) is -A r (1 - s (2 r - 1) / w)."""
    batch = smooth_batch((2, 5))
    batch.response_mask[:] = True
    hessian = torch.func.hessian(
        lambda x: losses(batch, x, region=bandpo.Clip(0.2), surrogate="quadratic", backend=backend)
    )
    found = hessian(batch.log_prob).reshape(10, 10).diagonal().reshape(2, 5)
    r, a = (batch.log_prob - batch.old_log_prob).exp(), batch.advantages
    wanted = -a * r * (1.0 - a.sign() * (2.0 * r - 1.0) / 0.2)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


NEW = ["soft-gate", "quadratic", "gamma-weight", Mask(symmetric=True), GammaWeight(1.0, 1.0)]


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("surrogate", NEW, ids=str)
def test_compiles_without_a_graph_break(surrogate: Any, anchored: bool, backend: Any) -> None:
    batch = random_batch((4, 8))
    anchor = (batch.old_log_prob + 0.1).clamp(max=0.0) if anchored else None

    def loss(log_prob: torch.Tensor, anchor_log_prob: torch.Tensor | None) -> torch.Tensor:
        return policy_loss(
            batch.old_log_prob, log_prob, *batch[2:], region=REGIONS[-1],
            surrogate=surrogate, anchor_log_prob=anchor_log_prob, backend=backend,
        ).loss  # fmt: skip

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = batch.log_prob.requires_grad_()
    torch.testing.assert_close(compiled(leaf, anchor), loss(leaf, anchor))
    wanted, found = (torch.autograd.grad(f(leaf, anchor), leaf)[0] for f in (loss, compiled))
    torch.testing.assert_close(found, wanted)
    assert np.count_nonzero(found) > 0


@pytest.mark.parametrize(
    ("surrogate", "level"),
    [
        *((surrogate, "token") for surrogate in ("min-clip", *NEW[:4], Mask(whole_sequence=True))),
        ("min-clip", "sequence"),
        ("min-clip", "geometric-mean"),
    ],
    ids=str,
)
def test_constant_bounds_compile_in_double_precision(
    surrogate: Any, level: Any, backend: Any
) -> None:
    """A compiler takes 0-dim float64 tensors of a CPU for numbers, and guards on their values."""
    batch = random_batch((4, 8), dtype=torch.float64)
    clip = bandpo.Clip(0.2)
    signed = bandpo.by_sign(positive=clip, negative=bandpo.Clip(0.1))

    def loss(log_prob: torch.Tensor, region: Any) -> torch.Tensor:
        return policy_loss(
            batch.old_log_prob, log_prob, *batch[2:], region=region, surrogate=surrogate,
            ratio_level=level, backend=backend,
        ).loss  # fmt: skip

    leaf = batch.log_prob.requires_grad_()
    for region in (clip, signed):
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        wanted, found = (torch.autograd.grad(f(leaf, region), leaf)[0] for f in (loss, compiled))
        torch.testing.assert_close(found, wanted)
