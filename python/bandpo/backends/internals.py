"""Private parts of torch, and what holds without them."""

from __future__ import annotations

import torch


def is_in_memory(tensor: torch.Tensor) -> bool:
    """Whether numpy can see the tensor as it is: of the CPU, no fake and no traced one."""
    plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu"
    return plain and not torch.compiler.is_compiling()


def is_transformed() -> bool:
    """Whether torch.func or forward mode looks on, which would take an operator for a constant."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def needs_no_dispatcher(tensor: torch.Tensor) -> bool:
    """Whether Rust can take a tensor, one of the CPU: nothing traces or transforms it."""
    return (
        is_in_memory(tensor)
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # of torch.autograd itself
    )


def keeps_graph() -> bool:
    """Whether the backward pass that is running leaves its graph for another one."""
    known = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return known is None or bool(known())


def has_saved_tensor_hooks() -> bool:
    """Whether others are shown what is saved now, who may keep it or give the same out twice."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
