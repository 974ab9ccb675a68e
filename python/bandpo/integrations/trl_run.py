"""Parts that the trainers of TRL share: fields of the rule, its schedule, its metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.recording import Recording
from bandpo.integrations.settings import LossSettings, wrong_region
from bandpo.integrations.version import check_version
from bandpo.loss import Metrics, policy_loss
from bandpo.region import Region
from bandpo.rule import AnyRegion
from bandpo.schedule import ScheduledBand
from bandpo.spec import spec_from_region

STATE = "bandpo"
"""Key of a schedule's state among the states of callbacks in trainer_state.json."""

if TYPE_CHECKING:
    RegionField = str | Region
else:  # a parser of arguments fills it with text
    RegionField = str


@dataclass
class BandFields:
    """Fields of the rule in TRL's arguments, which are saved as text."""

    region: RegionField = field(
        default="preset:bandpo-kl",
        metadata={
            "help": "Bounds of the ratio, such as '(kl@0.05).cap(10)', 'kl@0.01|clip@0.2,0.28' or "
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


class BandRun:
    """Part of a trainer with a region, which is stepped, logged and kept in checkpoints."""

    _config: type[BandFields]
    _old_policy: str
    epsilon_low: Any
    epsilon_high: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = signature(super().__init__).bind(*args, **kwargs).arguments.get("args")
        if not isinstance(given, self._config):
            raise InvalidTypeError(
                f"args must be a {self._config.__name__}, which has the region, "
                f"got {type(given).__name__}"
            )
        given.check()
        check_version("trl", "1.16")
        super().__init__(*args, **kwargs)
        self._settings = given.settings
        self._region = self._settings.clamp_region("TRL")
        self._correction = self._settings.arguments()["correction"]
        self._band: dict[str, Metrics] = {}
        self._recording = given.recording(
            temperature=self.temperature,  # type: ignore[attr-defined]
            old_policy=self._old_policy,
            rule=self._settings.as_json(),
        )
        if self._recording is not None:
            self.add_callback(_Flusher(self._recording))  # type: ignore[attr-defined]
        if isinstance(self._region, ScheduledBand):
            self.add_callback(_Stepper(self, self._region))  # type: ignore[attr-defined]

    @property
    def region(self) -> AnyRegion:
        """The region, or the source of one with a schedule.

        Raises:
            InvalidTypeError: If it is set to something else than a `bandpo.Region`.
            InvalidValueError: If it is set where there is a schedule, or after the first batch of a
                record.
        """
        return self._region

    @region.setter
    def region(self, region: Region) -> None:
        if not isinstance(region, Region):
            raise InvalidTypeError(f"region must be a bandpo.Region, got {region!r}")
        if isinstance(self._region, ScheduledBand):
            raise InvalidValueError(
                f"region must be in the configuration with a schedule, which moves it, "
                f"got {region!r} on the trainer"
            )
        if self._recording is not None:
            self._recording.describe(rule=replace(self._settings, region=region).as_json())
        self._region = region

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"  # type: ignore[attr-defined]

    @contextmanager
    def _band_at(
        self, old_log_prob: torch.Tensor, anchor_log_prob: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Sets the epsilons of each token in place of TRL's two numbers."""
        plain = self.epsilon_low, self.epsilon_high
        self.epsilon_low, self.epsilon_high = epsilons(self.region, old_log_prob, anchor_log_prob)
        try:
            yield
        finally:
            self.epsilon_low, self.epsilon_high = plain

    @torch.no_grad()
    def _count(
        self,
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        anchor_log_prob: torch.Tensor | None = None,
        **recorded: torch.Tensor | None,
    ) -> None:
        """Adds a micro-batch to the metrics and to the record, without waiting for the device."""
        if self._recording is not None and self._mode == "train":
            self._recording(
                old_log_prob,
                log_prob,
                advantages,
                response_mask,
                step=self.state.global_step,  # type: ignore[attr-defined]
                **recorded,
            )
        found = policy_loss(
            *(old_log_prob, log_prob, advantages, response_mask),
            region=self.region,
            anchor_log_prob=anchor_log_prob,
            metrics_by_probability=True,
        ).metrics
        before = self._band.get(self._mode)
        self._band[self._mode] = found if before is None else Metrics.merge([before, found])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the band, of all ranks, since the last log of the trainer's loss."""
        # Others may log on one rank, and there no rank would answer.
        if self._mode in self._band and any(name.endswith("loss") for name in logs):
            several = self.accelerator.num_processes > 1  # type: ignore[attr-defined]
            group = torch.distributed.group.WORLD if several else None
            prefix = "band/" if self._mode == "train" else "eval_band/"
            logs.update(Metrics.merge([self._band.pop(self._mode)], group=group).scalars(prefix))
            if isinstance(self.region, ScheduledBand):
                logs[f"{prefix}delta"] = self.region.schedule.value
        super().log(logs, start_time)  # type: ignore[misc]


class _Flusher(TrainerCallback):  # type: ignore[misc]
    """Writes the rest of a record when training ends."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._recording.flush()


class _Stepper(TrainerCallback):  # type: ignore[misc]
    """Steps a schedule after each optimiser step, and keeps its state in trainer_state.json."""

    def __init__(self, trainer: Any, source: ScheduledBand) -> None:
        self._trainer, self._source = trainer, source
        self._start = source.state_dict()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._source.load_state_dict(state.stateful_callbacks.get(STATE, self._start))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        measured = trainer._metrics["train"]["entropy"]  # of all ranks, one a micro-batch
        last = measured[-trainer.current_gradient_accumulation_steps :]
        self._source.step(entropy=sum(last) / len(last))
        state.stateful_callbacks[STATE] = self._source.state_dict()
