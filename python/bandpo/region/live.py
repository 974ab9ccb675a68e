"""Regions that exist, by number."""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

_Made = TypeVar("_Made", bound="Live")


class Live:
    """A region, or a source of regions, that is found by its ``id`` as long as it exists."""

    def __new__(cls: type[_Made], *_args: Any, **_named: Any) -> _Made:
        """Returns a new object, which `live` finds."""
        made = super().__new__(cls)
        _LIVE[id(made)] = made
        return made


_LIVE: weakref.WeakValueDictionary[int, Live] = weakref.WeakValueDictionary()


def live(key: int) -> Any:
    """Returns the object with this ``id``.

    Operators and compilers of torch take numbers but no Python objects.

    Raises:
        KeyError: If there is none.
    """
    return _LIVE[key]
