"""The language of region specs: any region in one line, for command lines and configurations.

>>> from bandpo.spec import region_from_spec
>>> region_from_spec("kl@0.01 | clip@0.2,0.28")
(Band('kl', 0.01) | Clip(0.2, 0.28))

=============================  =======================================================
spec                           region
=============================  =======================================================
``kl@0.05``                    ``Band("kl", 0.05)``, with any name of a `Divergence`
``alpha:0.5@0.01/0.1``         ``Band("alpha:0.5", (0.01, 0.1))``
``"u*ln(u) - u + 1"@0.01``     a band of an expression, in double or single quotes
``price:kl@0.1``               ``PriceBand("kl", 0.1)``, with the same forms as a band
``clip@0.2``                   ``Clip(0.2)``
``clip@0.2,0.28``              ``Clip(0.2, 0.28)``
``log-clip@0.4``               ``Clip.from_log_ratio(0.4)``, with one width or two
``kl3@0.05``                   ``Clip.kl3(0.05)``
``dcpo@0.16,0.2``              ``Dcpo(0.16, 0.2)``
``dapo`` or ``preset:dapo``    the region of a preset
``a | b``                      union
``a & b``                      intersection, which binds tighter
``(a).cap(10)``                ``a.cap(10)``
``(a).at_least(0.1, 0.2)``     ``a.at_least(0.1, 0.2)``, with one width or two
``sides(a, b)``                ``sides(lower=a, upper=b)``
=============================  =======================================================

The grammar is in ``rust/spec.rs``; this module gives words and methods their meaning. Spaces may
stand between all parts. A spec has up to 4 KiB, 32 nested parentheses and 64 regions.
A preset gives its region alone; `bandpo.presets.preset` has the rest of the method.

A schedule of a delta has specs as well, which `schedule_from_spec` reads:

====================================  ================================================
spec                                  schedule
====================================  ================================================
``linear(0.1, 0.02, 1000)``           ``Linear(0.1, 0.02, 1000, hold=True)``
``cosine(0.1, 0.02, 1000)``           ``Cosine(0.1, 0.02, 1000, hold=True)``
``constant(0.05)``                    ``Constant(0.05)``
``entropy(0.05, target=0.3,           ``EntropyTargeted(0.05, target=0.3, rate=0.1,
rate=0.1, min_value=0.01,             min_value=0.01, max_value=0.2)``
max_value=0.2)``
====================================  ================================================

Every number may have its name. The last number is held after the steps, because the length of a
trainer's run is often not known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeAlias

from bandpo import _core
from bandpo.check import check_text, suggestion
from bandpo.divergence import Divergence
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.presets import PRESETS, preset
from bandpo.region import Band, Clip, Combined, Dcpo, PriceBand, Region, sides
from bandpo.schedule import (
    Constant,
    Cosine,
    EntropyTargeted,
    Linear,
    RegionSource,
    Schedule,
)

_Node: TypeAlias = dict[str, Any]
"""A node of the tree that `_core.parse_spec` returns."""

_INTERVALS: dict[str, tuple[Callable[..., Region], tuple[int, ...], str]] = {
    "clip": (Clip, (1, 2), "clip@0.2 or clip@0.2,0.28"),
    "log-clip": (Clip.from_log_ratio, (1, 2), "log-clip@0.4 or log-clip@0.4,0.5"),
    "dcpo": (Dcpo, (2,), "dcpo@0.16,0.2"),
    "kl3": (Clip.kl3, (1,), "kl3@0.05"),
}
"""Constructors of regions of numbers alone, the counts that they take, and an example."""

_METHODS: dict[str, tuple[Callable[..., Region], tuple[int, ...], str]] = {
    "cap": (Region.cap, (1,), "cap(10)"),
    "at_least": (Region.at_least, (1, 2), "at_least(0.1) or at_least(0.1, 0.2)"),
}


def region_from_spec(text: str) -> Region:
    """Returns the region that a spec names, such as ``"(kl@0.05).cap(10)"``.

    Raises:
        InvalidTypeError: If ``text`` is not a string.
        InvalidValueError: If it cannot be read, with the column and the reason; or if its region
            changes with the batch, as that of the preset bapo.
    """
    return _region(_tree(text))


def region_or_source_from_spec(text: str) -> Region | RegionSource:
    """Returns the region that a spec names, or the source of a preset whose region changes.

    A source has a state, so every call makes a new one. It cannot be a part of another region.

    Raises:
        InvalidTypeError: If ``text`` is not a string.
        InvalidValueError: If it cannot be read, with the column and the reason.
    """
    return _build(_tree(text))


def _tree(text: str) -> _Node:
    if not isinstance(text, str):
        raise InvalidTypeError(f"a region's spec must be a str, got {type(text).__name__}")
    check_text("region", text)
    tree: _Node = json.loads(_core.parse_spec(text))
    return tree


def _region(node: _Node) -> Region:
    found = _build(node)
    if isinstance(found, RegionSource):
        raise InvalidValueError(
            f"{node['place']}: the region of {node['leaf']} changes with the batch; "
            "its source is the region of that preset in bandpo.presets"
        )
    return found


def _build(node: _Node) -> Region | RegionSource:
    if "leaf" in node:
        return _leaf(node)
    if "method" in node:
        of = _region(node["of"])
        return _call(_METHODS, node["method"], node, of)
    [(kind, parts)] = node.items()
    left, right = (_region(part) for part in parts)
    if kind == "sides":
        return sides(lower=left, upper=right)
    return left | right if kind == "union" else left & right


def _leaf(node: _Node) -> Region | RegionSource:
    word: str = node["leaf"]
    is_interval = word in _INTERVALS and not node["quoted"]
    is_name = word in PRESETS and not (is_interval and node["numbers"])  # dcpo is both
    if not node["quoted"] and (is_name or word.startswith("preset:")):
        return _preset(word.removeprefix("preset:"), node)
    if not is_interval:
        return _band(word, node)
    if node["separator"] == "/":
        raise _error(node, f"widths are separated by a comma: {_INTERVALS[word][2]}")
    return _call(_INTERVALS, word, node)


def _preset(name: str, node: _Node) -> Region | RegionSource:
    if node["numbers"]:
        raise _error(node, f"the preset {name} takes no numbers")
    try:
        region = preset(name).region
    except InvalidValueError as error:
        raise _error(node, error) from None
    if not isinstance(region, (Region, RegionSource)):
        raise _error(
            node,
            f"the preset {name} has no region of its own, because its rule depends on more than a "
            f"log-probability: PolicyLoss.from_preset({name!r}) takes it whole",
        )
    return region


def _band(source: str, node: _Node) -> Region:
    is_price = node["price"] or (source.startswith("price:") and not node["quoted"])
    name = "price" if is_price else "radius"
    numbers = node["numbers"]
    if not numbers and node["quoted"]:
        example = "price:" if node["price"] else ""
        raise _error(node, f'an expression needs a {name}, as in {example}"u*ln(u) - u + 1"@0.01')
    if not numbers:
        raise _error(node, _not_a_region(source))
    if node["separator"] == ",":
        plural = "prices" if is_price else "radii"
        raise _error(node, f"{plural} below and above 1 are written {source}@{'/'.join(numbers)}")
    try:
        make = Divergence.from_expression if node["quoted"] else Divergence
        pair = (float(numbers[0]), float(numbers[-1]))
        if is_price:
            return PriceBand(make(source.removeprefix("price:")), pair)
        return Band(make(source), pair)
    except InvalidValueError as error:
        raise _error(node, error) from None


def _not_a_region(word: str) -> str:
    """The reason why a word without numbers is no region."""
    names = [name.partition(":")[0] for name in _core.DIVERGENCES]
    if word.startswith("price:"):
        return f"a price is missing, as in {word}@0.1"
    if word.partition(":")[0] in names:
        return f"a divergence needs a radius, as in {word}@0.05"
    return (
        f"{word!r} is neither a preset ({', '.join(PRESETS)}) nor a region such as kl@0.05"
        f"{suggestion(word, [*PRESETS, *names, *_INTERVALS])}"
    )


def _call(
    makers: dict[str, tuple[Callable[..., Region], tuple[int, ...], str]],
    name: str,
    node: _Node,
    *arguments: Region,
) -> Region:
    """Makes a region of a node's numbers, after checking how many there are."""
    if name not in makers:
        raise _error(node, f"{name!r} is not known, only {' and '.join(makers)}")
    make, counts, example = makers[name]
    numbers = [float(number) for number in node["numbers"]]
    if len(numbers) not in counts:
        raise _error(node, f"{name} is written {example}")
    try:
        return make(*arguments, *numbers)
    except InvalidValueError as error:
        raise _error(node, error) from None


