"""The recorder in a training loop: what it keeps, its cost, its files, and failures."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pyarrow")

import torch

from bandpo.error import (
    BandpoError,
    InvalidTypeError,
    InvalidValueError,
    MissingExtraError,
    OutputPathError,
    RecordWarning,
)
from bandpo.loss import PROBABILITY_EDGES, policy_loss
from bandpo.record import LoggedTokens, Recorder, parts, read_tokens, writer
from bandpo.record.layout import concatenate
from bandpo.record.parquet import encoded
from bandpo.record.tokens import LogMetadata

# torch's own, raised on the first import of its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

ROWS, WIDTH = 6, 20
ULPS = 64 * np.finfo(np.float64).eps
"""Rounding of a sum of some hundred weights."""


def batch(seed: int, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    old = torch.log(random(rows, WIDTH) ** 4 + 1e-6).to(dtype)
    return {
        "old_log_prob": old,
        "log_prob": (old.float() + 0.3 * (random(rows, WIDTH) - 0.5)).to(dtype).requires_grad_(),
        "advantages": (random(rows) - 0.5).to(dtype),
        "response_mask": random(rows, WIDTH) < 0.8,
    }


def read(folder: Path) -> LoggedTokens:
    return concatenate(list(read_tokens(folder)))


def by_place(tokens: LoggedTokens) -> dict[str, Any]:
    """The fields, in the order of step, sequence and position."""
    order = np.lexsort((tokens.position, tokens.sequence, tokens.step))
    return {f: None if v is None else v[order] for f, v in tokens._asdict().items()}


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_with_room_for_all_tokens_they_are_read_as_they_were(
    dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    if kind == "numpy" and dtype == torch.bfloat16:
        pytest.skip("numpy has none")
    batches = [batch(seed, dtype=dtype) for seed in range(3)]
    with Recorder(tmp_path, every=1) as record:
        for step, given in enumerate(batches):
            arrays = {name: tensor.detach() for name, tensor in given.items()}
            if kind == "numpy":
                arrays = {name: tensor.numpy() for name, tensor in arrays.items()}
            record(**arrays, step=step + 7)
    found = by_place(read(tmp_path))
    masks = torch.stack([given["response_mask"] for given in batches])
    steps, rows, places = masks.nonzero(as_tuple=True)
    np.testing.assert_array_equal(found["step"], steps + 7)
    np.testing.assert_array_equal(found["sequence"], steps * ROWS + rows)
    np.testing.assert_array_equal(found["position"], places)
    np.testing.assert_array_equal(found["weight"], np.ones(len(steps)))
    assert found["rollout_log_prob"] is None
    assert found["reward"] is None
    for name in ("old_log_prob", "log_prob", "advantages"):
        stacked = torch.stack([given[name].detach() for given in batches]).double()
        expected = stacked[steps, rows] if name == "advantages" else stacked[masks]
        np.testing.assert_array_equal(found[name], expected)
    assert read_tokens(tmp_path).metadata.dtype == str(dtype).removeprefix("torch.")


def test_policy_loss_of_the_recorded_tokens_is_that_of_the_run(tmp_path: Path) -> None:
    given = batch(0, rows=50)
    reported = policy_loss(**given, region="clip@0.2", metrics_by_probability=True)
    with Recorder(tmp_path, every=1) as record:
        record(**given)
    found = read(tmp_path)
    columns = (found.old_log_prob, found.log_prob, found.advantages, found.weight)
    old, new, advantages, weight = (torch.tensor(c, dtype=torch.float32) for c in columns)
    replayed = policy_loss(
        old, new, advantages, weight, region="clip@0.2", metrics_by_probability=True
    )
    for name in ("clip_fraction_low", "clip_fraction_high", "ratio_max", "tokens_by_probability"):
        assert torch.equal(replayed.metrics[name], reported.metrics[name]), name


def test_a_sample_has_rare_tokens_and_its_weights_add_up_to_the_tokens_of_the_step(
    tmp_path: Path,
) -> None:
    batches = [batch(seed, rows=100) for seed in range(4)]
    with Recorder(tmp_path, every=1, tokens_per_step=100) as record:
        for index, given in enumerate(batches):
            record(**given, step=index // 2)
    found = read(tmp_path)
    for step in range(2):
        of_step = found.step == step
        masks = [given["response_mask"] for given in batches[2 * step : 2 * step + 2]]
        tokens = sum(int(mask.sum()) for mask in masks)
        assert of_step.sum() == 100
        assert found.weight[of_step].sum() == pytest.approx(tokens, rel=ULPS)
        bins = np.digitize(np.exp(found.old_log_prob[of_step]), PROBABILITY_EDGES[1:-1])
        assert np.bincount(bins, minlength=5).tolist() == [20] * 5


def test_micro_batches_give_the_sample_that_the_whole_batch_has_room_for(tmp_path: Path) -> None:
    given = batch(0, rows=6)
    for name, size in (("whole", 6), ("parts", 2)):
        with Recorder(tmp_path / name, every=1) as record:
            for start in range(0, 6, size):
                record(**{n: t[start : start + size] for n, t in given.items()}, step=0)
    whole, divided = (by_place(read(tmp_path / name)) for name in ("whole", "parts"))
    for name, array in whole.items():
        np.testing.assert_array_equal(divided[name], array, err_msg=name)


def test_packed_tokens_have_their_sequences_and_places(tmp_path: Path) -> None:
    offsets = np.array([0, 2, 2, 5, 6], np.int32)
    numbers = -np.arange(1.0, 7.0)
    mask = np.array([1, 1, 0, 1, 1, 1])
    packed: dict[str, Any] = {"cu_seqlens": offsets, "reward": np.arange(4.0)}
    with Recorder(tmp_path, every=1) as record:
        record(numbers, numbers, numbers, mask, **packed)
        record(numbers, numbers, numbers, mask, **packed)
    found = by_place(read(tmp_path))
    assert found["sequence"].tolist() == [0, 0, 2, 2, 3, 4, 4, 6, 6, 7]
    assert found["position"].tolist() == [0, 1, 1, 2, 0] * 2
    assert found["reward"].tolist() == [0, 0, 2, 2, 3] * 2
    assert found["log_prob"].tolist() == [-1, -2, -4, -5, -6] * 2


def test_packed_tokens_without_offsets_have_no_sequence(tmp_path: Path) -> None:
    numbers = -np.ones(4)
    with Recorder(tmp_path, every=1) as record:
        record(numbers, numbers, numbers, np.ones(4))
    assert read(tmp_path).sequence.tolist() == read(tmp_path).position.tolist() == [-1] * 4


@pytest.mark.parametrize("last", [(), (1,)])
@pytest.mark.parametrize("per_row", [(ROWS,), (ROWS, 1), (ROWS, WIDTH)])
def test_optional_arrays_and_shapes_of_policy_loss_are_taken(
    last: tuple[int, ...], per_row: tuple[int, ...], tmp_path: Path
) -> None:
    given = {n: t if n == "advantages" else t.reshape(*t.shape, *last) for n, t in batch(0).items()}
    rows = torch.arange(float(ROWS))[:, None].expand(ROWS, WIDTH)
    of_rows = rows if len(per_row) == 2 and per_row[1] > 1 else rows[:, 0].reshape(per_row)
    given["advantages"] = of_rows
    with Recorder(tmp_path, every=1) as record:
        record(
            **given,
            rollout_log_prob=given["old_log_prob"] - 1,
            reward=of_rows.bool(),
            sequence=of_rows.long() + 2**40,
        )
    found = read(tmp_path)
    assert found.rollout_log_prob is not None
    assert found.reward is not None
    np.testing.assert_allclose(found.rollout_log_prob, found.old_log_prob - 1, rtol=1e-6)
    np.testing.assert_array_equal(found.advantages + 2**40, found.sequence)
    np.testing.assert_array_equal(found.reward, found.advantages > 0)
    assert set(found.sequence.tolist()) == {2**40 + row for row in range(ROWS)}


def test_metadata_is_that_of_the_arguments(tmp_path: Path) -> None:
    rule = {"region": "(kl@0.05).cap(10)", "dual_clip": None}
    with Recorder(
        tmp_path, every=1, temperature=0.7, old_policy="rollout", rule=rule, rank=1, world_size=4
    ) as record:
        record(**batch(0) | {"old_log_prob": batch(0)["old_log_prob"].bfloat16()})
    assert read_tokens(tmp_path).metadata == LogMetadata(
        temperature=0.7,
        dtype="bfloat16",
        old_policy="rollout",
        rule=rule,
        format_version=1,
        rank=1,
        world_size=4,
    )


def test_other_readers_of_parquet_read_the_folder(tmp_path: Path) -> None:
    import pyarrow.parquet

    with Recorder(tmp_path, every=1) as record:
        record(**batch(0))
    table = pyarrow.parquet.read_table(tmp_path)
    assert table.schema.names == [
        name for name in LoggedTokens._fields if name not in ("rollout_log_prob", "reward")
    ]
    assert str(table.schema.field("log_prob").type) == "float"
    assert json.loads(table.schema.metadata[b"bandpo"])["format_version"] == 1


# --- which steps ---------------------------------------------------------------------------------


def steps_of(folder: Path, every: int, seed: int = 0, rank: int = 0, calls: int = 60) -> list[int]:
    numbers = -np.ones(2)
    with Recorder(folder, every=every, seed=seed, rank=rank, world_size=2) as record:
        for _ in range(calls):
            record(numbers, numbers, numbers, np.ones(2))
    return sorted({int(step) for step in read(folder).step})


def test_one_step_in_each_run_is_recorded_at_a_random_place(tmp_path: Path) -> None:
    steps = steps_of(tmp_path / "a", 4)
    assert [step // 4 for step in steps] == list(range(15))
    assert {step % 4 for step in steps} == {0, 1, 2, 3}
    assert steps_of(tmp_path / "b", 4, seed=1) != steps
    assert steps_of(tmp_path / "c", 1) == list(range(60))


def test_ranks_record_the_same_steps_and_other_tokens(tmp_path: Path) -> None:
    assert steps_of(tmp_path / "a", 5, rank=0) == steps_of(tmp_path / "b", 5, rank=1)
    for rank in range(2):
        with Recorder(
            tmp_path / "c", every=1, tokens_per_step=10, rank=rank, world_size=2
        ) as record:
            record(**batch(0), step=0)
    found = read(tmp_path / "c")
    places = list(zip(found.sequence // 2, found.position, strict=True))
    assert len(places) == 20
    assert set(places[:10]) != set(places[10:])


def test_two_ranks_are_read_together_with_numbers_that_are_unique(tmp_path: Path) -> None:
    recorders = [Recorder(tmp_path, every=1, rank=rank, world_size=2) for rank in range(2)]
    for step in range(3):
        for rank, record in enumerate(recorders):
            record(**batch(10 * step + rank), step=step)
    for record in recorders:
        record.close()
    assert sorted({path.name[:10] for path in read_tokens(tmp_path).paths}) == [
        "rank-00000",
        "rank-00001",
    ]
    found = read(tmp_path)
    masks = [batch(10 * step + rank)["response_mask"] for step in range(3) for rank in range(2)]
    assert len(found.step) == sum(int(mask.sum()) for mask in masks)
    assert len(set(found.sequence.tolist())) == 3 * 2 * ROWS
    assert read_tokens(tmp_path).metadata.rank is None
    assert read_tokens(tmp_path).metadata.world_size == 2


def test_two_processes_write_into_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from bandpo.record import Recorder, writer\n"
        "writer.SECONDS_OF_PART = 0.0\n"
        "numbers = -np.ones((2, 3))\n"
        "with Recorder(sys.argv[1], every=3) as record:\n"
        "    for step in range(60): record(numbers, numbers, numbers, np.ones((2, 3)), step=step)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    found = read(tmp_path)
    steps, counts = np.unique(found.step, return_counts=True)
    assert len(steps) == 20
    assert set(counts) == {2 * 6}
    assert len(set(found.sequence.tolist())) == 2 * 20 * 2


def test_the_rank_is_that_of_the_environment_or_of_the_process_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place() -> tuple[int | None, int | None]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with Recorder(folder, every=1) as record:
            record(**batch(0))
        metadata = read_tokens(folder).metadata
        return metadata.rank, metadata.world_size

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert place() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert place() == (3, 8)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 6)
    assert place() == (5, 6)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InvalidValueError, match="variable RANK must be a whole number"):
        place()


def test_a_run_that_continues_adds_files_and_sequences(tmp_path: Path) -> None:
    for seed in range(3):
        with Recorder(tmp_path, every=1) as record:
            record(**batch(seed), step=seed)
    files = read_tokens(tmp_path)
    assert len(files.paths) == 3
    (found,) = files
    assert found.step.tolist() == sorted(found.step.tolist())  # names are in the order of time
    assert len(set(found.sequence.tolist())) == 3 * ROWS


# --- cost in the training loop -------------------------------------------------------------------


class Unreadable(torch.Tensor):
    """A tensor whose values cannot be read or copied; its shape and dtype can."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__" and func.__self__ in (  # type: ignore[attr-defined]
            torch.Tensor.shape,
            torch.Tensor.dtype,
            torch.Tensor.device,
        ):
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise AssertionError(f"{func} was called")


