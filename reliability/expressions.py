"""Texts that are as long, as deep or as full of kinks as they may be, each in a process of its own.

python -m reliability.expressions
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from reliability.result import Row, write

MAX_SECONDS = 0.1
MAX_BYTES = 64 * 2**20
LONGEST = 4096
"""Bytes of a text; the grammar allows 1024 characters."""


def filled(unit: str, start: str = "(u-1)^2", separator: str = "+", size: int = 1024) -> str:
    """A text of a repeated unit."""
    return start + (separator + unit) * ((size - len(start)) // (len(unit) + len(separator)))


def nested(before: str, inner: str, after: str, depth: int) -> str:
    """A text inside so many others."""
    return before * depth + inner + after * depth


TEXTS = {
    "squares": filled("(u-1)^2"),
    "kinks": filled("abs(u-1)"),
    "sums at the limit of work": filled("u-1", size=196),
    "kinks at the limit of work": filled("abs(u-1)", size=376),
    "products at the limit of work": filled("u*u-u", size=158),
    "quotients at the limit of work": filled("1/u-1", size=86),
    "kinks at many places": "(u-1)^2" + "".join(f"+abs(u-{k}.5)" for k in range(90)),
    "maxima": filled("max(u-1,0)"),
    "logarithms": filled("-ln(u)+u-1", "0"),
    "roots": filled("(1-sqrt(u))"),
    "powers": filled("u^1.5-1"),
    "whole powers": filled("u^999999-1"),
    "oscillations": filled("0*sin(9e9*u)"),
    "kinks of oscillations": filled("0*abs(sin(99*u))"),
    "quotients of oscillations": filled("0/sin(u*1e3)"),
    "maxima of oscillations": filled("0*max(sin(9e9*u),cos(7e9*u))"),
    "few kinks of an oscillation": "(u-1)^2+0*abs(sin(9e9*u))+0*abs(sin(8e9*u))",
    "nested kinks": "(u-1)^2+" + nested("abs(-1+u*", "0", ")", 60),
    "nested parentheses": nested("(", "u*ln(u)-u+1", ")", 64),
    "too deep": nested("(", "u", ")", 2000),
    "nested functions": nested("exp(ln(", "u", "))", 30) + "-u",
    "towers": "(u-1)^2+0*" + "^".join(["u"] * 500),
    "signs": "-" * 1000 + "ln(u)",
    "signs beyond the limit": "-" * 4000 + "ln(u)",
    "digits": "0" * 1000 + "*u+(u-1)^2",
    "characters of four bytes": "\U0001f600" * 1024,
    "open parentheses": "(" * 4096,
    "unary towers": "u" + "^-u" * 300,
    "an unfinished call": filled("max(u,", ""),
}
"""Texts by what they are full of."""

JUDGE = """
import json, resource, sys, time
from bandpo import Divergence
from bandpo.error import InvalidValueError
Divergence.from_expression("u*ln(u)-u+1")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
text = sys.stdin.read()
seconds = []
for _ in range(3):
    start = time.process_time()
    try:
        Divergence.from_expression(text)
        found = "accepted"
    except InvalidValueError as error:
        found = str(error).rpartition(": ")[2]
    seconds.append(time.process_time() - start)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([min(seconds), grown * 1024, found]))
"""


def judged(text: str) -> tuple[float, int, str]:
    """Seconds of the processor, bytes and verdict of a text."""
    done = subprocess.run(
        [sys.executable, "-c", JUDGE], input=text, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seconds, size, found = json.loads(done.stdout)
    return seconds, size, found


def main() -> None:
    """Judges all texts and writes the longest time and the largest memory."""
    found = {name: judged(text) for name, text in TEXTS.items()}
    for name, (seconds, size, verdict) in found.items():
        print(f"{name}: {1e3 * seconds:.1f} ms, {size / 2**20:.1f} MiB, {verdict}")
    slowest = max(found, key=lambda name: found[name][0])
    seconds, size = found[slowest][0], max(each[1] for each in found.values())
    assert seconds < MAX_SECONDS, f"{slowest}: {seconds} s"
    assert size < MAX_BYTES, size
    counts = {
        f"ms of a processor ({slowest})": 1e3 * seconds,
        "MiB": size / 2**20,
    }
    row = Row(f"texts of up to {LONGEST} bytes, of one kind each", len(found), counts)
    write("expressions", "python -m reliability.expressions", [row])


if __name__ == "__main__":
    main()
