"""f-divergences, by name."""

from __future__ import annotations

from bandpo import _core
from bandpo.error import InvalidTypeError


class Divergence:
    """An f-divergence between the old and the new policy, ``E_old[f(new/old)]`` (Csiszár 1967).

    Built in, with the normalisation of their generator ``f(u)``, ``u = new/old``, and the greatest
    value ``f(0) + f'(inf)``:

    ================ ============================================ =================
    name             f(u)                                         greatest value
    ================ ============================================ =================
    kl               -ln u + u - 1; KL(old || new), the paper's   inf
    reverse-kl       u ln u - u + 1; KL(new || old)               inf
    tv               abs(u-1)/2                                   1
    pearson-chi2     (u-1)^2                                      inf
    neyman-chi2      (u-1)^2/u                                    inf
    hellinger        (sqrt u - 1)^2/2                             1
    le-cam           (u-1)^2/(2(u+1))                             1
    jensen-shannon   [u ln u - (u+1) ln((u+1)/2)]/2               ln 2
    jeffreys         (u-1) ln u                                   inf
    bhattacharyya    -ln(1 - hellinger)                           inf
    alpha:a          (u^a - 1 - a(u-1))/(a(a-1)), any finite a    1/(a(1-a)) if 0<a<1
    renyi:a          ln(1 + a(a-1) alpha:a)/(a-1), a > 0          inf
    vajda:k          abs(u-1)^k, k >= 1                           2 if k = 1, else inf
    bwcs:l           (u-1)^2/(1-l+l u), 0 <= l <= 1               1/(l(1-l))
    hockey-stick:g   max(u-g, 0), g >= 1                          1
    ================ ============================================ =================

    The limits of alpha are kl (a = 0) and reverse-kl (a = 1); renyi is of new || old.

    Args:
        spec: A name of the table, with its parameter after a colon where it has one.

    Raises:
        InvalidTypeError: If ``spec`` is not a string.
        InvalidValueError: If the name is not known (the message lists those that are) or the
            parameter is missing or out of range.
    """

    __slots__ = ("_core",)

    _core: _core.Divergence

    def __init__(self, spec: str) -> None:
        if not isinstance(spec, str):
            raise InvalidTypeError(f"divergence must be a name (str), got {type(spec).__name__}")
        self._core = _core.Divergence(spec)

    @property
    def spec(self) -> str:
        """The name it was made from, such as ``"kl"`` or ``"alpha:0.5"``."""
        return self._core.spec

    def __repr__(self) -> str:
        return f"Divergence({self.spec!r})"

    def __eq__(self, other: object) -> bool:
        return self.spec == other.spec if isinstance(other, Divergence) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.spec)

    def __reduce__(self) -> tuple[type[Divergence], tuple[str]]:
        return Divergence, (self.spec,)