def test_a_step_that_is_skipped_reads_no_value(tmp_path: Path) -> None:
    every = 7
    skipped = 0
    with Recorder(tmp_path, every=every) as record:
        for step in range(5 * every):
            given: dict[str, Any] = {
                name: tensor.detach().as_subclass(Unreadable)
                for name, tensor in batch(step).items()
            }
            try:
                record(**given, step=step)
                skipped += 1
            except AssertionError as read_by:
                assert "detach" in str(read_by)  # noqa: PT017 -- it is the recorded step
    assert skipped == 5 * (every - 1)


def test_nothing_waits_for_the_disk_on_a_recorded_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part is under way while further steps are recorded."""
    begun, go_on = threading.Event(), threading.Event()
    write = parts.Parts.write

    def slow(self: Any, content: bytes) -> bool:
        begun.set()
        go_on.wait()
        return write(self, content)

    monkeypatch.setattr(parts.Parts, "write", slow)
    with Recorder(tmp_path, every=1) as record:
        record(**batch(0), step=0)
        record(**batch(1), step=1)
        begun.wait()
        for step in range(2, 1 + writer.MAX_WAITING):
            record(**batch(step), step=step)
        files = list(tmp_path.iterdir())
        go_on.set()
    assert files == []
    assert set(read(tmp_path).step.tolist()) == set(range(1 + writer.MAX_WAITING))


def test_batches_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(writer.Writer, "_end_step", lambda self: go_on.wait() and None)
    record = Recorder(tmp_path, every=1)
    record(**batch(0), step=0)
    calls: list[int] = []

    def train() -> None:
        for step in range(1, 20):
            record(**batch(step), step=step)
            calls.append(step)

    loop = threading.Thread(target=train)
    loop.start()
    loop.join(timeout=1.0)
    waits, count = loop.is_alive(), len(calls)
    go_on.set()
    loop.join()
    record.close()
    assert waits
    assert count <= writer.MAX_WAITING


def test_the_graph_of_a_batch_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while the thread has not come to the batch."""
    go_on = threading.Event()
    add = writer.Writer._add
    monkeypatch.setattr(writer.Writer, "_add", lambda *args: go_on.wait() and add(*args))
    weight = torch.ones(WIDTH, requires_grad=True)
    with Recorder(tmp_path, every=1) as record:
        given = batch(0)
        hidden = given["log_prob"].detach() * weight  # a tensor inside of the graph
        given["log_prob"] = hidden * 1.0
        alive = weakref.ref(hidden), weakref.ref(given["log_prob"])
        record(**given, step=0)
        del given, hidden
        gc.collect()
        kept = [reference() for reference in alive]
        go_on.set()
    assert kept == [None, None]
    assert len(read(tmp_path).step) > 0


