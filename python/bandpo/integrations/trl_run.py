"""The part that the trainers of TRL share: a region, its epsilons and its metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import torch

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.trl_callbacks import Checker, Flusher, Stepper
from bandpo.integrations.trl_fields import BandFields
from bandpo.integrations.version import check_version
from bandpo.loss import Metrics, policy_loss
from bandpo.region import Region
from bandpo.rule import AnyRegion
from bandpo.schedule import ScheduledBand


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
        self.add_callback(Checker(given))  # type: ignore[attr-defined]
        if self._recording is not None:
            self.add_callback(Flusher(self._recording))  # type: ignore[attr-defined]
        if isinstance(self._region, ScheduledBand):
            self.add_callback(Stepper(self, self._region))  # type: ignore[attr-defined]

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
