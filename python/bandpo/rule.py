"""A rule: region x surrogate x ratio level, and which of them go together."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

from bandpo.check import check_name
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.region import BySign, Clip, PrefixBudget, Region, TensorBand
from bandpo.schedule import RegionSource
from bandpo.surrogate import GammaWeight, Mask, MinClip, Surrogate, TokenSurrogate, resolve

AggregationMode: TypeAlias = Literal[
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "none",
]
RatioLevel: TypeAlias = Literal["token", "sequence", "sequence-product", "geometric-mean"]
BackendName: TypeAlias = Literal["auto", "native", "cuda", "torch"]
AnyRegion: TypeAlias = Region | RegionSource
"""A region, or a source of one that changes between steps."""

Budget: TypeAlias = PrefixBudget | TensorBand
"""A measure of which tokens are inside, without bounds."""

RuleRegion: TypeAlias = AnyRegion | BySign | Budget
"""The region of a loss, one for each sign of the advantage, or a budget."""

AGGREGATION_MODES: tuple[str, ...] = get_args(AggregationMode)
RATIO_LEVELS: tuple[str, ...] = get_args(RatioLevel)
BACKENDS: tuple[str, ...] = get_args(BackendName)


class Rule(NamedTuple):
    """A checked rule of `bandpo.loss.policy_loss`; made by `Rule.of`."""

    region: RuleRegion
    surrogate: TokenSurrogate
    ratio_level: RatioLevel

    @classmethod
    def of(
        cls,
        region: RuleRegion,
        surrogate: Surrogate,
        dual_clip: float | None,
        ratio_level: RatioLevel,
    ) -> Rule:
        """Returns the rule that the arguments of `bandpo.loss.policy_loss` describe.

        Raises:
            InvalidTypeError: If an argument has the wrong type.
            InvalidValueError: If it is out of range or unknown, or does not go with another.
        """
        resolved = resolve(surrogate, dual_clip)
        check_name("ratio_level", ratio_level, RATIO_LEVELS)
        if isinstance(region, (PrefixBudget, TensorBand)):
            if not isinstance(resolved, Mask) or ratio_level != "token":
                raise InvalidValueError(
                    f"surrogate must be 'mask' with ratio_level 'token' for {region!r}, which has "
                    f"no bounds, got {resolved.name!r} and {ratio_level!r}"
                )
            return cls(region, resolved, ratio_level)
        if not isinstance(region, BySign):
            check_region(region)
        if ratio_level in ("sequence", "sequence-product") and not all(
            isinstance(part, Clip) for part in parts_of(region)
        ):
            raise InvalidValueError(
                f"region must be a Clip with ratio_level {ratio_level!r}, got {region!r}, which "
                f"depends on each token's probability; use ratio_level 'token'"
            )
        if ratio_level == "geometric-mean":
            if not isinstance(resolved, MinClip):
                raise InvalidValueError(
                    f"surrogate must be 'min-clip' with ratio_level 'geometric-mean', "
                    f"got {resolved.name!r}"
                )
            if dual_clip is not None:
                raise InvalidValueError(
                    f"dual_clip must be left out with ratio_level 'geometric-mean', got {dual_clip}"
                )
        return cls(region, resolved, ratio_level)

    def changes_tokens(self) -> bool:
        """True if some tokens are clipped or masked before a backend computes their losses."""
        return (
            self.surrogate.whole_sequence
            or self.ratio_level == "geometric-mean"
            or isinstance(self.surrogate, GammaWeight)
        )


def current(region: AnyRegion) -> Region:
    """Returns the region, or the one that a source has now."""
    return region.region if isinstance(region, RegionSource) else region


def parts_of(region: AnyRegion | BySign) -> tuple[Region, ...]:
    """Returns the region that it is now, or both regions of a `BySign`."""
    return region if isinstance(region, BySign) else (current(region),)


def check_region(region: object) -> None:
    """Raises InvalidTypeError unless the argument is a region or a source of one."""
    if not isinstance(region, (Region, RegionSource)):
        raise InvalidTypeError(
            f"region must be a bandpo.Band, Clip, BandTable or another Region, or a "
            f"bandpo.schedule.RegionSource, got {type(region).__name__}; a preset is given by "
            f"**preset(name).arguments(), and a schedule within a ScheduledBand"
        )
