"""Solver and loss in threads, forks and workers give the bits of one call alone."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import joblib
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch.utils.data import DataLoader, Dataset

from bandpo import Band, Clip
from bandpo.loss import policy_loss

TOKENS = 100_000
"""Enough for every thread of either pool."""


def digest(seed: int) -> str:
    """The bits of exact bounds, a table's bounds, losses and gradients of a batch."""
    logp = -np.random.default_rng(seed).exponential(2.0, TOKENS)
    bits = hashlib.sha256()
    for bounds in (
        Band("kl", 0.01 + seed / 1000).log_bounds(logp[: TOKENS // 10]),
        Band("tv", 0.05).table().log_bounds(logp.astype("f4")),
    ):
        bits.update(bounds[0].tobytes() + bounds[1].tobytes())
    # Of numpy, because torch's own operators wait for ever in a fork of a process that used OpenMP.
    moved = np.minimum(logp + 0.3 * np.sin(logp), 0.0)
    old, new, advantages = (
        torch.from_numpy(column.astype("f4").reshape(100, -1))
        for column in (logp, moved, np.cos(7.0 * logp))
    )
    mask = torch.from_numpy(np.ones(old.shape, dtype=bool))
    for region in (Band("kl", 0.05).cap(10), Clip(0.2)):
        leaf = new.detach().requires_grad_()
        result = policy_loss(old, leaf, advantages, mask, region=region, loss_agg_mode="token-sum")
        (gradient,) = torch.autograd.grad(result.loss, leaf)
        bits.update(gradient.numpy().tobytes() + result.per_token.detach().numpy().tobytes())
    return bits.hexdigest()


@pytest.fixture(scope="module")
def wanted() -> list[str]:
    """The digests of one call after another, which has used both pools."""
    return [digest(seed) for seed in range(4)]


def test_sixteen_threads(wanted: list[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(digest, [seed % 4 for seed in range(32)])) == wanted * 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_start_after_both_pools_were_used(
    method: Any, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spawned one reads the number of threads from its environment."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert list(pool.map(digest, range(4), timeout=120)) == wanted


def test_the_number_of_threads_may_change_between_calls(wanted: list[str]) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 2, 16, 1):
            torch.set_num_threads(threads)
            assert digest(1) == wanted[1]
    finally:
        torch.set_num_threads(before)


class _Digests(Dataset[str]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, seed: int) -> str:
        return digest(seed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads
def test_workers_of_a_loader(wanted: list[str]) -> None:
    loader: Iterator[list[str]] = iter(DataLoader(_Digests(), num_workers=2, timeout=120))
    assert [name for names in loader for name in names] == wanted


def test_workers_of_joblib(wanted: list[str]) -> None:
    jobs = [joblib.delayed(digest)(seed) for seed in range(4)]
    for backend in ("threading", "loky"):
        assert joblib.Parallel(2, backend=backend)(jobs) == wanted


def test_arguments_are_not_changed() -> None:
    logp = -np.random.default_rng(0).exponential(2.0, 1000)
    given = [torch.from_numpy(logp.copy()).float()[None] for _ in range(3)]
    given.append(torch.ones(1, 1000))
    before = [tensor.clone() for tensor in given]
    versions = [tensor._version for tensor in given]
    array = logp.copy()
    for region in (Band("kl", 0.05), Band("kl", 0.05) | Clip(0.2)):
        region.log_bounds(array)
        region.contains(array, array)
        for surrogate in ("min-clip", "mask", "weight", "soft-gate", "gamma-weight"):
            for backend in ("native", "torch"):
                result = policy_loss(
                    *given, region=region, surrogate=surrogate,
                    backend=backend,
                )  # fmt: skip
                dict(result.metrics)
                assert result.per_token.shape == (1, 1000)
    assert np.array_equal(array, logp)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))
    assert [tensor._version for tensor in given] == versions
