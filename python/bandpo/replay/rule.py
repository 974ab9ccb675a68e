"""A rule that a log is replayed with: its name, its loss and its correction."""

from __future__ import annotations

from typing import NamedTuple

from bandpo.check import suggestion
from bandpo.correction import Correction
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.presets import PRESETS, Preset, preset
from bandpo.region import PrefixBudget, Region, TensorBand
from bandpo.rule import Rule, RuleRegion
from bandpo.schedule import RegionSource
from bandpo.spec import region_from_spec, spec_from_region
from bandpo.surrogate import BY_NAME, Surrogate


class ReplayedRule(NamedTuple):
    """A rule whose region is the same for every batch."""

    name: str
    rule: Rule
    correction: Correction | None

    @property
    def has_own_ratio(self) -> bool:
        """True if the ratio is that of a sequence, not of the token."""
        return self.rule.ratio_level != "token"

    @property
    def takes_sequences(self) -> bool:
        """True if other tokens of a sequence decide with a token."""
        return (
            self.has_own_ratio
            or self.rule.surrogate.whole_sequence
            or isinstance(self.rule.region, PrefixBudget)
            or (self.correction is not None and self.correction.level != "token")
        )


def replayed_rule(given: str | Region | Preset) -> ReplayedRule:
    """Returns the rule of a text, a region or a preset.

    A text is the name of a preset, which stands for its whole rule, a region's spec (see
    `bandpo.spec`), or a surrogate and a spec, as in ``"mask:kl@0.05"``. A region alone is replayed
    with min-clip.

    Raises:
        InvalidTypeError: If ``given`` has another type.
        InvalidValueError: If a text cannot be read, or if the region changes with the batch, or
            has no bounds and no text.
    """
    if isinstance(given, Preset):
        return _of_preset(given)
    if isinstance(given, Region):
        return _checked(_name_of(given), given, "min-clip")
    if not isinstance(given, str):
        raise InvalidTypeError(
            f"a rule must be a str, a Region or a Preset, got {type(given).__name__}"
        )
    name = given.strip()
    if name in PRESETS:
        return _of_preset(preset(name))
    head, colon, rest = name.partition(":")
    if colon and head in BY_NAME:
        return _checked(name, region_from_spec(rest), head)  # type: ignore[arg-type]
    try:
        return _checked(name, region_from_spec(name), "min-clip")
    except InvalidValueError as error:
        raise InvalidValueError(f"rule {name!r}: {error}{_nearest(head, colon)}") from None


def _nearest(head: str, colon: str) -> str:
    return suggestion(head, list(BY_NAME)) if colon else ""


def _name_of(region: Region) -> str:
    try:
        return spec_from_region(region)
    except InvalidValueError:  # an array or a function has no spec
        return repr(region)


def _of_preset(given: Preset) -> ReplayedRule:
    correction = None if given.correction is None else Correction(**given.correction)
    return _checked(
        given.name,
        given.region,
        given.surrogate,
        given.dual_clip,
        given.ratio_level,
        correction=correction,
    )


def _checked(
    name: str,
    region: RuleRegion,
    surrogate: Surrogate,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    *,
    correction: Correction | None = None,
) -> ReplayedRule:
    rule = Rule.of(region, surrogate, dual_clip, ratio_level)  # type: ignore[arg-type]
    if isinstance(region, RegionSource):
        raise InvalidValueError(
            f"rule {name!r} has a region that changes with the batch, and cannot be replayed: a "
            f"log has some of the steps alone. Replay one of its regions, as in clip@0.2,0.28"
        )
    if isinstance(region, TensorBand):
        raise InvalidValueError(
            f"rule {name!r} has a delta for each token of one batch, and cannot be replayed"
        )
    return ReplayedRule(name, rule, correction)
