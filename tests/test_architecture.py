"""Holds the tables of arrows in ARCHITECTURE.md to the imports of the code.

A room is a file or a folder. Its row names the rooms that it may import, all of which stand above
it, so that there is no circle. A row that grants an import which no file uses fails as well. Lazy
imports count; those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
LANGUAGES = ("Rust", "Python")

pytestmark = pytest.mark.skipif(
    not (ROOT / "python").is_dir(), reason="needs a checkout, not an installed wheel"
)

Arrows = dict[str, set[str]]


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the table under a heading of ARCHITECTURE.md: first cell -> the other cells."""
    section = re.search(rf"^### {heading}\n(.*?)(?=^##|\Z)", DOCUMENT, re.M | re.S)
    assert section, f"ARCHITECTURE.md has no section {heading!r}"
    rows = [line.strip("|").split("|") for line in section[1].splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}


def rooms_of(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def granted(language: str) -> Arrows:
    """What each room may import, in the order of the table."""
    return {
        room: set(rooms_of(cells[-1]))
        for row, cells in table(f"Arrows of {language}").items()
        for room in rooms_of(row)
    }


def exceptions(language: str) -> Arrows:
    """Arrows that go upwards, each with its reason in the table."""
    found: Arrows = defaultdict(set)
    for row, (where, _) in table("Exceptions").items():
        if where == language:
            source, target = rooms_of(row)
            found[source].add(target)
    return found


def room_of(path: str, rooms: Arrows) -> str:
    """The longest room that a path lies in."""
    parts = path.split("/")
    for length in range(len(parts), 0, -1):
        if (room := "/".join(parts[:length])) in rooms:
            return room
    raise AssertionError(f"{path} lies in no room of ARCHITECTURE.md")


def without_tests(code: str) -> str:
    """Rust without comments, strings and the module of tests at its foot."""
    code = re.sub(r"//[^\n]*", "", code)
    code = re.sub(r'"(?:[^"\\]|\\.)*"', '""', code, flags=re.S)
    return re.split(r"#\[cfg\(test\)\]\s*(?:pub(?:\(crate\))? )?mod \w+ \{", code)[0]


def rust_arrows(rooms: Arrows) -> Arrows:
    found: Arrows = defaultdict(set)
    top = {room.split("/")[0] for room in rooms}
    for file in sorted((ROOT / "rust").rglob("*.rs")):
        path = file.relative_to(ROOT / "rust").with_suffix("")
        if path.parts == ("lib",) or "tests" in path.parts:
            continue
        parts = path.parts[:-1] if path.name == "mod" else path.parts
        source = room_of("/".join(parts), rooms)
        code = without_tests(file.read_text(encoding="utf-8"))
        for prefix, group, name in re.findall(
            r"\b(crate|(?:super::)*super)::(?:\{([^;]*?)\}\s*;|(\w+))", code
        ):
            supers = prefix.count("super")
            if 0 < supers < len(parts):
                continue  # stays inside its room
            names = re.findall(r"(?:^|,)\s*(\w+)", group) if group else [name]
            found[source] |= {name for name in names if name in top} - {source}
    return found


def modules() -> dict[str, Path]:
    """Each module of the package by its path below it, `__init__` being the folder."""
    package = ROOT / "python/bandpo"
    found = {"_core": package / "_core.pyi"}
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package).with_suffix("")
        inside = path.parent if path.name == "__init__" and path.parent.name else path
        found[inside.as_posix()] = file
    return found


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement that runs, at whatever depth."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(other)
        else:
            yield from imports(node)


def imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """Names of what a file imports: paths of our modules, or other packages with a leading dot."""
    for node in imports(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{file} imports relatively"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in full:
            if name.split(".")[0] != "bandpo":
                yield "." + name.split(".")[0]
                continue
            path = name.replace(".", "/").removeprefix("bandpo").strip("/")
            while path and path not in known:
                path = path.rpartition("/")[0]
            yield path or "__init__"


def python_arrows(rooms: Arrows) -> Arrows:
    found: Arrows = defaultdict(set)
    known = modules()
    for module, file in known.items():
        if module != "_core":
            source = room_of(module, rooms)
            ours = {name for name in imported(file, known) if not name.startswith(".")}
            found[source] |= {room_of(name, rooms) for name in ours} - {source}
    return found


def arrows(language: str) -> Arrows:
    return {"Rust": rust_arrows, "Python": python_arrows}[language](granted(language))


@pytest.mark.parametrize("language", LANGUAGES)
def test_imports_are_those_that_the_table_grants(language: str) -> None:
    allowed, upwards, used = granted(language), exceptions(language), arrows(language)
    beyond = {room: used[room] - allowed[room] - upwards[room] for room in used}
    unused = {room: (allowed[room] | upwards[room]) - used.get(room, set()) for room in allowed}
    assert {room: names for room, names in beyond.items() if names} == {}
    assert {room: names for room, names in unused.items() if names} == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_rows_grant_only_rooms_above_them(language: str) -> None:
    above: set[str] = set()
    for room, names in granted(language).items():
        assert names <= above, f"{room} may import {names - above}, which stand below it"
        above.add(room)


def test_exceptions_are_of_a_language_and_have_a_reason() -> None:
    for where, reason in table("Exceptions").values():
        assert where in LANGUAGES
        assert reason


def users_of(package: str) -> set[str]:
    """The files, as paths of modules, that import a package of others."""
    if package in ("pyo3", "std::arch"):
        code = {
            file.relative_to(ROOT / "rust").with_suffix("").as_posix(): without_tests(
                file.read_text(encoding="utf-8")
            )
            for file in (ROOT / "rust").rglob("*.rs")
        }
        return {file for file, text in code.items() if re.search(rf"\buse {package}\b", text)}
    known = modules()
    return {
        module
        for module, file in known.items()
        if module != "_core" and f".{package}" in set(imported(file, known))
    }


def lies_in(path: str, room: str) -> bool:
    return f"{path}/".startswith(f"{room}/")


@pytest.mark.parametrize(
    "row", list(table("Packages that few rooms import").items()), ids=lambda row: row[0]
)
def test_a_package_is_imported_in_its_rooms_alone(row: tuple[str, list[str]]) -> None:
    (package,), rooms = rooms_of(row[0]), rooms_of(row[1][0])
    users = users_of(package)
    assert {room for room in rooms if any(lies_in(user, room) for user in users)} == set(rooms)
    assert {user for user in users if not any(lies_in(user, room) for room in rooms)} == set()


def test_no_module_is_imported_by_a_text() -> None:
    """An arrow that is text would not be seen; a framework's adapter has none to our modules."""
    texts = {
        name: file.read_text(encoding="utf-8")
        for name, file in modules().items()
        if name != "_core"
    }
    assert {name for name, text in texts.items() if "import_module(" in text} == {
        "conform/frameworks"
    }
