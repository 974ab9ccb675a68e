"""Surrogates: the loss of a token, given its ratio, its bounds and its advantage.

A surrogate is an object with its parameters, or a name, which stands for the defaults. Each class
carries its own data, so that nothing else compares names. `bandpo.loss.policy_loss` defines their
formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from bandpo.check import check_name, real_number
from bandpo.error import InvalidTypeError, InvalidValueError

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus and minus this before they are exponentiated."""


class TokenSurrogate:
    """Data of a surrogate that a loss needs."""

    name: ClassVar[str]
    gradient_carries_ratio: ClassVar[bool] = False
    """True if the gradient is ``r`` times a constant, so that its derivative is itself."""
    needs_bounds: ClassVar[bool] = True
    """False if membership in the region is enough, which takes no root."""
    limited_metric: ClassVar[str | None] = None
    """Metric of the share of tokens that a limit of the surrogate acts on, if it has a limit."""

    @property
    def parameters(self) -> list[float]:
        """Its numbers, in the order in which backends take them."""
        return []

    @property
    def whole_sequence(self) -> bool:
        """True if one token decides for its sequence."""
        return False


@dataclass(frozen=True)
class MinClip(TokenSurrogate):
    """The min of the unclipped and the clipped gain (PPO, arXiv 1707.06347, Eq. 7).

    Args:
        dual_clip: Max ratio where ``A < 0``, above 1, or None (arXiv 1912.09729, Eq. 5).

    Raises:
        InvalidTypeError: If ``dual_clip`` is not a real number.
        InvalidValueError: If it is not above 1.
    """

    name: ClassVar = "min-clip"
    gradient_carries_ratio: ClassVar = True
    limited_metric: ClassVar = "dual_clip_fraction"
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        _check_above_1("dual_clip", self.dual_clip)

    @property
    def parameters(self) -> list[float]:
        """The dual clip, if there is one."""
        return _optional(self.dual_clip)


@dataclass(frozen=True)
class Mask(TokenSurrogate):
    """Drop tokens that have left the region on the side of their advantage (DPPO).

    DPPO: arXiv 2602.04879. The gradient of a token that is kept is ``-A min(r, truncation)``.

    Args:
        truncation: Max weight c of a token, above 1, or None. The default, 20, is the fallback of
            verl's loss; verl's shipped configuration sets 3.
        whole_sequence: Drop every token of a sequence in which any token has left the region, on
            either side (trust region masking, arXiv 2512.23075), in place of single tokens.

    Raises:
        InvalidTypeError: If ``truncation`` is not a real number, or ``whole_sequence`` not a bool.
        InvalidValueError: If ``truncation`` is not above 1.
    """

    name: ClassVar = "mask"
    needs_bounds: ClassVar = False
    limited_metric: ClassVar = "truncation_fraction"
    truncation: float | None = 20.0
    whole_sequence: bool = False

    def __post_init__(self) -> None:
        _check_above_1("truncation", self.truncation)
        if not isinstance(self.whole_sequence, bool):
            raise InvalidTypeError(
                f"whole_sequence must be a bool, got {type(self.whole_sequence).__name__}"
            )

    @property
    def parameters(self) -> list[float]:
        """The truncation, if there is one."""
        return _optional(self.truncation)


@dataclass(frozen=True)
class Weight(TokenSurrogate):
    """The clipped ratio as a weight without gradient (CISPO, arXiv 2506.13585)."""

    name: ClassVar = "weight"


@dataclass(frozen=True)
class GradientPreserving(TokenSurrogate):
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
    gradient_carries_ratio: ClassVar = True
    beta_low: float = 1.0
    beta_high: float = 1.0

    def __post_init__(self) -> None:
        for argument in ("beta_low", "beta_high"):
            value = getattr(self, argument)
            if not 0.0 <= real_number(argument, value) < math.inf:
                raise InvalidValueError(f"{argument} must be finite and at least 0, got {value}")

    @property
    def parameters(self) -> list[float]:
        """Both factors."""
        return [float(self.beta_low), float(self.beta_high)]


SurrogateName: TypeAlias = Literal["min-clip", "mask", "weight", "gradient-preserving"]
Surrogate: TypeAlias = SurrogateName | Mask | GradientPreserving

BY_NAME: dict[str, type[TokenSurrogate]] = {
    surrogate.name: surrogate for surrogate in (MinClip, Mask, Weight, GradientPreserving)
}
"""Every surrogate by its name, which backends take."""

NAMES = tuple(BY_NAME)
"""The names, in the order of the kernels' numbers."""


def resolve(surrogate: Surrogate, dual_clip: float | None) -> TokenSurrogate:
    """Returns a surrogate with its parameters, from the arguments of `bandpo.loss.policy_loss`.

    Raises:
        InvalidTypeError: If ``dual_clip`` is not a real number.
        InvalidValueError: If the name is not known, or ``dual_clip`` is out of range or is given
            with a surrogate that has none.
    """
    found: TokenSurrogate
    if isinstance(surrogate, TokenSurrogate):
        found = surrogate
    else:
        check_name("surrogate", surrogate, BY_NAME)
        found = _DEFAULTS[surrogate]
    if dual_clip is None:
        return found
    limited = MinClip(dual_clip)
    if not isinstance(found, MinClip):
        raise InvalidValueError(
            f"dual_clip must be left out with surrogate {found.name!r}, got {dual_clip}; "
            f"it limits 'min-clip'"
        )
    return limited


def _check_above_1(argument: str, value: float | None) -> None:
    if value is not None and not real_number(argument, value) > 1.0:
        raise InvalidValueError(f"{argument} must be above 1, got {value}")


def _optional(value: float | None) -> list[float]:
    return [] if value is None else [float(value)]


_DEFAULTS: dict[str, TokenSurrogate] = {name: surrogate() for name, surrogate in BY_NAME.items()}
"""Made once, so that a loss makes none at every call and a compiled graph none at all."""
