"""Faults of the machine: full disks, folders that cannot be written, closed outputs, paths."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from bandpo import Band, BandTable
from bandpo.cli import main
from bandpo.error import OutputPathError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of Unix")

TABLE = Band("kl", 0.05).table()


def command(
    words: Sequence[str | bytes], folder: Path, **options: object
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "bandpo", *words], cwd=folder, capture_output=True, check=False,
        **options,
    )  # fmt: skip


def with_room(bytes_of_file: int) -> Callable[[], None]:
    """Limits the size of a file, beyond which a write fails as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_file, bytes_of_file))

    return limit


WRITERS = {
    "table build": ["table", "build", "kl@0.06", "-o", "out.safetensors"],
    "table verify": ["table", "verify", "--exhaustive", "out.safetensors"],
    "plot": ["plot", "kl@0.05", "-o", "out.png"],
}
"""Commands that write a file."""


@pytest.mark.parametrize(
    ("name", "room"),
    [*((name, room) for name in ("table build", "table verify") for room in (0, 1, 700, 3000)),
     ("plot", 700)],
)  # fmt: skip
def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    name: str, room: int, tmp_path: Path
) -> None:
    if name == "plot":
        pytest.importorskip("matplotlib")
    words = WRITERS[name]
    old = tmp_path / words[-1]
    before = b"old" if name != "table verify" else TABLE._core.to_bytes()
    old.write_bytes(before)
    # matplotlib may write its list of fonts elsewhere, which the limit would break too.
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    done = command(words, tmp_path, preexec_fn=with_room(room), env=environment)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("bandpo: ")]
    assert lines[-1].startswith("bandpo: error: cannot write")
    assert b"Traceback" not in done.stderr
    assert old.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {old.name, "matplotlib"}


def as_nobody(action: Callable[[], object]) -> str:
    """What an action raises, in a process that may write nothing of others."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            action()
            answer = "nothing"
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder, *folder.parents):
        if path.owner() == tmp_path.owner() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    TABLE.save(folder / "table")
    folder.chmod(0o555)
    for action in (
        lambda: TABLE.save(folder / "new"),
        lambda: TABLE.save(folder / "table"),
        lambda: TABLE.verify(100, checkpoint=folder / "checkpoint"),
    ):
        answer = as_nobody(action)
        assert answer.startswith("OutputPathError: cannot write"), answer
        assert answer.endswith("Permission denied"), answer
    assert [path.name for path in folder.iterdir()] == ["table"]


def test_a_table_that_is_replaced_while_it_is_read_is_one_of_both(tmp_path: Path) -> None:
    tables = [TABLE, Band("tv", 0.3).table()]
    path, stop = tmp_path / "table", threading.Event()
    TABLE.save(path)

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            tables[number % 2].save(path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            assert BandTable.load(path) in tables
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("words", [["presets"], ["bounds", "0.5", "kl@0.05"]])
def test_a_closed_standard_output_is_an_error_of_one_line(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bandpo", *words], cwd=tmp_path, check=False,
        stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1),
    )  # fmt: skip
    expected = b"bandpo: error: cannot write standard output: it is closed\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_a_closed_standard_input_is_an_error_of_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bandpo", "bounds", "-"], cwd=tmp_path, check=False,
        capture_output=True, preexec_fn=lambda: os.close(0),
    )  # fmt: skip
    expected = b"bandpo: error: cannot read standard input: it is closed\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_closed_standard_error_leaves_output_and_exit_code(tmp_path: Path) -> None:
    def close() -> None:
        os.close(2)

    def run(words: list[str]) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "bandpo", *words], cwd=tmp_path, check=False,
            stdout=subprocess.PIPE, preexec_fn=close,
        )  # fmt: skip

    failed = run(["table", "inspect", "nothing"])
    assert (failed.returncode, failed.stdout) == (2, b"")
    assert run(["bounds", "0.5", "kl@0.05"]).returncode == 0


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_a_path_that_is_not_utf_8_is_written_read_and_shown(encoding: str, tmp_path: Path) -> None:
    name = b"caf\xe9.safetensors"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    built = command([b"table", b"build", b"kl@0.05", b"-o", name], tmp_path, env=environment)
    assert (built.returncode, built.stderr) == (0, b"")
    assert os.listdir(os.fsencode(tmp_path)) == [name]
    for words in ([b"table", b"inspect", name], [b"table", b"inspect", name, b"--json"]):
        shown = command(words, tmp_path, env=environment)
        assert (shown.returncode, shown.stderr) == (0, b"")
    assert json.loads(shown.stdout)["path"] == os.fsdecode(name)
    missing = command([b"table", b"inspect", b"no" + name], tmp_path, env=environment)
    assert missing.returncode == 2
    assert missing.stderr.startswith(b"bandpo: error: cannot read no")
    assert b"Traceback" not in missing.stderr


@pytest.mark.parametrize(
    "words",
    [[b"bounds", b"0.5", b"kl\xe9@0.1"], [b"bounds", b"0.5", b"--divergence", b"\xff"],
     [b"bounds", b"0.5", b"--expression", b"u\xe9", b"--delta", b"1"], [b"caf\xe9"],
     [b"plot", b"\xff\xfe"], [b"table", b"build", b"'\xe9'@1", b"-o", b"out"]],
)  # fmt: skip
def test_arguments_that_are_not_utf_8_are_errors(words: list[bytes], tmp_path: Path) -> None:
    done = command(words, tmp_path)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["bounds", "0.5", "kl@0.05"], ["presets"]])
def test_no_home_and_no_environment_are_enough(words: list[str], tmp_path: Path) -> None:
    code = "import sys; sys.path[:0] = sys.argv[1].split(':'); del sys.argv[1]; "
    code += "from bandpo.cli import main; sys.exit(main())"
    paths = ":".join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code, paths, *words], env={}, cwd=tmp_path,
        capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b""), done.stderr


def test_a_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputPathError, match="No such file or directory"):
        TABLE.save(tmp_path / "gone" / "table")
    with pytest.raises(OutputPathError, match="No such file or directory"):
        TABLE.verify(100, checkpoint=tmp_path / "gone" / "checkpoint")


REQUESTS: dict[str, Callable[[], object]] = {
    "samples": lambda: TABLE.verify(2**62),
    "bounds": lambda: Band("kl", 0.05).log_bounds(np.broadcast_to(-1.0, (2**20, 2**20))),
    "lookups": lambda: TABLE.log_bounds(np.broadcast_to(np.float32(-1.0), (2**21, 2**20))),
    "membership": lambda: Band("kl", 0.05).contains(
        np.broadcast_to(-1.0, (2**31, 1)), np.zeros(2**10)
    ),
}
"""Requests for terabytes."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads
@pytest.mark.parametrize("name", REQUESTS)
def test_requests_beyond_the_memory_are_refused_at_once(name: str) -> None:
    def action() -> None:
        # Otherwise a system that promises more than it has would take all of its memory.
        resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            REQUESTS[name]()
        finally:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < 64 * 1024, f"{grown} KiB were taken first"

    answer = as_nobody(action)
    assert answer.split(":")[0] in ("InvalidValueError", "MemoryError", "_ArrayMemoryError"), answer


def test_numbers_without_end_are_refused_by_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (
        ["bounds", "1" * 5000, "kl@0.05"],
        ["bounds", "0.5", f"kl@{'9' * 400}"],
        ["table", "verify", "nothing", "--samples", "9" * 300],
    ):
        assert main(words) == 2
        assert "Traceback" not in capsys.readouterr().err
