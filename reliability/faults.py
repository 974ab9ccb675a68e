"""Commands that are killed at random moments: the old file or the new one is there, never half.

python -m reliability.faults --kills 300
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bandpo import Band, BandTable
from bandpo.record import read_tokens
from reliability.result import Row, write

SEED = 20260304

Check = Callable[[Path], None]


def _is_table(path: Path) -> None:
    BandTable.load(path)


def _is_picture(path: Path) -> None:
    """Raises unless a PNG has its first and last bytes."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG"), path
    assert content.endswith(b"IEND\xaeB`\x82"), path


def _is_demo(path: Path) -> None:
    if path.exists():
        _is_picture(path)
    tokens = path.with_name(f"{path.stem}-tokens")
    if tokens.exists() and any(tokens.glob("*.parquet")):
        for part in read_tokens(tokens):
            assert len(part.log_prob) == len(part.step)


COMMANDS: dict[str, tuple[Sequence[str], str, Check]] = {
    "table build": (("table", "build", "kl@0.07", "-o"), "kl.safetensors", _is_table),
    "plot": (("plot", "dapo", "kl@0.05", "-o"), "plot.png", _is_picture),
    "demo": (("demo", "--seeds", "1", "--batches", "2", "-o"), "demo.png", _is_demo),
}
"""Commands, the file that each writes, and the check of the file."""


def _path() -> str:
    """The path of modules of this process, for one in another folder."""
    return os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)


def _started(words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "bandpo", *words], cwd=folder, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": _path()},
    )  # fmt: skip


def killed(name: str, kills: int, seed: int = SEED) -> Row:
    """Kills a command at random moments of its run, and checks the file after each.

    Raises:
        AssertionError: If a file is half.
    """
    words, file, check = COMMANDS[name]
    chance = random.Random(seed)  # noqa: S311 -- no secret
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start = time.monotonic()
        assert _started([*words, file], folder).wait() == 0, name
        whole = time.monotonic() - start
        first = (folder / file).read_bytes()
        died = 0
        for _ in range(kills):
            process = _started([*words, file], folder)
            # Most of the run is the imports; files are written near its end.
            time.sleep(whole * chance.choice([chance.uniform(0.0, 1.1), chance.uniform(0.6, 1.05)]))
            process.send_signal(signal.SIGKILL)
            died += process.wait() != 0
            check(folder / file)
            assert (folder / file).read_bytes() == first, f"{name}: another file"
    return Row(f"kills of {name}", kills, {"before its end": died, "files not whole": 0})


VERIFY = """
import sys
from pathlib import Path
from bandpo import BandTable
from bandpo.table import verification
verification._BLOCK, verification._SAVE_EVERY = 1 << 16, 0.0
path = Path(sys.argv[1])
table = BandTable.load(path)
table.verify(int(sys.argv[2]), checkpoint=path.with_suffix(".json")).save(path)
"""
"""A verification of so many values that saves its progress after each part."""


def resumed(kills: int, values: int = 2_000_000, seed: int = SEED) -> Row:
    """Kills verifications until they end, and compares each with an uninterrupted one.

    Raises:
        AssertionError: If a result differs, or a checkpoint is half.
    """
    chance = random.Random(seed)  # noqa: S311 -- no secret
    table = Band("kl", 0.05).table()
    wanted = table.verify(values)
    done, ends = 0, 0
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "kl.safetensors")
        while done < kills:
            table.save(path)
            while True:
                process = subprocess.Popen(
                    [sys.executable, "-c", VERIFY, str(path), str(values)],
                    env={**os.environ, "PYTHONPATH": _path()},
                )  # fmt: skip
                if done < kills:
                    done += 1
                    try:
                        process.wait(timeout=chance.uniform(0.1, 1.5))
                    except subprocess.TimeoutExpired:
                        process.kill()
                if process.wait() == 0:
                    break
                checkpoint = path.with_suffix(".json")
                if checkpoint.exists():
                    assert 0 <= json.loads(checkpoint.read_text(encoding="utf-8"))["done"] <= values
            ends += 1
            assert BandTable.load(path) == wanted, "a resumed verification differs"
            assert not path.with_suffix(".json").exists()
    counts = {"ended after resumptions": ends, "other than an uninterrupted one": 0}
    return Row(f"kills of a verification of {values} values", kills, counts)


WRITE = """
import sys
from bandpo import Band, BandTable
tables = [Band("kl", float(delta)).table() for delta in sys.argv[3:]]
for number in range(int(sys.argv[2])):
    tables[number % 2].save(sys.argv[1])
"""


def shared(writes: int) -> Row:
    """Two processes write one table while this one reads it.

    Raises:
        AssertionError: If a read finds anything but one of the tables.
    """
    deltas = (("0.05", "0.06"), ("0.07", "0.08"))
    known = {Band("kl", float(delta)).table() for pair in deltas for delta in pair}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "kl.safetensors")
        next(iter(known)).save(path)
        environment = {**os.environ, "PYTHONPATH": _path()}
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITE, str(path), str(writes), *pair], env=environment
            )
            for pair in deltas
        ]
        reads = 0
        while any(writer.poll() is None for writer in writers):
            assert BandTable.load(path) in known
            reads += 1
        assert [writer.wait() for writer in writers] == [0, 0]
        assert [file.name for file in Path(place).iterdir()] == [path.name]
    counts = {"reads meanwhile": reads, "of a table that was not whole": 0}
    return Row("writes of one table by two processes", 2 * writes, counts)


def main() -> None:
    """Runs all parts and writes their counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--writes", type=int, default=5000)
    parsed = parser.parse_args()
    rows = [killed(name, parsed.kills // (10 if name == "demo" else 1)) for name in COMMANDS]
    rows += [resumed(parsed.kills), shared(parsed.writes)]
    command = f"python -m reliability.faults --kills {parsed.kills} --writes {parsed.writes}"
    write("faults", command, rows)


if __name__ == "__main__":
    main()
