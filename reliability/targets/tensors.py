"""Tensors of every type in a loss."""

from __future__ import annotations

from functools import cache
from typing import Any

from bandpo import Band, Clip
from reliability.choices import Choices


@cache
def _losses() -> tuple[dict[str, Any], ...]:
    table = Band("kl", 0.05).table()
    return (
        {"region": Band("kl", 0.05).cap(10)},
        {"region": Clip(0.2, 0.28), "surrogate": "weight"},
        {"region": table, "ratio_level": "sequence"},
        {"region": Band("tv", 0.1), "surrogate": "mask", "loss_agg_mode": "seq-mean-token-mean"},
    )


def tensors(data: bytes) -> None:
    """Tensors of every dtype and layout in a loss, against the same numbers in order."""
    import torch

    from bandpo.loss import policy_loss

    choices = Choices(data)
    options = choices.of(_losses())
    backend: Any = choices.of(("native", "torch"))
    shape = choices.of(((2, 3), (1, 1), (0, 3), (3, 0), (4, 7), (5,), (), (2, 2, 2)))
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
    generator = torch.Generator().manual_seed(choices.below(2**16))
    given = []
    for place in range(4):
        dtype = choices.of(dtypes[:2] if choices.below(4) else dtypes)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = -values.abs() if place < 2 else values
        if choices.below(8) == 0 and values.numel():
            special = (float("nan"), float("inf"), -float("inf"), 0.0, 5.0, -3e38, 1e-320)
            values.view(-1)[choices.below(values.numel())] = choices.of(special)
        values = (values > 0.0) if place == 3 else values
        values = values.to(dtype) if place < 3 or choices.below(2) else values
        kind = choices.below(4)
        if kind == 1 and values.dim() == 2:
            values = values.t().contiguous().t()
        elif kind == 2 and values.dim():
            values = torch.stack([values, values], -1)[..., 0]
        elif kind == 3 and values.dim() == 2 and values.shape[1]:
            values = values[:, :1].expand(shape)
        given.append(values)
    results = []
    for batch in (given, [tensor.clone(memory_format=torch.contiguous_format) for tensor in given]):
        new = batch[1].detach()
        if new.is_floating_point():
            new = new.requires_grad_()
        result = policy_loss(batch[0], new, *batch[2:], backend=backend, **options)
        gradient = torch.autograd.grad(result.loss, new, allow_unused=True)[0]
        results.append((result.loss.detach(), gradient))
    for found, wanted in zip(*results, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:  # sums of torch depend on the layout in their last bits
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0, equal_nan=True)