def _error(node: _Node, reason: object) -> InvalidValueError:
    return InvalidValueError(f"{node['place']}: {reason}")


_SCHEDULES: dict[str, tuple[Callable[..., Schedule], tuple[str, ...], str]] = {
    "linear": (Linear, ("start", "end", "steps"), "linear(0.1, 0.02, 1000)"),
    "cosine": (Cosine, ("start", "end", "steps"), "cosine(0.1, 0.02, 1000)"),
    "constant": (Constant, ("value",), "constant(0.05)"),
    "entropy": (
        EntropyTargeted,
        ("start", "target", "rate", "min_value", "max_value"),
        "entropy(0.05, target=0.3, rate=0.1, min_value=0.01, max_value=0.2)",
    ),
}
"""Constructors of schedules, the names of their numbers, and an example."""

_CALL = re.compile(r"\s*([a-z][a-z-]*)\s*\((.*)\)\s*", re.DOTALL)
_ARGUMENT = re.compile(
    r"\s*(?:([a-z_]+)\s*=\s*)?([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*", re.ASCII | re.IGNORECASE
)


def schedule_from_spec(text: str) -> Schedule:
    """Returns the schedule that a spec names, such as ``"linear(0.1, 0.02, 1000)"``.

    Raises:
        InvalidTypeError: If ``text`` is not a string.
        InvalidValueError: If it cannot be read, with the column and the reason, or a number is out
            of range.
    """
    if not isinstance(text, str):
        raise InvalidTypeError(f"a schedule's spec must be a str, got {type(text).__name__}")
    call = _CALL.fullmatch(text)
    if call is None or call[1] not in _SCHEDULES:
        word = re.match(r"\s*([^\s(]*)", text)
        name = "" if word is None else word[1]
        column = 1 if word is None else word.start(1) + 1
        if name in _SCHEDULES:
            raise _schedule_error(text, column, f"{name} is written {_SCHEDULES[name][2]}")
        known = ", ".join(_SCHEDULES)
        raise _schedule_error(
            text, column, f"{name!r} is no schedule ({known}){suggestion(name, _SCHEDULES)}"
        )
    make, names, example = _SCHEDULES[call[1]]
    numbers: dict[str, float] = {}
    named, column = False, call.start(2) + 1
    for place, part in enumerate(call[2].split(",")):
        argument = _ARGUMENT.fullmatch(part)
        at = column + len(part) - len(part.lstrip())
        column += len(part) + 1
        if argument is None:
            raise _schedule_error(text, at, f"{part.strip()!r} is not a number; write {example}")
        named = named or argument[1] is not None
        if argument[1] is None and (named or place >= len(names)):
            found = "a name is missing" if named else "too many numbers"
            raise _schedule_error(text, at, f"{found}; write {example}")
        name = argument[1] or names[place]
        if name not in names or name in numbers:
            found = "is given twice" if name in numbers else "is not known"
            raise _schedule_error(text, at, f"{name!r} {found}; write {example}")
        number = argument[2]
        numbers[name] = int(number) if number.lstrip("+-").isdigit() else float(number)
    if len(numbers) < len(names):
        missing = ", ".join(name for name in names if name not in numbers)
        raise _schedule_error(text, call.end(2) + 1, f"{missing} is missing; write {example}")
    try:
        return make(**numbers, **({"hold": True} if "steps" in names else {}))
    except (InvalidTypeError, InvalidValueError) as error:
        raise _schedule_error(text, call.start(1) + 1, error) from None


