"""Errors of bandpo: one root, each also the builtin that a caller expects."""

import inspect
from types import FrameType


class BandpoError(Exception):
    """Root of all errors raised by bandpo."""


class InvalidValueError(BandpoError, ValueError):
    """An argument of the right type has a value that is not allowed; the message names it."""


class UnknownNameError(InvalidValueError, KeyError):
    """A mapping has no entry of that name; the message lists those it has."""

    __str__ = Exception.__str__  # KeyError would put the message in quotes


class InvalidTypeError(BandpoError, TypeError):
    """An argument has a type or dtype that is not accepted; the message lists those that are."""


class TableFileError(BandpoError, ValueError):
    """A table file is truncated, altered, foreign or newer than this version; nothing was read."""


class TokenFileError(BandpoError, ValueError):
    """A file of logged tokens is damaged or lacks a column; the message names the place."""


class InputPathError(BandpoError, OSError):
    """A file could not be read; the message gives the reason."""


class OutputPathError(BandpoError, OSError):
    """A file could not be written; nothing half-written was left behind."""


class MissingExtraError(BandpoError, ImportError):
    """An optional dependency is missing; the message names the extra that brings it."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"{module} is not installed; run: pip install '.[{extra}]' in a checkout of bandpo, "
            "which is not on PyPI yet"
        )
        self.module = module
        self.extra = extra


class BrokenExtraError(BandpoError, ImportError):
    """An optional dependency is installed but cannot be imported; the message gives the reason."""


class KernelError(BandpoError, RuntimeError):
    """The CUDA driver or its compiler refused a kernel; the message has its code and reason."""


class MissingHookError(BandpoError, ImportError):
    """A trainer lacks the name that an adapter needs; the message has its version and the name."""


class BackendWarning(UserWarning):
    """The fastest backend of a device cannot run; the message gives the reason and the fallback."""


class MismatchWarning(UserWarning):
    """Two policies' log-probabilities of the same tokens are far apart; the message has causes."""


class ClipWarning(UserWarning):
    """The widths of a clip are likely meant as its ends; the message names `Clip.between`."""


class LogProbWarning(UserWarning):
    """Log-probabilities are above 0 by more than rounding; the message has the likely mistakes."""


class StepWarning(UserWarning):
    """A region that changes between steps serves many losses and was never stepped."""


class RecordWarning(UserWarning):
    """A recorder lost tokens of a run, which goes on; the message gives the reason."""


class ResumeWarning(UserWarning):
    """A schedule goes on from the steps that an optimiser took in an earlier process."""


class VersionWarning(UserWarning):
    """A trainer's version is not one that its adapter was tested with; the message has both."""


def caller_level() -> int:
    """Returns the ``stacklevel`` of the first frame outside of this package and of torch.

    No constant, because a loss may be called as a module, which adds frames of torch.
    """
    frame, level = inspect.currentframe(), 0
    while frame is not None and _package_of(frame) in ("bandpo", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).split(".")[0]


def __dir__() -> list[str]:
    return [name for name in globals() if name.endswith(("Error", "Warning"))]
