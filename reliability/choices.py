"""Choices made of bytes, so that a fuzzer that knows bytes alone can steer them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Choices:
    """Reads choices off bytes; after their end each is the first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, count: int) -> int:
        """A whole number below ``count``, of as many bytes as it needs."""
        size = max(1, ((count - 1).bit_length() + 7) // 8)
        part = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(part, "little") % count

    def of(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def rest(self) -> bytes:
        """The bytes that were not read."""
        return self._data[self._at :]
