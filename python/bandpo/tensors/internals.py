"""Private parts of torch, each with the safe answer for a version that lacks it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.utils._python_dispatch

_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_is_legacy_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: True)
_no_transforms = getattr(torch._C, "_DisableFuncTorch", nullcontext)
_no_modes = getattr(torch.utils._python_dispatch, "_disable_current_modes", nullcontext)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_mode_of = getattr(torch._C, "_get_dispatch_mode", lambda key: None)
_mode_keys = getattr(torch._C, "_TorchDispatchModeKey", None)
_exports = getattr(torch.compiler, "is_exporting", lambda: False)
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore: True)


# Constant for a compiler, which guards on the transforms that it is in.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_transformed() -> bool:
    """Returns True inside a `torch.func` transform or forward-mode AD, compiled or not.

    Both treat a custom operator as a constant, so its tangent would silently be zero.
    """
    return _transforms_are_active() or getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


@contextmanager
def outside_transforms(device: torch.device) -> Iterator[None]:
    """A context without `torch.func` transforms, fake modes and traces; its tensors outlive them.

    Args:
        device: That of the tensors. A fake one may not exist here, and is left to its mode.
    """
    exists = device.type in ("cpu", "meta") or (device.type == "cuda" and torch.cuda.is_available())
    with _no_transforms(), _no_modes() if exists else nullcontext():
        yield


def is_concrete(tensor: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Returns True if the tensors are neither traced nor transformed, on any device.

    Args:
        tensor: The one that carries the gradient.
        others: Further ones, of which only the class counts: a mode or a transform that wraps one
            of them is active for all.
    """
    return (
        type(tensor) is torch.Tensor
        and not torch.compiler.is_compiling()
        and all(type(other) is torch.Tensor for other in others if other is not None)
        and _modes() == 0  # one of torch.utils._python_dispatch, such as that of a trace
        and not is_transformed()
        and not _is_legacy_batched(tensor)  # autograd's own, of is_grads_batched
    )


def needs_no_dispatcher(tensor: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Returns True if Rust may read the tensors, and the host without waiting for a device."""
    return tensor.is_cpu and is_concrete(tensor, *others)


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


def faked(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a kept tensor as the active fake mode takes it; itself without such a mode.

    A trace keeps its constants, so it gets the tensor itself.
    """
    if _modes() == 0 or _mode_keys is None or _mode_of(_mode_keys.PROXY) is not None or _exports():
        return tensor
    mode = _mode_of(_mode_keys.FAKE)
    found: torch.Tensor = tensor if mode is None else mode.from_tensor(tensor)
    return found


def savable(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor that autograd may save: a copy of one that was made in inference mode."""
    if (
        torch.compiler.is_compiling()  # which cannot trace the next line, and saves what it reads
        or not tensor.is_inference()
        or torch.is_inference_mode_enabled()
    ):
        return tensor
    return tensor.clone()
