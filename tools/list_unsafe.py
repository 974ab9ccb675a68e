"""Lists what Rust's compiler does not check: every `unsafe` with its reason, and what may panic.

python tools/list_unsafe.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

PANICS = {
    "unwrap": r"\.unwrap\(\)",
    "expect": r"\.expect\(",
    "panic": r"\b(?:panic|unreachable|todo|unimplemented|assert|assert_eq|assert_ne)!",
    "index": r"[\w)\]]\[",
}
"""What may panic, as it is written."""


class Unsafe(NamedTuple):
    """An `unsafe` block or function."""

    file: str
    line: int
    code: str
    reason: str
    """Its comment; empty for a function of a trait, whose trait has it."""


def sources() -> Iterator[tuple[str, list[str]]]:
    """Files of Rust and their lines, without tests."""
    for path in sorted((ROOT / "rust").rglob("*.rs")):
        name = path.relative_to(ROOT / "rust").as_posix()
        if "tests" not in path.with_suffix("").parts:
            text = path.read_text(encoding="utf-8")
            text = re.split(r"#\[cfg\(test\)\]\s*(?:pub(?:\(crate\))? )?mod \w+ \{", text)[0]
            yield name, text.splitlines()


def unsafe() -> list[Unsafe]:
    """Every `unsafe` of the sources."""
    found = []
    for file, lines in sources():
        for number, line in enumerate(lines):
            code = line.split("//")[0]
            # Types of functions of C are no code.
            if not re.search(r"\bunsafe (?:\{|fn |impl )", code):
                continue
            found.append(Unsafe(file, number + 1, code.strip(), _reason(lines, number)))
    return found


def _reason(lines: list[str], number: int) -> str:
    """The comment above a line, from `SAFETY` or `# Safety` on."""
    comment: list[str] = []
    for line in reversed(lines[max(0, number - 12) : number]):
        text = line.strip()
        if text.startswith("//"):
            comment.insert(0, text.lstrip("/").strip())
        elif comment or not (text.startswith("#[") or text.endswith(("(", "{", "|index|"))):
            break
    match = re.search(r"(?:SAFETY:|# Safety)\s*(.*)", " ".join(comment))
    return match[1] if match else ""


def panics() -> dict[str, dict[str, int]]:
    """What may panic, counted by file; files without any are left out."""
    found = {}
    for file, lines in sources():
        code = "\n".join(line.split("//")[0] for line in lines if not line.strip().startswith("#"))
        code = re.sub(r'r#"(.*?)"#', '""', code, flags=re.S)
        counts = {name: len(re.findall(pattern, code)) for name, pattern in PANICS.items()}
        if any(counts.values()):
            found[file] = {name: count for name, count in counts.items() if count}
    return found


def main() -> None:
    """Prints both lists."""
    for each in unsafe():
        print(f"rust/{each.file}:{each.line}: {each.reason or 'as its trait requires'}")
    for file, counts in panics().items():
        print(f"rust/{file}:", ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
