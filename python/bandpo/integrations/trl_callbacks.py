"""Calls of TRL's trainers outside of the loss: fields, the end of a record, steps of a schedule."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import TrainerCallback

from bandpo.error import InvalidValueError
from bandpo.integrations.recording import Recording
from bandpo.integrations.settings import LossSettings
from bandpo.integrations.trl_fields import BandFields
from bandpo.schedule import ScheduledBand

STATE = "bandpo"
"""Key of a schedule's state among the states of callbacks in trainer_state.json."""


class Checker(TrainerCallback):  # type: ignore[misc]
    """Refuses fields that were assigned after the trainer had read them."""

    def __init__(self, args: BandFields) -> None:
        self._read = args.settings, args.record

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raises as a configuration does, or if the rule is no longer that of the trainer."""
        args.check()
        if (args.settings, args.record) != self._read:
            raise InvalidValueError(
                f"{', '.join(own.name for own in fields(LossSettings) if hasattr(args, own.name))} "
                f"and record must be set before the trainer is made, which reads them once, got "
                f"{args.settings.as_json()}; a region may be given to trainer.region"
            )


class Flusher(TrainerCallback):  # type: ignore[misc]
    """Writes the rest of a record when training ends."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Writes the rest."""
        self._recording.flush()


class Stepper(TrainerCallback):  # type: ignore[misc]
    """Steps a schedule after each optimiser step, and keeps its state in trainer_state.json."""

    def __init__(self, trainer: Any, source: ScheduledBand) -> None:
        self._trainer, self._source = trainer, source
        self._start = source.state_dict()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Loads the state of a checkpoint, or begins."""
        self._source.load_state_dict(state.stateful_callbacks.get(STATE, self._start))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Steps the schedule, and keeps its state."""
        trainer = self._trainer
        measured = trainer._metrics["train"]["entropy"]  # of all ranks, one a micro-batch
        last = measured[-trainer.current_gradient_accumulation_steps :]
        self._source.step(entropy=sum(last) / len(last))
        state.stateful_callbacks[STATE] = self._source.state_dict()
