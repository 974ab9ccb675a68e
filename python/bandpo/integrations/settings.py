"""`LossSettings`: the rule of a loss as a trainer's configuration has it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from bandpo.check import check_name, nonnegative_number
from bandpo.correction import Correction
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.presets import PRESETS, Preset, preset
from bandpo.region import Region
from bandpo.rule import AnyRegion, RatioLevel, Rule, RuleRegion
from bandpo.schedule import EntropyTargeted, RegionSource, Schedule, ScheduledBand
from bandpo.spec import region_or_source_from_spec, schedule_from_spec, spec_from_region
from bandpo.surrogate import BY_NAME, MinClip, Surrogate, TokenSurrogate

DEFAULT_PRESET = "bandpo-kl"
"""Preset of settings that name neither a preset nor a region, but for its region."""
DEFAULT_REGION = "(kl@0.01).cap(10)"
"""Region in place of that of `DEFAULT_PRESET`, for the reasons in docs/evidence.md."""

ANCHORS = ("old", "rollout")

_UNSET = (None, "old")
"""Values of fields that change nothing."""


@dataclass(frozen=True)
class LossSettings:
    """The rule of `bandpo.loss.policy_loss` as text and numbers, for YAML and command lines.

    A field that is None leaves the value of the preset, or else the default of `policy_loss`. With
    neither a preset nor a region the rule is `DEFAULT_PRESET` with `DEFAULT_REGION`. Aggregation is
    the trainer's.

    Args:
        region: Source of the bounds: a spec such as ``"(kl@0.01).cap(10)"`` or
            ``"preset:dppo-kl"`` (see `bandpo.spec`), or a region or a source of one as an object.
        preset: A whole rule by name (see `bandpo.presets`), of which other fields replace parts.
        surrogate: Loss of a token: a name; its arguments with its name, such as
            ``{"name": "mask", "truncation": 3.0}``; or an object. It takes the preset's dual clip
            away.
        dual_clip: Max ratio where the advantage is negative; inf for none.
        ratio_level: Whose ratio is bounded.
        schedule: Delta by optimiser step: a spec such as ``"linear(0.1, 0.02, 1000)"`` (see
            `bandpo.spec.schedule_from_spec`), or an object, of which every region gets a copy. The
            one band in the region follows it; see `bandpo.schedule.ScheduledBand.of`.
        anchor: Policy at which the region stands: "old", the denominator of the ratio, or
            "rollout", the engine that sampled.
        correction: Weights for that engine: the name of a preset that has one, such as "icepop";
            arguments of `bandpo.correction.Correction` by name; or one as an object.
        log_ratio_penalty: Coefficient of the squared log-ratio, finite and at least 0.

    Raises:
        InvalidTypeError: If a field has the wrong type; the message names it.
        InvalidValueError: If it is out of range or unknown, or does not go with another.
    """

    region: RuleRegion | str | None = None
    preset: str | None = None
    surrogate: Surrogate | Mapping[str, Any] | None = None
    dual_clip: float | None = None
    ratio_level: RatioLevel | None = None
    schedule: Schedule | str | None = None
    anchor: Literal["old", "rollout"] = "old"
    correction: Correction | Mapping[str, Any] | str | None = None
    log_ratio_penalty: float | None = None

    def __post_init__(self) -> None:
        check_name("anchor", self.anchor, ANCHORS)
        rule = self.arguments()
        Rule.of(rule["region"], rule["surrogate"], rule["dual_clip"], rule["ratio_level"])
        nonnegative_number("log_ratio_penalty", rule["log_ratio_penalty"])

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> LossSettings:
        """Returns the settings of a mapping, as JSON, YAML or TOML has them.

        Raises:
            InvalidTypeError: If it is no mapping, or a field has the wrong type.
            InvalidValueError: If it has a field that is not known, or one is out of range.
        """
        if not isinstance(given, Mapping):
            raise InvalidTypeError(
                f"settings must have fields by name, such as region, got {type(given).__name__}"
            )
        for name in given:
            check_name("setting", name, [field.name for field in fields(cls)])
        return cls(**given)

    def arguments(self) -> dict[str, Any]:
        """Returns keyword arguments for `bandpo.loss.policy_loss` and `bandpo.loss.PolicyLoss`.

        All that make the rule, but not ``loss_agg_mode``. A region that changes is a new one.
        """
        base = self._base()
        correction = base.correction if self.correction is None else self.correction
        given = {
            "surrogate": _surrogate(self.surrogate),
            "dual_clip": self.dual_clip,
            "ratio_level": self.ratio_level,
            "log_ratio_penalty": self.log_ratio_penalty,
        }
        return {
            "region": self.region_or_source(),
            "surrogate": base.surrogate,
            "dual_clip": base.dual_clip if self.surrogate is None else None,
            "ratio_level": base.ratio_level,
            "log_ratio_penalty": base.log_ratio_penalty,
            "correction": _correction(correction),
            **{name: value for name, value in given.items() if value is not None},
        }

    def region_or_source(self) -> RuleRegion:
        """Returns the region; one that changes has a state, and is a new one at each call.

        A source that was given as an object is that object.
        """
        region = self._base().region
        if self.schedule is None:
            return region
        schedule = self.schedule
        if isinstance(schedule, str):
            schedule = schedule_from_spec(schedule)
        elif isinstance(schedule, Schedule):
            schedule = copy.deepcopy(schedule)
        else:
            raise InvalidTypeError(
                f"schedule must be a spec, such as 'linear(0.1, 0.02, 1000)', or a "
                f"bandpo.schedule.Schedule, got {schedule!r}"
            )
        if not isinstance(region, Region):
            raise InvalidValueError(
                f"schedule must be left out with region {region!r}, which is none with a band"
            )
        try:
            return ScheduledBand.of(region, schedule)
        except InvalidValueError as error:
            raise InvalidValueError(f"schedule must be left out: {error}") from None

    def as_json(self) -> dict[str, Any]:
        """Returns the fields that are given, as JSON has them, for the metadata of a record.

        `of` makes an equal rule of them. Without a preset and a region, those of the default are
        given. An object that no text stands for, such as a table, is its repr.
        """
        given = {own.name: getattr(self, own.name) for own in fields(self)}
        if self.preset is None and self.region is None:
            given |= {"preset": DEFAULT_PRESET, "region": DEFAULT_REGION}
        return {name: _as_json(value) for name, value in given.items() if value not in _UNSET}

    @property
    def needs_rollout_log_prob(self) -> bool:
        """True if the loss reads the log-probabilities of the engine that sampled."""
        return self.anchor == "rollout" or self.arguments()["correction"] is not None

    @property
    def needs_entropy(self) -> bool:
        """True if a step of the region takes the entropy of the policy."""
        region = self.region_or_source()
        return isinstance(region, ScheduledBand) and isinstance(region.schedule, EntropyTargeted)

    @property
    def changes(self) -> Literal["never", "by step", "by batch"]:
        """When the region changes: by ``step`` of an optimiser, or by ``update`` with a batch."""
        region = self.region_or_source()
        if not isinstance(region, RegionSource):
            return "never"
        return "by step" if isinstance(region, ScheduledBand) else "by batch"

    def refuse_changes(self, trainer: str, *, but_steps: bool = False) -> None:
        """Raises InvalidValueError if the region changes in a way that an adapter does not serve.

        Args:
            trainer: Name of the trainer, for the message.
            but_steps: True if the adapter counts optimiser steps.
        """
        if self.changes == "by batch":
            raise InvalidValueError(
                f"region must not be learnt from batches with {trainer}, because its adapter calls "
                f"no update, got {self.region_or_source()!r}"
            )
        if self.changes == "by step" and not but_steps:
            raise InvalidValueError(
                f"schedule must be left out with {trainer}, whose loss is not told of optimiser "
                f"steps, got {self.region_or_source()!r}"
            )

    def refuse(self, trainer: str, instead: str, *names: str) -> None:
        """Raises InvalidValueError if one of the fields is given.

        Args:
            trainer: Name of the trainer that cannot take it.
            instead: Sentence that ends the message: the reason, and another way.
            *names: Names of fields.
        """
        for name in names:
            check_name("field", name, [field.name for field in fields(self)])
            value = getattr(self, name)
            if value not in _UNSET:
                raise InvalidValueError(
                    f"{name} must be left out with {trainer}, got {value!r}; {instead}"
                )

    def refuse_correction(self, trainer: str, instead: str) -> None:
        """Raises InvalidValueError if the rule has a correction, of its own or of its preset.

        Args:
            trainer: Name of the trainer that cannot take it.
            instead: Sentence that ends the message.
        """
        if self.arguments()["correction"] is not None:
            self.refuse(trainer, instead, "correction", "preset")

    def refuse_rollout(self, trainer: str) -> None:
        """Raises InvalidValueError if the rule needs the log-probabilities of a third policy.

        Args:
            trainer: Name of the trainer whose loss does not get them.
        """
        reason = "its loss gets the log-probabilities of one older policy"
        self.refuse(trainer, reason, "anchor")
        self.refuse_correction(trainer, reason)

    def clamp_region(self, trainer: str) -> AnyRegion:
        """Returns the region for a trainer that clamps the ratio of each token by itself.

        Args:
            trainer: Name of the trainer, for the message.

        Raises:
            InvalidValueError: If the rule is more than a clamp: another surrogate than min-clip,
                another level than "token", a penalty, a region with more than two bounds a token,
                or a dual clip.
        """
        rule = self.arguments()
        surrogate, region, dual = rule["surrogate"], rule["region"], rule["dual_clip"]
        name = surrogate.name if isinstance(surrogate, TokenSurrogate) else surrogate
        if isinstance(surrogate, MinClip):
            dual = surrogate.dual_clip if dual is None else dual
        for field, value, allowed in (
            ("surrogate", name, MinClip.name),
            ("ratio_level", rule["ratio_level"], "token"),
            ("log_ratio_penalty", rule["log_ratio_penalty"], 0.0),
            ("dual_clip", dual, None),
        ):
            if value != allowed and not (field == "dual_clip" and value == math.inf):
                raise InvalidValueError(
                    f"{field} must be {allowed!r} with {trainer}, whose own loss clamps the ratio "
                    f"of each token, got {value!r}{self._origin(field)}"
                )
        if not isinstance(region, (Region, RegionSource)):
            raise InvalidValueError(
                f"region must be one with a lower and an upper bound a token with {trainer}, whose "
                f"own loss clamps the ratio, got {region!r}"
            )
        return region

    def _origin(self, field: str) -> str:
        """The end of a message about the value of a field that a preset may have given."""
        if getattr(self, field) is not None or (
            field == "dual_clip" and self.surrogate is not None
        ):
            return ""
        if self.preset is None:
            return (
                f" of the preset {DEFAULT_PRESET!r}, which is taken where no rule is given; "
                f"give region={DEFAULT_REGION!r} for the region alone"
            )
        instead = (
            f"give region='preset:{self.preset}'" if self.region is None else "leave preset out"
        )
        return f" of the preset {self.preset!r}; {instead} for the region alone"

    def _base(self) -> Preset:
        """The preset, or the defaults, with the region of the settings."""
        region = self.region
        if region is None:
            if self.preset is not None:
                return preset(self.preset)
            of_default = region_or_source_from_spec(DEFAULT_REGION)
            return replace(preset(DEFAULT_PRESET), region=of_default)
        if isinstance(region, str):
            if region.strip() in PRESETS:
                raise InvalidValueError(
                    f"region must be a region, got the preset {region.strip()!r}, which has a "
                    f"surrogate as well; 'preset:{region.strip()}' is its region alone, and the "
                    f"setting preset, where the trainer has it, the whole rule"
                )
            region = region_or_source_from_spec(region)
        if not isinstance(region, RuleRegion):
            raise wrong_region(region)
        if self.preset is None:
            return Preset("", region, source="")
        return replace(preset(self.preset), region=region)


def check_settings(given: object) -> LossSettings:
    """Returns the settings that an adapter was given.

    Raises:
        InvalidTypeError: If they are something else, such as a spec.
    """
    if not isinstance(given, LossSettings):
        raise InvalidTypeError(
            f"settings must be a LossSettings, such as LossSettings({DEFAULT_REGION!r}), "
            f"got {given!r}"
        )
    return given


def wrong_region(given: object) -> InvalidTypeError:
    """Returns the error for a region of a configuration that is neither text nor an object."""
    return InvalidTypeError(
        f"region must be a spec, such as {DEFAULT_REGION!r}, 'clip@0.2,0.28' or "
        f"'preset:bandpo-kl', or a bandpo.Region, got {given!r}"
    )


def refuse_delta(delta: object, trainer: str) -> None:
    """Raises InvalidValueError if a trainer's ``delta``, a cap of the ratio, is given.

    Below a token's upper bound it would act in place of it, and the metrics would not say so.
    """
    if delta is not None:
        raise InvalidValueError(
            f"delta, a cap of the ratio in {trainer}, must be left out with a region, which has "
            f"the bounds, got {delta!r}; region={DEFAULT_REGION!r} has a cap where the advantage "
            f"is positive"
        )


def _surrogate(given: Surrogate | Mapping[str, Any] | None) -> Surrogate | None:
    """The surrogate of a field; a mapping has its name and its arguments."""
    if not isinstance(given, Mapping):
        return given
    arguments = {str(name): value for name, value in given.items()}
    name = arguments.pop("name", None)
    check_name("surrogate, its name,", name, BY_NAME)
    kind = BY_NAME[str(name)]
    known: list[str] = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    if arguments and (kind is MinClip or not known):
        raise InvalidValueError(
            f"surrogate {name!r} takes no arguments, got {', '.join(arguments)}; dual_clip is a "
            f"field of its own"
        )
    for argument in arguments:
        check_name(f"argument of surrogate {name!r}", argument, known)
    try:
        return kind(**arguments) if arguments else name  # type: ignore[return-value]
    except (InvalidTypeError, InvalidValueError) as error:
        raise type(error)(f"surrogate {name!r}: {error}") from None


def _correction(given: Correction | Mapping[str, Any] | str | None) -> Correction | None:
    """The correction of a field, or of a preset."""
    if given is None or isinstance(given, Correction):
        return given
    if isinstance(given, str):
        having = [name for name in PRESETS if PRESETS[name].correction is not None]
        check_name("correction", given, having)
        given = PRESETS[given].correction
    if not isinstance(given, Mapping):
        raise InvalidTypeError(
            f"correction must be the name of a preset that has one, a bandpo.correction.Correction "
            f"or its arguments by name, got {type(given).__name__}"
        )
    for argument in given:
        check_name("argument of a correction", argument, Correction.__dataclass_fields__)
    try:
        return Correction(**given)
    except (InvalidTypeError, InvalidValueError) as error:
        raise type(error)(f"correction: {error}") from None


def _as_json(value: Any) -> Any:
    """A value of a field as JSON has it."""
    if isinstance(value, Region):
        try:
            return spec_from_region(value)
        except InvalidValueError:
            return repr(value)
    if isinstance(value, (TokenSurrogate, Correction)):
        named = {"name": value.name} if isinstance(value, TokenSurrogate) else {}
        own = fields(value) if is_dataclass(value) else ()
        value = {**named, **{field.name: getattr(value, field.name) for field in own}}
    if isinstance(value, Mapping):
        return {str(name): _as_json(part) for name, part in value.items()}
    return value if isinstance(value, (str, int, float, type(None))) else repr(value)
