"""`Correction`: which weights a batch gets, as data; and the result of applying it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from bandpo.check import check_bool, check_name, nonnegative_number
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.presets import PRESETS
from bandpo.region import Clip
from bandpo.rule import AnyRegion, check_region, current
from bandpo.spec import region_from_spec

if TYPE_CHECKING:
    import torch

    from bandpo.batch.metrics import Metrics

Level: TypeAlias = Literal[
    "token",
    "sequence-product",
    "geometric-mean",
    "sequence-mean",
    "sequence-sum",
    "sequence-max",
]
Statistic: TypeAlias = Literal[
    "k1",
    "k2",
    "k3",
    "ratio-distance",
    "bernoulli-tv",
    "bernoulli-kl",
    "bernoulli-reverse-kl",
    "bernoulli-hellinger",
    "bernoulli-pearson-chi2",
    "bernoulli-neyman-chi2",
    "bernoulli-jensen-shannon",
]
Action: TypeAlias = Literal["truncate", "mask", "mask-only"]

STATISTICS: tuple[str, ...] = get_args(Statistic)
ACTIONS: tuple[str, ...] = get_args(Action)
REGION_LEVELS = ("token", "sequence-product", "geometric-mean")
STATISTIC_LEVELS = ("token", "sequence-mean", "sequence-sum", "sequence-max")

MISMATCH_LIMIT = 0.5
"""Mean of ``abs(ln B)`` above which a `bandpo.error.MismatchWarning` is given."""


@dataclass(frozen=True)
class Correction:
    """A rule from two policies' log-probabilities to weights; call it on a batch.

    Either a region or a statistic decides. With a region, a ratio has to lie in it, ends included:

    ================ ============================== ========================= =====================
    level            ratio that has to lie in it    weight with "truncate"    weight with "mask"
    ================ ============================== ========================= =====================
    token            B, at the rollout probability  B, moved to the nearest   B
                                                    bound
    sequence-product product of B over the sequence the product, likewise     the product
    geometric-mean   exp of the mean of ln B        that mean, likewise       B of each token
    ================ ============================== ========================= =====================

    With a statistic, its value for the token, or its mean, sum or max over the sequence's tokens
    that count, must be at most the threshold. The weight is then B of each token. The statistics:

    - k1: ``-ln B``, k2: ``(ln B)^2 / 2``, k3: ``B - 1 - ln B``
    - ratio-distance: ``abs(B - 1)``
    - bernoulli-NAME: the divergence of `bandpo.Divergence` of that name from rollout to old, over
      {this token, everything else}, as in `bandpo.Band`

    Weights take ln B, or its sum, clamped to plus and minus `bandpo.loss.LOG_RATIO_LIMIT`, which is
    20. Decisions take it unclamped, and infinite values as the limits that they are.

    Args:
        region: Allowed ratios: any region at level "token", a `Clip` at the others, because a band
            needs the probability of a token; a `bandpo.schedule.RegionSource` of such; or a spec
            such as ``"clip@0.5,4"``, which becomes its region (see `bandpo.spec`).
        statistic: Quantity that a threshold limits, in place of a region.
        threshold: Max value of the statistic, finite and at least 0.
        level: Whose ratio or statistic decides.
        action: "truncate" moves the ratio into the region and drops nothing; "mask" drops what is
            outside and keeps the ratio elsewhere; "mask-only" gives weight 1 there.
        negative_only: Drop of what is outside only tokens with ``A < 0``; a sequence has the mean
            of its tokens' advantages.
        outward_only: Drop of what is outside only tokens with ``A ln B > 0``, whose update would
            enlarge ``abs(ln B)``.

    Raises:
        InvalidTypeError: If an argument has the wrong type.
        InvalidValueError: If it is out of range or unknown, or does not go with another.
    """

    region: AnyRegion | str | None = None
    statistic: Statistic | None = None
    threshold: float | None = None
    level: Level = "token"
    action: Action = "mask"
    negative_only: bool = False
    outward_only: bool = False

    def __post_init__(self) -> None:
        check_name("action", self.action, ACTIONS)
        for argument in ("negative_only", "outward_only"):
            check_bool(argument, getattr(self, argument))
        if self.negative_only and self.outward_only:
            raise InvalidValueError(
                "outward_only must be left out with negative_only, got True for both"
            )
        if (self.region is None) == (self.statistic is None):
            found = "neither" if self.region is None else f"{self.region!r} and {self.statistic!r}"
            raise InvalidValueError(
                f"region or statistic must be given, and not both: a region for ratios, such as "
                f"Clip.between(0.5, 5), or a statistic with its threshold; got {found}"
            )
        if self.region is not None:
            region = self.region
            if isinstance(region, str):
                region = _region_of(region)
                object.__setattr__(self, "region", region)
            self._check_region(region)
        else:
            self._check_statistic()
        if self.action == "truncate" and self.needs_advantages:
            argument = "negative_only" if self.negative_only else "outward_only"
            raise InvalidValueError(
                f"{argument} must be left out with action 'truncate', which drops nothing, got True"
            )

    @property
    def allowed(self) -> AnyRegion | None:
        """The region as an object, also if a spec was given."""
        return cast("AnyRegion | None", self.region)

    @property
    def needs_advantages(self) -> bool:
        """True if the sign of the advantage decides as well."""
        return self.negative_only or self.outward_only

    @property
    def max_statistic(self) -> float:
        """Max value of the statistic: the threshold.

        Raises:
            InvalidValueError: If there is none.
        """
        if self.threshold is None:
            raise InvalidValueError(
                f"threshold must be given with statistic {self.statistic!r}: its max value"
            )
        return self.threshold

    def _check_region(self, region: AnyRegion) -> None:
        check_region(region)
        check_name("level of a region", self.level, REGION_LEVELS)
        if self.threshold is not None:
            raise InvalidValueError(
                f"threshold must be left out with a region, got {self.threshold}; the region has "
                f"the bounds: Clip.between(0, 2) is B <= 2"
            )
        if self.level != "token" and not isinstance(current(region), Clip):
            raise InvalidValueError(
                f"region must be a Clip with level {self.level!r}, got {region!r}, which "
                f"depends on each token's probability; use level 'token', or a statistic such as "
                f"'bernoulli-kl' with level 'sequence-mean'"
            )

    def _check_statistic(self) -> None:
        check_name("statistic", self.statistic, STATISTICS)
        check_name("level of a statistic", self.level, STATISTIC_LEVELS)
        threshold = nonnegative_number("threshold", self.max_statistic)
        object.__setattr__(self, "threshold", threshold)
        if self.action == "truncate":
            raise InvalidValueError(
                f"action must be 'mask' or 'mask-only' with statistic {self.statistic!r}, which "
                f"has no ratio to truncate to; give a region for 'truncate'"
            )

    def __call__(
        self,
        old_log_prob: torch.Tensor,
        rollout_log_prob: torch.Tensor,
        response_mask: torch.Tensor,
        *,
        advantages: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> RolloutCorrection:
        """Returns the weights of a batch; `rollout_correction` describes the arguments."""
        from bandpo.correction.weights import apply

        return apply(self, old_log_prob, rollout_log_prob, response_mask, advantages, cu_seqlens)


def _region_of(text: str) -> AnyRegion:
    name = text.strip()
    if name in PRESETS:
        raise InvalidValueError(
            f"region must be a region, got the preset {name!r}, whose region is that of its loss; "
            f"preset({name!r}).correction has the arguments of its correction, if it has one"
        )
    return region_from_spec(text)


def correction_of(correction: Correction | Mapping[str, Any]) -> Correction:
    """Returns the rule, made from its arguments if it is plain data, as in a preset.

    Raises:
        InvalidTypeError: If it is neither, or an argument has the wrong type.
        InvalidValueError: If an argument is unknown or out of range.
    """
    if isinstance(correction, Correction):
        return correction
    if not isinstance(correction, Mapping):
        raise InvalidTypeError(
            f"correction must be a bandpo.correction.Correction or its arguments by name, "
            f"got {type(correction).__name__}"
        )
    for name in correction:
        check_name("argument of a correction", name, Correction.__dataclass_fields__)
    return Correction(**correction)


class RolloutCorrection:
    """Weights of a batch, for the argument ``rollout_is_weights`` of `bandpo.loss.policy_loss`.

    Attributes:
        weights: In the shape of ``old_log_prob``, without gradient, float32, or float64 if a
            log-prob is; 0 where dropped or masked, NaN where an input of the weight is.
        kept: Bool, likewise: tokens that count and are not dropped. A loss that divides by the
            tokens that are kept takes it as its ``response_mask``.
        metrics: Detached tensors by name; see `rollout_correction`.
    """

    def __init__(self, weights: torch.Tensor, kept: torch.Tensor, metrics: Metrics) -> None:
        self.weights = weights
        self.kept = kept
        self.metrics = metrics

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return RolloutCorrection, (self.weights, self.kept, self.metrics)

    def __repr__(self) -> str:
        return f"RolloutCorrection(weights={self.weights!r}, metrics={self.metrics!r})"


def rollout_correction(
    old_log_prob: torch.Tensor,
    rollout_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    region: AnyRegion | str | None = None,
    statistic: Statistic | None = None,
    threshold: float | None = None,
    level: Level = "token",
    action: Action = "mask",
    negative_only: bool = False,
    outward_only: bool = False,
    advantages: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> RolloutCorrection:
    """Returns the weights that correct a batch for the engine that drew it.

    The rule is that of `Correction`, which describes its arguments and holds them for many batches.
    Everything is computed in float32, or in float64 if a log-prob is, on the tensors' device and
    without waiting for it. Nothing has a gradient.

    Masked tokens have no effect, even if they hold NaN or inf. A NaN in a token that counts makes
    its weight NaN, and at another level than "token" those of its sequence: it is neither dropped
    nor kept unseen, and ``kept`` is true there. So does an advantage that decides, and a
    token that neither policy could draw, with both log-probs ``-inf``.

    Metrics, over the tokens that count (0, and 1 for shares and weights, if there is none):

    - kept_fraction: share of the tokens that are kept
    - outside_fraction: share of them outside the region or above the threshold, themselves or their
      sequence: dropped, truncated, or kept because of their advantage
    - effective_sample_size: ``(sum w)^2 / (n sum w^2)`` of the weights w, dropped ones as 0, as a
      share of the n tokens; 0 if all are dropped
    - weight_mean, weight_max, and the quantiles weight_p01, weight_p50 and weight_p99, linear
      between neighbours; dropped tokens count as 0
    - log_ratio_abs: mean of ``abs(ln B)``, each clamped to 20
    - valid_tokens (int64)
    - tokens_by_probability (int64) and kept_fraction_by_probability, over the bins of the rollout
      probability between `bandpo.loss.PROBABILITY_EDGES`

    If log_ratio_abs exceeds `MISMATCH_LIMIT`, a `bandpo.error.MismatchWarning` is given once in a
    process. It is checked for CPU tensors alone, outside of `torch.compile`, because it has to read
    the value.

    Args:
        old_log_prob: Natural log-probabilities of the tokens under the policy in the denominator of
            the loss's ratio, computed by the trainer; [B, T], [B, T, 1] or packed [N], float32,
            float64, bfloat16 or float16. With the current ``log_prob`` in its place, B is
            new/rollout.
        rollout_log_prob: The same under the policy that drew them, as the engine returns them, with
            the temperature that it drew with.
        response_mask: Which tokens count (0: not), bool, int or float.
        region: Allowed ratios; see `Correction` for this and the next six.
        statistic: Quantity that a threshold limits, in place of a region.
        threshold: Max value of the statistic.
        level: Whose ratio or statistic decides.
        action: Treatment of a ratio outside.
        negative_only: Drop only tokens with a negative advantage.
        outward_only: Drop only tokens whose update would enlarge the mismatch.
        advantages: One a token, or one a sequence as [B, 1] or [B]; needed with one of these two.
        cu_seqlens: Offsets of the sequences in packed tensors, int32 or int64 [S + 1], from 0 to N;
            needed for packed tensors at another level than "token".

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype; the message names the right
            ones.
        InvalidValueError: If shapes or devices do not match, a value is out of range, arguments do
            not go together or one is missing.
        MissingExtraError: If torch is not installed.
    """
    rule = Correction(region, statistic, threshold, level, action, negative_only, outward_only)
    return rule(
        old_log_prob, rollout_log_prob, response_mask, advantages=advantages, cu_seqlens=cu_seqlens
    )
