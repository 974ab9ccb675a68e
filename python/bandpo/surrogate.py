"""Surrogates: what a token's loss is, given its ratio and its bounds.

``"min-clip"`` and ``"weight"`` have no parameters of their own and are named; `Mask` and
`GradientPreserving` have, and their names stand for the defaults. `bandpo.loss.policy_loss` defines
all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Literal, TypeAlias

from bandpo.error import InvalidTypeError, InvalidValueError

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus and minus this before they are exponentiated."""


@dataclass(frozen=True)
class Mask:
    """Drop tokens that have left the region on the side of their advantage (DPPO).

    DPPO: arXiv 2602.04879. The gradient of a token that is kept is ``-A min(r, truncation)``.

    Args:
        truncation: Greatest weight c of a token, above 1, or None for none. 20 is what verl takes.
        whole_sequence: Drop every token of a sequence in which any token has left the region, on
            either side (trust region masking, arXiv 2512.23075), in place of single tokens.

    Raises:
        InvalidTypeError: If ``truncation`` is not a real number, or ``whole_sequence`` not a bool.
        InvalidValueError: If ``truncation`` is not above 1.
    """

    name: ClassVar = "mask"
    truncation: float | None = 20.0
    whole_sequence: bool = False

    def __post_init__(self) -> None:
        if self.truncation is not None:
            check_number("truncation", self.truncation)
            if not self.truncation > 1.0:
                raise InvalidValueError(f"truncation must be above 1, got {self.truncation}")
        if not isinstance(self.whole_sequence, bool):
            raise InvalidTypeError(
                f"whole_sequence must be a bool, got {type(self.whole_sequence).__name__}"
            )


@dataclass(frozen=True)
class GradientPreserving:
    """Keep a bounded gradient beyond a bound, where min-clip has none (CE-GPPO, arXiv 2509.20712).

    The gradient of a token beyond its bound is ``-A beta bound``.

    Args:
        beta_low: Factor for ``A < 0`` and ``r < lower``, finite and at least 0.
        beta_high: Factor for ``A > 0`` and ``r > upper``, likewise. With 0 on both sides the
            gradient is that of min-clip.

    Raises:
        InvalidTypeError: If a factor is not a real number.
        InvalidValueError: If it is out of range.
    """

    name: ClassVar = "gradient-preserving"
    beta_low: float = 1.0
    beta_high: float = 1.0

    def __post_init__(self) -> None:
        for argument in ("beta_low", "beta_high"):
            value = getattr(self, argument)
            check_number(argument, value)
            if not 0.0 <= value < float("inf"):
                raise InvalidValueError(f"{argument} must be finite and at least 0, got {value}")


SurrogateName: TypeAlias = Literal["min-clip", "mask", "weight", "gradient-preserving"]
Surrogate: TypeAlias = SurrogateName | Mask | GradientPreserving

NAMES: tuple[str, ...] = ("min-clip", "mask", "weight", "gradient-preserving")


def check_number(argument: str, value: object) -> None:
    """Raises InvalidTypeError unless the value is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{argument} must be a real number, got {type(value).__name__}")
