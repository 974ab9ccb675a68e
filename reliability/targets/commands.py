"""Lines of the command line."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys

from bandpo.cli import main as command_line
from reliability.choices import Choices
from reliability.targets.files import TABLE, damaged, folder
from reliability.targets.texts import corpus, text_of


def commands(data: bytes) -> None:
    """Arguments of the command line, whose files are damaged tables."""
    choices = Choices(data)
    line = text_of(choices, corpus("commands"))
    path = folder() / "table.safetensors"
    path.write_bytes(damaged(choices, TABLE))
    line = line.replace("FILE", str(path)).replace("FOLDER", str(folder()))
    try:
        words = shlex.split(line)
    except ValueError:
        words = line.split()
    if {"demo", "conform", "doctor"} & set(words[:1]):  # seconds each
        words.append("--unknown")
    if len(words) > 1 and words[0] == "plot" and "--json" not in words:
        words.append("--json")
    if "--exhaustive" in words or any(len(word) > 300 for word in words):
        return
    silent = io.StringIO("0.5 0.25\n")
    out, sys.stdin = io.StringIO(), silent
    before = os.getcwd()
    os.chdir(folder())  # where a picture without a path would go
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = command_line(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 2
    finally:
        sys.stdin = sys.__stdin__
        os.chdir(before)
    assert code in (0, 1, 2), code
    assert "Traceback" not in out.getvalue()
