"""Checks of tensors that a user gives."""

from __future__ import annotations

import torch

from bandpo.error import InvalidTypeError

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_float(argument: str, tensor: torch.Tensor) -> None:
    """Raises InvalidTypeError unless the argument is a dense tensor of floats."""
    check_tensor(argument, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise InvalidTypeError(
            f"{argument} must be float32, float64, bfloat16 or float16, got {tensor.dtype}"
        )


def check_tensor(argument: str, tensor: torch.Tensor) -> None:
    """Raises InvalidTypeError unless the argument is a dense tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(f"{argument} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise InvalidTypeError(
            f"{argument} must be a dense tensor, got a nested one: of a jagged tensor, pass the "
            f".values() as packed [N], and the .offsets() as cu_seqlens"
        )
    if hasattr(tensor, "to_local"):  # a DTensor, whose import takes long
        raise InvalidTypeError(
            f"{argument} must be a tensor of one rank, got a {type(tensor).__name__}: pass its "
            f".to_local() with the counts of the global batch, or its .full_tensor()"
        )
    if hasattr(tensor, "get_mask"):  # of torch.masked
        raise InvalidTypeError(
            f"{argument} must be a tensor without masked elements, got a {type(tensor).__name__}: "
            f"pass its .get_data(), and its .get_mask() as the mask of the tokens"
        )
    if tensor.layout != torch.strided:
        raise InvalidTypeError(f"{argument} must be a dense tensor, got layout {tensor.layout}")


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the tensor in a dtype: itself if it has that one, without the call of torch."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Returns float64 if any of the tensors is, else float32."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32
