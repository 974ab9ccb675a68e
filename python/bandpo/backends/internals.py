"""Private parts of torch, each with the safe answer for a version that lacks it."""

from __future__ import annotations

import torch

_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_is_legacy_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: True)
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore: True)


def is_in_memory(tensor: torch.Tensor) -> bool:
    """Returns True if numpy can read the tensor: on the CPU, neither fake nor traced."""
    return tensor.device.type == "cpu" and _is_plain(tensor)


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and not torch.compiler.is_compiling()


def is_transformed() -> bool:
    """Returns True inside a `torch.func` transform or forward-mode AD.

    Both treat a custom operator as a constant, so its tangent would silently be zero.
    """
    return not torch.compiler.is_compiling() and (
        _transforms_are_active() or getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0
    )


def needs_no_dispatcher(tensor: torch.Tensor) -> bool:
    """Returns True if Rust or a kernel may read the tensor: neither traced nor transformed."""
    return (
        tensor.device.type in ("cpu", "cuda")
        and _is_plain(tensor)
        and not _transforms_are_active()
        and not _is_legacy_batched(tensor)  # autograd's own, of is_grads_batched
    )


def keeps_graph() -> bool:
    """Returns True if the running backward pass keeps its graph for another one."""
    return bool(_keeps_graph())


def has_saved_tensor_hooks() -> bool:
    """Returns True if saved-tensor hooks are active.

    A hook may keep the gradient or return it twice, so it must not be scaled in place.
    """
    return _top_hooks(False) is not None


def version_of(tensor: torch.Tensor) -> int | None:
    """Returns a number that every change in place raises; None if the tensor has none."""
    return None if tensor.is_inference() else tensor._version
