"""The backends of this package as implementations of the vectors."""

from __future__ import annotations

from typing import Any

import torch

from bandpo.conform.batch import Loss, LossOf, MicroBatch, tokens_that_count
from bandpo.conform.vectors import Vector
from bandpo.loss import policy_loss
from bandpo.presets import preset
from bandpo.schedule import SecondMoment

DEVICES = {"native": "cpu", "torch": "cpu", "cuda": "cuda"}
"""The device that each backend runs on here."""

_SIMPLEX = "a table lets no probability rise above 1, the published bound and the exact solver do"

KNOWN = {("dcpo", "positive"): _SIMPLEX, ("trgppo", "positive"): _SIMPLEX}
"""Presets and cases that do not agree, and why; with ``exact`` they do."""


def backends() -> list[str]:
    """Returns the backends that can run here."""
    return ["native", "torch", *(["cuda"] if _cuda_runs() else [])]


def _cuda_runs() -> bool:
    if not torch.cuda.is_available():
        return False
    from bandpo.backends.cuda.availability import kernels_run

    return kernels_run()


def loss_of(vector: Vector, backend: str, *, exact: bool = False) -> LossOf:
    """Returns the loss of a vector's preset by a backend."""
    arguments = preset(vector.preset).arguments(loss_agg_mode=vector.mode)
    region = arguments["region"]
    if isinstance(region, SecondMoment):
        region.update(*tokens_that_count(vector))

    def loss(batch: MicroBatch) -> Loss:
        return _loss(batch, {**arguments, "backend": backend, "exact": exact})

    return loss


def _loss(batch: MicroBatch, arguments: dict[str, Any]) -> Loss:
    corrected = arguments["correction"] is not None
    result = policy_loss(
        batch.old_log_prob,
        batch.log_prob,
        batch.advantages,
        batch.response_mask,
        rollout_log_prob=batch.rollout_log_prob if corrected else None,
        batch_num_tokens=batch.tokens,
        global_batch_size=batch.sequences,
        loss_scale_factor=batch.width,
        **arguments,
    )
    shares = [result.metrics[f"clip_fraction_{side}"] for side in ("low", "high")]
    counts = torch.stack(shares).double() * result.metrics["valid_tokens"]
    return Loss(result.loss, counts.round().to(torch.int64))
