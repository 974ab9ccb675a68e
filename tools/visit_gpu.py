"""A visit to a GPU for minutes: correctness first, then times, each part written at once.

    make gpu-visit                            here: the wheels, in build/visit
    python tools/visit_gpu.py FOLDER          there, in a checkout: writes FOLDER/visit.json
    python tools/visit_gpu.py FOLDER --call 1 half of the parts, --call 2 the other half: 200 s each
    python tools/visit_gpu.py --list          the parts
    python tools/visit_gpu.py FOLDER --dry    the same without a GPU, the kernels in the emulator

A part is a program with a limit of time. One that fails or is stopped leaves its output, and the
next one runs. `visit.json` has the returncode, the seconds and the end of the output of each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/backends"
PYTEST = (sys.executable, "-m", "pytest", "-q", "-rs", "-W", "default", "-p", "no:cacheprovider")
BENCH = (sys.executable, "tools/bench_gpu.py", "--parts")
FIRST_CALL = """
import time
start = time.perf_counter()
import torch
import bandpo
from bandpo.loss import policy_loss
old = torch.full((8, 1024), -1.0, device="cuda")
torch.cuda.synchronize()
imported = time.perf_counter()
loss = policy_loss(old, old, old, old, region=bandpo.Band("kl", 0.05), backend="cuda").loss
torch.cuda.synchronize()
called = time.perf_counter()
print(f"imports and context {imported - start:.3f} s, first call {called - imported:.3f} s")
assert loss.item() == 1.0, loss
"""
ONE_LAUNCH = """
import sys
sys.path.insert(0, "tools")
import torch, bench_gpu
tokens = bench_gpu.steps_of("cuda", sys.argv[1], getattr(torch, sys.argv[2]), 1 << 24)
call = bench_gpu.kernel(tokens)
for _ in range(3):
    call()
torch.cuda.synchronize()
"""
METRICS = ",".join(
    (
        "gpu__time_duration.sum",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__bytes.sum",
        "sm__inst_executed.sum",
        "sm__inst_issued.avg.pct_of_peak_sustained_active",
        "sm__warps_active.avg.pct_of_peak_sustained_active",
        "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
        "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
        "smsp__cycles_active.avg",
        "launch__registers_per_thread",
        "launch__occupancy_limit_registers",
    )
)


class Part(NamedTuple):
    """A program, and the seconds after which it is stopped."""

    name: str
    limit: float
    command: tuple[str, ...]


def counters(steps: str, dtype: str) -> tuple[str, ...]:
    """The program that counts what one launch does."""
    return (
        "ncu", "--clock-control", "none", "--kernel-name", "regex:^policy_loss$", "--launch-skip",
        "2", "--launch-count", "1", "--metrics", METRICS, sys.executable, "-c",
        ONE_LAUNCH, steps, dtype,
    )  # fmt: skip


FIRST = (
    Part("machine", 10, ("nvidia-smi",)),
    Part("first call", 40, (sys.executable, "-c", FIRST_CALL)),
    Part("second process", 40, (sys.executable, "-c", FIRST_CALL)),
    Part(
        "correctness",
        150,
        (
            *(*PYTEST, "-n", "8", "-k", "gpu"),
            *(f"{TESTS}/{name}.py" for name in ("test_cuda", "test_launch", "test_tokens")),
        ),
    ),
    Part("memcheck", 60, (*PYTEST, f"{TESTS}/test_gpu.py", "-k", "sanitizer and memcheck")),
    Part("racecheck", 60, (*PYTEST, f"{TESTS}/test_gpu.py", "-k", "sanitizer and racecheck")),
    Part(
        "streams and graphs",
        60,
        (*PYTEST, f"{TESTS}/test_gpu.py", "-k", "not sanitizer and not max_int32"),
    ),
    Part("more than 2^31 tokens", 60, (*PYTEST, f"{TESTS}/test_gpu.py", "-k", "max_int32")),
)
SECOND = (
    Part("cases", 60, (*BENCH, "cases", "--to", "{folder}/cases.json")),
    Part("sizes", 120, (*BENCH, "sizes", "--to", "{folder}/sizes.json")),
    *(
        Part(f"counters {steps} {dtype}", 30, counters(steps, dtype))
        for steps, dtype in (("near", "float32"), ("far", "float32"), ("near", "bfloat16"))
    ),
    Part("calls", 60, (*BENCH, "calls", "--to", "{folder}/calls.json")),
)


CALLS = {0: FIRST + SECOND, 1: FIRST, 2: SECOND}
DRY = (
    Part("correctness", 60, (*PYTEST, f"{TESTS}/test_tokens.py", "-k", "emulator and kl")),
    Part("cases", 60, (*BENCH, "cases", "--to", "{folder}/cases.json", "--emulated")),
    Part("calls", 60, (*BENCH, "calls", "--to", "{folder}/calls.json", "--emulated")),
    Part("counters", 10, counters("near", "float32")),
    Part("a failure", 10, (sys.executable, "-c", "raise SystemExit('fails')")),
    Part("too long", 2, ("sh", "-c", "echo begins; sleep 60")),
    Part("the next", 10, (sys.executable, "-c", "print('runs')")),
)
"""Parts that run in the emulator, then those of a visit on which something goes wrong."""


def run(part: Part, folder: Path, left: float) -> dict[str, object]:
    """Runs a part, and returns what became of it."""
    start = time.monotonic()
    command = [word.replace("{folder}", str(folder)) for word in part.command]
    if shutil.which(command[0]) is None:
        return {"returncode": None, "seconds": 0.0, "output": f"there is no {command[0]}"}
    log = folder / "output.txt"
    with log.open("w+", encoding="utf-8") as output:
        done = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            returncode: int | None = done.wait(min(part.limit, left))
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)
            done.wait()
            returncode = None
    text = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    seconds = round(time.monotonic() - start, 2)
    return {"returncode": returncode, "seconds": seconds, "output": text[-12000:]}


def main() -> None:
    """Runs the parts in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--list", action="store_true", help="print the parts")
    parser.add_argument("--call", type=int, choices=CALLS, default=0, help="1 or 2; 0 for both")
    parser.add_argument("--seconds", type=float, help="limit of all parts, 200 for each call")
    parser.add_argument("--dry", action="store_true", help="try the script without a GPU")
    parser.add_argument("--only", nargs="+", help="names of the parts to run")
    given = parser.parse_args()
    parts = [
        part
        for part in (DRY if given.dry else CALLS[given.call])
        if given.only is None or part.name in given.only
    ]
    if given.list:
        print("\n".join(f"{part.name}: at most {part.limit:.0f} s" for part in parts))
        return
    seconds = (200.0 if given.call else 400.0) if given.seconds is None else given.seconds
    end = time.monotonic() + seconds
    given.folder.mkdir(parents=True, exist_ok=True)
    results = given.folder / "visit.json"
    found: dict[str, object] = {}
    if given.call == 2 and results.exists():  # the parts of the first call
        found = json.loads(results.read_text())
    for part in parts:
        left = end - time.monotonic()
        if left < 2.0:
            break
        found[part.name] = row = run(part, given.folder, left)
        results.write_text(json.dumps(found, indent=1) + "\n")
        print(f"== {part.name}: rc {row['returncode']}, {row['seconds']} s", flush=True)
        print(str(row["output"])[-1500:], flush=True)


if __name__ == "__main__":
    main()
