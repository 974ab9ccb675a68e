"""Fields of a rule in TRL's arguments, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.recording import Recording
from bandpo.integrations.settings import DEFAULT_REGION, LossSettings, wrong_region
from bandpo.region import Region
from bandpo.spec import spec_from_region

if TYPE_CHECKING:
    RegionField = str | Region
else:  # a parser of arguments fills it with text
    RegionField = str


@dataclass
class BandFields:
    """Fields of the rule in TRL's arguments, which are saved as text."""

    region: RegionField = field(
        default=DEFAULT_REGION,
        metadata={
            "help": "Bounds of the ratio, such as '(kl@0.01).cap(10)', 'kl@0.01|clip@0.2,0.28' or "
            "'preset:dppo-kl'."
        },
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "Delta of the region's one band by optimiser step, such as "
            "'cosine(0.05, 0.005, 1000)'."
        },
    )
    record: str | None = field(
        default=None,
        metadata={"help": "Folder for a sample of the tokens of the run, for bandpo replay."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        self.check()

    def check(self) -> None:
        """Raises if TRL's loss cannot follow a field.

        A trainer calls it as well, because fields may be assigned after the configuration is made.

        Raises:
            InvalidTypeError: If a field has the wrong type.
            InvalidValueError: If one is out of range, or TRL's loss does not go with a region.
        """
        if isinstance(self.region, Region):
            self.region = spec_from_region(self.region)
        if not isinstance(self.region, str):
            raise wrong_region(self.region)
        if not isinstance(self.schedule, (str, type(None))):
            raise InvalidTypeError(
                f"schedule must be text, such as 'linear(0.1, 0.02, 1000)', got {self.schedule!r}"
            )
        self.settings.clamp_region("TRL")
        self.settings.refuse_changes("TRL", but_steps=True)
        self.recording()
        defaults = {own.name: own.default for own in fields(self)}
        for name in ("epsilon", "epsilon_high"):
            if getattr(self, name) != defaults[name]:
                raise InvalidValueError(
                    f"{name} must be left out, because the region has the bounds, "
                    f"got {getattr(self, name)!r}; a fixed clip is region='clip@0.2,0.28'"
                )
        if self.use_liger_kernel:  # type: ignore[attr-defined]
            raise InvalidValueError(
                "use_liger_kernel must be False, because TRL had a loss for it that no region "
                "reaches; model_init_kwargs={'use_kernels': True} has kernels for the layers"
            )

    @property
    def settings(self) -> LossSettings:
        """The rule of these fields."""
        return LossSettings(region=self.region, schedule=self.schedule)

    def recording(self, **metadata: Any) -> Recording | None:
        """Returns the recorder of the run, if there is to be one."""
        return None if self.record is None else Recording(self.record, **metadata)
