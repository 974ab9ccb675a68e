"""`PolicyLoss`: the rule of a loss as a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from bandpo.backends.contract import Count
from bandpo.check import check_bool, check_name, nonnegative_number
from bandpo.correction import Correction, RolloutCorrection
from bandpo.correction.rule import correction_of
from bandpo.error import InvalidValueError
from bandpo.loss.policy import policy_loss
from bandpo.loss.reduction import GlobalBatch, Reduction
from bandpo.loss.region import resolved
from bandpo.loss.result import PolicyLossResult
from bandpo.presets import preset
from bandpo.rule import BACKENDS, AggregationMode, BackendName, RatioLevel, Rule, RuleRegion
from bandpo.schedule import RegionSource
from bandpo.surrogate import Surrogate


class PolicyLoss(torch.nn.Module):
    """`policy_loss` as a module: the rule in the constructor, the batch in the call.

    Args:
        region: Where the bounds come from; `policy_loss` describes every argument.
        surrogate: The loss of a token.
        dual_clip: Max ratio where the advantage is negative.
        ratio_level: Whose ratio is bounded.
        loss_agg_mode: How the losses of the tokens become one number.
        log_ratio_penalty: Coefficient of the squared log-ratio.
        correction: Rule that makes weights of the ``rollout_log_prob`` of a batch.
        backend: Backend that computes them.
        exact: Take the bounds from the exact solver.
        dp_size: Number of data-parallel ranks.
        loss_scale_factor: Divisor of seq-mean-token-sum-norm.
        metrics_by_probability: Add the metrics by bin of the old probability.

    Raises:
        InvalidTypeError: If an argument has the wrong type.
        InvalidValueError: If a value is out of range or a name not known.
    """

    def __init__(
        self,
        region: RuleRegion | str,
        *,
        surrogate: Surrogate = "min-clip",
        dual_clip: float | None = None,
        ratio_level: RatioLevel = "token",
        loss_agg_mode: AggregationMode = "token-mean",
        log_ratio_penalty: float = 0.0,
        correction: Correction | Mapping[str, Any] | None = None,
        backend: BackendName = "auto",
        exact: bool = False,
        dp_size: int = 1,
        loss_scale_factor: float | None = None,
        metrics_by_probability: bool = False,
    ) -> None:
        super().__init__()
        region = resolved(region)
        Rule.of(region, surrogate, dual_clip, ratio_level)
        check_name("backend", backend, BACKENDS)
        check_bool("exact", exact)
        check_bool("metrics_by_probability", metrics_by_probability)
        Reduction.of(loss_agg_mode, None, dp_size, None, None, loss_scale_factor)
        self.region = region
        self.surrogate: Surrogate = surrogate
        self.dual_clip = dual_clip
        self.ratio_level: RatioLevel = ratio_level
        self.loss_agg_mode: AggregationMode = loss_agg_mode
        self.log_ratio_penalty = nonnegative_number("log_ratio_penalty", log_ratio_penalty)
        self.correction = None if correction is None else correction_of(correction)
        self.backend: BackendName = backend
        self.exact = exact
        self.dp_size = dp_size
        self.loss_scale_factor = loss_scale_factor
        self.metrics_by_probability = metrics_by_probability

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> PolicyLoss:
        """Returns the loss of a published method.

        >>> PolicyLoss.from_preset("dapo", loss_agg_mode="token-sum").region
        Clip(0.2, 0.28)

        Args:
            name: One of `bandpo.presets.PRESETS`.
            changes: Arguments of the class, in place of the preset's or beside them.

        Raises:
            InvalidTypeError: If a change has the wrong type.
            InvalidValueError: If there is no such preset, or a change is out of range.
        """
        return cls(**{**preset(name).arguments(), **changes})

    def forward(
        self,
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        *,
        rollout_is_weights: torch.Tensor | RolloutCorrection | None = None,
        rollout_log_prob: torch.Tensor | None = None,
        anchor_log_prob: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        batch_num_tokens: Count | None = None,
        global_batch_size: Count | None = None,
        global_batch: GlobalBatch | None = None,
    ) -> PolicyLossResult:
        """Returns `policy_loss` of a batch.

        With a ``global_batch`` the module must have neither a dp_size nor a loss_scale_factor.
        """
        return policy_loss(
            old_log_prob,
            log_prob,
            advantages,
            response_mask,
            region=self.region,
            surrogate=self.surrogate,
            dual_clip=self.dual_clip,
            ratio_level=self.ratio_level,
            loss_agg_mode=self.loss_agg_mode,
            log_ratio_penalty=self.log_ratio_penalty,
            rollout_is_weights=rollout_is_weights,
            correction=self.correction,
            rollout_log_prob=rollout_log_prob,
            anchor_log_prob=anchor_log_prob,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
            exact=self.exact,
            dp_size=self.dp_size,
            batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size,
            loss_scale_factor=self.loss_scale_factor,
            global_batch=global_batch,
            metrics_by_probability=self.metrics_by_probability,
        )

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the state of a region that changes between steps, for `state_dict`."""
        return self.region.state_dict() if isinstance(self.region, RegionSource) else {}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `get_extra_state` returned, for `load_state_dict`.

        Raises:
            InvalidValueError: If it is that of another kind of region.
        """
        if isinstance(self.region, RegionSource):
            self.region.load_state_dict(state)
        elif state:
            raise InvalidValueError(
                f"region must be a RegionSource to take the state {dict(state)}, "
                f"got {self.region!r}"
            )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        """Returns the rule, for the module's repr."""
        return (
            f"{self.region!r}, surrogate={self.surrogate!r}, dual_clip={self.dual_clip}, "
            f"ratio_level={self.ratio_level!r}, loss_agg_mode={self.loss_agg_mode!r}, "
            f"log_ratio_penalty={self.log_ratio_penalty}, correction={self.correction!r}, "
            f"backend={self.backend!r}"
        )
