"""prime-rl: a loss for ``trainer.loss`` of type "custom".

``import_path = "bandpo.integrations.prime_rl.band_loss"``, and the rule in
``[trainer.loss.kwargs]``.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from bandpo.error import InvalidTypeError
from bandpo.integrations.loss import TrainerLoss
from bandpo.integrations.settings import LossSettings
from bandpo.integrations.version import check_version, require

if TYPE_CHECKING:
    from prime_rl.trainer.rl.loss import LossInputs, LossOutputs

check_version("prime-rl", "0.8.0")

_METRICS = ("clip_fraction_low", "clip_fraction_high", "gradient_removed", "approx_kl_k3")


def band_loss(inputs: LossInputs, **fields: Any) -> LossOutputs:
    """Returns the loss of one sample, summed over its tokens, and metrics as tensors.

    prime-rl divides the sum by the count of tokens of its whole batch. The region stands at
    ``inference_logprobs``, the denominator of the ratio.

    Args:
        inputs: prime-rl's tensors of one sample, 1-D. ``loss_weights`` scale the loss of a token.
        **fields: The rule; see `LossSettings`.

    Raises:
        InvalidTypeError: If a field has the wrong type.
        InvalidValueError: If one is unknown or out of range, or needs a third policy or a schedule.
    """
    import prime_rl.trainer.rl.loss as theirs

    require("prime-rl", theirs, "LossOutputs")
    mask = inputs.loss_mask
    result = _loss_of(_as_text(fields))(
        inputs.inference_logprobs,
        inputs.trainer_logprobs,
        inputs.advantages,
        mask,
        loss_agg_mode="none",
        cu_seqlens=torch.tensor([0, mask.numel()], device=mask.device),
    )
    losses = result.loss
    if inputs.loss_weights is not None:
        # The penalty of the log-ratio as well, as in prime-rl, and 0 where masked.
        losses = losses * torch.where(mask, inputs.loss_weights, 0.0)
    metrics = {f"band/{name}": result.metrics[name] for name in _METRICS}
    outputs: LossOutputs = theirs.LossOutputs(loss=losses.sum(), metrics=metrics)
    return outputs


def _as_text(fields: dict[str, Any]) -> str:
    try:
        return json.dumps(fields, sort_keys=True)
    except TypeError as error:
        raise InvalidTypeError(
            f"trainer.loss.kwargs must be text, numbers and tables, as TOML has them: {error}"
        ) from None


@lru_cache(16)
def _loss_of(fields: str) -> TrainerLoss:
    """One loss a rule, because prime-rl calls the function for each sample."""
    settings = LossSettings.of(json.loads(fields))
    settings.refuse_rollout("prime-rl")
    settings.refuse_changes("prime-rl")
    return TrainerLoss(settings)