def test_tensors_may_change_after_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    add = writer.Writer._add
    monkeypatch.setattr(writer.Writer, "_add", lambda *args: go_on.wait() and add(*args))
    old, mask = -torch.ones(2, 3), torch.ones(2, 3)
    array = -np.ones((2, 3))
    with Recorder(tmp_path, every=1) as record:
        record(old, array, array, mask, step=0)
        old.fill_(-9.0)
        array.fill(-9.0)
        mask.zero_()
        go_on.set()
    found = read(tmp_path)
    assert found.old_log_prob.tolist() == found.advantages.tolist() == [-1.0] * 6


def test_a_gpu_is_not_waited_for(gpu: torch.device, tmp_path: Path) -> None:
    given = {name: tensor.detach().to(gpu) for name, tensor in batch(0).items()}
    with Recorder(tmp_path, every=2, seed=1) as record:
        for step in range(4):
            record(**given, step=step)  # memory of the host is taken here
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(4, 10):
                tensors = {name: tensor.clone() for name, tensor in given.items()}
                torch.cuda._sleep(10**7)  # type: ignore[no-untyped-call]
                record(**tensors, step=step)
                tensors["old_log_prob"].fill_(-99.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = read(tmp_path)
    assert len(found.step) == 5 * int(given["response_mask"].sum())
    assert found.old_log_prob.min() > -99.0


# --- files and failures --------------------------------------------------------------------------

KILLED = """
import os, sys
import numpy as np
from bandpo.record import Recorder, writer
writer.SECONDS_OF_PART = 0.0  # a part a step
sync, calls = os.fsync, []
def kill(file):
    calls.append(file)
    if len(calls) == 4:
        os.kill(os.getpid(), 9)
    sync(file)
if sys.argv[2] == "in a write":
    os.fsync = kill
record = Recorder(sys.argv[1], every=1, tokens_per_step=500)
numbers = -np.random.default_rng(0).exponential(2.0, (10, 100)).astype(np.float32)
for step in range(10**9):
    record(numbers, numbers, numbers, np.ones((10, 100)), step=step)
    print(step, flush=True)
"""


def check_steps(folder: Path, tokens_per_step: float) -> int:
    """Returns the number of steps of a folder, each of which is whole."""
    found = read(folder)
    steps = np.unique(found.step)
    sums = np.array([found.weight[found.step == step].sum() for step in steps])
    np.testing.assert_allclose(sums, tokens_per_step, rtol=500 * np.finfo(float).eps)
    np.testing.assert_array_equal(steps, np.arange(len(steps)))
    return len(steps)


def test_what_was_written_before_a_kill_in_the_middle_of_a_write_is_read(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "in a write"], capture_output=True
    )
    assert outcome.returncode == -signal.SIGKILL
    assert check_steps(tmp_path, 1000) == 3
    (hidden,) = tmp_path.glob(".*")
    assert hidden.stat().st_size > 0
    with Recorder(tmp_path, every=1) as record:  # of the run that continues
        record(**batch(0), step=3)
    assert list(tmp_path.glob(".*")) == []
    assert set(read(tmp_path).step.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.5])
