"""The compiled loss with its gradient, for autograd and the transforms of torch.

The forward pass computes the gradient as well, so the backward pass only scales it.
"""

from __future__ import annotations

from typing import Any

import torch

from bandpo import _core
from bandpo.backends import plain
from bandpo.backends.contract import (
    LossInputs,
    TokenLosses,
    Totals,
    Weight,
    WeightedSum,
    gradients_of,
)
from bandpo.backends.cuda import kernels
from bandpo.backends.internals import (
    has_saved_tensor_hooks,
    is_in_memory,
    is_transformed,
    keeps_graph,
    needs_no_dispatcher,
)
from bandpo.backends.native import all_in_rust, in_rust, token_loss_op
from bandpo.error import InvalidValueError
from bandpo.surrogate import BY_NAME


def on_cuda(tensor: torch.Tensor) -> bool:
    """Returns True if the kernels take the tensor, False if Rust does."""
    return tensor.is_cuda


def _save_gradient(ctx: Any, surrogate: str, gradient: torch.Tensor) -> None:
    ctx.save_for_backward(gradient)
    ctx.set_materialize_grads(False)
    ctx.surrogate = BY_NAME[surrogate]


def _save_of_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _save_gradient(ctx, LossInputs(*inputs).surrogate, output[1])


def _backward(
    ctx: Any,
    grad_per_token: torch.Tensor | None,
    grad_gradient: torch.Tensor | None,
    *_: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    return _gradients(ctx, grad_per_token, grad_gradient)


def _gradients(
    ctx: Any, grad_per_token: torch.Tensor | None, grad_gradient: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `LossInputs` from those of the losses and of their gradients."""
    (gradient,) = ctx.saved_tensors
    # A gradient that carries the ratio is its own derivative, so any order is right.
    if not ctx.surrogate.gradient_carries_ratio:
        if ctx.surrogate.gradient_bends and torch.is_grad_enabled():
            raise InvalidValueError(
                f"backend must be 'torch' for second derivatives of surrogate "
                f"{ctx.surrogate.name!r}, got a compiled one"
            )
        gradient, grad_gradient = gradient.detach(), None
    grads = [grad for grad in (grad_per_token, grad_gradient) if grad is not None]
    if not grads:
        return gradients_of(None)
    whole = grads[0] if len(grads) == 1 else grads[0] + grads[1]
    return gradients_of(gradient * whole)


token_loss_op.register_autograd(_backward, setup_context=_save_of_op)


def token_losses(inputs: LossInputs) -> TokenLosses:
    """Returns the losses; Rust on the CPU or a kernel on CUDA computes their gradient as well."""
    if BY_NAME[inputs.surrogate].gradient_bends and is_transformed():
        return plain.token_losses(inputs)  # which has two derivatives
    if not (is_in_memory(inputs.log_prob) or is_transformed()):
        per_token, _, counts, sums = token_loss_op(*inputs)
        sums = sums.detach()
        return TokenLosses(per_token, per_token.sum(), lambda: Totals.of(counts, sums))
    per_token, _, total, counts, sums = _TokenLossFunction.apply(*inputs)  # type: ignore[no-untyped-call]
    return TokenLosses(per_token, total, lambda: Totals.of(counts, sums))


def weighted_sum(weight: Weight, inputs: LossInputs) -> WeightedSum:
    """Returns the sum of the losses times a weight, and what returns the counts and sums.

    It writes the gradient alone, already weighted, so a loss that is a mean takes one pass over the
    tokens. It avoids the dispatcher, which costs more than the loss of a thousand tokens. On CUDA a
    gradient of bfloat16 is written as such; one that the backward pass scales is rounded twice.

    Args:
        weight: Factor of the sum.
        inputs: Tokens with a log-prob for which `needs_no_dispatcher` holds.
    """
    _, loss, counts, sums = _WeightedSum.apply(weight, *inputs)  # type: ignore[no-untyped-call]
    return loss, lambda: Totals.of(counts, sums)


def _forward_mode(
    ctx: Any, tangents: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tangents of the losses and of their gradients, from those of `LossInputs`."""
    (gradient,) = ctx.saved_tensors
    moved = gradient * LossInputs(*tangents).log_prob  # type: ignore[arg-type]
    carries_ratio = ctx.surrogate.gradient_carries_ratio
    return moved, moved if carries_ratio else torch.zeros_like(moved)


class _TokenLossFunction(torch.autograd.Function):
    """The operator with the sum of the losses, in the form that `torch.func` needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        """Returns losses, gradients, the sum of the losses, counts and sums."""
        inputs = LossInputs(*args)
        if is_in_memory(inputs.log_prob) and needs_no_dispatcher(inputs.log_prob):
            return all_in_rust(inputs)
        per_token, gradient, counts, sums = token_loss_op(*inputs)
        return per_token, gradient, per_token.sum(), counts, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Saves the gradient."""
        _save_gradient(ctx, LossInputs(*inputs).surrogate, output[1])
        ctx.save_for_forward(output[1])
        ctx.mark_non_differentiable(*output[3:])

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Returns the tangents of the outputs."""
        moved, of_gradient = _forward_mode(ctx, tangents)
        return moved, of_gradient, moved.sum(), None, None

    @staticmethod
    def backward(
        ctx: Any,
        grad_per_token: torch.Tensor | None,
        grad_gradient: torch.Tensor | None,
        grad_total: torch.Tensor | None,
        *_: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of the inputs."""
        if grad_total is None:
            return _gradients(ctx, grad_per_token, grad_gradient)
        # The sum passes its gradient to each of the losses.
        whole = grad_total if grad_per_token is None else grad_per_token + grad_total
        return _gradients(ctx, whole, grad_gradient)


class _WeightedSum(torch.autograd.Function):
    """The weighted sum of the losses, with one gradient that is already weighted.

    It has no setup_context, because torch would inspect signatures at every call.
    """

    @staticmethod
    def forward(ctx: Any, weight: Weight, *args: Any) -> tuple[torch.Tensor, ...]:
        inputs = LossInputs(*args)
        if on_cuda(inputs.log_prob):
            output: tuple[torch.Tensor, ...] = kernels.weighted_sum(inputs, weight)
        else:
            output = in_rust(inputs, weight.number())
        _save_gradient(ctx, inputs.surrogate, output[0])
        ctx.is_shared = has_saved_tensor_hooks()
        ctx.save_for_forward(output[0])
        ctx.mark_non_differentiable(*output[2:])
        return output

    @staticmethod
    def jvp(
        ctx: Any, weight: None, *tangents: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the tangents of the outputs."""
        moved, of_gradient = _forward_mode(ctx, tangents)
        return of_gradient, moved.sum(), None, None

    @staticmethod
    def backward(
        ctx: Any,
        grad_gradient: torch.Tensor | None,
        grad_loss: torch.Tensor | None,
        *_: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of the inputs."""
        if (
            grad_gradient is not None
            or grad_loss is None
            or torch.is_grad_enabled()
            or not needs_no_dispatcher(grad_loss)
        ):
            return None, *_gradients(ctx, grad_loss, grad_gradient)
        (saved,) = ctx.saved_tensors
        # A graph about to be freed gives its gradient away, because memory that is new to the
        # process costs more than everything else.
        gradient = saved.clone() if ctx.is_shared or keeps_graph() else saved.detach()
        if on_cuda(gradient):
            kernels.scale_gradient(gradient, grad_loss)
        elif grad_loss.numpy() != 1.0:
            # In Rust, because torch's threads would spin on the cores that the next loss needs.
            _core.scale(gradient.numpy(), grad_loss.numpy())
        return None, *gradients_of(gradient)
