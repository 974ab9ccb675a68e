"""Counts of instructions a token of the solver, the table lookup and the loss.

Times on a shared machine are too noisy for a gate; the number of instructions is the same in each
run. Valgrind executes at most AVX2, on one thread, so that path alone is counted.

    python tools/count_instructions.py            fails if a count is over 5 % above the stored one
    python tools/count_instructions.py --update   stores the counts, beside those of other machines
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "instructions.json"
ALLOWED = 0.05
"""Max growth of a number. Reorderings by the compiler stay below it."""
FEW, MANY = 1, 3
"""Numbers of repeats; the difference of their counts excludes start and preparation."""


def counted_on() -> dict[str, str]:
    """Returns the tools and the processor that determine the counts."""
    cpu: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        cpu.setdefault(name.strip(), value.strip())
    return {
        "cpu": f"{platform.machine()} {cpu.get('vendor_id')} family {cpu.get('cpu family')}",
        "rustc": _output("rustc", "--version"),
        "libc": " ".join(platform.libc_ver()),  # its exp and log are counted too
        "valgrind": _output("valgrind", "--version"),
    }


def count() -> dict[str, float]:
    """Returns the instructions a token of every routine in benchmarks/instructions.rs."""
    program = _build()
    counts = {}
    for line in _output(program).splitlines():
        tokens, name = line.split(" ", 1)
        few, many = (_instructions(program, name, repeats) for repeats in (FEW, MANY))
        counts[name] = round((many - few) / (MANY - FEW) / int(tokens), 2)
        print(f"{counts[name]:10.2f}  {name}", flush=True)
    return counts


def broken(
    stored: Mapping[str, float], counted: Mapping[str, float], allowed: float = ALLOWED
) -> list[str]:
    """Returns a line for each routine whose count exceeds the stored one by more than allowed."""
    lines = []
    for name in sorted(stored.keys() | counted.keys()):
        if name not in stored or name not in counted:
            where = "stored" if name in counted else "counted"
            lines.append(f"{name}: is not among the {where} ones")
        elif counted[name] > stored[name] * (1.0 + allowed):
            growth = counted[name] / stored[name] - 1.0
            lines.append(
                f"{name}: {counted[name]:.2f} a token, {growth:+.1%} over {stored[name]:.2f}"
            )
    return lines


def _build() -> str:
    """Builds the program with the settings of a release and returns its path."""
    messages = _output(
        *("cargo", "bench", "--locked", "--quiet", "--no-run", "--bench", "instructions"),
        "--message-format=json",
    )
    built = [json.loads(line) for line in messages.splitlines()]
    return next(
        str(message["executable"])
        for message in built
        if message.get("executable") and message["target"]["name"] == "instructions"
    )


def _instructions(program: str, name: str, repeats: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"),
                *(program, name, str(repeats)),
            ],
            check=False,
            capture_output=True,
            text=True,
        )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or found is None:
        raise SystemExit(f"count_instructions: {name} did not run:\n{done.stderr}")
    return int(found[1])


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return done.stdout.strip()


def main() -> int:
    """Counts, then compares or stores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--update", action="store_true", help=f"write {STORED.relative_to(ROOT)}")
    update = parser.parse_args().update
    for needed in ("valgrind", "cargo"):
        if shutil.which(needed) is None:
            print(f"count_instructions: needs {needed}, which is not on the PATH", file=sys.stderr)
            return 2
    here = counted_on()
    counted = count()
    stored: list[dict[str, Any]] = json.loads(STORED.read_text())
    others = [entry for entry in stored if entry["counted_on"] != here]
    if update:
        entries = [*others, {"counted_on": here, "instructions_a_token": counted}]
        STORED.write_text(json.dumps(entries, indent=2) + "\n")
        print(f"stored in {STORED.relative_to(ROOT)}")
        return 0
    if len(others) == len(stored):
        print("not compared: the stored numbers are of other machines or compilers")
        for entry in others:
            print(f"  stored: {entry['counted_on']}")
        print(f"  here:   {here}")
        return 0
    (same,) = (entry for entry in stored if entry["counted_on"] == here)
    lines = broken(same["instructions_a_token"], counted)
    for line in lines:
        print(f"worse: {line}")
    print(
        "make gate-update stores new numbers" if lines else f"none is worse by over {ALLOWED:.0%}"
    )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
