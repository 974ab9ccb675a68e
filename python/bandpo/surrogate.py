"""Surrogates: the loss of a token, given its ratio, its bounds and its advantage.

A surrogate is an object with its parameters, or a name, which stands for the defaults. Each class
carries its own data, so that nothing else compares names. `bandpo.loss.policy_loss` defines their
formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from bandpo.check import check_bool, check_name, nonnegative_number, positive_number, real_number
from bandpo.error import InvalidValueError

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus and minus this before they are exponentiated."""

PROBABILITY_EDGES = (0.0, 1e-3, 1e-2, 1e-1, 0.5, 1.0)
"""Edges of the bins of the old probability; a bin includes its lower edge, the last one both."""

MIN_WIDTH = 1e-6
"""Min width of a region for the surrogates that divide by it; as in ``rust/loss/surrogate.rs``."""


class TokenSurrogate:
    """Data of a surrogate that a loss needs."""

    name: ClassVar[str]
    gradient_carries_ratio: ClassVar[bool] = False
    """True if the gradient is ``r`` times a constant, so that its derivative is itself."""
    gradient_bends: ClassVar[bool] = False
    """True if the derivative of the gradient is neither itself nor 0."""
    needs_width: ClassVar[bool] = False
    """True if it divides by the distance from 1 to a bound, so that every token needs its bound."""
    needs_bounds: ClassVar[bool] = True
    """False if membership in the region is enough, which takes no root."""
    limited_metric: ClassVar[str | None] = None
    """Metric of the share of tokens that a limit of the surrogate acts on, if it has a limit."""

    @property
    def parameters(self) -> list[float]:
        """Its numbers, in the order in which backends take them."""
        return []

    @staticmethod
    def by_log_ratio(parameters: list[float]) -> bool:
        """Returns True if the sign of the log-ratio selects the bound, not the advantage's."""
        return False

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
        symmetric: Drop a token that has left the region on either side, whatever the sign of its
            advantage (IPO of prime-rl, IcePop as a loss, KPop).

    Raises:
        InvalidTypeError: If ``truncation`` is not a real number, or a flag not a bool.
        InvalidValueError: If ``truncation`` is not above 1, or both flags are True.
    """

    name: ClassVar = "mask"
    needs_bounds: ClassVar = False
    limited_metric: ClassVar = "truncation_fraction"
    truncation: float | None = 20.0
    whole_sequence: bool = False
    symmetric: bool = False

    def __post_init__(self) -> None:
        _check_above_1("truncation", self.truncation)
        for argument in ("whole_sequence", "symmetric"):
            check_bool(argument, getattr(self, argument))
        if self.symmetric and self.whole_sequence:
            raise InvalidValueError(
                "symmetric must be left out with whole_sequence, which drops on either side, "
                "got True for both"
            )

    @property
    def parameters(self) -> list[float]:
        """The truncation, infinite for none, and 1 if the mask is symmetric."""
        limit = math.inf if self.truncation is None else float(self.truncation)
        return [limit, float(self.symmetric)]

    @staticmethod
    def by_log_ratio(parameters: list[float]) -> bool:
        """Returns True if the mask is symmetric."""
        return parameters[1:] == [1.0]


@dataclass(frozen=True)
class Weight(TokenSurrogate):
    """The clipped ratio as a weight without gradient (CISPO, arXiv 2506.13585)."""

    name: ClassVar = "weight"

    @staticmethod
    def by_log_ratio(parameters: list[float]) -> bool:
        """Returns True."""
        return True


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
            nonnegative_number(argument, getattr(self, argument))

    @property
    def parameters(self) -> list[float]:
        """Both factors."""
        return [float(self.beta_low), float(self.beta_high)]


@dataclass(frozen=True)
class SoftGate(TokenSurrogate):
    """A smooth gate in place of a bound (SAPO, arXiv 2511.20347); the region gives its width.

    The gradient of a token is ``-A r / cosh(tau (r - 1) / (2 w))^2``. The width w is the distance
    from 1 to the bound on the side of r. With ``Clip(1.0, 1.0)``, where w is 1, this is SAPO. A
    band opens the gate wider for tokens that are rarer. The width of a table ends at the simplex,
    where a region such as `Clip` may not; ``exact=True`` has the region's own.

    Args:
        tau_positive: Sharpness for ``A > 0``, finite and above 0; SAPO takes 1.0.
        tau_negative: Sharpness for other advantages; SAPO takes 1.05.

    Raises:
        InvalidTypeError: If a sharpness is not a real number.
        InvalidValueError: If it is out of range.
    """

    name: ClassVar = "soft-gate"
    gradient_bends: ClassVar = True
    needs_width: ClassVar = True
    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        for argument in ("tau_positive", "tau_negative"):
            positive_number(argument, getattr(self, argument))

    @property
    def parameters(self) -> list[float]:
        """Both sharpnesses."""
        return [float(self.tau_positive), float(self.tau_negative)]

    @staticmethod
    def by_log_ratio(parameters: list[float]) -> bool:
        """Returns True."""
        return True


@dataclass(frozen=True)
class Quadratic(TokenSurrogate):
    """A quadratic penalty in place of a bound (SPO, arXiv 2401.16025); the region gives its width.

    The gradient of a token is ``-A r (1 - sign(A) (r - 1) / w)``: it falls to 0 at the bound on the
    side of the advantage and turns back beyond it. The width w is the distance from 1 to the bound
    on the side of r. With ``Clip(eps)`` this is SPO, with a total-variation band inside the simplex
    the rule of DRPO (arXiv 2606.09821). The width of a table ends at the simplex.
    """

    name: ClassVar = "quadratic"
    gradient_bends: ClassVar = True
    needs_width: ClassVar = True

    @staticmethod
    def by_log_ratio(parameters: list[float]) -> bool:
        """Returns True."""
        return True


@dataclass(frozen=True)
class GammaWeight(TokenSurrogate):
    """A weight without gradient that follows a gamma density (VESPO, arXiv 2602.10693).

    The gradient of a token is ``-A R^k exp(lambda (1 - R))``, where R is the ratio, moved to the
    nearest bound of the region. VESPO takes ratio_level "sequence-product" and no bound.

    Args:
        k_positive: Exponent k for ``A >= 0``, finite and at least 0.
        lambda_positive: Rate for ``A >= 0``, likewise.
        k_negative: Exponent for ``A < 0``.
        lambda_negative: Rate for ``A < 0``.

    Raises:
        InvalidTypeError: If a number is not real.
        InvalidValueError: If it is out of range.
    """

    name: ClassVar = "gamma-weight"
    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0

    def __post_init__(self) -> None:
        for argument in ("k_positive", "lambda_positive", "k_negative", "lambda_negative"):
            nonnegative_number(argument, getattr(self, argument))


SurrogateName: TypeAlias = Literal[
    "min-clip", "mask", "weight", "gradient-preserving", "soft-gate", "quadratic", "gamma-weight"
]
Surrogate: TypeAlias = (
    SurrogateName | Mask | GradientPreserving | SoftGate | Quadratic | GammaWeight
)

BY_NAME: dict[str, type[TokenSurrogate]] = {
    surrogate.name: surrogate
    for surrogate in (MinClip, Mask, Weight, GradientPreserving, SoftGate, Quadratic, GammaWeight)
}
"""Every surrogate by its name."""

NAMES = tuple(name for name in BY_NAME if name != GammaWeight.name)
"""The names that backends take, in the order of the kernels' numbers; `bandpo.loss.levels` makes a
gamma weight of "weight"."""


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
