"""Tokens of a training run: a recorder that samples them, and a reader of files that hold some."""

from bandpo.record.read import read_tokens
from bandpo.record.recorder import Recorder
from bandpo.record.tokens import LoggedTokens

__all__ = ["LoggedTokens", "Recorder", "read_tokens"]


def __dir__() -> list[str]:
    return __all__
