"""`Recording`: a recorder of a trainer's run, which is named in its configuration."""

from __future__ import annotations

import math
from typing import Any

import torch

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.record import Recorder


class Recording:
    """A `bandpo.record.Recorder`, made at the first batch in the process that trains.

    A configuration goes to other processes before that, and a recorder does not.

    Args:
        path: The folder.
        **metadata: Arguments of the recorder, such as its temperature.

    Raises:
        InvalidTypeError: If ``path`` is no text, or empty.
        MissingExtraError: If pyarrow is not installed.
    """

    def __init__(self, path: str, **metadata: Any) -> None:
        if not isinstance(path, str) or not path.strip():
            raise InvalidTypeError(f"record must be the path of a folder, got {path!r}")
        import bandpo.record.parquet  # noqa: F401 -- which tells now that pyarrow is missing

        self._path = path
        self._metadata: dict[str, Any] = metadata
        self._recorder: Recorder | None = None
        self._has_rollout = False

    def describe(self, **metadata: Any) -> None:
        """Changes arguments of the recorder.

        Raises:
            InvalidValueError: If batches were recorded already, by the arguments before.
        """
        if self._recorder is not None:
            raise InvalidValueError(
                f"{', '.join(metadata)} must be set before the first batch of a record, which says "
                f"{self._metadata}"
            )
        self._metadata.update(metadata)

    def __call__(
        self,
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        rollout_log_prob: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        """Records a micro-batch; `bandpo.record.Recorder` describes the arguments.

        Rollout log-probs are in the record if the first batch has them, and NaN for a later batch
        that has none.
        """
        if self._recorder is None:
            self._recorder = Recorder(self._path, **self._metadata)
            self._has_rollout = rollout_log_prob is not None
        if not self._has_rollout:
            rollout_log_prob = None
        elif rollout_log_prob is None:
            rollout_log_prob = torch.full_like(old_log_prob, math.nan)
        self._recorder(
            *(old_log_prob, log_prob, advantages, response_mask),
            rollout_log_prob=rollout_log_prob,
            **others,
        )

    def flush(self) -> None:
        """Waits until all tokens that were recorded are written."""
        if self._recorder is not None:
            self._recorder.flush()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorder": None}
