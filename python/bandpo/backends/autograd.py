"""The compiled loss with its gradient, for autograd.

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
from bandpo.backends.native import all_in_rust, in_rust, token_loss_op
from bandpo.error import InvalidValueError
from bandpo.surrogate import BY_NAME
from bandpo.tensors.check import compute_dtype
from bandpo.tensors.internals import (
    has_saved_tensor_hooks,
    is_concrete,
    is_transformed,
    keeps_graph,
    needs_no_dispatcher,
)


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
    return gradients_of(_gradient(ctx, grad_per_token, grad_gradient))


def _gradient(
    ctx: Any, grad_per_token: torch.Tensor | None, grad_gradient: torch.Tensor | None
) -> torch.Tensor | None:
    """The gradient of the log-probs from those of the losses and of their gradients."""
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
        return None
    whole = grads[0] if len(grads) == 1 else grads[0] + grads[1]
    found: torch.Tensor = gradient * whole
    return found


token_loss_op.register_autograd(_backward, setup_context=_save_of_op)


def token_losses(inputs: LossInputs) -> TokenLosses:
    """Returns the losses; Rust on the CPU or a kernel on CUDA computes their gradient as well.

    Inside a transform plain torch computes them, because it has every derivative.
    """
    if is_transformed():
        return plain.token_losses(_widened(inputs))
    others = inputs.old_log_prob, inputs.advantages, inputs.valid, inputs.anchor_log_prob
    if not needs_no_dispatcher(inputs.log_prob, inputs.log_ratio, inputs.bounds, *others):
        per_token, _, counts, sums = token_loss_op(*inputs)
        sums = sums.detach()
        return TokenLosses(per_token, per_token.sum(), lambda: Totals.of(counts, sums))
    per_token, _, total, counts, sums = _TokenLossFunction.apply(*inputs)  # type: ignore[no-untyped-call]
    return TokenLosses(per_token, total, lambda: Totals.of(counts, sums))


def _widened(inputs: LossInputs) -> LossInputs:
    """The log-probs in the dtype that plain torch has to compute with."""
    dtype, anchor = compute_dtype(inputs.log_prob), inputs.anchor_log_prob
    return inputs._replace(
        old_log_prob=inputs.old_log_prob.to(dtype),
        log_prob=inputs.log_prob.to(dtype),
        anchor_log_prob=None if anchor is None else anchor.to(dtype),
    )


def weighted_sum(weight: Weight, inputs: LossInputs) -> WeightedSum:
    """Returns the sum of the losses times a weight, and what returns the counts and sums.

    It writes the gradient alone, already weighted, so a loss that is a mean takes one pass over the
    tokens. It avoids the dispatcher, which costs more than the loss of a thousand tokens. On CUDA a
    gradient of bfloat16 is written as such; one that the backward pass scales is rounded twice.

    Args:
        weight: Factor of the sum.
        inputs: Tokens with a log-prob for which `is_concrete` holds.
    """
    _, loss, counts, sums = _WeightedSum.apply(inputs.log_prob, inputs, weight)  # type: ignore[no-untyped-call]
    return loss, lambda: Totals.of(counts, sums)


class _TokenLossFunction(torch.autograd.Function):
    """The losses with their sum.

    It has no setup_context, because torch would inspect signatures at every call.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        """Returns losses, gradients, the sum of the losses, counts and sums; saves the gradient."""
        inputs = LossInputs(*args)
        output = all_in_rust(inputs)
        _save_gradient(ctx, inputs.surrogate, output[1])
        ctx.mark_non_differentiable(*output[3:])
        return output

    @staticmethod
    def backward(
        ctx: Any,
        grad_per_token: torch.Tensor | None,
        grad_gradient: torch.Tensor | None,
        grad_total: torch.Tensor | None,
        *_: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of the inputs."""
        whole = grad_per_token
        if grad_total is not None:  # which each of the losses gets
            whole = grad_total if whole is None else whole + grad_total
        return gradients_of(_gradient(ctx, whole, grad_gradient))


class _WeightedSum(torch.autograd.Function):
    """The weighted sum of the losses, with one gradient that is already weighted.

    It has no setup_context, as `_TokenLossFunction`. Only the log-probs are an argument of their
    own, because torch unwraps each argument at every call.
    """

    @staticmethod
    def forward(
        ctx: Any, log_prob: torch.Tensor, inputs: LossInputs, weight: Weight
    ) -> tuple[torch.Tensor, ...]:
        if on_cuda(log_prob):
            output: tuple[torch.Tensor, ...] = kernels.weighted_sum(inputs, weight)
        else:
            output = in_rust(inputs, weight.number())
        _save_gradient(ctx, inputs.surrogate, output[0])
        ctx.is_shared = has_saved_tensor_hooks()
        ctx.mark_non_differentiable(*output[2:])
        return output

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
            or not is_concrete(grad_loss)
        ):
            return _gradient(ctx, grad_loss, grad_gradient), None, None
        (saved,) = ctx.saved_tensors
        # A graph about to be freed gives its gradient away, because memory that is new to the
        # process costs more than everything else.
        gradient = saved.clone() if ctx.is_shared or keeps_graph() else saved.detach()
        if on_cuda(gradient):
            kernels.scale_gradient(gradient, grad_loss)
        elif grad_loss.numpy() != 1.0:
            # In Rust, because torch's threads would spin on the cores that the next loss needs.
            _core.scale(gradient.numpy(), grad_loss.numpy())
        return gradient, None, None
