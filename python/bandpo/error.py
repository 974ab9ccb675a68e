"""Every error that bandpo raises on purpose: one root, each also the builtin a caller expects."""


class BandpoError(Exception):
    """Root of all errors raised by bandpo."""


class InvalidValueError(BandpoError, ValueError):
    """An argument has the right type but a value that is not allowed; the message says which."""


class InvalidTypeError(BandpoError, TypeError):
    """An argument has a type or dtype that is not accepted; the message lists those that are."""


class TableFileError(BandpoError, ValueError):
    """A table file is truncated, altered, foreign or newer than this version; nothing was read."""


class InputPathError(BandpoError, OSError):
    """A file could not be read; the message says why."""


class OutputPathError(BandpoError, OSError):
    """A file could not be written; nothing half-written was left behind."""


class MissingExtraError(BandpoError, ImportError):
    """An optional dependency is missing; the message names the extra that brings it."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; run: pip install 'bandpo[{extra}]'")
        self.module = module
        self.extra = extra


class BrokenExtraError(BandpoError, ImportError):
    """An optional dependency is installed but cannot be imported; the message says why."""


class BackendWarning(UserWarning):
    """The fastest backend for a device cannot run; the message says why and which one does."""


def __dir__() -> list[str]:
    return [name for name in globals() if name.endswith(("Error", "Warning"))]
