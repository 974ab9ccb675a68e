"""`Recorder`: samples tokens of a training run, and writes them in a thread of its own."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bandpo.check import check_name, positive_number, whole_number
from bandpo.error import InvalidTypeError, InvalidValueError, RecordWarning
from bandpo.record.batch import Array, Batch
from bandpo.record.layout import FIELDS
from bandpo.record.parts import Parts
from bandpo.record.read import PathLike
from bandpo.record.reservoir import STRATA
from bandpo.record.tokens import LogMetadata

if TYPE_CHECKING:
    from bandpo.record.writer import Writer

OLD_POLICIES = ("trainer", "rollout")


class Recorder:
    """Records a sample of a run's tokens, for `read_tokens` and what builds on it.

    One line in a training loop, beside the loss:

    >>> import tempfile
    >>> import numpy as np
    >>> from bandpo.record import Recorder, read_tokens
    >>> folder = tempfile.TemporaryDirectory()
    >>> old_log_prob, mask = -np.arange(1.0, 9.0).reshape(2, 4), np.ones((2, 4))
    >>> advantages = np.array([1.0, -1.0])
    >>> with Recorder(folder.name, every=1) as record:
    ...     for step in range(3):
    ...         log_prob = old_log_prob + 0.1 * step
    ...         record(old_log_prob, log_prob, advantages, mask, step=step)
    >>> [len(tokens.step) for tokens in read_tokens(folder.name)]
    [24]
    >>> folder.cleanup()

    **Steps.** In each run of ``every`` steps one is recorded, chosen at random by ``seed``. A fixed
    remainder would always meet the same inner step of a batch, and in the first one no ratio
    differs from 1. The choice depends on the step alone, so ranks record the same steps. Calls with
    the same ``step`` that follow each other, such as micro-batches, are one step.

    **Tokens.** Of a step, a random sample of at most ``tokens_per_step`` tokens that count is kept.
    Its strata are the bins of the old probability between `bandpo.loss.PROBABILITY_EDGES`, which
    have equal room, so that rare tokens are there. A token has the weight N / n of its stratum: its
    tokens in the step over those that were kept. So sums over the sample are unbiased, and the
    weights of a step add up to its tokens, on each rank.

    **Cost.** A step that is not recorded compares shapes and dtypes; no value is read, and nothing
    waits for a device. On a recorded step each array is copied to the host once, from CUDA through
    pinned memory without waiting. The rest runs in a thread. No graph is kept.

    **Files.** ``path`` is a folder with Parquet files, which other readers of Parquet open as well.
    A file of Parquet can only be read once its end is written, so a run that is killed would leave
    nothing in a single one; a folder of parts has all that came before. Arrow's stream has no end
    either, but few programs read it. A part is written 60 s after the last, or when it has 2^18
    tokens, so a kill takes at most the last minute and the step under way. A run that continues
    adds to the folder.

    **Ranks.** Each writes files of its own into the same folder. By default the rank is that of
    ``torch.distributed``, or of the variables RANK and WORLD_SIZE; ranks that hold the same tokens,
    such as those of tensor parallelism, should not all record.

    **Failures.** If a file cannot be written, its tokens are lost and training goes on; the next
    call gives a `bandpo.error.RecordWarning`, once. So it does when the folder is full.

    Args:
        path: The folder, which is made.
        every: Steps of which one is recorded.
        tokens_per_step: Max tokens of a recorded step, at least 5.
        max_bytes: Max bytes of the rank's files; then recording ends.
        temperature: Temperature of the log-probs, for the metadata.
        old_policy: Policy of ``old_log_prob``, ``"trainer"`` or ``"rollout"``, likewise.
        rule: The rule of the run, as JSON has it, likewise, such as
            ``{"region": "kl@0.05", "surrogate": "min-clip"}``.
        rank: Number of this process.
        world_size: Number of processes.
        seed: Seed of the choice of steps and tokens.

    Raises:
        InvalidTypeError: If an argument has the wrong type.
        InvalidValueError: If one is out of range.
        OutputPathError: If the folder cannot be made.
        MissingExtraError: If pyarrow is not installed.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        every: int = 10,
        tokens_per_step: int = 4096,
        max_bytes: int = 2**30,
        temperature: float | None = None,
        old_policy: str | None = None,
        rule: Mapping[str, Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
    ) -> None:
        # These need pyarrow, which is optional.
        from bandpo.record.parquet import FORMAT_VERSION
        from bandpo.record.writer import Writer

        every = whole_number("every", every, 1)
        tokens_per_step = whole_number("tokens_per_step", tokens_per_step, STRATA)
        max_bytes = whole_number("max_bytes", max_bytes, 1)
        seed = whole_number("seed", seed, 0)
        found_rank, found_size = _place_in_world()
        rank = found_rank if rank is None else whole_number("rank", rank, 0)
        if world_size is None:
            world_size = max(found_size, rank + 1)
        world_size = whole_number("world_size", world_size, rank + 1)
        if temperature is not None:
            temperature = positive_number("temperature", temperature)
        if old_policy is not None:
            check_name("old_policy", old_policy, OLD_POLICIES)
        metadata = LogMetadata(
            temperature=temperature,
            old_policy=old_policy,
            rule=_checked_rule(rule),
            format_version=FORMAT_VERSION,
            rank=rank,
            world_size=world_size,
        )
        self._every = every
        self._seed = seed
        self._process = os.getpid()
        self._calls = 0
        self._is_closed = False
        self._step: int | None = None  # the step under way, if it is recorded
        self._given: frozenset[str] | None = None
        parts = Parts(Path(path), rank, max_bytes)
        self._writer = Writer(parts, metadata, tokens_per_step, seed)
        self._finalizer = weakref.finalize(self, _close, self._writer, self._process)

    def __call__(
        self,
        old_log_prob: Array,
        log_prob: Array,
        advantages: Array,
        response_mask: Array,
        *,
        step: int | None = None,
        rollout_log_prob: Array | None = None,
        reward: Array | None = None,
        sequence: Array | None = None,
        cu_seqlens: Array | None = None,
    ) -> None:
        """Records a batch or a micro-batch, if its step is one that is recorded.

        The arrays are tensors of torch or arrays of numpy; see `bandpo.policy_loss` for the first
        four.

        Args:
            old_log_prob: Log-probabilities in the denominator of the ratio, [B, T], [B, T, 1] or
                packed [N].
            log_prob: The same of the policy in training.
            advantages: One a token, or one a sequence as [B, 1] or [B].
            response_mask: Which tokens count (0: not).
            step: Step of the run; by default each call is one.
            rollout_log_prob: Like ``old_log_prob``, from the rollout engine.
            reward: One a token, or one a sequence as [B, 1], [B] or, packed, [S].
            sequence: Numbers of the sequences, likewise; by default they are counted.
            cu_seqlens: Offsets of the sequences in packed tensors, [S + 1], from 0 to N.

        Raises:
            InvalidTypeError: If an argument has the wrong type or dtype.
            InvalidValueError: If shapes do not match, an optional array is there in one call and
                not in another, or the recorder is closed.
        """
        self._check_open()
        batch = Batch.of(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=response_mask,
            rollout_log_prob=rollout_log_prob,
            reward=reward,
            sequence=sequence,
            cu_seqlens=cu_seqlens,
        )
        self._check_optional(batch)
        _warn(self._writer, stacklevel=2)
        if step is None:
            step = self._calls
        step = whole_number("step", step, -(2**63))
        self._calls += 1
        if self._step is not None and step != self._step:
            self._step = None
            self._writer.end_step()
        if self._is_recorded(step) and not self._writer.is_full:
            self._step = step
            self._writer.add(step, batch)

    def flush(self) -> None:
        """Waits until all tokens that were recorded are written; the step under way ends."""
        self._check_open()
        self._step = None
        self._writer.flush()
        _warn(self._writer, stacklevel=2)

    def close(self) -> None:
        """Writes what was recorded and ends the thread; also at the end of the process."""
        self._is_closed = True
        if self._finalizer.alive and os.getpid() == self._process:
            self._writer.close()
            # Last, so that after an interrupt the next close waits, or the end of the process.
            self._finalizer.detach()
            _warn(self._writer, stacklevel=2)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _is_recorded(self, step: int) -> bool:
        """Returns True for one step in each run of so many."""
        run, place = divmod(step, self._every)
        if self._every == 1:
            return True
        digest = hashlib.blake2b(f"{self._seed} {run}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self._every == place

    def _check_open(self) -> None:
        if self._is_closed:
            raise InvalidValueError("the recorder is closed")
        if os.getpid() != self._process:
            raise InvalidValueError("a recorder must be made in the process that uses it")

    def _check_optional(self, batch: Batch) -> None:
        """Raises unless each call has the same columns."""
        given = frozenset(batch.arrays) & set(FIELDS)
        if self._given is None:
            self._given = given
        for name in sorted(given ^ self._given):
            raise InvalidValueError(
                f"{name} must be given in each call or in none, and the first call "
                f"{'had it' if name in self._given else 'did not have it'}"
            )


def _close(writer: Writer, process: int) -> None:
    """Ends the thread of a recorder that is collected, or at the end of the process."""
    if os.getpid() == process:  # a fork has the writer, but not its thread
        writer.close()
        _warn(writer, stacklevel=2)


def _warn(writer: Writer, *, stacklevel: int) -> None:
    """Gives the warnings of the thread at the user's line."""
    while (problem := writer.problem()) is not None:
        warnings.warn(problem, RecordWarning, stacklevel=stacklevel + 1)


def _place_in_world() -> tuple[int, int]:
    """Rank and world size of this process."""
    if "torch" in sys.modules:
        from bandpo.record.tensors import process_group  # torch is optional

        found = process_group()
        if found is not None:
            return found
    place = {"RANK": 0, "WORLD_SIZE": 1}
    for name in place:
        if text := os.environ.get(name):
            if not text.isdecimal():
                raise InvalidValueError(
                    f"the variable {name} must be a whole number, got {text!r}; give rank and "
                    f"world_size"
                )
            place[name] = int(text)
    return place["RANK"], place["WORLD_SIZE"]


def _checked_rule(rule: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A copy of the rule, as JSON has it."""
    if rule is None:
        return None
    try:
        copied = json.loads(json.dumps(dict(rule)))
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(
            f"rule must be a mapping that JSON can hold, with a region as text "
            f"(bandpo.spec.spec_from_region): {error}"
        ) from None
    return dict(copied)