def test_what_was_written_before_a_kill_at_any_time_is_read(seconds: float, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), "outside"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(10):
        process.stdout.readline()
    time.sleep(seconds)
    process.kill()
    output, _ = process.communicate()
    calls = output.count("\n") + 10
    # The last call's step is under way, some wait, and one may be in a write.
    assert calls - writer.MAX_WAITING - 3 <= check_steps(tmp_path, 1000) <= calls


def test_a_process_that_ends_without_close_writes_everything(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from bandpo.record import Recorder\n"
        "record = Recorder(sys.argv[1], every=1)\n"
        "numbers = -np.ones((2, 3))\n"
        "for step in range(5): record(numbers, numbers, numbers, np.ones((2, 3)), step=step)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    assert check_steps(tmp_path, 6) == 5


def test_a_recorder_that_is_collected_writes_everything(tmp_path: Path) -> None:
    record = Recorder(tmp_path, every=1)
    record(**batch(0))
    del record
    gc.collect()
    assert len(read(tmp_path).step) == int(batch(0)["response_mask"].sum())
    assert "bandpo-record" not in {thread.name for thread in threading.enumerate()}


def test_flush_waits_for_the_files_and_ends_the_step(tmp_path: Path) -> None:
    tokens = int(batch(0)["response_mask"].sum())
    with Recorder(tmp_path, every=1) as record:
        record(**batch(0), step=0)
        record.flush()
        assert len(read(tmp_path).step) == tokens
        record(**batch(0), step=0)
    assert len(read(tmp_path).step) == 2 * tokens


def test_a_part_is_written_after_a_time_without_further_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SECONDS_OF_PART", 0.2)
    with Recorder(tmp_path, every=1) as record:
        for step in range(4):
            record(**batch(step), step=step)
        while len({int(step) for path in tmp_path.glob("rank-*") for step in read(path).step}) < 3:
            time.sleep(0.01)  # ends, because the steps before the last one are written
    assert len(set(read(tmp_path).step.tolist())) == 4


def test_few_files_are_written_however_many_steps_are_recorded(tmp_path: Path) -> None:
    with Recorder(tmp_path, every=1) as record:
        for step in range(100):
            record(**batch(step), step=step)
    assert len(list(tmp_path.iterdir())) == 2  # the first step at once, and the rest at the end


def test_a_part_has_a_bounded_number_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "TOKENS_OF_PART", 200)
    with Recorder(tmp_path, every=1) as record:
        for step in range(20):
            record(**batch(step), step=step)
    sizes = [len(concatenate(list(read_tokens(path))).step) for path in tmp_path.iterdir()]
    assert max(sizes) < 200 + ROWS * WIDTH
    assert len(sizes) > 5


