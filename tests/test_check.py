"""Checks of arguments."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from bandpo import Clip, Mask
from bandpo.check import (
    check_name,
    nonnegative_number,
    positive_number,
    real_array,
    real_number,
    suggestion,
)
from bandpo.error import InvalidTypeError, InvalidValueError


@pytest.mark.parametrize(
    "value", [2, 2.0, Fraction(2), np.float32(2), np.int64(2), np.array(2.0), np.array(2)]
)
def test_numbers_of_every_origin_are_accepted(value: Any) -> None:
    assert real_number("x", value) == 2.0
    assert type(real_number("x", value)) is float
    assert Mask(truncation=value) == Mask(truncation=2.0)
    assert Clip(0.2, value) == Clip(0.2, 2.0)


def test_a_0_dim_tensor_is_a_number() -> None:
    torch = pytest.importorskip("torch")
    assert Clip(torch.tensor(0.25)) == Clip(0.25)
    assert Mask(truncation=torch.tensor(2.0)).parameters == [2.0, 0.0]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        "2",
        2j,
        [2.0, 3.0],
        object(),
        np.array([2.0]),
        np.timedelta64(2),
        np.timedelta64(2, "s"),
        np.ma.masked,
        np.ma.array(2.0, mask=True),
    ],
)
def test_other_types_than_numbers_are_refused(value: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"x must be (a real|one) number"):
        real_number("x", value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_positive_number_is_finite_and_above_0(value: float) -> None:
    with pytest.raises(InvalidValueError, match="x must be finite and above 0, got"):
        positive_number("x", value)


@pytest.mark.parametrize("value", [-1e-300, math.inf, math.nan])
def test_a_nonnegative_number_is_finite_and_at_least_0(value: float) -> None:
    assert nonnegative_number("x", 0) == 0.0
    with pytest.raises(InvalidValueError, match="x must be finite and at least 0, got"):
        nonnegative_number("x", value)


def test_real_array_keeps_the_dtype() -> None:
    assert real_array("x", np.zeros(3, np.float32)).dtype == np.float32
    with pytest.raises(InvalidTypeError, match="x must hold real numbers, got dtype bool"):
        real_array("x", [True])


def test_only_a_near_name_is_suggested() -> None:
    assert suggestion("hellingr", ("kl", "hellinger")) == "; did you mean 'hellinger'?"
    assert suggestion("abc", ("kl", "hellinger")) == ""
    assert suggestion(3, ("kl",)) == ""
    for other in ("c", np.array(["a", "b"]), ["a"], None):
        with pytest.raises(InvalidValueError, match=r"x must be one of a, b, got "):
            check_name("x", other, ("a", "b"))