def _schedule_error(text: str, column: int, reason: object) -> InvalidValueError:
    return InvalidValueError(f"schedule {text!r}, column {column}: {reason}")


def spec_from_region(region: Region) -> str:
    """Returns a spec of a region, from which `region_from_spec` makes an equal one.

    >>> spec_from_region(Band("kl", 0.05).cap(10) | Clip(0.2, 0.28))
    '(kl@0.05).cap(10)|clip@0.2,0.28'

    Raises:
        InvalidTypeError: If ``region`` is not a `Region`.
        InvalidValueError: If it has no spec: one that holds a table, an array of radii, a Python
            function or an expression with given limits, or is beyond the size of a spec.
    """
    if not isinstance(region, Region):
        raise InvalidTypeError(f"region must be a Region, got {type(region).__name__}")
    text = _text(region)
    try:
        exact = region_from_spec(text) == region
    except InvalidValueError:
        exact = False
    if not exact:
        raise InvalidValueError(f"{region!r} has no spec")
    return text


def _text(region: Region) -> str:
    """The text of a region, of which the reader decides whether it means the same."""
    if isinstance(region, Band):
        pair = _pair(region.delta_low, region.delta_high, "/")
        return f"{_source(region.divergence)}@{pair}"
    if isinstance(region, PriceBand):
        pair = _pair(region.price_low, region.price_high, "/")
        return f"price:{_source(region.divergence)}@{pair}"
    if isinstance(region, Clip):
        clip = f"clip@{_pair(region.eps_low, region.eps_high, ',')}"
        log_clip = f"log-clip@{_pair(-region.log_lower, region.log_upper, ',')}"
        # The widths may make another clip than the log-ratios that it was given by, or a warning.
        is_plain = "clip" in region.describe() and not region.has_likely_ends
        return min((clip, log_clip) if is_plain else (log_clip,), key=len)
    if isinstance(region, Dcpo):
        return f"dcpo@{_digits(region.eps_low)},{_digits(region.eps_high)}"
    if not isinstance(region, Combined):
        return repr(region)
    left, right = region.parts
    if region.kind == "sides":
        return f"sides({_text(left)},{_text(right)})"
    if region.kind == "union":
        return f"{_text(left)}|{_within(right, 'union')}"
    if isinstance(right, Clip) and right.eps_low == 1.0:
        upper = 1.0 + right.eps_high
        if Clip(1.0, upper - 1.0) == right:
            return f"({_text(left)}).cap({_digits(upper)})"
    return f"{_within(left, 'union')}&{_within(right, 'union', 'intersection')}"


def _source(divergence: Divergence) -> str:
    """The name of a divergence, or its expression in quotation marks."""
    name = divergence.spec
    return name if "divergence" in divergence.describe() else f'"{name}"'


def _within(region: Region, *looser: str) -> str:
    """The text of a part, in parentheses if it is of a kind that binds no tighter."""
    text = _text(region)
    return f"({text})" if isinstance(region, Combined) and region.kind in looser else text


def _pair(low: object, high: object, separator: str) -> str:
    """Two numbers, or one if they are equal; an array is not text that can be read."""
    same = _digits(low) == _digits(high)
    return _digits(low) if same else f"{_digits(low)}{separator}{_digits(high)}"


def _digits(number: object) -> str:
    return repr(number).removesuffix(".0")


def __dir__() -> list[str]:
    return [
        "region_from_spec",
        "region_or_source_from_spec",
        "schedule_from_spec",
        "spec_from_region",
    ]
