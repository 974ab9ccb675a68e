"""Lines and branches that tests run, by package: of Python by coverage.py, of Rust by LLVM.

Rust has the tests of Rust alone; those of Python run more of it. LLVM's tools have to be of the
version of rustc: `rustup component add llvm-tools`, or a folder in PATH.
Tests that measure memory, or compile a loss with torch, take minutes and are left out.

    python -m reliability.coverage
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from reliability.mutation_rust import SLOW
from reliability.result import Row, write

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "coverage"
DATA = PLACE / "python.data"

SUITES = (
    *("schedule", "region", "record", "replay", "loss", "correction", "table", "divergence"),
    *("tensors", "generator", "cli", "conform", "band", "demo", "backends"),
    *("test_check.py", "test_presets.py", "trust/test_untrusted_files.py"),
)
"""Folders and files of tests; adapters to trainers and examples need the trainers."""

LEFT_OUT = "not compil and not memory and not thread"


def _run(*command: str, **environment: str) -> str:
    """Runs a command in the checkout, and returns its output.

    Raises:
        AssertionError: If it fails.
    """
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_suites(suites: Sequence[str]) -> None:
    """Runs tests of Python under coverage.py."""
    for suite in suites:
        print(f"tests/{suite}", flush=True)
        _run(
            *(sys.executable, "-m", "coverage", "run", "-m", "pytest", "-q", "-k", LEFT_OUT),
            *("-p", "no:cacheprovider", f"tests/{suite}"),
            *("--junitxml", str(PLACE / f"{suite.replace('/', '.')}.xml")),
            COVERAGE_FILE=str(DATA),
        )  # fmt: skip
    _run(sys.executable, "-m", "coverage", "combine", COVERAGE_FILE=str(DATA))


def tests() -> dict[str, tuple[float, str]]:
    """Seconds and pytest's name of each test function, by coverage.py's name of it."""
    found: dict[str, tuple[float, str]] = {}
    for path in sorted(PLACE.glob("*.xml")):
        tree = ElementTree.parse(path)  # noqa: S314 -- pytest wrote it
        for case in tree.iter("testcase"):
            *folders, name = case.attrib["classname"].split(".")
            inner = case.attrib["name"].partition("[")[0]
            if not name.startswith("test_"):  # a class
                inner, name = f"{name}.{inner}", folders.pop()
            seconds = float(case.attrib["time"]) + found.get(f"{name}.{inner}", (0.0, ""))[0]
            test = f"{'/'.join([*folders, name])}.py::{inner.replace('.', '::')}"
            found[f"{name}.{inner}"] = (seconds, test)
    return found


def _row(check: str, lines: tuple[int, int], others: tuple[int, int], kind: str) -> Row:
    """A row of a package: of its lines, and of something else, the number and how many ran."""
    found = {}
    for (count, ran), words in ((lines, "lines run"), (others, f"{kind} run")):
        share = f"{100 * ran / count:.1f} %" if count else "none"
        found[f"of {count:,} {words} ({share})"] = ran
    return Row(check, lines[0], found)


def _package(file: str, root: str) -> str:
    """The package of a file below a folder; files beside packages are one."""
    folder, slash, _ = file.removeprefix(f"{root}/").partition("/")
    return f"{root}/{folder}" if slash else root


def python() -> Iterator[Row]:
    """Lines and branches of each package of Python in the last run of the suites."""
    report = PLACE / "python.json"
    _run(sys.executable, "-m", "coverage", "json", "-o", str(report), COVERAGE_FILE=str(DATA))
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    keys = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    for file, found in json.loads(report.read_text(encoding="utf-8"))["files"].items():
        numbers = (found["summary"][key] for key in keys)
        package = _package(file, "python/bandpo")
        sums[package] = [old + new for old, new in zip(sums[package], numbers, strict=True)]
    for package, (count, ran, branches, taken) in sorted(sums.items()):
        yield _row(package, (count, ran), (branches, taken), "branches")


def _tool(name: str) -> str:
    """LLVM's tool of the toolchain, or else of PATH.

    Raises:
        AssertionError: If there is none.
    """
    library = Path(_run("rustc", "--print", "sysroot").strip(), "lib", "rustlib")
    folders = [*map(str, library.glob("*/bin")), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    assert found, f"needs {name}: rustup component add llvm-tools"
    return found


def rust() -> Iterator[Row]:
    """Lines and regions of each folder of Rust that its own tests run."""
    build = {
        "CARGO_PROFILE_TEST_OPT_LEVEL": "0",  # compiled in a third of the time
        # Not every build of LLVM's tools reads compressed names.
        "RUSTFLAGS": "-C instrument-coverage -C llvm-args=-enable-name-compression=false",
        "RUST_MIN_STACK": str(2**26),  # such a build keeps every register of a vector on the stack
        "CARGO_TARGET_DIR": str(PLACE / "target"),
        "LLVM_PROFILE_FILE": str(PLACE / "rust-%p.profraw"),
    }
    cargo = ("cargo", "test", "--locked", "--lib")
    messages = _run(*cargo, "--no-run", "--message-format=json", **build).splitlines()
    programs = [json.loads(line).get("executable") for line in messages if line[0] == "{"]
    (program,) = filter(None, programs)
    for old in PLACE.glob("*.profraw"):
        old.unlink()
    _run(program, "--skip", SLOW, **build)
    raw, merged = map(str, PLACE.glob("*.profraw")), str(PLACE / "rust.profdata")
    _run(_tool("llvm-profdata"), "merge", "--sparse", *raw, "--output", merged)
    export = (_tool("llvm-cov"), "export", "--summary-only", f"--instr-profile={merged}", program)
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for file in json.loads(_run(*export))["data"][0]["files"]:
        path = Path(file["filename"])
        if not path.is_relative_to(ROOT / "rust") or "tests" in (path.stem, path.parent.name):
            continue
        package = _package(path.relative_to(ROOT).as_posix(), "rust")
        kinds = (file["summary"][kind] for kind in ("lines", "regions"))
        numbers = [kind[key] for kind in kinds for key in ("count", "covered")]
        sums[package] = [old + new for old, new in zip(sums[package], numbers, strict=True)]
    for package, (count, ran, regions, reached) in sorted(sums.items()):
        yield _row(package, (count, ran), (regions, reached), "regions")


def main() -> None:
    """Runs the tests, and writes what they reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", default=SUITES, help="in tests, default: all")
    suites = parser.parse_args().suites
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    run_suites(suites)
    chosen = () if suites is SUITES else suites
    command = " ".join(["python -m reliability.coverage", *chosen])
    write("coverage", command, [*python(), *rust()])


if __name__ == "__main__":
    main()
