"""`BySign`: one region for positive advantages and another for the others."""

from __future__ import annotations

from typing import NamedTuple

from bandpo.error import InvalidTypeError
from bandpo.region.base import Region


class BySign(NamedTuple):
    """A region for each sign of the advantage; made with `by_sign`.

    It is no `Region`, because its bounds depend on more than a log-probability.
    """

    positive: Region
    negative: Region


def by_sign(*, positive: Region, negative: Region) -> BySign:
    """Returns one region for tokens with ``A > 0`` and another for those with ``A <= 0``.

    min-clip, mask and gradient-preserving bound a token on the side of its advantage alone, so for
    them `sides` says the same. The other surrogates bound both sides of every token: with
    surrogate "weight", ``by_sign(positive=Clip(0.0), negative=Clip(1.0, 0.0))`` is the rule of TOPR
    (arXiv 2503.14286), and four epsilons are that of DISPO (arXiv 2602.00983).

    Args:
        positive: The region where the advantage is positive.
        negative: The region elsewhere.

    Raises:
        InvalidTypeError: If one is not a region.
    """
    for argument, region in (("positive", positive), ("negative", negative)):
        if not isinstance(region, Region):
            raise InvalidTypeError(f"{argument} must be a Region, got {type(region).__name__}")
    return BySign(positive, negative)
