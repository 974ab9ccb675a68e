"""Which version of a trainer is there, and the message where its hook is not."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

from bandpo.error import MissingHookError, VersionWarning

_WARNED: set[str] = set()


def installed(distribution: str) -> str:
    """Returns the version of a distribution, or "of an unknown version", as for a checkout."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def check_version(distribution: str, first: str, last: str | None = None) -> None:
    """Warns, once in a process, unless the installed version was tested.

    Args:
        distribution: Name of the trainer's package in an index.
        first: First version that the adapter was tested with, such as "0.8".
        last: Last one, by default the first. "1.16" includes 1.16.1.
    """
    last = first if last is None else last
    found = installed(distribution)
    release = _release(found)
    low, high = _release(first), _release(last)
    if release and low <= release and release[: len(high)] <= high:
        return
    if distribution in _WARNED:
        return
    _WARNED.add(distribution)
    tested = first if last == first else f"{first} to {last}"
    warnings.warn(
        f"{distribution} is {found}; bandpo's adapter was tested with {tested}",
        VersionWarning,
        stacklevel=3,
    )


def require(distribution: str, owner: object, *names: str) -> None:
    """Raises unless a trainer still has what an adapter calls, overrides or sets.

    Args:
        distribution: Name of the trainer's package in an index.
        owner: Module, class or object of the trainer.
        *names: Attributes that it has to have.

    Raises:
        MissingHookError: If one is missing; the message has the version and what was looked for.
    """
    for name in names:
        if not hasattr(owner, name):
            raise missing_hook(distribution, f"{_name_of(owner)}.{name}")


def require_reads(distribution: str, function: Callable[..., Any], *names: str) -> None:
    """Raises unless a trainer's function still reads what an adapter sets or overrides.

    Args:
        distribution: Name of the trainer's package in an index.
        function: The function, decorated or not.
        *names: Attributes, keys or arguments that its code has to have.

    Raises:
        MissingHookError: If one is missing; the message has the version and what was looked for.
    """
    code = inspect.unwrap(function).__code__
    for name in names:
        if name not in {*code.co_names, *code.co_consts, *code.co_varnames}:
            raise missing_hook(distribution, f"{name!r} in {function.__qualname__}")


def missing_hook(distribution: str, what: str) -> MissingHookError:
    """Returns the error for a name that a trainer does not have."""
    return MissingHookError(
        f"{distribution} {installed(distribution)} has no {what}, which bandpo's adapter needs; "
        f"without it the clip would stay the trainer's own"
    )


def _name_of(owner: object) -> str:
    named = owner if hasattr(owner, "__name__") else type(owner)
    qualified = getattr(named, "__qualname__", None) or named.__name__
    return str(qualified)


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with; none if it has none."""
    start = re.match(r"\d+(?:\.\d+)*", version)
    return () if start is None else tuple(int(number) for number in start[0].split("."))
