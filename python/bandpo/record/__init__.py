"""Logged tokens of a training run, and their files."""

from bandpo.record.read import read_tokens
from bandpo.record.tokens import LoggedTokens

__all__ = ["LoggedTokens", "read_tokens"]


def __dir__() -> list[str]:
    return __all__
