"""The command line: exit codes, and errors of one line."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

from bandpo.cli.parser import parse
from bandpo.error import BandpoError

BAD_INPUT = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 is success, 1 a failed check (a verified table beyond its target, a problem found by ``doctor
    --check``, a backend that ``conform`` finds to disagree), 2 bad input, 130 an interruption.
    Errors and warnings are one line each on standard error.
    """
    if arguments is None and isinstance(sys.stdout, io.TextIOWrapper):
        # A path may have bytes that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        parsed = parse(sys.argv[1:] if arguments is None else arguments)
        command: Callable[[argparse.Namespace], int] = parsed.command
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            code = command(parsed)
        if sys.stdout is None:  # it was closed before the start, and the result is lost
            _report("error: cannot write standard output: it is closed")
            return BAD_INPUT
        sys.stdout.flush()
        return code
    except BandpoError as error:
        _report(f"error: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        _report("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone, which is no error
        _discard_output()
        return 0
    except OSError as error:
        _discard_output()
        place = error.filename or "standard output"
        _report(f"error: cannot write {place}: {error.strerror}")
        return BAD_INPUT


def _discard_output() -> None:
    """Sends the rest of the output nowhere; otherwise Python fails once more at its end."""
    with suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    _report(f"warning: {message}")


def _report(text: str) -> None:
    if sys.stderr is not None:  # otherwise print would take standard output
        print(f"bandpo: {text}", file=sys.stderr)
