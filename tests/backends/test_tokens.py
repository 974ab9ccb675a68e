"""One file of tokens, tests/data/tokens.csv.gz, for every backend: Rust, torch, the CUDA kernels.

tools/make_cases.py writes it from 60-digit bounds and published formulas.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch")

import torch

import bandpo
from bandpo.backends import autograd, plain
from bandpo.backends.contract import LossInputs
from bandpo.backends.cuda import kernels
from bandpo.tensors.bounds import bounds_of
from conftest import DATA

Backend: TypeAlias = Callable[..., Any]

IN_FLOAT32 = 4e-6
"""Relative: exponentials within 1.2 ulp, up to three products, and the table's error of log_upper,
1e-6 beyond one ulp of a bound of up to 8."""
TABLE = 1e-6
"""Absolute, of `lower` in a table."""
IN_FLOAT64 = 1e-12
"""Relative: bounds within 1e-14 for the solver, 1e-12 for the kernel's."""


@cache
def columns() -> dict[tuple[str, float], dict[str, NDArray[np.float64]]]:
    """The numbers of each region, by the name of their column."""
    with gzip.open(DATA / "tokens.csv.gz", "rt", encoding="ascii") as file:
        rows = list(csv.DictReader(file))
    by_region: dict[tuple[str, float], list[dict[str, str]]] = {}
    for row in rows:
        region = row.pop("divergence"), float(row.pop("delta"))
        by_region.setdefault(region, []).append(row)
    return {
        region: {name: np.array([float.fromhex(row[name]) for row in rows]) for name in rows[0]}
        for region, rows in by_region.items()
    }


REGIONS = tuple(columns())
RULES = [name.removeprefix("loss of ") for name in columns()[REGIONS[0]] if name.startswith("loss")]


@pytest.fixture(params=["native", "torch", "emulator", "gpu"])
def backend(request: pytest.FixtureRequest) -> tuple[Backend, torch.device]:
    """Returns losses and, by autograd, gradients; with where its tensors are."""
    if request.param in ("native", "torch"):
        module = autograd if request.param == "native" else plain
        return module.token_losses, torch.device("cpu")
    found = request.getfixturevalue(request.param)
    if request.param == "gpu":
        return autograd.token_losses, found
    return kernels.token_loss, torch.device("cpu")


def loss_and_gradient(
    backend: tuple[Backend, torch.device],
    token: dict[str, NDArray[np.float64]],
    bounds: torch.Tensor,
    rule: str,
    dtype: torch.dtype,
) -> tuple[Any, Any]:
    run, device = backend
    old, new, advantage = (
        torch.from_numpy(token[name]).to(device, dtype)[None]
        for name in ("old_log_prob", "log_prob", "advantage")
    )
    new.requires_grad_()
    surrogate, *parameters = rule.split()
    valid = torch.ones_like(old, dtype=torch.bool)
    numbers = [float(parameter) for parameter in parameters]
    bounds = bounds.to(device)
    inputs = LossInputs(old, new, None, advantage, valid, bounds, surrogate, numbers, False)
    if run is kernels.token_loss:  # the kernel itself
        result = run(*inputs)
        return result[0][0].numpy(), result[1][0].numpy()
    result = run(inputs)
    gradient = torch.autograd.grad(result[0].sum(), new)[0]
    return result[0][0].detach().cpu().numpy(), gradient[0].cpu().numpy()


def fading(rule: str, token: dict[str, NDArray[np.float64]]) -> tuple[Any, Any]:
    """Sizes that errors of a rule with a width are relative to, beside the value itself.

    Its factor cancels, so that rounding is relative to the gradient without it; and it divides by
    the width w, so that an error of w counts ``abs(r - 1) / w^2`` times.
    """
    if not rule.startswith(("soft-gate", "quadratic")):
        return 0.0, 0.0
    x = np.clip(token["log_prob"] - token["old_log_prob"], -20.0, 20.0)
    upper = np.exp(np.minimum(token["log_upper"], 20.0))
    width = np.maximum(np.where(x < 0.0, -np.expm1(token["log_lower"]), upper - 1.0), 1e-6)
    moved, unclipped = np.abs(np.expm1(x)), np.abs(token["advantage"]) * np.exp(x)
    scale = np.abs(token["advantage"]) * np.maximum(np.exp(x), moved) * np.where(x < 0, 1.0, upper)
    return unclipped, scale * moved / width**2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("region", REGIONS, ids=str)
class TestTokens:
    def test_float32_with_a_table_equals_the_file(
        self, region: tuple[str, float], rule: str, backend: tuple[Backend, torch.device]
    ) -> None:
        token = columns()[region]
        bounds = bounds_of(bandpo.Band(*region), torch.zeros(1))
        found = loss_and_gradient(backend, token, bounds, rule, torch.float32)
        # A loss that weighs log-probs carries the error of the bound times the log-prob.
        weighs = rule.startswith(("mask", "weight"))
        for actual, what in zip(found, ("loss", "gradient"), strict=True):
            wanted = token[f"{what} of {rule}"]
            size = np.abs(token["advantage"])
            if weighs and what == "loss":
                size = size * np.abs(token["log_prob"])
            rounded, by_width = fading(rule, token)
            size = size + by_width
            error = np.abs(actual - wanted)
            assert (error <= IN_FLOAT32 * (np.abs(wanted) + rounded) + TABLE * size).all()
            assert np.count_nonzero(wanted) > 100

    def test_float64_with_exact_bounds_equals_the_file(
        self, region: tuple[str, float], rule: str, backend: tuple[Backend, torch.device]
    ) -> None:
        token = columns()[region]
        old = torch.from_numpy(token["old_log_prob"])
        band = bandpo.Band(*region)
        if backend[0] is kernels.token_loss:
            solved = kernels.log_bounds(band, old)
            assert solved is not None
        else:
            solved = bounds_of(band, old.to(backend[1]), exact=True)
        found = loss_and_gradient(backend, token, solved[:, None], rule, torch.float64)
        rounded, _ = fading(rule, token)
        for actual, what in zip(found, ("loss", "gradient"), strict=True):
            wanted = token[f"{what} of {rule}"]
            assert (np.abs(actual - wanted) <= IN_FLOAT64 * (np.abs(wanted) + rounded)).all()