def full_disk(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    sync = os.fsync
    failures: list[int] = []

    def fail(file: int) -> None:
        if len(failures) < times:
            failures.append(file)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", fail)


def test_a_full_disk_gives_one_warning_and_recording_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, times=3)
    record = Recorder(tmp_path, every=1)
    caught: list[warnings.WarningMessage] = []
    for step in range(6):
        with warnings.catch_warnings(record=True) as new:
            warnings.simplefilter("always")
            record(**batch(step), step=step)
            record.flush()
        caught += new
    record.close()
    (warning,) = caught
    assert warning.category is RecordWarning
    assert f"{tmp_path}: No space left on device" in str(warning.message)
    assert warning.filename == __file__
    assert set(read(tmp_path).step.tolist()) == {3, 4, 5}
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device is of Linux")
def test_an_error_of_the_write_itself_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "open", lambda self, mode: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.warns(RecordWarning, match="No space left"), Recorder(tmp_path, every=1) as record:
        record(**batch(0))
    assert list(tmp_path.iterdir()) == []


def test_any_other_error_of_the_thread_is_a_warning_and_loses_that_step_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, mask = -np.ones(4), np.ones(4)
    offsets = [[0, 2, 4]] * 9
    offsets[4] = [0, 2, 3]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Recorder(tmp_path, every=1) as record:
            for call, given in enumerate(offsets):
                record(numbers, numbers, numbers, mask, cu_seqlens=np.array(given), step=call // 3)
    (warning,) = caught
    assert warning.category is RecordWarning
    assert "cu_seqlens must rise from 0 to the number of tokens, 4, got [0 2 3]" in str(
        warning.message
    )
    found = read(tmp_path)
    assert np.bincount(found.step).tolist() == [12, 0, 12]


@pytest.mark.parametrize("value", [0.5, math.nan, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_floats_has_0_and_1_alone(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    numbers = -torch.ones(4)
    mask = torch.tensor([1.0, value, 0.0, 1.0], dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Recorder(tmp_path, every=1) as record:
            record(numbers, numbers, numbers, mask, step=0)
            record(numbers, numbers, numbers, mask.isfinite().float(), step=1)
    (warning,) = caught
    assert warning.category is RecordWarning
    assert "response_mask must hold 0 and 1 if it is a float" in str(warning.message)
    assert set(read(tmp_path).step.tolist()) == {1}


def test_files_end_below_their_max_size_with_one_warning(tmp_path: Path) -> None:
    most = 30_000
    total = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # a run that continues counts what is there
            with Recorder(tmp_path, every=1, max_bytes=most) as record:
                for step in range(40):
                    record(**batch(step), step=step)
                    record.flush()
            total = sum(file.stat().st_size for file in tmp_path.iterdir())
            assert 0.5 * most < total <= most
    assert [warning.category for warning in caught] == [RecordWarning] * 2
    assert all(f"rank 0 have max_bytes, {most}" in str(warning.message) for warning in caught)
    with Recorder(tmp_path, every=1, rank=1, max_bytes=most) as record:
        record(**batch(0))  # another rank has its own
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > total


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"old_log_prob": [[1.0]]}, InvalidTypeError, "old_log_prob must be a tensor or a numpy"),
        ({"log_prob": np.ones((ROWS, WIDTH), int)}, InvalidTypeError, "log_prob must be float32"),
        ({"advantages": torch.ones(ROWS, dtype=torch.int64)}, InvalidTypeError, "advantages must"),
        ({"response_mask": np.ones((ROWS, WIDTH), "U1")}, InvalidTypeError, "response_mask must"),
        ({"sequence": np.ones(ROWS)}, InvalidTypeError, "sequence must hold whole numbers"),
        ({"old_log_prob": torch.ones(2, 2)}, InvalidValueError, "old_log_prob must have shape"),
        ({"log_prob": torch.ones(2, 2, 2)}, InvalidValueError, "log_prob must have shape"),
        ({"log_prob": torch.ones(())}, InvalidValueError, "log_prob must have shape"),
        ({"response_mask": torch.ones(ROWS)}, InvalidValueError, "response_mask must have shape"),
        ({"reward": torch.ones(WIDTH)}, InvalidValueError, "reward must have shape"),
        ({"cu_seqlens": np.array([0, 1])}, InvalidValueError, "cu_seqlens must be left out"),
        ({"step": 1.0}, InvalidTypeError, "step must be a whole number, got float"),
        ({"step": True}, InvalidTypeError, "step must be a whole number, got bool"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_also_on_skipped_steps(
    changes: dict[str, Any], error: type[BandpoError], message: str, tmp_path: Path
) -> None:
    with Recorder(tmp_path, every=3) as record:
        for _ in range(3):
            with pytest.raises(error, match=message):
                record(**batch(0) | changes)


def test_packed_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    numbers = -np.ones(6)
    offsets = np.array([0, 2, 6])
    with Recorder(tmp_path, every=1) as record:
        with pytest.raises(InvalidValueError, match=r"advantages must have shape \(6,\)"):
            record(numbers, numbers, np.ones(2), np.ones(6), cu_seqlens=offsets)
        with pytest.raises(InvalidValueError, match=r"reward must have shape \(6,\) or \(2,\)"):
            record(numbers, numbers, numbers, np.ones(6), cu_seqlens=offsets, reward=np.ones(3))
        with pytest.raises(InvalidValueError, match=r"cu_seqlens must have shape \[S \+ 1\]"):
            record(numbers, numbers, numbers, np.ones(6), cu_seqlens=offsets[None])
        with pytest.raises(InvalidTypeError, match="cu_seqlens must hold whole numbers"):
            record(numbers, numbers, numbers, np.ones(6), cu_seqlens=offsets * 1.0)


def test_an_optional_array_is_in_each_call_or_in_none(tmp_path: Path) -> None:
    with Recorder(tmp_path, every=100) as record:
        record(**batch(0), reward=torch.ones(ROWS))
        with pytest.raises(InvalidValueError, match=r"reward must be given in each call .* had it"):
            record(**batch(0))
        with pytest.raises(InvalidValueError, match=r"rollout_log_prob .* did not have it"):
            record(
                **batch(0),
                reward=torch.ones(ROWS),
                rollout_log_prob=batch(0)["old_log_prob"],
            )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, InvalidValueError, "every must be at least 1, got 0"),
        ({"every": 2.0}, InvalidTypeError, "every must be a whole number, got float"),
        ({"tokens_per_step": 4}, InvalidValueError, "tokens_per_step must be at least 5, got 4"),
        ({"max_bytes": 0}, InvalidValueError, "max_bytes must be at least 1, got 0"),
        ({"seed": -1}, InvalidValueError, "seed must be at least 0, got -1"),
        ({"rank": -1}, InvalidValueError, "rank must be at least 0, got -1"),
        ({"rank": 2, "world_size": 2}, InvalidValueError, "world_size must be at least 3, got 2"),
        ({"temperature": 0.0}, InvalidValueError, "temperature must be finite and above 0"),
        ({"old_policy": "vllm"}, InvalidValueError, "old_policy must be one of trainer, rollout"),
        ({"rule": {"region": object()}}, InvalidTypeError, "rule must be a mapping that JSON"),
    ],
)
def test_an_option_that_is_not_allowed_is_refused(
    options: dict[str, Any], error: type[BandpoError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        Recorder(tmp_path, **options)
    assert "bandpo-record" not in {thread.name for thread in threading.enumerate()}


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputPathError, match=r"cannot write to .*file"):
        Recorder(tmp_path / "file")


def test_a_recorder_that_is_closed_takes_nothing_and_may_be_closed_again(tmp_path: Path) -> None:
    record = Recorder(tmp_path, every=1)
    record.close()
    record.close()
    for call in (record.flush, lambda: record(**batch(0))):
        with pytest.raises(InvalidValueError, match="the recorder is closed"):
            call()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals of Unix")
def test_a_close_that_is_interrupted_writes_everything_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, write = threading.Event(), encoded

    def slow(*arguments: Any) -> Any:
        go_on.wait()
        return write(*arguments)

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "encoded", slow)
    record = Recorder(tmp_path, every=1)
    record(**batch(0))
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            record.close()
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(InvalidValueError, match="the recorder is closed"):
        record(**batch(1))
    threading.Timer(0.2, go_on.set).start()
    record.close()
    assert len(read(tmp_path).step) == int(batch(0)["response_mask"].sum())
    assert "bandpo-record" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals of Unix")
def test_a_process_that_ends_after_an_interrupted_close_writes_everything(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time, numpy as np\n"
        "from bandpo.record import Recorder, writer\n"
        "encoded = writer.encoded\n"
        "writer.encoded = lambda *arguments: (time.sleep(1.0), encoded(*arguments))[1]\n"
        "numbers = -np.ones((2, 3))\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "with Recorder(sys.argv[1], every=1) as record:\n"
        "    record(numbers, numbers, numbers, np.ones((2, 3)))\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.3)\n"
    )
    outcome = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert b"KeyboardInterrupt" in outcome.stderr
    assert check_steps(tmp_path, 6) == 1


def test_a_fork_leaves_the_recorder_alone(tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system has none")
    code = (
        "import os, sys, numpy as np\n"
        "from bandpo.record import Recorder\n"
        "record = Recorder(sys.argv[1], every=1)\n"
        "numbers = -np.ones((2, 3))\n"
        "record(numbers, numbers, numbers, np.ones((2, 3)))\n"
        "child = os.fork() == 0\n"
        "try: record(numbers, numbers, numbers, np.ones((2, 3)))\n"
        "except ValueError as error: print(error)\n"
        "record.close()\n"
        "child or os.wait()\n"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert outcome.stdout == "a recorder must be made in the process that uses it\n"
    assert check_steps(tmp_path, 6) == 2


def test_a_recorder_without_pyarrow_is_an_error_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "bandpo.record.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[record\]'"):
        Recorder(tmp_path)


def test_importing_the_room_imports_neither_torch_nor_pyarrow() -> None:
    code = (
        "import sys, bandpo.record\n"
        "print([name for name in ('torch', 'pyarrow') if name in sys.modules])"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert outcome.stdout == "[]\n"
