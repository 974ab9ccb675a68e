"""Counts of instructions a token that the kernel of the loss issues on a GPU, without a GPU.

NVRTC compiles the kernel and ``nvdisasm`` writes its machine code, which tests/support/sass.py runs
on tokens, warp by warp. An instruction counts once for each warp that it is issued to, however many
lanes take part, so a branch that parts the lanes counts both ways. The kernel writes gradients, as
for a loss that is a mean, and they have to be those of Rust, bit for bit.

    python tools/count_sass.py            fails if a count is over 2 % above the stored one
    python tools/count_sass.py --update   stores the counts
    python tools/count_sass.py --all      prints those of more regions and surrogates, with opcodes

A count is the difference between a block with two chunks and one with one chunk, so it leaves out
the start of a block and its copy of the table. Every token counts. The cases are:

- near: logit steps of deviation 0.1, as in the first steps on a batch
- far: logit steps of 1.5 in either direction, so that every warp looks every token up and clips
  some of the lanes

A binary of the same source, options and compiler always has the same counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from count_instructions import broken  # noqa: E402

from bandpo import Band, Clip, Region, _core  # noqa: E402
from bandpo.backends.contract import LossInputs, Weight  # noqa: E402
from bandpo.backends.cuda import kernels  # noqa: E402
from bandpo.backends.cuda.launch import CHUNK, COMPILER_OPTIONS  # noqa: E402
from bandpo.backends.native import in_rust  # noqa: E402
from bandpo.tensors.bounds import bounds_of  # noqa: E402
from support.nvrtc import (  # noqa: E402
    ADDED_BY_CUPY,
    Nvrtc,
    compiler,
    disassembled,
    disassembler,
    section,
)
from support.sass import Counts, Machine, Program, parse  # noqa: E402

STORED = ROOT / "benchmarks" / "sass.json"
ALLOWED = 0.02
"""Max growth of a number. A compiler of another version may reorder, so that it fails the check."""
CUDA = 13
ARCHITECTURES = (80, 90, 100)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEED = 20261127


class Case(NamedTuple):
    """Tokens and the rule for them."""

    name: str
    steps: str
    dtype: str = "float32"
    region: Region = Band("kl", 0.05)
    surrogate: str = "min-clip"
    parameters: tuple[float, ...] = ()
    architectures: tuple[int, ...] = ARCHITECTURES


CASES = tuple(
    Case(f"{steps} {dtype}", steps, dtype) for dtype in DTYPES for steps in ("near", "far")
)
MORE_CASES = tuple(
    Case(f"{steps} float32 {name}", steps, "float32", region, surrogate, parameters, (90,))
    for name, region, surrogate, parameters in (
        ("kl 0.005", Band("kl", 0.005), "min-clip", ()),
        ("pearson-chi2 0.05", Band("pearson-chi2", 0.05), "min-clip", ()),
        ("clip 0.2", Clip(0.2), "min-clip", ()),
        ("mask", Band("kl", 0.05), "mask", ()),
        ("weight", Band("kl", 0.05), "weight", ()),
        ("gradient-preserving", Band("kl", 0.05), "gradient-preserving", (0.75, 0.5)),
        ("soft-gate", Band("kl", 0.05), "soft-gate", (1.0, 1.05)),
        ("quadratic", Band("kl", 0.05), "quadratic", ()),
    )
    for steps in ("near", "far")
)


def tokens_of(case: Case, chunks: int) -> list[torch.Tensor]:
    """Old and new log-probs, advantages and the mask of whole chunks, all of whose tokens count."""
    rng = np.random.default_rng(SEED)
    shape = (chunks, CHUNK)
    logits = rng.normal(3.0, 3.0, shape)
    if case.steps == "near":
        steps = rng.normal(0.0, 0.1, shape)
    else:
        steps = np.where(rng.random(shape) < 0.5, -1.5, 1.5)
    dtype = DTYPES[case.dtype]
    old, new = (
        torch.from_numpy(-np.logaddexp(0.0, -moved)).to(dtype) for moved in (logits, logits + steps)
    )
    advantages = torch.from_numpy(rng.normal(0.0, 1.0, shape)).float()
    return [old, new, advantages, torch.ones(shape, dtype=torch.bool)]


class Binary(NamedTuple):
    """A kernel for an architecture."""

    program: Program
    registers: int
    shared_bytes: int


def _compiler() -> Nvrtc:
    nvrtc = compiler(CUDA)
    if nvrtc is None or disassembler() is None:
        raise SystemExit("count_sass: needs NVRTC and nvdisasm: pip install '.[nvrtc]'")
    return nvrtc


@cache
def binary_of(kernel: str, architecture: int) -> Binary:
    """Compiles a kernel and reads its machine code."""
    options = [
        *COMPILER_OPTIONS, *ADDED_BY_CUPY, f"-arch=sm_{architecture}", "--ptxas-options=-v",
    ]  # fmt: skip
    made = _compiler().compile(_core.KERNEL_SOURCE, [kernel], options)
    [registers] = re.findall(r"Used (\d+) registers", made.log)
    shared = re.findall(r"(\d+) bytes smem", made.log)
    program = parse(disassembled(made.binary), section(made.binary, ".nv.constant2"))
    return Binary(program, int(registers), sum(int(size) for size in shared))


def run(case: Case, architecture: int, chunks: int) -> tuple[Binary, Counts]:
    """Returns the kernel and what it issued in one block."""
    tokens = tokens_of(case, chunks)
    bounds = bounds_of(case.region, tokens[0].float())
    old, new, advantages, valid = tokens
    inputs = LossInputs(
        old, new, None, advantages, valid, bounds, case.surrogate, list(case.parameters), False
    )
    found: list[tuple[Binary, Counts]] = []

    def launch(kernel: str, *given: Any) -> None:
        if "policy_loss_totals" in kernel:
            return
        binary = binary_of(kernel, architecture)
        machine = Machine(binary.program, architecture)
        machine.launch(kernel, *given)
        found.append((binary, machine.counts))

    with (
        mock.patch.object(kernels, "launch", launch),
        mock.patch.object(kernels, "chunk_length", return_value=CHUNK),
    ):
        gradient, *_ = kernels.weighted_sum(inputs, Weight(1, 3))
    wide = inputs._replace(old_log_prob=old.float(), log_prob=new.float())
    wanted, *_ = in_rust(wide, 1 / 3)
    if not torch.equal(gradient, wanted.to(gradient.dtype)):
        apart = (gradient != wanted).sum()
        raise SystemExit(f"count_sass: {apart} results of {case.name} are not those of Rust")
    return found[0]


def count(cases: Iterable[Case], show: bool) -> dict[str, float]:
    """Returns the instructions a token of cases on each of their architectures."""
    counted = {}
    for case in cases:
        for architecture in case.architectures:
            binary, one = run(case, architecture, 1)
            _, two = run(case, architecture, 2)
            issued = [b - a for a, b in zip(one.issued, two.issued, strict=True)]
            threads = CHUNK // 32
            name = f"sm_{architecture} {case.name}"
            counted[name] = round(sum(issued) / threads, 2)
            wavefronts = (two.shared_wavefronts - one.shared_wavefronts) / threads
            print(
                f"{counted[name]:8.2f}  {name}: {len(issued)} instructions, "
                f"{binary.registers} registers, {wavefronts:.2f} wavefronts of shared memory",
                flush=True,
            )
            if show:
                by_name = Counts(issued).by_name(binary.program)
                for opcode, number in by_name.most_common():
                    print(f"{number / threads:12.2f}  {opcode}")
    return counted


def main() -> int:
    """Counts, then compares or stores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--update", action="store_true", help=f"write {STORED.relative_to(ROOT)}")
    parser.add_argument("--all", action="store_true", help="print more cases, and opcodes")
    arguments = parser.parse_args()
    version = _compiler().version
    if arguments.all:
        count((*CASES, *MORE_CASES), show=True)
        return 0
    counted = count(CASES, show=False)
    if arguments.update:
        made = {"nvrtc": version, "instructions_a_token": counted}
        STORED.write_text(json.dumps(made, indent=2) + "\n")
        print(f"stored in {STORED.relative_to(ROOT)}")
        return 0
    stored: dict[str, Any] = json.loads(STORED.read_text())
    if stored["nvrtc"] != version:
        print(
            f"not compared: the stored numbers are of NVRTC {stored['nvrtc']}, this is {version}; "
            f"pip install '.[nvrtc]' takes that one"
        )
        return 1
    lines = broken(stored["instructions_a_token"], counted, ALLOWED)
    for line in lines:
        print(f"worse: {line}")
    print(
        "make gate-gpu-update stores new numbers"
        if lines
        else f"none is worse by over {ALLOWED:.0%}"
    )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
