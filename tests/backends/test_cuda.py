"""The CUDA kernels: against Rust, plain torch and 60-digit references, on the CPU and on a GPU.

On the CPU they run in an emulator (tests/support/emulator.h), once more under the address and the
undefined-behaviour sanitizer. Tests of a GPU are skipped, with the reason, where there is none.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
import bandpo.loss
from bandpo import _core
from bandpo.backends import autograd, select
from bandpo.backends.autograd import token_losses
from bandpo.backends.contract import (
    COUNTS,
    PROBABILITY_BINS,
    SUMS,
    Backend,
    LossInputs,
    TokenLosses,
    Totals,
    Weight,
)
from bandpo.backends.cuda import kernels, launch
from bandpo.backends.cuda.availability import kernels_run, obstacle
from bandpo.backends.cuda.launch import (
    BLOCKS_A_PROCESSOR,
    CHUNK,
    COMPILER_OPTIONS,
    THREADS,
    TOTALS_KERNEL,
)
from bandpo.backends.native import in_rust, token_loss_op
from bandpo.backends.select import default_backend
from bandpo.error import BackendWarning, BrokenExtraError, MissingExtraError
from bandpo.schedule import Constant, ScheduledBand
from bandpo.surrogate import NAMES, GammaWeight, Mask
from bandpo.tensors.bounds import _source, bounds_of
from bandpo.tensors.cached import Cached, upload
from bandpo.tensors.lookup import read_table
from bandpo.torch import clip, clip_ratio
from conftest import REFERENCE_FILES, SANITIZED, Reference, read_reference
from support.batches import Batch, every_end, random_batch
from support.emulated import INDEXING_TESTS, SANITIZERS, Emulator, build, missing_compiler

ROWS = SUMS + 1
"""Rows of a kernel's sums: those of the contract and the losses."""

KL = bandpo.Band("kl", 0.05)
REGIONS = (
    KL,
    bandpo.Band("jeffreys", 1e-4),
    bandpo.Band("reverse-kl", 0.3),
    (bandpo.Band("tv", 0.1) | bandpo.Clip(0.2, 0.28)).cap(10),
    bandpo.Clip(0.2, 0.28),
    bandpo.Clip(1.0, float("inf")),
)
RULES: tuple[tuple[str, list[float]], ...] = (
    ("min-clip", []),
    ("min-clip", [3.0]),
    ("mask", []),
    ("mask", [1.5]),
    ("weight", []),
    ("gradient-preserving", [0.75, 0.5]),
    ("mask", [math.inf, 1.0]),
    ("mask", [1.5, 1.0]),
    ("soft-gate", [1.0, 1.05]),
    ("soft-gate", [30.0, 0.3]),
    ("quadratic", []),
)

MIN_NORMAL = 2.0**-126
"""Results below it may be flushed to 0."""

FLUSHED = 8.0 * 2.0**30 * MIN_NORMAL
"""A derivative of a node below the min normal number is lost, with the width of its cell, at
most 2^30, in one of the eight terms of a cubic."""
UNMOVED = FLUSHED * 2.0**24
"""Such a loss leaves the last bit of lower bounds above it as it is: e^-47, far beyond the clamp,
e^-20."""

TOTALS = 4e-7
"""Relative, of sums in float32: Rust adds 32 vectors, a thread 32 tokens, before float64 takes
over; a partial sum of 32 terms of one sign is off by 31 roundings of 6e-8 at most."""

LIBM = 8 * 2.0**-52
"""Relative, of float64: exponentials of different libraries differ by an ulp each, in products."""

LOGARITHM = {torch.float32: 2.0**-23, torch.float64: LIBM}
"""Relative: an ulp, as CUDA documents log of a float32."""

EXPONENTIATED = {torch.float32: 4 * 2.0**-24, torch.float64: LIBM}
"""Relative: exp of a float32 within 2 ulp, as CUDA documents it; of x <= 0 itself rounded, as
log(lower) is, an ulp of 1 at most, because x e^x is below 1."""

WELL_CONDITIONED = 20.0
SOLVED = 1e-12
"""Relative error that `kernels.log_bounds` states where the condition number is at most 20."""
CONVERTED = 1e-10
"""The same for renyi and bhattacharyya next to their max value: rounding the radius of their
generator moves the bound by more than its condition number says."""

FAR = (-690.0, -1e-300)
"""Beyond these log-probs bounds are inside, but not as accurate."""


