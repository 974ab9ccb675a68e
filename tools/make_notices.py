"""Writes THIRD-PARTY-LICENSES.md and bandpo.cdx.json: the crates in the extension, and notices.

A wheel holds compiled code of these crates, and their licences require their notices. A crate that
is available under Apache-2.0 is used under it; LICENSE is its text. Any other licence is copied.
The bill of materials is in CycloneDX, for programs. It has neither time nor paths, so that a build
can be repeated; a wheel holds it by PEP 770.

    python tools/make_notices.py          # writes both files
    python tools/make_notices.py --check  # exit code 1 if one would change
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTICES = ROOT / "THIRD-PARTY-LICENSES.md"
MATERIALS = ROOT / "bandpo.cdx.json"
BUILD = ("--locked", "--features", "python")
COLUMNS = "{p}\t{l}\t{r}"
HEAD = """\
# Licences of the Rust crates in a wheel

The extension `bandpo._core` contains these crates, some on one platform alone, and the Rust
standard library (MIT OR Apache-2.0). Crates that are available under Apache-2.0 are used under it;
LICENSE is its text. The licences of the others follow the table.
`python tools/make_notices.py` writes this file.

| crate | version | licence | source |
|---|---|---|---|
"""


def cargo(*arguments: str) -> str:
    """Returns the output of cargo."""
    return subprocess.run(
        ["cargo", *arguments], cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", check=True
    ).stdout


def linked_crates() -> list[tuple[str, str, str, str]]:
    """Returns name, version, licence and source of each crate, by name."""
    linked = ("--edges", "normal,no-proc-macro", "--target", "all")
    layout = ("--prefix", "none", "--no-dedupe", "--format", COLUMNS)
    lines = cargo("tree", *BUILD, *linked, *layout).splitlines()
    crates = set()
    for line in lines:
        package, licence, source = line.split("\t")
        name, version = package.split()[:2]
        if name != "bandpo":
            crates.add((name, version.removeprefix("v"), licence, source))
    return sorted(crates)


def is_apache(licence: str) -> bool:
    """True if Apache-2.0 alone is one of the choices of an SPDX expression."""
    return "Apache-2.0" in re.split(r" OR |\s*/\s*", licence)


def document() -> str:
    """Returns the content of the file."""
    crates = linked_crates()
    packages = json.loads(cargo("metadata", *BUILD, "--format-version", "1"))["packages"]
    folders = {(p["name"], p["version"]): Path(p["manifest_path"]).parent for p in packages}
    rows, texts = [], []
    for name, version, licence, source in crates:
        rows.append(f"| {name} | {version} | {licence} | {source} |\n")
        files = sorted(folders[name, version].iterdir())
        # Apache-2.0 requires NOTICE files (section 4d) beside its own text.
        wanted = r"(?i)notice" if is_apache(licence) else r"(?i)(licen[cs]e|copying|notice)"
        found = [file for file in files if re.match(wanted, file.name)]
        if not found and not is_apache(licence):
            sys.exit(f"make_notices: {name} {version} ({licence}) comes without a licence file")
        for file in found:
            text = "\n".join(line.rstrip() for line in file.read_text("utf-8").splitlines())
            texts.append(f"\n## {name}: {file.name}\n\n```text\n{text.strip()}\n```\n")
    return HEAD + "".join(rows) + "".join(texts)


def materials() -> str:
    """Returns the bill of materials, by CycloneDX 1.5."""
    lock = (ROOT / "Cargo.lock").read_text(encoding="utf-8")
    entry = re.compile(r'name = "(.+)"\nversion = "(.+)"\nsource = .+\nchecksum = "(\w+)"')
    checksums = {(name, version): digest for name, version, digest in entry.findall(lock)}
    components = [
        {
            "type": "library",
            "bom-ref": f"pkg:cargo/{name}@{version}",
            "name": name,
            "version": version,
            "hashes": [{"alg": "SHA-256", "content": checksums[name, version]}],
            # A slash between licences is an older way to write OR.
            "licenses": [{"expression": re.sub(r"\s*/\s*", " OR ", licence)}],
            "purl": f"pkg:cargo/{name}@{version}",
            "externalReferences": [{"type": "vcs", "url": source}],
        }
        for name, version, licence, source in linked_crates()
    ]
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "library", "bom-ref": "bandpo", "name": "bandpo"}},
        "components": components,
    }
    return json.dumps(content, indent=1) + "\n"


def main() -> None:
    """Parses the command line, then writes or checks the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    for path, text in ((NOTICES, document()), (MATERIALS, materials())):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is out of date: run python tools/make_notices.py")


if __name__ == "__main__":
    main()
