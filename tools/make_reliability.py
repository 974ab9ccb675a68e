"""Writes docs/reliability.md from the counts that long checks left in reliability/results.

make reliability                            # runs the checks, then this
python tools/make_reliability.py            # writes the page
python tools/make_reliability.py --check    # exit code 1 if it would change
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from reliability.result import RESULTS, rows_of  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"

SECTIONS = {
    "fuzz": (
        "Fuzzing of the Python entries",
        "Random and damaged input gives a result or an error of bandpo. Cases are made by a seed, "
        "or steered by coverage (`guided`). `tests/data/corpus` holds their beginnings.",
    ),
    "fuzz_rust": (
        "Fuzzing of the Rust entries",
        "Random and damaged input of the parsers and of the reader of tables does not panic.",
    ),
    "expressions": (
        "Long expressions",
        "Texts at the limits of length, terms, kinks and nesting are judged or refused in bounded "
        "time and memory. The work of a judgement is counted before it is done.",
    ),
    "convexity": (
        "Convexity",
        "A chord that lies below f between its ends, by more than ball arithmetic leaves open, "
        "proves that f is not convex. Beside the places that a refusal names, chords are tried at "
        "ever smaller distances. The judgement samples slope and f'', so that a smooth dent "
        "between two samples escapes it, as `Divergence.from_expression` documents. At a kink the "
        "slope may fall by the rounding of decimals, about 1e-15 of the slopes. The listed one has "
        "a kink at u = 1.69, where the slope falls by 3e-56.",
    ),
    "bounds": (
        "Bounds",
        "Exact bounds against ball arithmetic, which encloses D_f. A bound is inside if the exact "
        "bound is at least as far out. Some deltas saturate a side within a few floats, and "
        "others range from the smallest subnormal number to 100.",
    ),
    "texts": (
        "Bounds of formulas",
        "The same for divergences that are given as text, random and accepted. Bounds that are "
        "farther in are ratios below e^-700, of tokens with p below e^-90.",
    ),
    "losses": (
        "Losses",
        "Losses and gradients of the backends against each other, and in float64 against formulas "
        "in numpy. Masked tokens hold NaN and infinities; batches may be packed or weighted.",
    ),
    "mutation": (
        "Mutation of Python",
        "An operator, a number or a condition is changed, and tests are run that reach its line, "
        "for at most half a minute, of the suites of the last run of `coverage`. Each package has "
        "a sample of the same size. Eight changes survived at first; they were tried again with "
        "tests of other suites and tests added for them. Listed changes survived. "
        "`reliability/survivors.json` has the reasons why others have no effect.",
    ),
    "mutation_rust": (
        "Mutation of Rust",
        "An operator or a returned value is changed, and the tests of Rust of its folder are run. "
        "Every n-th change is made. In a first run 36 of 97 changes of tables survived; the row is "
        "of a second run, with tests added. Four changes that survived were made once more with "
        "tests added for them. `reliability/survivors.json` has the reasons why others have no "
        "effect. Listed changes survived; tests of Python, which are not run, may kill them.",
    ),
    "coverage": (
        "Coverage",
        "Lines and branches of Python that tests run, by package, without tests that compile a "
        "loss or measure memory or threads. The command has the suites, by default all that need "
        "neither a trainer nor a GPU; other packages are run in passing. Lines and regions of Rust "
        "are those that tests of Rust run.",
    ),
    "levels": (
        "Levels",
        "`BANDPO_SIMD` selects the level of vector instructions; all give the same bits.",
    ),
    "faults": (
        "Faults",
        "A process is killed at random moments. Full disks, folders that cannot be written, closed "
        "outputs and odd paths are in `tests/trust/test_faults.py`.",
    ),
    "suites": (
        "Tests by what they try",
        "Inputs and situations that were chosen by hand, from reports of users and for each kind "
        "of call. One of the tests under sanitizers runs those of the kernels once more.",
    ),
    "trust": (
        "Trust",
        "`python tools/list_unsafe.py` lists every `unsafe` with its reason, and what may panic. "
        "`cargo deny check bans licenses sources` and `pip-audit` check what others wrote. "
        "`tests/trust/test_untrusted_files.py` has the files that are refused.",
    ),
    "long_run": (
        "Long run",
        "Memory after the first tenth of the calls, in one process.",
    ),
}
"""Parts by the names of their files: heading and what is checked."""


def page() -> str:
    """Returns the text of the page."""
    known = {path.stem for path in RESULTS.glob("*.json")}
    if unknown := known - set(SECTIONS):
        sys.exit(f"make_reliability: no section for {sorted(unknown)}")
    parts = [
        "# Reliability\n\n"
        "Written by `python tools/make_reliability.py` from the counts of the last run of each "
        "part.\nA part may run in shards: `--shard 3/64 --into FOLDER` in each, then "
        "`python -m reliability.result FOLDER`.\nThe command above a table is the one that was "
        "run; `make reliability` runs the default numbers, which are larger.\n"
        "Tests of `tests/trust` run a small part of each.\n"
    ]
    for name, (heading, text) in SECTIONS.items():
        if name not in known:
            parts.append(f"## {heading}\n\n{text}\n\nNot run yet.\n")
            continue
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        cells = [(row, row.words().replace("|", r"\|")) for row in rows_of(found)]
        rows = [f"| {row.check} | {row.cases:,} | {words} |" for row, words in cells]
        command = f"`{found['command']}`"
        if found["shards"] > 1:
            command += f", in {found['shards']} shards"
        table = "\n".join(["| check | cases | found |", "| --- | ---: | --- |", *rows])
        parts.append(f"## {heading}\n\n{text}\n\n{command}\n\n{table}\n")
    return "\n".join(parts)


def main() -> None:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE.name} is out of date: run python tools/make_reliability.py")


if __name__ == "__main__":
    main()