@pytest.fixture(params=["emulator", "gpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: tensors of the CPU go to the emulator."""
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, torch.device) else torch.device("cpu")


def batch(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.Tensor]:
    """Old and new log-probs, advantages and the mask of random tokens, some of them extreme."""
    return with_positive(list(random_batch(shape, seed, dtype, extremes=True)))


def with_positive(tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same with some log-probs above 0, by rounding or by mistake."""
    for log_prob, start in zip(tokens[:2], (40, 60), strict=True):
        flat = log_prob.view(-1)
        flat[start::397], flat[start + 7 :: 401] = 0.04, 0.06
    tokens[0].view(-1)[80::397], tokens[1].view(-1)[80::397] = 0.2, 0.1
    return tokens


def after_small_steps(deviation: float) -> list[torch.Tensor]:
    """The same after steps of the logits; few are masked, so that warps find all ways."""
    rng = np.random.default_rng(11)
    shape = (3, 8192)
    logits = rng.normal(4.0, 6.0, shape)
    moved = logits + rng.normal(0.0, deviation, shape)
    old, new = (torch.from_numpy(-np.logaddexp(0.0, -some)).float() for some in (logits, moved))
    advantages = torch.from_numpy(rng.normal(0.0, 1.0, shape)).float()
    with_positive([old[2:], new[2:]])  # the rows before have none, so that all ways are taken
    return [old, new, advantages, torch.from_numpy(rng.random(shape) < 0.999)]


def equal(actual: torch.Tensor, wanted: torch.Tensor) -> bool:
    """The same bits, but for the sign of 0 and the kind of a NaN."""
    return torch.equal(actual.cpu().nan_to_num(nan=12345.0), wanted.nan_to_num(nan=12345.0))


def on(device: torch.device, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def apart(
    rule: tuple[str, list[float]],
    tokens: list[torch.Tensor],
    wanted: Any,
    log_ratio: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """How far losses and gradients in float64 may be apart, with exponentials of two libraries."""
    old, new, advantages, _ = tokens
    loss, slope = (LIBM * result.abs() for result in wanted[:2])
    name, parameters = rule
    if name == "soft-gate":
        # The gate falls as e^-s, and s has an ulp of each of two exponentials.
        slope = slope + 2.0 * 40.0 * 2.0**-52 * wanted[1].abs()
        # A sum of 2/tau and a term of the other sign.
        loss = loss + LIBM * 4.0 / min(parameters) * advantages.abs().nan_to_num(0.0, 0.0)
    if name == "quadratic":
        # Differences of r and a term of its size or, where that is larger, of the result's.
        x = (new - old if log_ratio is None else log_ratio).clamp(-20.0, 20.0)
        size = 2.0 * LIBM * (advantages.abs() * x.exp()).nan_to_num(0.0, 0.0)
        loss, slope = loss + size, slope + size
    return [loss, slope]


def assert_within(mine: torch.Tensor, wanted: torch.Tensor, allowed: torch.Tensor) -> None:
    mine = mine.cpu()
    same = (mine == wanted) | (mine.isnan() & wanted.isnan())
    near = same | ((mine - wanted).abs() <= allowed)
    assert near.all(), (mine[~near], wanted[~near], allowed[~near])


def check_as_rust(
    device: torch.device,
    tokens: list[torch.Tensor],
    bounds: torch.Tensor,
    rule: tuple[str, list[float]],
    log_ratio: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
) -> None:
    """Loss, gradient, counts and sums are those of rust/loss/mod.rs.

    With counts by probability and without, because a warp has its short ways without alone.
    """
    for by_probability in (False, True):
        check_one_as_rust(device, tokens, bounds, (*rule, by_probability), log_ratio, anchor)


def check_one_as_rust(
    device: torch.device,
    tokens: list[torch.Tensor],
    bounds: torch.Tensor,
    options: tuple[str, list[float], bool],
    log_ratio: torch.Tensor | None,
    anchor: torch.Tensor | None,
) -> None:
    old, new, advantages, valid = tokens
    wanted = token_loss_op(old, new, log_ratio, advantages, valid, bounds, *options, anchor)
    old, new, advantages, valid, bounds = on(device, [*tokens, bounds])
    moved = None if log_ratio is None else log_ratio.to(device)
    anchor = None if anchor is None else anchor.to(device)
    actual = kernels.token_loss(old, new, moved, advantages, valid, bounds, *options, anchor)
    wide = old.dtype == torch.float64
    for mine, rusts, allowed in zip(
        actual[:2], wanted[:2], apart(options[:2], tokens, wanted, log_ratio), strict=True
    ):
        assert mine.dtype == rusts.dtype
        if wide and device.type == "cuda":  # not compared on a GPU yet
            assert_within(mine, rusts, allowed)
        else:
            assert equal(mine, rusts)
    assert torch.equal(actual[2].cpu(), wanted[2])
    tolerance = LIBM if wide else TOTALS
    # Sums of x cancel, so the rounding is that of its terms.
    scale = wanted[3].abs()
    finite = torch.where(valid.cpu(), (tokens[1] - tokens[0]).clamp(-20.0, 20.0), 0.0)
    scale[0] = torch.maximum(scale[0], finite.abs().sum().double())
    if wide:  # what a soft gate removes is a difference from the whole
        scale[4] = torch.maximum(scale[4], scale[3])
    difference = (actual[3].cpu() - wanted[3]).abs()
    same = (actual[3].cpu() == wanted[3]) | (actual[3].cpu().isnan() & wanted[3].isnan())
    assert (same | (difference <= tolerance * scale)).all(), (actual[3], wanted[3])


class TestLoss:
    @pytest.mark.parametrize("region", REGIONS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_every_rule_equals_rust(
        self, dtype: torch.dtype, region: bandpo.Region, device: torch.device
    ) -> None:
        tokens = batch((37, 421), dtype)
        bounds = bounds_of(region, tokens[0])
        for rule in RULES:
            check_as_rust(device, tokens, bounds, rule)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_equals_rust_with_bounds_per_token(
        self, dtype: torch.dtype, device: torch.device
    ) -> None:
        tokens = batch((5, 97), dtype)
        low, high = KL.log_bounds(np.minimum(np.nan_to_num(tokens[0].numpy()), 0.0))
        bounds = torch.from_numpy(np.stack([low, high])).to(dtype)
        for rule in RULES[:1] if SANITIZED else RULES:  # rules index nothing
            check_as_rust(device, tokens, bounds, rule)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("region", [KL, REGIONS[3], REGIONS[4]], ids=str)
    def test_bounds_at_an_anchor_are_those_of_rust(
        self, region: bandpo.Region, dtype: torch.dtype, device: torch.device
    ) -> None:
        tokens = batch((9, 421), dtype)
        # Near the old policy, as in training, and for every seventh token anywhere.
        anchor = tokens[0] + 0.3 * batch((9, 421), dtype, seed=1)[2]
        anchor[:, ::7] = batch((9, 421), dtype, seed=2)[0][:, ::7]
        at = np.minimum(np.nan_to_num(anchor.numpy()), 0.0)  # as a table reads those above 0
        low, high = (torch.from_numpy(side) for side in region.log_bounds(at))
        per_token = torch.stack([low, high]).to(dtype)
        for bounds in (bounds_of(region, tokens[0]), per_token):
            for rule in RULES:
                check_as_rust(device, tokens, bounds, rule, None, anchor)

    def test_a_given_log_ratio_is_compared_less_the_anchors(self, device: torch.device) -> None:
        tokens = batch((6, 50))
        mean = (tokens[1] - tokens[0]).nanmean(1, keepdim=True).clamp(-1.0, 1.0).expand(6, 50)
        anchor = tokens[0] + 0.1 * batch((6, 50), seed=1)[2]
        for rule in RULES:
            check_as_rust(device, tokens, bounds_of(REGIONS[4], tokens[0]), rule, mean, anchor)

    def test_equals_rust_with_given_log_ratios(self, device: torch.device) -> None:
        tokens = batch((6, 50))
        mean = (tokens[1] - tokens[0]).nanmean(1, keepdim=True).clamp(-1.0, 1.0).expand(6, 50)
        for rule in RULES:
            check_as_rust(device, tokens, bounds_of(REGIONS[4], tokens[0]), rule, mean)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize(
        "shape", [(0, 7), (3, 0), (1, 1), (1, 31), (33, 1), (1, 8191), (3, 2731), (2, 12289)]
    )
    def test_equals_rust_at_any_size(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """None, fewer than a vector, next to a warp, to a chunk (8192), and several of them."""
        tokens = batch(shape, dtype, seed=shape[1])
        for region in (KL, REGIONS[4]):
            check_as_rust(device, tokens, bounds_of(region, tokens[0]), RULES[1])

    def test_equals_rust_where_every_token_is_masked(self, device: torch.device) -> None:
        tokens = batch((3, 50))
        tokens[3] = torch.zeros_like(tokens[3])
        check_as_rust(device, tokens, bounds_of(KL, tokens[0]), RULES[0])

    @pytest.mark.parametrize("anchored", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_equals_rust_at_every_end(
        self, dtype: torch.dtype, anchored: bool, device: torch.device
    ) -> None:
        tokens, anchor = every_end(dtype, anchored=anchored)
        for region in (KL, KL.cap(10), REGIONS[4]):
            for rule in RULES:
                bounds = bounds_of(region, tokens.old_log_prob)
                check_as_rust(device, list(tokens), bounds, rule, None, anchor)

    @pytest.mark.parametrize("column", range(3))
    def test_a_nan_affects_its_token_alone(self, column: int, device: torch.device) -> None:
        tokens = batch((4, 100))
        row, token = torch.nonzero(tokens[3])[17].tolist()
        for value in (float("nan"), float("inf"), -float("inf")):
            tokens[column][row, token] = value
            for region in (KL, REGIONS[4]):
                check_as_rust(device, tokens, bounds_of(region, tokens[0]), RULES[1])

    @pytest.mark.parametrize("rows", [1, 3, 4])
    def test_any_strides_give_the_same_result(self, rows: int, device: torch.device) -> None:
        """Slices, transposes and advantages of a row are read where they are."""
        whole = batch((rows, 65))
        bounds = bounds_of(KL, whole[0])
        tokens = [tensor.clone() for tensor in whole]
        tokens[2] = tokens[2][:, :1].nan_to_num().expand(rows, 65).contiguous()
        wanted = kernels.token_loss(*self._arguments(device, tokens, bounds))
        for change in (
            lambda tensor: torch.cat([tensor, tensor], 1)[:, :65],
            lambda tensor: torch.cat([tensor[:, :1], tensor], 1)[:, 1:],
            lambda tensor: tensor.t().contiguous().t(),
        ):
            changed = [change(tensor) for tensor in on(device, tokens)]
            changed[2] = on(device, tokens)[2][:, :1]  # [B, 1]
            actual = kernels.token_loss(*self._arguments(device, changed, bounds))
            for mine, other in zip(actual, wanted, strict=True):
                assert equal(mine, other.cpu())

    def test_an_advantage_a_row_gives_the_same_result(self, device: torch.device) -> None:
        """Read once a vector, if rows are whole vectors."""
        tokens = batch((5, 2400))
        tokens[2] = tokens[2][:, :1].nan_to_num().contiguous()
        bounds = bounds_of(KL, tokens[0])
        expanded = [*tokens[:2], tokens[2].expand(5, 2400).contiguous(), tokens[3]]
        found, wanted = (
            kernels.token_loss(*self._arguments(device, some, bounds))
            for some in (tokens, expanded)
        )
        for mine, other in zip(found, wanted, strict=True):
            assert equal(mine, other.cpu())

    @pytest.mark.parametrize("spec", ["kl", "pearson-chi2", "reverse-kl"])
    @pytest.mark.parametrize("deviation", [0.01, 0.1, 0.4])
    def test_equals_rust_after_small_steps(
        self, deviation: float, spec: str, device: torch.device
    ) -> None:
        """All ways of a warp: near, next to 0, masked in part, looked up."""
        tokens = after_small_steps(deviation)
        bounds = bounds_of(bandpo.Band(spec, 0.05), tokens[0])
        for rule in RULES[:4]:
            check_as_rust(device, tokens, bounds, rule)

    @staticmethod
    def _arguments(
        device: torch.device,
        tokens: list[torch.Tensor],
        bounds: torch.Tensor,
        *,
        by_probability: bool = False,
    ) -> tuple[Any, ...]:
        old, new, advantages, valid, bounds = on(device, [*tokens, bounds])
        return old, new, None, advantages, valid, bounds, "min-clip", [3.0], by_probability

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_equals_float32_of_the_same_numbers(
        self, dtype: torch.dtype, device: torch.device
    ) -> None:
        old, new, advantages, valid = batch((9, 333), dtype)
        old.view(torch.int16)[0, :100] = torch.arange(0, 100).to(torch.int16)  # subnormal ones
        advantages = advantages.float()
        for region in (KL, REGIONS[4]):
            wide = [old.float(), new.float(), advantages, valid]
            bounds = bounds_of(region, wide[0])
            narrow = [old, new, advantages, valid]
            actual = kernels.token_loss(*self._arguments(device, narrow, bounds))
            wanted = kernels.token_loss(*self._arguments(device, wide, bounds))
            assert actual[0].dtype == torch.float32
            for mine, other in zip(actual, wanted, strict=True):
                assert equal(mine, other.cpu())

    def test_the_result_is_independent_of_grid_and_warp_order(self, emulator: Emulator) -> None:
        for tokens, by_probability in ((batch((5, 8192)), True), (after_small_steps(0.1), False)):
            results = []
            for emulator.grid, emulator.last_warp_first in product((1, 2, 5, 1000), (False, True)):
                arguments = self._arguments(
                    torch.device("cpu"),
                    tokens,
                    bounds_of(KL, tokens[0]),
                    by_probability=by_probability,
                )
                results.append(kernels.token_loss(*arguments))
            for result in results[1:]:
                for mine, first in zip(result, results[0], strict=True):
                    assert equal(mine, first)


class TestTotals:
    """The second stage alone, of more chunks than a block has threads."""

    @pytest.mark.parametrize("last_warp_first", [False, True])
    @pytest.mark.parametrize("chunks", [0, 1, 255, 257, 1000])
    def test_they_combine_all_chunks(
        self, chunks: int, last_warp_first: bool, emulator: Emulator
    ) -> None:
        rng = np.random.default_rng(chunks)
        sums = rng.normal(0.0, 1.0, (ROWS, chunks)) + 5.0
        counts = rng.integers(0, 8193, (COUNTS, chunks)).astype(np.int32)
        emulator.last_warp_first = last_warp_first
        for emulator.grid in (1, 5):
            total_sums, total_counts, loss = self.combined(emulator, sums, counts, 3.0, 7.0)
            np.testing.assert_array_equal(total_counts, counts.sum(1, dtype=np.int64))
            # In double precision, of terms of one sign mostly.
            added = [math.fsum(row) for row in sums]
            np.testing.assert_allclose(total_sums[:-2], added[: SUMS - 2], rtol=1e-13)
            np.testing.assert_allclose(loss, 3.0 / 7.0 * added[-1], rtol=1e-13)
            extremes = [sums[-3].min(initial=np.inf), sums[-2].max(initial=-np.inf)]
            assert total_sums[-2:].tolist() == extremes

    def test_a_nan_of_one_chunk_reaches_every_total(self, emulator: Emulator) -> None:
        sums = np.zeros((ROWS, 300))
        for row in range(ROWS):
            sums[row, 41 * row] = np.nan
        total_sums, _, loss = self.combined(emulator, sums, np.zeros((1, 300), np.int32), 1.0, 1.0)
        assert np.isnan(total_sums).all()
        assert np.isnan(loss)

    @staticmethod
    def combined(
        emulator: Emulator, sums: Any, counts: Any, numerator: float, divisor: float
    ) -> tuple[Any, Any, Any]:
        """The totals of chunks, and their loss in float64."""
        total_sums, total_counts = np.full(SUMS, np.nan), np.full(len(counts), -1)
        divisors, loss = np.array([divisor]), np.full(1, -1.0)
        at = [
            array.ctypes.data for array in (sums, counts, total_sums, total_counts, divisors, loss)
        ]
        sizes = sums.shape[1], len(counts)
        arguments = (*at[:2], *sizes, *at[2:4], numerator, *at[4:])
        kernel = "bandpo::policy_loss_totals<double>"
        emulator.launch(kernel, None, ROWS + len(counts), "PPqiPPdPP", arguments)
        return total_sums, total_counts, loss[0]


class TestWeightedSum:
    """The gradient alone, with its weight, and the sum of the losses."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 2731), (37, 421), (2, 12289)])
    def test_equals_rust(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        tokens = batch(shape, dtype, seed=shape[1])
        for region in (KL, REGIONS[4]):
            for rule in RULES:
                self.check_as_rust(device, tokens, bounds_of(region, tokens[0]), rule)

    @pytest.mark.parametrize("region", [KL, REGIONS[4]], ids=str)
    @pytest.mark.parametrize("deviation", [0.01, 0.4])
    def test_equals_rust_after_small_steps(
        self, deviation: float, region: bandpo.Region, device: torch.device
    ) -> None:
        tokens = after_small_steps(deviation)
        for rule in RULES[:4]:
            self.check_as_rust(device, tokens, bounds_of(region, tokens[0]), rule)

    @staticmethod
    def check_as_rust(
        device: torch.device,
        tokens: list[torch.Tensor],
        bounds: torch.Tensor,
        rule: tuple[str, list[float]],
    ) -> None:
        for by_probability in (False, True):
            TestWeightedSum.check_one_as_rust(device, tokens, bounds, (*rule, by_probability))

    @staticmethod
    def check_one_as_rust(
        device: torch.device,
        tokens: list[torch.Tensor],
        bounds: torch.Tensor,
        options: tuple[str, list[float], bool],
    ) -> None:
        divisor = tokens[3].sum(dtype=torch.float64).clamp(min=1)
        old, new, advantages, valid = tokens
        inputs = LossInputs(old, new, None, advantages, valid, bounds, *options)
        wanted, total, counts, _ = in_rust(inputs, 2.0 / divisor.item())
        _, slack = apart(options[:2], tokens, (wanted, wanted))
        old, new, advantages, valid, bounds = on(device, [*tokens, bounds])
        inputs = LossInputs(old, new, None, advantages, valid, bounds, *options)
        on_device = kernels.token_loss(*inputs)
        for weight in (Weight(2, divisor.to(device)), Weight(2, divisor.item())):
            found, sum_of_losses, *totals = kernels.weighted_sum(inputs, weight)
            assert found.dtype == wanted.dtype
            assert sum_of_losses.dtype == total.dtype
            if device.type == "cuda" and old.dtype == torch.float64:  # not compared on a GPU yet
                assert_within(found, wanted, slack)
            else:
                assert equal(found, wanted)
            for mine, same in zip(totals, on_device[2:], strict=True):
                assert equal(mine.cpu(), same.cpu())
            assert torch.equal(totals[0].cpu(), counts)
            # The terms of the sum cancel.
            size = 2.0 / divisor * on_device[0].double().abs().sum().cpu()
            near = (sum_of_losses.cpu() - total).abs() <= TOTALS * size
            assert near or equal(sum_of_losses, total)

    @pytest.mark.parametrize("shape", [(0, 7), (1, 1), (1, 15), (3, 17), (37, 421), (64, 1024)])
    def test_tokens_that_count_are_counted(
        self, shape: tuple[int, int], device: torch.device
    ) -> None:
        valid = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
        mask = valid.to(device)
        for view in (mask, mask[:, ::2], mask[:, 1:], mask.t(), torch.zeros_like(mask)):
            found = kernels.count_valid(view)
            assert (found.dtype, found.ndim) == (torch.float64, 0)
            assert found.item() == view.sum().item()

    @pytest.mark.parametrize("region", [KL, REGIONS[4]], ids=str)
    def test_a_gradient_of_half_precision(
        self, region: bandpo.Region, device: torch.device
    ) -> None:
        """It is rounded once, but for float16, which a loss scale has to reach first."""
        for dtype, stored in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
            old, new, advantages, valid = on(device, batch((7, 421), dtype))
            bounds = bounds_of(region, old.float())
            narrow = LossInputs(
                old, new, None, advantages.float(), valid, bounds, "mask", [1.5], False
            )
            wide = narrow._replace(old_log_prob=old.float(), log_prob=new.float())
            found, wanted = (
                kernels.weighted_sum(inputs, Weight(1, 3.0))[0] for inputs in (narrow, wide)
            )
            assert found.dtype == stored
            assert equal(found, wanted.to(stored).cpu())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("count", [0, 1, 5, 4096, 12345])
    def test_a_gradient_is_scaled_in_place(
        self, count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        gradient = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        gradient[: count // 50] = torch.nan
        factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        for factor in (1.0, 0.3, 0.0, math.inf, math.nan):
            scaled = gradient.clone()
            by = torch.tensor(factor, dtype=factor_dtype, device=device)
            kernels.scale_gradient(scaled, by)
            assert equal(scaled, (gradient.to(factor_dtype) * by).to(dtype).cpu())

    @pytest.mark.usefixtures("on_cpu")
    @pytest.mark.filterwarnings("ignore::bandpo.error.LogProbWarning")
    @pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum-norm"])
    def test_autograd_scales_what_the_forward_pass_wrote(self, mode: Any) -> None:
        tokens = Batch(*(tensor.nan_to_num() for tensor in batch((6, 50))))
        options: dict[str, Any] = {"region": KL, "loss_agg_mode": mode, "dp_size": 1}
        for factor in (1.0, -0.7):
            slopes: list[torch.Tensor] = []
            for backend in ("cuda", "torch"):
                leaf = tokens.log_prob.clone().requires_grad_()
                of_leaf = tokens._replace(log_prob=leaf)
                loss = factor * of_leaf.loss(**options, backend=backend).loss
                slopes += torch.autograd.grad(loss, leaf)
            torch.testing.assert_close(*slopes, rtol=4e-6, atol=0.0)

    @pytest.mark.usefixtures("on_cpu")
    @pytest.mark.filterwarnings("ignore::bandpo.error.LogProbWarning")
    def test_a_graph_that_is_kept_gives_the_same_gradient_again(self) -> None:
        tokens = Batch(*(tensor.nan_to_num() for tensor in batch((6, 50))))
        leaf = tokens.log_prob.clone().requires_grad_()
        loss = 3.0 * tokens._replace(log_prob=leaf).loss(region=KL, backend="cuda").loss
        first, second = (
            torch.autograd.grad(loss, leaf, retain_graph=keep)[0] for keep in (True, False)
        )
        assert torch.equal(first, second)

    @pytest.fixture
    def on_cpu(self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
        """Backend cuda takes tensors of the CPU to the emulator."""
        of_cuda = select._BACKENDS["cuda"]
        backend = dataclasses.replace(of_cuda, runs_on="cpu")
        monkeypatch.setitem(select._BACKENDS, "cuda", backend)
        monkeypatch.setattr(select, "_require_kernels", lambda: True)
        monkeypatch.setattr(autograd, "on_cuda", lambda tensor: True)


@pytest.mark.skipif(SANITIZED, reason="the address sanitizer sets memory aside for every byte")
class TestManyTokens:
    """Their last block alone, so that little of the memory is ever used."""

    @pytest.fixture(autouse=True)
    def _last_block(self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
        emulator.grid = 2**31 - 1
        whole = emulator.launch

        def launch(kernel: str, device: object, blocks: int, *arguments: Any) -> None:
            emulator.skipped = 0 if "totals" in kernel else blocks - 1
            whole(kernel, device, blocks, *arguments)

        monkeypatch.setattr(kernels, "launch", launch)

    @staticmethod
    def untouched(count: int, dtype: type) -> torch.Tensor:
        """One more than `count` zeros, in pages that the system has not filled."""
        try:
            return torch.from_numpy(np.zeros(count + 1, dtype))
        except MemoryError as reason:
            pytest.skip(str(reason))

    @staticmethod
    def run(kernel: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return kernel(*arguments)
        except RuntimeError as reason:
            if "allocate memory" in str(reason):
                pytest.skip(str(reason))
            raise

    @pytest.mark.parametrize("count", [2**31 + 1, 2**32 + 5])
    @pytest.mark.parametrize(("in_vectors", "rows"), [(True, 3), (False, 3), (False, 1)])
    def test_the_loss_of_the_last_block_is_that_of_its_tokens(
        self, count: int, in_vectors: bool, rows: int
    ) -> None:
        here = count % CHUNK
        old, new, advantages, _ = batch((rows, here), torch.float16, seed=1)
        advantages = advantages[:, :1].nan_to_num().float()
        bounds = bounds_of(KL, old)
        rule = bounds, "min-clip", [3.0], True
        wanted = kernels.token_loss(old, new, None, advantages, torch.ones_like(old) > 0, *rule)
        assert wanted[0][-1].count_nonzero() > 0
        tokens = []
        for end in (old, new, torch.ones(rows, here, dtype=torch.bool)):
            dtype = np.bool_ if end.dtype == torch.bool else np.float16
            # Off the boundaries of vectors, unless vectors are wanted.
            whole = self.untouched(count, dtype)[0 if in_vectors else 1 :][:count]
            tokens.append(whole.view(rows, count // rows))
            tokens[-1][-1, -here:] = end[-1]
        found = self.run(
            kernels.token_loss, tokens[0], tokens[1], None, advantages, tokens[2], *rule
        )
        for mine, other in zip(found[:2], wanted[:2], strict=True):
            assert equal(mine[-1, -here:], other[-1])

    def test_the_bounds_of_the_last_token_are_its_own(self) -> None:
        count = 2**31 + 1
        old = self.untouched(count, np.float16)[:count]
        old[-1] = -3.0
        words = bounds_of(KL, old[-1:])
        found = self.run(kernels.table_log_bounds, words, old)
        assert equal(found[:, -1:], kernels.table_log_bounds(words, old[-1:]))


def every_kind_of_float() -> torch.Tensor:
    """All exponents and signs, infinities and NaN, subnormal numbers, and log-probs closely."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = high | (np.arange(1 << 16, dtype=np.uint32) * 40503 & 0xFFFF)
    spread = -np.arange(1 << 16, dtype=np.float32) * np.float32(1e-3)
    return torch.from_numpy(np.concatenate([bits.astype(np.uint32).view(np.float32), spread]))


class TestTable:
    @pytest.mark.parametrize("region", REGIONS[:4], ids=str)
    def test_every_kind_of_float_equals_rust(
        self, region: bandpo.Region, device: torch.device, request: pytest.FixtureRequest
    ) -> None:
        """Also where a log-prob is subnormal, though arithmetic may flush it to 0."""
        logp = every_kind_of_float()
        words = torch.from_numpy(region.table().words)
        lower, upper = (
            read_table(words, logp, torch.tensor(side)).numpy() for side in (True, False)
        )
        # CuPy always flushes, the emulator on request.
        for flush_to_zero in (True, False) if device.type == "cpu" else (True,):
            if device.type == "cpu":
                request.getfixturevalue("emulator").flush_to_zero = flush_to_zero
            found = kernels.table_log_bounds(*on(device, [words, logp])).cpu().numpy()
            log_lower, log_upper = found
            np.testing.assert_array_equal(
                np.where(np.abs(upper) < MIN_NORMAL, 0.0, upper),
                np.where(np.abs(log_upper) < MIN_NORMAL, 0.0, log_upper),
            )
            self.check_logarithms(log_lower, lower)

    @staticmethod
    def check_logarithms(log_lower: Any, lower: Any) -> None:
        """Within an ulp of those of the lower bounds; near 0, where terms are flushed, as ratios,
        of which logarithms at -87 keep 17 bits.
        """
        np.testing.assert_array_equal(np.isnan(log_lower), np.isnan(lower))
        apart = lower > UNMOVED
        exact = np.log(lower[apart].astype(np.float64))
        # In float64 numpy's logarithm is off by as much as CUDA's.
        ulps = 1 if log_lower.dtype == np.float32 else 2
        np.testing.assert_array_max_ulp(log_lower[apart], exact.astype(log_lower.dtype), ulps)
        ratio = np.exp(log_lower[lower <= UNMOVED].astype(np.float64))
        np.testing.assert_allclose(ratio, lower[lower <= UNMOVED], rtol=2.0**-17, atol=FLUSHED)
        assert apart.sum() > 10_000
        assert ratio.size > 100

    def test_float64_log_probs_equal_rust(self, device: torch.device) -> None:
        logp = torch.cat([every_kind_of_float().double(), torch.tensor([-1e-40, -1e-46, -1e-300])])
        words = torch.from_numpy(KL.table().words)
        with np.errstate(over="ignore"):
            lower, upper = (
                read_table(words, logp, torch.tensor(side)).numpy() for side in (True, False)
            )
        log_lower, log_upper = kernels.table_log_bounds(*on(device, [words, logp])).cpu().numpy()
        np.testing.assert_allclose(log_upper, upper, rtol=0.0, atol=MIN_NORMAL)
        self.check_logarithms(log_lower, lower)

    @pytest.mark.parametrize("region", REGIONS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_clip_moves_log_ratios_to_the_bounds(
        self, dtype: torch.dtype, region: bandpo.Region, device: torch.device
    ) -> None:
        old, new, _, _ = batch((13, 61), dtype)
        x = new - old
        bounds = bounds_of(region, old)
        if bounds.dtype == torch.int32:
            lower = read_table(bounds, old, torch.tensor(True)).double().log()
            upper = read_table(bounds, old, torch.tensor(False)).double()
        else:
            lower, upper = bounds.double()
        wanted = torch.where(old.isnan(), old.double(), x.double().clamp(lower, upper)).to(dtype)
        tensors = on(device, [bounds, old, x])
        moved, inside = kernels.clipped(tensors[0], tensors[1], tensors[2], of_ratio=False)
        for found in (moved.cpu(), clip(region, old, x)):
            torch.testing.assert_close(
                found, wanted, rtol=LOGARITHM[dtype], atol=0.0, equal_nan=True
            )
        assert torch.equal(inside.cpu(), moved.cpu() == x)
        assert 0 < inside.sum() < inside.numel() or region == REGIONS[5]

    @pytest.mark.parametrize("region", REGIONS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_clip_moves_ratios_to_the_bounds(
        self, dtype: torch.dtype, region: bandpo.Region, device: torch.device
    ) -> None:
        old, new, _, _ = batch((13, 61), dtype)
        ratio = (new - old).exp()
        ratio[0, :4] = torch.tensor([0.0, float("inf"), -1.0, 1.0])
        old[0, :4] = -1.0
        bounds = bounds_of(region, old)
        if bounds.dtype == torch.int32:
            lower = read_table(bounds, old, torch.tensor(True)).double()
            upper = read_table(bounds, old, torch.tensor(False)).double().exp()
        else:
            lower, upper = bounds.double().exp()
        wanted = torch.where(old.isnan(), old.double(), ratio.double().clamp(lower, upper))
        wanted = wanted.to(dtype)
        tensors = on(device, [bounds, old, ratio])
        moved, inside = kernels.clipped(tensors[0], tensors[1], tensors[2], of_ratio=True)
        torch.testing.assert_close(
            moved.cpu(), wanted, rtol=EXPONENTIATED[dtype], atol=0.0, equal_nan=True
        )
        assert torch.equal(inside.cpu(), moved.cpu() == ratio)
        assert 0 < inside.sum() < inside.numel()
        # Plain torch takes the lower bound of a table through its logarithm.
        torch.testing.assert_close(
            clip_ratio(region, old, ratio), wanted, equal_nan=True,
            rtol=EXPONENTIATED[dtype], atol=torch.finfo(dtype).eps,
        )  # fmt: skip


class TestOperators:
    """Under `torch.compile`, autograd and fake tensors; their kernels are tested above."""

    @pytest.fixture
    def in_place_of_rust(self, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes the emulated kernel that of the operator for tensors of the CPU."""
        monkeypatch.setitem(token_loss_op._backend_fns, "cpu", kernels.token_loss)

    @pytest.mark.usefixtures("in_place_of_rust")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_gradient_of_half_precision_is_the_float32_one_rounded(
        self, dtype: torch.dtype
    ) -> None:
        tokens = batch((3, 40), dtype)
        slopes: list[torch.Tensor] = []
        for stored in (dtype, torch.float32):
            old, new, advantages = (tensor.to(stored) for tensor in tokens[:3])
            new.requires_grad_()
            loss, *_ = token_loss_op(
                old,
                new,
                None,
                advantages.float(),
                tokens[3],
                bounds_of(KL, old),
                "min-clip",
                [],
                False,
            )
            slopes += torch.autograd.grad(loss.sum(), new)
        assert [slope.dtype for slope in slopes] == [dtype, torch.float32]
        assert equal(slopes[0], slopes[1].to(dtype))

    @pytest.mark.usefixtures("in_place_of_rust")
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"surrogate": GammaWeight()},
            {"log_ratio_penalty": 0.1},
            {"surrogate": Mask(whole_sequence=True)},
            {"ratio_level": "geometric-mean"},
        ],
        ids=str,
    )
    def test_a_loss_of_half_precision_is_that_of_float32_of_the_same_numbers(
        self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def losses(inputs: LossInputs) -> TokenLosses:
            per_token, _, counts, sums = token_loss_op(*inputs)
            return TokenLosses(per_token, per_token.sum(), lambda: Totals.of(counts, sums))

        reader = Backend(losses, runs_on="cpu", reads_half=True)
        monkeypatch.setitem(select._BACKENDS, "native", reader)
        tokens = random_batch((7, 30), 3, torch.bfloat16)
        old, new, advantages = (tensor.float() for tensor in tokens[:3])
        wide = Batch(old, new, advantages, tokens.response_mask)
        options = {"region": bandpo.Clip(0.2), "backend": "native", **options}
        found = bandpo.policy_loss(*tokens, **options)
        wanted = bandpo.policy_loss(*wide, **options)
        assert found.loss.dtype == torch.float32
        assert torch.equal(found.per_token, wanted.per_token)
        assert torch.equal(found.loss, wanted.loss)

    @pytest.mark.usefixtures("in_place_of_rust")
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_compiles_without_a_graph_break(self) -> None:
        torch.compiler.reset()
        tokens = [tensor.nan_to_num() for tensor in batch((5, 30))]
        module = bandpo.loss.PolicyLoss(KL, dual_clip=3.0, metrics_by_probability=True)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        found = []
        for run in (module, compiled):
            new = tokens[1].clone().requires_grad_()
            result = run(tokens[0], new, *tokens[2:])
            gradient = torch.autograd.grad(result.loss, new)[0]
            sums = [result.loss, *(result.metrics[name] for name in sorted(result.metrics))]
            found.append(([result.per_token, gradient], sums))
        for eager, traced in zip(found[0][0], found[1][0], strict=True):
            assert torch.equal(eager, traced)
        # Without a compiler the loss is that of Rust, which adds up in another order.
        for eager, traced in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(eager, traced, rtol=1e-6, atol=0.0)

    @pytest.mark.usefixtures("in_place_of_rust")
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("rule", [RULES[1], RULES[2], RULES[5]], ids=str)
    def test_forward_mode_and_transforms_agree_with_the_gradient(
        self, rule: tuple[str, list[float]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Otherwise they would take an operator for a constant."""
        monkeypatch.setattr("bandpo.backends.autograd.needs_no_dispatcher", lambda *tensors: False)
        tokens = [tensor.nan_to_num() for tensor in batch((3, 40))]
        old, new = (tensor.to(dtype) for tensor in tokens[:2])
        advantages = tokens[2].to(torch.float64 if dtype == torch.float64 else torch.float32)
        arguments = advantages, tokens[3], bounds_of(KL, old), *rule, False
        weights = torch.linspace(0.5, 1.5, 40, dtype=advantages.dtype)

        def loss(log_prob: torch.Tensor) -> torch.Tensor:
            per_token, total, *_ = token_losses(LossInputs(old, log_prob, None, *arguments))
            return (weights * per_token).sum() + total

        leaf = new.clone().requires_grad_()
        [slope] = torch.autograd.grad(loss(leaf), leaf)
        # A transform takes plain torch, which rounds elsewhere.
        torch.testing.assert_close(torch.func.grad(loss)(new), slope)
        tangent = torch.randn(new.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        forward_ad: Any = torch.autograd.forward_ad
        with forward_ad.dual_level():
            by_dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(new, tangent))).tangent
        by_func = torch.func.jvp(loss, (new,), (tangent,))[1]
        assert torch.equal(by_dual, by_func)
        # Slopes were rounded to the dtype of the log-probs, and cancel in the sum.
        terms = slope.double() * tangent.double()
        rounding = 4.0 * torch.finfo(dtype).eps * terms.abs().sum()
        assert (by_func.double() - terms.sum()).abs() <= rounding
        assert by_func.abs() > rounding

        def per_token(log_prob: torch.Tensor) -> torch.Tensor:
            return token_losses(LossInputs(old, log_prob, None, *arguments))[0]

        several = torch.stack([new, new + tangent])
        wanted = torch.stack([per_token(log_prob) for log_prob in several])
        torch.testing.assert_close(torch.vmap(per_token)(several), wanted)

    @pytest.mark.parametrize("region", [KL, REGIONS[4]], ids=str)
    def test_operators_pass_opcheck(self, region: bandpo.Region) -> None:
        old, new, *_ = batch((4, 9), torch.float64)
        old, x = old.nan_to_num(), (new - old).nan_to_num().requires_grad_()
        bounds = bounds_of(region, old)
        if bounds.dtype == torch.int32:
            for log_prob in (old, old.half()):
                inputs = bounds, log_prob
                torch.library.opcheck(torch.ops.bandpo.table_log_bounds.default, inputs)
        half = old.half(), x.detach().float().requires_grad_()
        for log_prob, values in ((old, x), half):
            kind = bounds_of(region, values.detach())
            for of_ratio in (False, True):
                arguments = kind, log_prob, values, of_ratio
                torch.library.opcheck(torch.ops.bandpo.clipped.default, arguments)
            solved = log_prob, id(region)
            torch.library.opcheck(torch.ops.bandpo.exact_log_bounds.default, solved)

    @pytest.mark.parametrize(
        "region", [KL, REGIONS[4], bandpo.Band("tv", np.full(9, 0.1))], ids=str
    )
    def test_clip_by_the_operator_equals_plain_clip(
        self, region: bandpo.Region, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old, new, _, _ = batch((4, 9), torch.float64)
        x = (new - old).requires_grad_()
        for function, values in ((clip, x), (clip_ratio, x.exp())):
            monkeypatch.setattr("bandpo.torch.reads_half", lambda device: False)
            wanted = function(region, old, values)
            [slope] = torch.autograd.grad(wanted.nansum(), x, retain_graph=True)
            monkeypatch.setattr("bandpo.torch.reads_half", lambda device: True)
            moved = function(region, old, values)
            torch.testing.assert_close(moved, wanted, equal_nan=True)
            [moved_slope] = torch.autograd.grad(moved.nansum(), x)
            torch.testing.assert_close(moved_slope, slope, equal_nan=True)

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("function", [clip, clip_ratio])
    def test_clip_by_the_operator_has_the_right_derivatives(
        self, function: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bandpo.torch.reads_half", lambda device: True)
        old, new, _, _ = (tensor.nan_to_num() for tensor in batch((4, 9), torch.float64))
        values = new - old if function is clip else (new - old).exp()
        inside = function(KL, old, values) == values
        assert 0 < inside.sum() < inside.numel()

        def moved(values: torch.Tensor) -> torch.Tensor:
            return function(KL, old, values)

        tangent = torch.linspace(1.0, 2.0, 36, dtype=torch.float64).view(4, 9)
        wanted = torch.where(inside, tangent, 0.0)
        assert torch.equal(torch.func.vjp(moved, values)[1](tangent)[0], wanted)
        assert torch.equal(torch.func.jvp(moved, (values,), (tangent,))[1], wanted)
        forward_ad: Any = torch.autograd.forward_ad
        with forward_ad.dual_level():
            dual = moved(forward_ad.make_dual(values, tangent))
            assert torch.equal(forward_ad.unpack_dual(dual).tangent, wanted)


class TestHalfPrecision:
    """Functions of `bandpo.torch` with log-probs of half precision, which kernels read as such."""

    @pytest.fixture
    def launched(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the kernels; on tensors of the CPU, they take the place of the operators."""
        names: list[str] = []
        whole = kernels.launch  # type: ignore[attr-defined]

        def logged(kernel: str, *given: Any) -> None:
            names.append(kernel)
            whole(kernel, *given)

        monkeypatch.setattr(kernels, "launch", logged)
        if device.type == "cpu":
            monkeypatch.setattr(kernels, "kernels_run", lambda: True)
            for module in ("torch", "backends.sides"):
                monkeypatch.setattr(f"bandpo.{module}.reads_half", lambda device: True)
            for operator, kernel in (
                ("torch.clipped_op", kernels.clipped),
                ("backends.sides.table_log_bounds_op", kernels.table_log_bounds),
                ("tensors.bounds.exact_log_bounds_op", kernels._exact_log_bounds),
            ):
                monkeypatch.setattr(f"bandpo.{operator}", kernel)
        return names

    @pytest.mark.parametrize(("dtype", "stored"), list(kernels._STORED.items())[2:], ids=str)
    @pytest.mark.parametrize("exact", [False, True])
    @pytest.mark.parametrize(
        "region",
        [KL, REGIONS[4], KL | bandpo.Band("tv", 0.1), bandpo.Band("renyi:2", np.full(50, 0.1))],
        ids=str,
    )
    def test_results_are_those_of_a_float32_copy(
        self,
        region: bandpo.Region,
        exact: bool,
        dtype: torch.dtype,
        stored: str,
        device: torch.device,
        launched: list[str],
    ) -> None:
        old, new = (tensor.to(dtype) for tensor in on(device, batch((8, 50))[:2]))
        x = new.float() - old.float()
        for values in (x, x.to(dtype)):
            for function, given in (
                (clip, values), (clip_ratio, values.exp()), (bandpo.torch.contains, values),
            ):  # fmt: skip
                wanted = function(region, old.float(), given, exact=exact)
                launched.clear()
                found = function(region, old, given, exact=exact)
                assert all(stored in kernel for kernel in launched)
                assert launched or isinstance(region, bandpo.Clip)
                assert found.dtype == wanted.dtype
                assert equal(found, wanted.cpu())
        launched.clear()
        bounds = bandpo.torch.log_bounds(region, old, exact=exact)
        assert all(stored in kernel for kernel in launched)
        single = bandpo.torch.log_bounds(region, old.float(), exact=exact)
        for found, wanted in zip(bounds, single, strict=True):
            assert equal(found, wanted.to(dtype).cpu())

    def test_a_value_in_float64_takes_a_copy(
        self, device: torch.device, launched: list[str]
    ) -> None:
        old = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16, device=device)
        x = torch.tensor([3.0, -3.0], dtype=torch.float64, device=device)
        assert torch.equal(clip(KL, old, x), clip(KL, old.double(), x))
        assert set(launched) == {"bandpo::band_clip<double, bandpo::Table>"}


@pytest.fixture(params=REFERENCE_FILES, ids=lambda path: path.name.removesuffix(".csv.gz"))
def solved(request: pytest.FixtureRequest) -> Reference:
    return read_reference(request.param)


class TestExact:
    def test_bounds_are_inside_and_near_the_reference(
        self, solved: Reference, device: torch.device, request: pytest.FixtureRequest
    ) -> None:
        if device.type == "cpu":
            request.getfixturevalue("emulator").flush_to_zero = False  # never of float64
        logp = torch.from_numpy(solved.logp).to(device)
        bounds = kernels.log_bounds(bandpo.Band(solved.spec, solved.delta), logp)
        assert bounds is not None
        near = (solved.logp >= FAR[0]) & (solved.logp <= FAR[1])
        sides = (
            (bounds[0], solved.log_lower, solved.log_lower_rest, solved.kappa_lower),
            (bounds[1], solved.log_upper, solved.log_upper_rest, solved.kappa_upper),
        )
        converted = solved.spec.startswith(("renyi", "bhattacharyya"))
        tolerance = CONVERTED if converted else SOLVED
        for bound, exact, rest, kappa in sides:
            actual = bound.cpu().numpy()
            with np.errstate(invalid="ignore"):
                beyond = np.abs(actual) - np.abs(exact) - np.sign(exact) * rest
                error = np.where(exact == actual, 0.0, np.abs(beyond) / np.abs(exact))
            tie = np.isinf(actual) & np.isinf(exact)
            assert (tie | (actual == exact) | (beyond <= 0.0)).all()
            well = near & (kappa <= WELL_CONDITIONED)
            assert well.sum() > 300
            assert (error[well] <= tolerance).all(), error[well].max()

    @pytest.mark.parametrize("spec", ["kl", "alpha:0.5", "renyi:2", "hockey-stick:1.2", "tv"])
    def test_contains_equals_the_cpu(self, spec: str, device: torch.device) -> None:
        rng = np.random.default_rng(3)
        logp = -rng.exponential(3.0, 2000) * 10.0 ** rng.uniform(-6.0, 1.0, 2000)
        delta = 10.0 ** rng.uniform(-4.0, 0.0, 2000)
        region = bandpo.Band(spec, delta)
        bound = np.where(rng.random(2000) < 0.5, *region.log_bounds(logp))
        bound = np.where(np.isfinite(bound), bound, -3.0)
        x = bound * (1.0 + rng.choice([-1.0, 1.0], 2000) * 10.0 ** rng.uniform(-8.0, 1.0, 2000))
        # Double precision does not decide next to an ill-conditioned bound.
        outer, inner = (region.contains(logp, x * (1.0 + step)) for step in (1e-9, -1e-9))
        clear = outer == inner
        tensors = on(device, [torch.from_numpy(logp), torch.from_numpy(x)])
        inside = kernels.contains(region, *tensors)
        assert inside is not None
        wanted = region.contains(logp, x)
        assert clear.sum() > 1500
        assert 500 < wanted.sum() < 1700
        np.testing.assert_array_equal(inside.cpu().numpy()[clear], wanted[clear])

    @pytest.mark.parametrize("spec", ["kl", "jensen-shannon", "pearson-chi2", "hockey-stick:4"])
    def test_solved_bounds_are_contained(self, spec: str, device: torch.device) -> None:
        rng = np.random.default_rng(4)
        old = torch.from_numpy(-rng.exponential(3.0, 500)).to(device)
        old[:4] = torch.tensor([0.0, 1.0, -float("inf"), -700.0])
        region = bandpo.Band(spec, (0.02, 0.3))
        bounds = kernels.log_bounds(region, old)
        assert bounds is not None
        for bound in bounds:
            inside = kernels.contains(region, old, bound)
            assert inside is not None
            assert inside.all()

    @pytest.mark.parametrize("spec", ["kl", "tv", "reverse-kl", "alpha:0.5", "bwcs:0.3", "vajda:1"])
    def test_limits_equal_the_cpu(self, spec: str, device: torch.device) -> None:
        logp = np.array([0.0, 0.03125, -np.inf, np.nan])
        region = bandpo.Band(spec, (0.02, 0.3))
        wanted = region.log_bounds(np.minimum(logp, 0.0))  # as a kernel reads those above 0
        bounds = kernels.log_bounds(region, torch.from_numpy(logp).to(device))
        assert bounds is not None
        np.testing.assert_allclose(bounds.cpu().numpy(), wanted, rtol=SOLVED)

    def test_combined_regions_equal_the_cpu(self, device: torch.device) -> None:
        logp = -np.random.default_rng(5).exponential(3.0, 300)
        band = bandpo.Band("kl", np.full(300, 0.05))
        x = np.linspace(-1.0, 1.0, 300)
        old, ratio = on(device, [torch.from_numpy(logp), torch.from_numpy(x)])
        for region in (
            (band | bandpo.Clip(0.2, 0.28)).cap(10),
            bandpo.sides(lower=bandpo.Clip(0.2), upper=band),
        ):
            bounds, inside = kernels.log_bounds(region, old), kernels.contains(region, old, ratio)
            assert bounds is not None
            assert inside is not None
            np.testing.assert_allclose(bounds.cpu().numpy(), region.log_bounds(logp), rtol=SOLVED)
            np.testing.assert_array_equal(inside.cpu().numpy(), region.contains(logp, x))

    @pytest.mark.usefixtures("emulator")
    def test_regions_without_a_kernel_return_none(self) -> None:
        old = torch.tensor([-1.0, -2.0])
        expression = bandpo.Divergence.from_expression("(u-1)^2")
        for region in (
            bandpo.Band(expression, 0.1),
            bandpo.Dcpo() | KL,
            bandpo.Band("kl", np.full(3, 0.1)),
            bandpo.Band("kl", np.full((4, 2), 0.1)),
        ):
            assert kernels.log_bounds(region, old) is None
            assert kernels.contains(region, old, old) is None


def constants_of_the_source() -> Iterator[tuple[str, int]]:
    for name, value in re.findall(r"^const int (\w+) = (\d+);", _core.KERNEL_SOURCE, re.MULTILINE):
        yield name, int(value)


def test_sizes_and_numbers_in_python_equal_the_source() -> None:
    sizes = dict(constants_of_the_source())
    assert sizes["THREADS"] == THREADS
    assert sizes["THREADS"] * sizes["WIDTH"] * sizes["VECTORS"] == CHUNK
    assert sizes["WIDTH"] * sizes["VECTORS"] < 64  # what six bits of a count hold
    for number, name in enumerate(NAMES):
        assert f"{name.upper().replace('-', '_')} = {number}" in _core.KERNEL_SOURCE
    for spec, name in (("tv", "TV"), ("le-cam", "LE_CAM"), ("hockey-stick:2", "HOCKEY_STICK")):
        generator = _core.Divergence(spec).kernel_generator
        assert generator is not None
        assert f" {name} = {generator[0]}" in _core.KERNEL_SOURCE


BROKEN = """
__global__ void divergent(int* out) {
  if (threadIdx.x < 100) __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void outside(int* out) {
  BAND_TABLE_IN_SHARED_MEMORY(table);
  table[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = table[threadIdx.x];
}
"""


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.skipif(SANITIZED, reason="starts the sanitizers itself")
class TestEmulator:
    def run(self, tmp_path: Path, kernel: str, flags: tuple[str, ...], shared: int) -> str:
        library = build(tmp_path, flags=flags, kernels=(kernel,), more=BROKEN)
        code = (
            "import numpy as np, sys; from pathlib import Path\n"
            "from support.emulated import Emulator\n"
            "out = np.zeros(256, np.int32)\n"
            f"Emulator(Path({str(library)!r})).launch({kernel!r}, None, 1, "
            f"'P', (out.ctypes.data,), {shared})\n"
            "print('fine', out.sum())"
        )
        return self.python(["-c", code], flags)

    @staticmethod
    def python(arguments: list[str], flags: tuple[str, ...]) -> str:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        if flags:
            asan = subprocess.run(
                ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
            )
            environment |= {
                "LD_PRELOAD": asan.stdout.strip(),
                # Python frees nothing at its end.
                "ASAN_OPTIONS": "detect_leaks=0",
                "BANDPO_SANITIZED": "1",
            }
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        return f"{done.stdout}{done.stderr}exit {done.returncode}"

    def test_aborts_at_a_divergent_barrier(self, tmp_path: Path) -> None:
        output = self.run(tmp_path, "divergent", (), 0)
        assert "a barrier that not all threads reach" in output
        assert "fine" not in output

    def test_the_sanitizer_reports_a_write_beyond_shared_memory(self, tmp_path: Path) -> None:
        assert "fine 32640\nexit 0" in self.run(tmp_path, "outside", (), 1024)
        output = self.run(tmp_path, "outside", SANITIZERS, 1020)
        assert "AddressSanitizer: heap-buffer-overflow" in output

    def test_every_kernel_passes_the_sanitizers(self) -> None:
        """This file once more, in the emulator alone: every kernel and every way to index."""
        chosen = f"not gpu and ({INDEXING_TESTS})"
        options = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
        output = self.python(["-m", "pytest", *options, __file__], SANITIZERS)
        assert re.search(r"\d\d passed", output), output[-3000:]
        assert output.endswith("exit 0"), output[-3000:]


class FakeCupy:
    """The part of CuPy 14 that launches take, in the emulator; `log` holds the calls."""

    __version__ = "14.0.0"

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.log: list[tuple[Any, ...]] = []
        self.devices: list[int] = []
        self.streams: list[int] = []
        self.broken: Exception | None = None
        self.cuda = SimpleNamespace(
            Device=lambda index: self._current(self.devices, index),
            Stream=SimpleNamespace(from_external=self._from_external),
            runtime=SimpleNamespace(getDeviceCount=lambda: 2, CUDARuntimeError=RuntimeError),
        )

    @staticmethod
    @contextmanager
    def _current(stack: list[int], one: int) -> Iterator[None]:
        stack.append(one)
        yield
        stack.pop()

    def _from_external(self, stream: Any) -> Any:
        version, pointer = stream.__cuda_stream__()
        assert version == 0
        return self._current(self.streams, pointer)

    def RawModule(self, *, code: str, options: tuple[str, ...], name_expressions: Any) -> Any:  # noqa: N802
        if self.broken is not None:
            raise self.broken
        assert code == _core.KERNEL_SOURCE
        assert options == COMPILER_OPTIONS
        [kernel] = name_expressions
        device = self.devices[-1]
        self.log.append(("compiled", kernel, device))

        def launch(grid: Any, block: Any, arguments: Any, *, shared_mem: int) -> None:
            assert self.devices[-1] == device
            assert block == (THREADS,)
            assert all(isinstance(argument, np.generic) for argument in arguments)
            self.log.append(("launched", kernel, device, self.streams[-1], *grid))
            self.emulator.grid = grid[0]
            self.emulator.launch_scalars(kernel, grid[0], arguments, shared_mem)

        return SimpleNamespace(get_function=lambda name: {kernel: launch}[name])


class TestLaunch:
    PROCESSORS = 2
    LOSS = "bandpo::policy_loss<float, bandpo::Table, bandpo::MIN_CLIP_ALONE>"

    @pytest.fixture
    def cupy(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
        cupy = FakeCupy(Emulator(library))
        monkeypatch.setattr("bandpo.backends.cuda.raw_module.cupy_module", lambda: cupy)
        monkeypatch.setattr(launch, "LAUNCHERS", {"cupy": launch.LAUNCHERS["cupy"]})
        for name in ("compiled", "_loaded", "launcher"):
            monkeypatch.setattr(launch, name, cache(getattr(launch, name).__wrapped__))
        monkeypatch.setattr("bandpo.backends.cuda.availability.launcher", launch.launcher)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77)
        )
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(multi_processor_count=self.PROCESSORS),
        )
        return cupy

    def test_kernels_run_on_the_device_and_stream_of_torch(self, cupy: FakeCupy) -> None:
        tokens = batch((5, 8192))
        bounds = bounds_of(KL, tokens[0])
        check_one_as_rust(torch.device("cpu"), tokens, bounds, (*RULES[1], True), None, None)
        totals = SUMS + COUNTS + 3 * PROBABILITY_BINS
        max_blocks = BLOCKS_A_PROCESSOR * self.PROCESSORS
        launches = [
            ("launched", self.LOSS, 1, 77, max_blocks),
            ("launched", TOTALS_KERNEL, 1, 77, max_blocks),
        ]
        # The launcher is chosen by the totals.
        compiled = [("compiled", TOTALS_KERNEL, 1), ("compiled", self.LOSS, 1)]
        assert totals > max_blocks
        assert cupy.log == [*compiled, *launches]
        assert (cupy.devices, cupy.streams) == ([], [])

    def test_kernels_compile_once_for_each_device(
        self, cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokens = batch((1, 9))
        old, new, advantages, valid = tokens
        bounds = bounds_of(KL, old)
        for index in (0, 1, 0, 1):
            monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
            kernels.token_loss(old, new, None, advantages, valid, bounds, "mask", [], False)
        assert [entry[2] for entry in cupy.log if entry[0] == "compiled"] == [0, 0, 1, 1]
        assert [entry[2] for entry in cupy.log if entry[0] == "launched"] == [0, 0, 1, 1] * 2

    def test_a_failed_compilation_is_an_obstacle(self, cupy: FakeCupy) -> None:
        assert obstacle() is None
        assert cupy.log == [("compiled", TOTALS_KERNEL, 1)]
        launch.launcher.cache_clear()
        launch._loaded.cache_clear()
        cupy.broken = RuntimeError("Failed to find CUDA headers.\nTry this")
        reason = obstacle()
        assert isinstance(reason, BrokenExtraError)
        wanted = "bandpo[cuda13] cannot be loaded: cupy: Failed to find CUDA headers."
        assert str(reason).endswith(wanted)

    def test_an_old_cupy_is_an_obstacle(self, cupy: FakeCupy) -> None:
        cupy.cuda.Stream = SimpleNamespace()
        cupy.__version__ = "13.6.0"
        assert str(obstacle()).endswith(": cupy: needs CuPy 14 or newer, got 13.6.0")


class FakeStream:
    """The events of a stream of torch, without a GPU."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.waited: list[object] = []

    def record_event(self) -> object:
        self.events.append(object())
        return self.events[-1]

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


class TestCached:
    """Tensors that outlive a call: constants, tables, radii."""

    def test_a_stream_waits_for_the_stream_that_fills(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, other = FakeStream(), FakeStream()
        recorded: list[object] = []
        tensor: Any = SimpleNamespace(is_cuda=True, device="cuda:0", record_stream=recorded.append)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: one)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        kept = Cached(tensor)
        assert len(one.events) == 1
        assert kept.ready() is tensor
        assert one.waited == recorded == []  # the order of the stream is enough
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: other)
        assert kept.ready() is tensor
        assert other.waited == one.events
        assert recorded == [other]
        kept.mark_filled()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: one)
        kept.ready()
        assert one.waited == other.events
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: other)
        kept.ready()  # the memory is not this stream's
        assert recorded == [other, one, other]
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: one)
        # A capture may not wait for events outside it.
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        kept.ready()
        assert len(one.waited) == 1

    def test_a_first_use_in_a_graph_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        device = torch.device("cuda:0")
        fresh = bandpo.Band("kl", 0.05), bandpo.Clip(0.2), ScheduledBand("kl", Constant(0.1))
        for region in fresh:
            with pytest.raises(ValueError, match="on cuda:0 once before a CUDA graph"):
                _source(id(region), torch.float32, device, exact=False)

    @pytest.mark.parametrize("delta", [0.1, (0.02, 0.3), np.full((3, 1), 0.1)], ids=str)
    @pytest.mark.usefixtures("emulator")
    def test_radii_are_copied_once(self, delta: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        copies: list[object] = []

        def counted(array: Any, device: torch.device) -> torch.Tensor:
            copies.append(array)
            return upload(array, device)

        monkeypatch.setattr(kernels, "upload", counted)
        old = torch.full((3, 50), -1.0, dtype=torch.float64)
        for band in (bandpo.Band("renyi:2", delta), bandpo.Band("renyi:2", delta)):
            for _ in range(2):
                bounds = kernels.log_bounds(band, old)
                assert bounds is not None
                assert kernels.contains(band, old, bounds[0]) is not None
                exact = band.log_bounds(old.numpy())
                np.testing.assert_allclose(bounds.numpy(), exact, rtol=SOLVED)
        assert len(copies) == 2  # with each band its own


class TestWithoutAGpu:
    @pytest.fixture(autouse=True)
    def _no_gpu(self) -> None:
        if obstacle() is None:
            pytest.skip("there is a GPU")

    def test_backend_cuda_names_the_missing_extra(self) -> None:
        old, new, advantages, valid = batch((2, 3))
        with pytest.raises(ImportError, match=r"\[cuda1[23]\]") as raised:
            bandpo.loss.policy_loss(old, new, advantages, valid, region=KL, backend="cuda")
        assert isinstance(raised.value, (MissingExtraError, BrokenExtraError))

    def test_auto_warns_once_when_it_falls_back_to_torch(self) -> None:
        kernels_run.cache_clear()
        with pytest.warns(BackendWarning, match="take the torch backend") as warned:
            assert default_backend("cuda") == "torch"
        assert len(warned) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert default_backend("cuda") == "torch"
