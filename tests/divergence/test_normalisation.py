"""The two tables of `bandpo.Divergence`, against the solver."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from bandpo import Band, Divergence
from bandpo._core import DIVERGENCES

SAME = 1e-13
"""Relative tolerance of two evaluations of one formula in double precision."""

EXPRESSION = 1e-10
"""Relative tolerance of the bounds of an expression, for delta >= 1e-5."""

# In the middle and at both sides of every condition of the table, beside those of `DIVERGENCES`.
PARAMETERS = {
    "alpha:a": [-3.0, -0.5, 0.25, 1.5, 4.0],
    "renyi:a": [0.5, 0.75, 3.5],
    "vajda:k": [1.0, 2.0, 3.0],
    "bwcs:l": [0.0, 0.25, 0.5, 1.0],
    "hockey-stick:g": [1.0, 1.25, 4.0],
}


def rows(heading: str) -> dict[str, list[str]]:
    """The rows below a heading of the docstring, by name."""
    # Python 3.13 takes the indentation out of a docstring, those before leave it in.
    document = inspect.cleandoc(Divergence.__doc__ or "")
    text = re.search(rf"\nname +{re.escape(heading)}.*?\n=+.*?\n(.*?)\n=+ ", document, re.DOTALL)
    assert text is not None, heading
    cells = (re.split(r" {2,}|(?<=k==\d) ", line.strip()) for line in text[1].split("\n"))
    return {name: values for name, *values in cells}


FORMULAS, NUMBERS = rows("f(u)"), rows("f(0)")
EXAMPLES = dict(spec.split(":") for spec in DIVERGENCES if ":" in spec)


def parameters(name: str) -> Sequence[float | None]:
    """Parameters to test a name of the tables with."""
    family, _, letter = name.partition(":")
    return [float(EXAMPLES[family]), *PARAMETERS.get(name, [])] if letter else [None]


CASES = [(name, value) for name in FORMULAS for value in parameters(name)]


def spec_of(name: str, value: float | None) -> str:
    return name if value is None else f"{name.split(':')[0]}:{value!r}"


def formula_of(name: str, value: float | None) -> tuple[str, str]:
    """The generator as an expression in u, and the quantity that delta bounds, in terms of D."""
    formula, _, units = FORMULAS[name][0].partition("; ")
    if formula.startswith("as "):
        formula = FORMULAS[formula.removeprefix("as ")][0]
    units = re.sub(r" of its.*", "", units) or "D"
    if value is not None:
        letter = re.compile(rf"\b{name[-1]}\b")
        formula, units = (letter.sub(f"({value!r})", text) for text in (formula, units))
    return formula, units


def evaluate(text: str, **names: float) -> float:
    """The value of a formula of our own docstring; it may be inf."""
    known = {name: np.float64(value) for name, value in names.items()}
    with np.errstate(divide="ignore"):
        return float(
            eval(text.replace("^", "**"), {"ln": np.log, "sqrt": np.sqrt, "inf": np.inf}, known)  # noqa: S307
        )


def of_table(name: str, value: float | None) -> tuple[Callable[[float], float], ...]:
    """The generator, and the change of units of D."""
    formula, units = formula_of(name, value)
    return (lambda u: evaluate(formula, u=u)), (lambda d: evaluate(units, D=d))


def number(cell: str, name: str, value: float | None) -> float:
    """A cell of the table, inf where its condition fails."""
    return evaluate(f"{cell} else inf" if " if " in cell else cell, **{name[-1]: value or 0.0})


def divergence_at(spec: str, p: float, r: float) -> float:
    logp, log_ratio = (np.log(np.array([x])) if x > 0 else np.array([-np.inf]) for x in (p, r))
    return float(Divergence(spec).between(logp, log_ratio)[0])


def test_both_tables_name_every_divergence() -> None:
    with pytest.raises(ValueError, match="known are") as known:
        Divergence("nothing")
    names = re.findall(r"[a-z][a-z0-9-]*(?::[a-z])?", str(known.value).split("known are:")[1])
    assert set(FORMULAS) == set(NUMBERS) == set(names)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_the_generator_is_the_one_of_the_table(name: str, value: float | None) -> None:
    spec, (f, own) = spec_of(name, value), of_table(name, value)
    for p in (1e-3, 0.3, 0.9):
        for r in (0.1, 0.9, 1.05, 0.5 / p):
            expected = own(p * f(r) + (1 - p) * f((1 - r * p) / (1 - p)))
            # The formula loses 1e-16 of 1 or of the max term.
            slack = SAME * (1 + p * abs(f(r)))
            assert divergence_at(spec, p, r) == pytest.approx(expected, rel=SAME, abs=slack), (p, r)
    formula, units = formula_of(name, value)
    if units != "D":
        return  # a delta in other units
    logp, expression = np.log([1e-6, 0.1, 0.6, 0.99]), Divergence.from_expression(formula)
    for delta in (1e-4, 0.05, 0.4):
        bounds = Band(spec, delta).log_bounds(logp)
        for actual, of_text in zip(bounds, Band(expression, delta).log_bounds(logp), strict=True):
            np.testing.assert_allclose(actual, of_text, rtol=EXPRESSION, atol=0)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_limits_curvature_and_max_value_are_those_of_the_table(
    name: str, value: float | None
) -> None:
    spec, (f, own) = spec_of(name, value), of_table(name, value)
    at_zero, slope, curvature, max_value = NUMBERS[name]
    # At p = 1/2 and r = 0 the others double.
    expected = own(0.5 * number(at_zero, name, value) + 0.5 * f(2.0))
    assert divergence_at(spec, 0.5, 0.0) == pytest.approx(expected, rel=SAME, abs=0)
    # At p = 1 the divergence is f(r) + (1-r) f'(inf).
    expected = own(f(0.5) + 0.5 * number(slope, name, value))
    assert divergence_at(spec, 1.0, 0.5) == pytest.approx(expected, rel=SAME, abs=0)
    expected = number(max_value, name, value)
    assert divergence_at(spec, 1.0, 0.0) == pytest.approx(expected, rel=SAME, abs=0)
    if curvature == "none" or number(curvature, name, value) == np.inf:
        assert Divergence(spec).curvature is None
    else:
        expected = number(curvature, name, value)
        assert Divergence(spec).curvature == pytest.approx(expected, rel=SAME, abs=0)
        # To second order in a change of r, D = f''(1)/2 p/(1-p) change^2; then come odd orders in
        # (1-2p), which are 0 at p = 1/2, and change^4.
        small = divergence_at(spec, 0.5, 1.0 + 1e-4)
        assert small == pytest.approx(expected * 0.5e-8, rel=1e-6, abs=0)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_from_the_max_value_on_everything_is_allowed(name: str, value: float | None) -> None:
    max_value = number(NUMBERS[name][3], name, value)
    logp = np.array([-700.0, -20.0, -1.0, -1e-3, -1e-12])
    spec = spec_of(name, value)
    if max_value == np.inf:
        log_lower, log_upper = Band(spec, 10.0).log_bounds(logp)
        assert not np.all((log_lower == -np.inf) & (log_upper == -logp))
        return
    rounded_up = max_value * (1 + 4 * np.finfo(float).eps)
    log_lower, log_upper = Band(spec, rounded_up).log_bounds(logp)
    np.testing.assert_array_equal(log_lower, np.full_like(logp, -np.inf))
    np.testing.assert_array_equal(log_upper, -logp)
    log_lower, log_upper = Band(spec, 0.99 * max_value).log_bounds(logp)
    assert not np.all((log_lower == -np.inf) & (log_upper == -logp))
