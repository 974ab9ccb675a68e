"""Checks of the files of a release, and tests of its wheel as it is installed.

Files, tags, size and licences are checked. Then the wheel is installed in a fresh environment of
every Python on this machine. The tests come from the sdist and run in a folder without
python/bandpo, so that they import the installed package alone. The Python that runs this script
takes PyTorch and every test. The others run the tests without PyTorch, because it is large and has
no build for some Pythons. Skipped tests are printed.

    python tools/check_wheel.py dist
"""

from __future__ import annotations

import argparse
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 2_000_000
"""A wheel must be smaller."""
LICENCES = ("LICENSE", "THIRD-PARTY-LICENSES.md")
MATERIALS = "bandpo.cdx.json"
"""The bill of materials, which stands in the folder that PEP 770 names."""
FOUND = """
import json, sys, sysconfig
threads = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
print(json.dumps([sys.version_info[:2], threads]))
"""


class RefusedError(Exception):
    """A failed check; the message names the check and the file."""


def require(condition: bool, message: str) -> None:
    """Raises RefusedError with the message if the condition is false."""
    if not condition:
        raise RefusedError(message)


@dataclass(frozen=True)
class Interpreter:
    """A Python that the wheel is tested on."""

    path: str
    version: tuple[int, int]
    threads: str
    """`t` if it is free-threaded, else empty."""

    @property
    def name(self) -> str:
        """The name of its command, such as `python3.14t`."""
        return f"python{self.version[0]}.{self.version[1]}{self.threads}"

    @staticmethod
    def at(path: str) -> Interpreter | None:
        """Returns the Python at a path, or None if the file does not run as Python."""
        try:
            outcome = subprocess.run(
                [path, "-c", FOUND], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        # A version manager puts a shim on the PATH for a Python that is not selected.
        if outcome.returncode != 0:
            return None
        version, threads = json.loads(outcome.stdout)
        return Interpreter(path, tuple(version), threads)


def interpreters() -> Iterator[Interpreter]:
    """Yields one of each supported Python: the running one, then those on this machine."""
    home = Path.home()
    managed = [
        *sorted(Path(os.environ.get("PYENV_ROOT", home / ".pyenv")).glob("versions/*/bin/python")),
        *sorted((home / ".local/share/uv/python").glob("*/bin/python3")),
    ]
    on_path = [shutil.which(f"python3.{minor}") for minor in range(10, 20)]
    seen: set[str] = set()
    for path in (sys.executable, *filter(None, on_path), *map(str, managed)):
        found = Interpreter.at(path)
        # Free-threaded Pythons need a wheel of their own; --python selects them.
        if found and found.version >= (3, 10) and not found.threads and found.name not in seen:
            seen.add(found.name)
            yield found


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Runs a command with its output on the terminal; raises RefusedError if it fails."""
    print("+", *command, flush=True)
    # PYTHONPATH could put the source tree before the installed wheel.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = subprocess.run(command, cwd=cwd, env=environment, check=False).returncode
    require(code == 0, f"exit code {code}: {' '.join(map(str, command))}")


def only(paths: list[Path], what: str) -> Path:
    """Returns the path of a list that has to hold one."""
    require(len(paths) == 1, f"expected one {what}, found {[str(path) for path in paths]}")
    return paths[0]


def crate_version() -> str:
    """Returns the version in Cargo.toml, its only place."""
    text = (ROOT / "Cargo.toml").read_text(encoding="utf-8")
    version: str = re.findall(r'^version = "(.+)"$', text, re.MULTILINE)[0]
    return version


def tracked(*folders: str) -> set[str]:
    """Returns the files under version control, as paths with slashes."""
    command = ["git", "ls-files", "-z", "--", *folders]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(filter(None, output.split("\0")))


def unpack(sdist: Path, target: Path) -> Path:
    """Checks that the sdist holds every tracked file, and unpacks it."""
    folder = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{folder}/") for name in archive.getnames()}
        missing = tracked() - names
        require(not missing, f"{sdist.name} lacks {sorted(missing)}")
        added = names - tracked() - {"PKG-INFO"}
        require(not added, f"{sdist.name} holds files that git does not: {sorted(added)}")
        # No filter, because Python 3.11.2 lacks it. The names were checked above: git has each.
        archive.extractall(target)  # noqa: S202
    return target / folder


def metadata(wheel: zipfile.ZipFile, file: str, version: str) -> Message:
    """Returns the fields of METADATA or WHEEL."""
    return email.message_from_bytes(wheel.read(f"bandpo-{version}.dist-info/{file}"))


def check_wheel(path: Path, version: str) -> None:
    """Checks the content of a wheel."""
    size = path.stat().st_size
    require(size < MOST_BYTES, f"{path.name}: {size} bytes, allowed are fewer than {MOST_BYTES}")
    information = f"bandpo-{version}.dist-info"
    sources = {name.removeprefix("python/") for name in tracked("python/bandpo")}
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        require({"bandpo/_core.pyi", "bandpo/py.typed"} <= names, f"{path.name} is not typed")
        missing = sources - names
        require(not missing, f"{path.name} lacks {sorted(missing)}")
        package = {name for name in names if not name.startswith(f"{information}/")}
        extension = only([Path(name) for name in package - sources], f"extension in {path.name}")
        require(
            extension.parent == Path("bandpo") and extension.name.startswith("_core."),
            f"{path.name} would install {extension} outside bandpo/",
        )
        about = metadata(wheel, "METADATA", version)
        require(about["Version"] == version, f"{path.name}: {about['Version']}, not {version}")
        for licence in LICENCES:
            text = wheel.read(f"{information}/licenses/{licence}")
            require(text == (ROOT / licence).read_bytes(), f"{path.name}: another {licence}")
        materials = f"{information}/sboms/{MATERIALS}"
        require(materials in names, f"{path.name} lacks the bill of materials, {materials}")
        require(
            wheel.read(materials) == (ROOT / MATERIALS).read_bytes(),
            f"{path.name}: another bill of materials",
        )
        tags = metadata(wheel, "WHEEL", version).get_all("Tag", [])
    free_threaded = re.search(r"-cp3\d+t-|-abi3t-", path.name) is not None
    require(
        free_threaded or "-cp310-abi3-" in path.name,
        f"{path.name} is for one Python; expected cp310-abi3, or a free-threaded one",
    )
    require("linux" not in path.name or "manylinux" in path.name, f"{path.name}: not manylinux")
    if not free_threaded:
        run(sys.executable, "-m", "abi3audit", "--strict", "--summary", path)
    if "manylinux" in path.name:
        # auditwheel names the oldest policy that the symbols of the extension allow.
        outcome = subprocess.run(
            [sys.executable, "-m", "auditwheel", "show", path],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        words = " ".join(outcome.stdout.split())
        claimed = {part for tag in tags for part in tag.split("-")[2].split(".")}
        found = re.search(r'consistent with the following platform tag: "(.+?)"', words)
        require(
            found is not None and found[1] in claimed,
            f"{path.name} claims {sorted(claimed)}, auditwheel reports: {words or outcome.stderr}",
        )
    print(f"{path.name}: {size} bytes, files, licences and tags as they should be", flush=True)


def test_requirements(wheel: Path, version: str) -> list[str]:
    """Returns the requirements of the extra `test` that need no PyTorch."""
    with zipfile.ZipFile(wheel) as archive:
        needed = metadata(archive, "METADATA", version).get_all("Requires-Dist", [])
    return [
        line.split(";")[0].strip()
        for line in needed
        if line.endswith("extra == 'test'") and not line.startswith("bandpo")
    ]


def environment(interpreter: Interpreter, folder: Path) -> Path:
    """Creates an environment that holds pip alone, and returns its Python."""
    run(interpreter.path, "-m", "venv", folder)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def test(
    interpreter: Interpreter, dist: Path, requirements: list[str], source: Path, work: Path
) -> str:
    """Installs the wheel in a fresh environment, runs the tests and returns their last line."""
    python = environment(interpreter, work / "environment")
    pip = (python, "-m", "pip", "install", "--quiet", "--prefer-binary")
    # From the folder alone, because a registry may hold another package of this name.
    local = ("--no-index", "--no-deps", "--only-binary=:all:", "--find-links", dist)
    run(*pip, *local, f"bandpo=={crate_version()}")
    run(*pip, *requirements)
    tests = work / "tests"
    shutil.copytree(source, tests, ignore=shutil.ignore_patterns("python"))
    found = subprocess.run(
        [python, "-c", "import bandpo; print(bandpo.__file__)"],
        cwd=tests, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    require(
        Path(found).resolve().is_relative_to((work / "environment").resolve()),
        f"the tests would import {found}, which is not the installed wheel",
    )
    command = [str(python), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    print("+", *command, flush=True)
    last = ""
    with subprocess.Popen(command, cwd=tests, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    require(process.returncode == 0, f"tests fail on {interpreter.name}")
    require(re.search(r"[1-9]\d* passed", last) is not None, f"no test passed: {last}")
    return last


def check(dist: Path, chosen: list[Interpreter], without_torch: bool) -> list[str]:
    """Runs every check and returns a line for each Python that was tested."""
    version = crate_version()
    wheels = sorted(dist.glob("*.whl"))
    require(bool(wheels), f"{dist} has no wheel")
    sdist = only(sorted(dist.glob("*.tar.gz")), "sdist")
    require(sdist.name == f"bandpo-{version}.tar.gz", f"{sdist.name} is not of {version}")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, *wheels)
    for wheel in wheels:
        check_wheel(wheel, version)
    results = []
    with tempfile.TemporaryDirectory(prefix="bandpo-") as folder:
        work = Path(folder)
        source = unpack(sdist, work / "sdist")
        python = environment(chosen[0], work / "build")
        run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", work / "built", sdist)
        only(list((work / "built").glob("*.whl")), "wheel from the sdist")
        print(f"{sdist.name}: complete, and a clean environment builds it", flush=True)
        some = [f"bandpo[plot]=={version}", *test_requirements(wheels[0], version)]
        for number, interpreter in enumerate(chosen):
            whole = number == 0 and not without_torch
            requirements = [f"bandpo[test]=={version}"] if whole else some
            last = test(interpreter, dist, requirements, source, work / interpreter.name)
            results.append(f"{interpreter.name}{'' if whole else ' without torch'}: {last}")
    return results


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dist", type=Path, help="folder with the sdist and its wheels")
    parser.add_argument(
        "--python", action="append", help="test on this Python instead of all; may be repeated"
    )
    parser.add_argument(
        "--without-torch", action="store_true", help="where PyTorch has no wheel for the platform"
    )
    arguments = parser.parse_args()
    chosen = []
    for name in arguments.python or ():
        found = Interpreter.at(shutil.which(name) or name)
        if found is None:
            parser.error(f"--python {name}: no Python that runs")
        chosen.append(found)
    try:
        dist = arguments.dist.resolve()
        results = check(dist, chosen or list(interpreters()), arguments.without_torch)
    except RefusedError as reason:
        sys.exit(f"check_wheel: {reason}")
    print("\nChecked", *sorted(path.name for path in dist.iterdir()), sep="\n  ")
    print("Tested the installed wheel on", *results, sep="\n  ")


if __name__ == "__main__":
    main()
