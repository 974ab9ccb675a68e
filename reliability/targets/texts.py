"""Specs of regions and schedules."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from bandpo import Region
from bandpo.spec import region_or_source_from_spec, schedule_from_spec
from reliability.choices import Choices

CORPUS = Path(__file__).resolve().parents[2] / "tests" / "data" / "corpus"


@cache
def corpus(name: str) -> tuple[str, ...]:
    """Lines of a file of the corpus."""
    return tuple((CORPUS / f"{name}.txt").read_text(encoding="utf-8").splitlines())


_PIECES = ("0", "-1", "1e-320", "1e308", "1e999", "nan", "inf", "9" * 400, ".05", "\udce9", "\0")


def text_of(choices: Choices, lines: tuple[str, ...]) -> str:
    """A line with some changes."""
    text = choices.of(lines)
    for _ in range(choices.below(4)):
        place = choices.below(len(text) + 1)
        kind = choices.below(4)
        if kind == 0:
            text = text[:place] + text[place + 1 + choices.below(6) :]
        elif kind == 1:
            text = text[:place] + choices.of(lines) + text[place:]
        elif kind == 2:
            text = text[:place] + chr(choices.below(0x2FF)) + text[place:]
        else:
            text = text[:place] + choices.of(_PIECES) + text[place:]
    return text


def specs(data: bytes) -> None:
    """Specs of regions."""
    region = region_or_source_from_spec(text_of(Choices(data), corpus("specs")))
    if isinstance(region, Region):
        lower, upper = region.log_bounds([-0.5])
        assert lower[0] <= 0.0 <= upper[0]


def schedules(data: bytes) -> None:
    """Specs of schedules."""
    schedule_from_spec(text_of(Choices(data), corpus("schedules")))
