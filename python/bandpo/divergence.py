"""f-divergences by name, from an expression or from a Python function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bandpo import _core
from bandpo.check import (
    BoolArray,
    Float64Array,
    broadcast,
    check_text,
    flat,
    float64_array,
    log_probs,
    suggestion,
)
from bandpo.error import InvalidTypeError, InvalidValueError

Delta: TypeAlias = "float | Float64Array"
"""One delta, or one for each token: float64 [n]."""

Sampler: TypeAlias = Callable[[bool, Float64Array], tuple[Float64Array, Float64Array]]
"""From (is upper, logp) to log bounds and their slopes in logp, all float64 [n]."""


class Solver(Protocol):
    """Solver of the bounds of a divergence; every array is one-dimensional, [n]."""

    @property
    def core(self) -> _core.Divergence | None:
        """The divergence that Rust and the kernels solve; None for a Python function."""

    @property
    def curvature(self) -> float | None:
        """``f''(1)``, if there is one."""

    def log_bounds(
        self, delta_low: Delta, delta_high: Delta, logp: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """Returns ``(log_lower, log_upper)``."""

    def contains(
        self, delta_low: Delta, delta_high: Delta, logp: Float64Array, log_ratio: Float64Array
    ) -> BoolArray:
        """Returns whether each log-ratio lies in the band."""

    def diagnose(
        self, delta: Delta, logp: Float64Array, upper: bool
    ) -> tuple[Float64Array, Float64Array, NDArray[np.uint8], NDArray[np.uint32]]:
        """Returns the fields of `bandpo.region.SideDiagnosis`."""

    def divergences(self, logp: Float64Array, log_ratio: Float64Array) -> Float64Array:
        """Returns D at each log-ratio."""

    def curve(
        self, delta_low: float, delta_high: float, upper: bool
    ) -> Sampler | tuple[_core.Divergence, float]:
        """Returns one side as a `bandpo.region.Curve`, from which a table is built."""


class CompiledSolver(NamedTuple):
    """Solver in Rust, for built-in divergences and expressions; see `Solver`."""

    core: _core.Divergence

    @property
    def curvature(self) -> float | None:
        """``f''(1)``, if there is one."""
        return self.core.curvature

    def log_bounds(
        self, delta_low: Delta, delta_high: Delta, logp: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """Returns ``(log_lower, log_upper)``."""
        return _core.log_bounds(self.core, delta_low, delta_high, logp)

    def contains(
        self, delta_low: Delta, delta_high: Delta, logp: Float64Array, log_ratio: Float64Array
    ) -> BoolArray:
        """Returns whether each log-ratio lies in the band."""
        return _core.contains(self.core, delta_low, delta_high, logp, log_ratio)

    def diagnose(
        self, delta: Delta, logp: Float64Array, upper: bool
    ) -> tuple[Float64Array, Float64Array, NDArray[np.uint8], NDArray[np.uint32]]:
        """Returns the fields of `bandpo.region.SideDiagnosis`."""
        return _core.diagnose(self.core, delta, logp, upper)

    def divergences(self, logp: Float64Array, log_ratio: Float64Array) -> Float64Array:
        """Returns D at each log-ratio."""
        return _core.divergences(self.core, logp, log_ratio)

    def curve(
        self, delta_low: float, delta_high: float, upper: bool
    ) -> tuple[_core.Divergence, float]:
        """Returns the divergence with the delta of the side."""
        return self.core, delta_high if upper else delta_low


class Divergence:
    """An f-divergence between the old and the new policy, ``E_old[f(new/old)]`` (Csiszár 1967).

    Built in, with their generators ``f(u)``, ``u = new/old``, as `from_expression` takes them. They
    fix the normalisation:

    ================ ===========================================
    name             f(u)
    ================ ===========================================
    kl               -ln(u) + u - 1
    reverse-kl       u*ln(u) - u + 1
    tv               abs(u-1)/2
    pearson-chi2     (u-1)^2
    neyman-chi2      (u-1)^2/u
    hellinger        (sqrt(u)-1)^2/2
    le-cam           (u-1)^2/(2*(u+1))
    jensen-shannon   (u*ln(u) - (u+1)*ln((u+1)/2))/2
    jeffreys         (u-1)*ln(u)
    bhattacharyya    as hellinger; -ln(1-D) of its value D
    alpha:a          (u^a - 1 - a*(u-1))/(a*(a-1))
    renyi:a          as alpha:a; ln(1+a*(a-1)*D)/(a-1) of its D
    vajda:k          abs(u-1)^k
    bwcs:l           (u-1)^2/(1-l+l*u)
    hockey-stick:g   max(u-g, 0)
    ================ ===========================================

    kl is KL(old || new), the paper's, and reverse-kl is KL(new || old). They are the limits of
    alpha for a = 0 and a = 1. renyi is of new || old, with the limit reverse-kl for a = 1. alpha
    takes any finite a, renyi a > 0, vajda k >= 1, bwcs 0 <= l <= 1, hockey-stick g >= 1.

    ``f(0)`` and ``f'(inf) = lim f(u)/u`` set where bounds saturate, ``f''(1)`` the width of a band
    of small delta. A delta from the max value on, ``f(0) + f'(inf)`` in the units of delta, allows
    every token everything. If a condition does not hold, the number is inf. ``f''(1)`` is none if
    f has a kink or is flat at 1:

    ================ ============= =============== ========= =====================
    name             f(0)          f'(inf)         f''(1)    max value
    ================ ============= =============== ========= =====================
    kl               inf           1               1         inf
    reverse-kl       1             inf             1         inf
    tv               1/2           1/2             none      1
    pearson-chi2     1             inf             2         inf
    neyman-chi2      inf           1               2         inf
    hellinger        1/2           1/2             1/4       1
    le-cam           1/2           1/2             1/2       1
    jensen-shannon   ln(2)/2       ln(2)/2         1/4       ln(2)
    jeffreys         inf           inf             2         inf
    bhattacharyya    1/2           1/2             1/4       inf
    alpha:a          1/a if a>0    1/(1-a) if a<1  1         1/(a*(1-a)) if 0<a<1
    renyi:a          1/a           1/(1-a) if a<1  a         inf
    vajda:k          1             1 if k==1       2 if k==2 2 if k==1
    bwcs:l           1/(1-l)       1/l             2         1/(l*(1-l))
    hockey-stick:g   0             1               none      1
    ================ ============= =============== ========= =====================

    bhattacharyya and renyi have the f(0) and f'(inf) of hellinger and alpha.

    Args:
        spec: A name of the table, with its parameter after a colon where it has one.

    Raises:
        InvalidTypeError: If ``spec`` is not a string.
        InvalidValueError: If the name is not known (the message lists those that are) or the
            parameter is missing or out of range.
    """

    __slots__ = ("_key", "_solver")

    _solver: Solver
    _key: tuple[object, ...]

    def __init__(self, spec: str) -> None:
        if not isinstance(spec, str):
            raise InvalidTypeError(f"divergence must be a name (str), got {type(spec).__name__}")
        check_text("divergence", spec)
        try:
            self._solver = CompiledSolver(_core.Divergence(spec))
        except InvalidValueError as error:
            names = [known.partition(":")[0] for known in _core.DIVERGENCES]
            raise InvalidValueError(f"{error}{suggestion(spec.partition(':')[0], names)}") from None
        self._key = ("name", spec)

    @classmethod
    def from_expression(
        cls,
        text: str,
        *,
        at_zero: float | None = None,
        slope_at_infinity: float | None = None,
    ) -> Divergence:
        """Returns the divergence of a convex function of ``u``, given as text.

        The text is parsed and evaluated in Rust, never by Python.

        >>> Divergence.from_expression("u*ln(u) - u + 1")
        Divergence.from_expression('u*ln(u) - u + 1')

        Args:
            text: ``u``, numbers, ``+ - * / ^`` (or ``**``), parentheses, and the functions ln
                (log), exp, sqrt, abs, min, max, sin, cos. Any multiple of ``u - 1`` may be added.
                Convexity is judged by slope and f'', at 1100 points on each side of 1, for
                ``abs(ln u) <= 700``, and beside each kink and pole of the text. Beyond them, to
                ``abs(ln u) = 1e10``, f'' is judged at 60 points. A smooth dent that lies between
                two points is not detected. The work of a judgement is limited to about 0.1 s, which
                some thirty terms or ten kinks take.
            at_zero: The limit f(0), where it cannot be derived (the error then names it).
            slope_at_infinity: The limit f'(inf), likewise.

        Raises:
            InvalidTypeError: If ``text`` is not a string or a limit not a real number.
            InvalidValueError: If the text cannot be read (with the column), or the function is not
                convex, not finite on (0, inf) or not 0 at 1 (with where and by how much).
        """
        if not isinstance(text, str):
            raise InvalidTypeError(f"text must be an expression (str), got {type(text).__name__}")
        check_text("expression", text)
        from bandpo.generator import checked_limit  # half of the package, and few need it

        at_zero = checked_limit("at_zero", at_zero)
        slope_at_infinity = checked_limit("slope_at_infinity", slope_at_infinity)
        divergence = cls.__new__(cls)
        divergence._solver = CompiledSolver(
            _core.Divergence.from_expression(text, at_zero, slope_at_infinity)
        )
        divergence._key = ("expression", text, at_zero, slope_at_infinity)
        return divergence

    @classmethod
    def from_callable(
        cls,
        fn: Callable[[NDArray[np.float64]], NDArray[np.float64]],
        *,
        at_zero: float | None = None,
        slope_at_infinity: float | None = None,
    ) -> Divergence:
        """Returns the divergence of a convex Python function over arrays.

        The function is called with whole numpy arrays. In double precision it cancels near
        ``u = 1``: bounds agree with exact ones to about 1e-10 for delta >= 1e-5, and ``log_lower``
        is a limit where the ratio is not a normal float64. Prefer `from_expression` where a
        function can be written as text.

        Args:
            fn: Takes a float64 array of ``u > 0`` and returns ``f(u)``, of the same shape.
            at_zero: The limit f(0), where it cannot be derived (the error then names it).
            slope_at_infinity: The limit f'(inf), likewise.

        Raises:
            InvalidTypeError: If ``fn`` cannot be called or does not return real numbers, or a limit
                is not one.
            InvalidValueError: If it raises, returns another shape or NaN, or the function is not
                convex, not finite on (0, inf) or not 0 at 1 (with where and by how much).
        """
        from bandpo.generator import CallableGenerator

        divergence = cls.__new__(cls)
        divergence._solver = CallableGenerator(
            fn, at_zero=at_zero, slope_at_infinity=slope_at_infinity
        )
        divergence._key = ("callable", fn, at_zero, slope_at_infinity)
        return divergence

    @property
    def spec(self) -> str:
        """The name or expression it was made from, or the name of its function."""
        source = self._key[1]
        return source if isinstance(source, str) else getattr(source, "__qualname__", repr(source))

    @property
    def solver(self) -> Solver:
        """Solver of its bounds; see `Solver`."""
        return self._solver

    @property
    def curvature(self) -> float | None:
        """``f''(1)``; None where f has a kink or is flat at 1."""
        return self._solver.curvature

    def between(self, logp: ArrayLike, log_ratio: ArrayLike) -> Float64Array:
        """Returns ``D_f(p, r)`` of the split {this token, everything else}, in double precision.

        Args:
            logp: Old log-probabilities, of any shape.
            log_ratio: Log-ratios new/old, which broadcast with ``logp``.

        Returns:
            The divergences, float64 in the common shape; inf outside the simplex.

        Raises:
            InvalidTypeError: If an argument does not hold real numbers.
            InvalidValueError: If the arguments do not broadcast.
        """
        tokens, ratios = broadcast(
            logp=log_probs("logp", logp), log_ratio=float64_array("log_ratio", log_ratio)
        )
        return self.solver.divergences(flat(tokens), flat(ratios)).reshape(tokens.shape)

    def describe(self) -> dict[str, object]:
        """Returns a description, for JSON, from which `from_description` makes the same."""
        kind, *values = self._key
        if kind == "name":
            return {"divergence": self.spec}
        _, at_zero, slope_at_infinity = values
        return {
            str(kind): self.spec,
            "at_zero": None if at_zero is None else str(at_zero),
            "slope_at_infinity": None if slope_at_infinity is None else str(slope_at_infinity),
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Divergence:
        """Returns the divergence of a description that `describe` returned.

        Raises:
            InvalidValueError: If it was made from a Python function, which no description holds.
        """
        if "divergence" in description:
            return cls(description["divergence"])
        if "callable" in description:
            raise InvalidValueError(
                f"region was made from the Python function {description['callable']}: "
                "pass it as region="
            )
        limits = {
            name: None if description[name] is None else float(description[name])
            for name in ("at_zero", "slope_at_infinity")
        }
        return cls.from_expression(description["expression"], **limits)

    def __repr__(self) -> str:
        kind, source, *limits = self._key
        if kind == "name":
            return f"Divergence({source!r})"
        given = zip(("at_zero", "slope_at_infinity"), limits, strict=True)
        rest = "".join(f", {name}={value}" for name, value in given if value is not None)
        shown = repr(source) if kind == "expression" else self.spec
        return f"Divergence.from_{kind}({shown}{rest})"

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Divergence) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _restore, self._key


def _restore(
    kind: str,
    source: Any,
    at_zero: float | None = None,
    slope_at_infinity: float | None = None,
) -> Divergence:
    if kind == "name":
        return Divergence(source)
    make = Divergence.from_expression if kind == "expression" else Divergence.from_callable
    return make(source, at_zero=at_zero, slope_at_infinity=slope_at_infinity)


def __dir__() -> list[str]:
    return ["CompiledSolver", "Divergence", "Sampler", "Solver"]
