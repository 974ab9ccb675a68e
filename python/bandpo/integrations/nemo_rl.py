"""NeMo-RL: `ClippedPGLossFn` with the bounds of a region.

`install` makes ``grpo.setup`` build it, in the driver, which sends it to the workers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn

from bandpo.error import InvalidValueError
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.settings import LossSettings, check_settings
from bandpo.integrations.version import require, require_reads

require_reads("nemo-rl", ClippedPGLossFn.__call__, "ratio_clip_min", "ratio_clip_max")

_WITHOUT_A_TOKEN_RATIO = (
    "disable_ppo_ratio",
    "force_on_policy_ratio",
    "sequence_level_importance_ratios",
    "use_cispo",
)


class BandClippedPGLossFn(ClippedPGLossFn):  # type: ignore[misc]
    """NeMo-RL's `ClippedPGLossFn`, with two epsilons for each token.

    Normalisation by the global counts, dual clip, KL term, importance weights and metrics are
    NeMo-RL's; its two numbers of a clip have no effect. The region stands at ``prev_logprobs``, or
    with the anchor "rollout" at ``generation_logprobs``.

    Args:
        *options: Arguments of `ClippedPGLossFn`.
        settings: The rule, which has to be a region and the surrogate min-clip.
        **named: Arguments of `ClippedPGLossFn` by name.

    Raises:
        InvalidTypeError: If ``settings`` is something else.
        InvalidValueError: If the rule is more than a clamp, or the configuration clips no ratio of
            a token.
    """

    def __init__(self, *options: Any, settings: LossSettings, **named: Any) -> None:
        super().__init__(*options, **named)
        for name in _WITHOUT_A_TOKEN_RATIO:
            if getattr(self, name):
                raise InvalidValueError(
                    f"loss_fn.{name} must be false with a region, which clips the ratio of a token"
                )
        instead = "truncated_importance_sampling_type has NeMo-RL's own"
        check_settings(settings).refuse_correction("NeMo-RL", instead)
        settings.refuse_changes("NeMo-RL")
        self.region = settings.clamp_region("NeMo-RL")
        self.anchored = settings.anchor == "rollout"

    def __call__(
        self, next_token_logprobs: torch.Tensor, data: Any, *others: Any, **named: Any
    ) -> Any:
        """Returns NeMo-RL's loss and metrics."""
        # NeMo-RL's tensors begin with the first token, which nothing predicts.
        old = data["prev_logprobs"][:, 1:]
        anchor = data["generation_logprobs"][:, 1:] if self.anchored else None
        numbers = vars(self)["ratio_clip_min"], vars(self)["ratio_clip_max"]
        self.ratio_clip_min, self.ratio_clip_max = epsilons(self.region, old, anchor)
        try:
            return super().__call__(next_token_logprobs, data, *others, **named)
        finally:
            self.ratio_clip_min, self.ratio_clip_max = numbers


def install(**fields: Any) -> None:
    """Makes ``nemo_rl.algorithms.grpo.setup`` of this process build a `BandClippedPGLossFn`.

    Args:
        **fields: The rule; see `LossSettings`.
    """
    import nemo_rl.algorithms.grpo as grpo

    require_reads("nemo-rl", grpo.setup, "ClippedPGLossFn")
    require("nemo-rl", grpo, "ClippedPGLossFn")
    settings = LossSettings.of(fields)
    settings.clamp_region("NeMo-RL")
    grpo.ClippedPGLossFn = partial(BandClippedPGLossFn, settings=settings)
