"""Tables: against the solver, and files that are not what they should be."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from bandpo import Band, BandTable
from bandpo.error import InputPathError, InvalidValueError, OutputPathError, TableFileError
from numpy.typing import NDArray
from safetensors.numpy import load_file

TARGET = 1e-6
"""Absolute error of log_upper and lower beyond one float32 ulp of the bound (DESIGN of tables)."""


def float32_log_probs(count: int) -> NDArray[np.float32]:
    """Evenly spaced bit patterns of float32 over [-104, 0], both ends included."""
    last = np.float32(104.0).view(np.uint32)
    bits = np.linspace(0, last, count).astype(np.uint32)
    return -bits.view(np.float32)


@pytest.mark.parametrize("spec", ["kl", "tv", "pearson-chi2", "hellinger", "reverse-kl"])
def test_a_million_float32_log_probs_are_within_the_target(spec: str) -> None:
    band = Band(spec, 0.05)
    logp = float32_log_probs(1_000_001)
    assert logp[0] == 0.0
    assert logp[-1] == -104.0
    log_lower, log_upper = band.log_bounds(logp)
    table_lower, table_upper = band.table().log_bounds(logp)

    ulp = np.spacing(log_upper.astype(np.float32)).astype(np.float64)
    clamped = log_upper > 20.0
    error = np.abs(table_upper - log_upper) - ulp
    assert error[~clamped].max() <= TARGET
    assert (table_upper[clamped] >= 20.0).all()

    lower = np.exp(log_lower)
    error = np.abs(np.exp(table_lower) - lower) - np.spacing(lower.astype(np.float32))
    assert error.max() <= TARGET


@pytest.mark.parametrize("delta", [1e-4, 0.003, 0.2, 1.0])
@pytest.mark.parametrize("spec", ["kl", "reverse-kl", "jensen-shannon", "jeffreys", "alpha:-3"])
def test_tables_hold_their_own_promise(spec: str, delta: float) -> None:
    table = Band(spec, delta).table()
    assert table.nbytes <= 32 * 1024
    assert max(table.max_error) <= TARGET
    verified = table.verify(100_000)
    assert max(verified.max_error) <= TARGET
    assert verified.metadata["verification"] == "sampled"


def test_limits_and_nan() -> None:
    table = Band("reverse-kl", 0.05).table()
    log_lower, log_upper = table.log_bounds([0.0, 1.0, -np.inf, np.nan])
    np.testing.assert_array_equal(log_upper, [0.0, 0.0, np.inf, np.nan])
    np.testing.assert_array_equal(log_lower, [0.0, 0.0, -np.inf, np.nan])


def test_a_table_is_a_region_and_is_cached() -> None:
    table = Band("kl", 0.05).table()
    assert Band("kl", 0.05).table() is table
    assert table.table() is table
    assert table.band == Band("kl", 0.05)
    logp = np.log([0.1, 0.5])
    assert table.contains(logp, [0.5, 0.5]).tolist() == [True, False]
    _, upper = table.bounds(logp)
    np.testing.assert_allclose(upper, Band("kl", 0.05).bounds(logp)[1], atol=3e-6)


def test_save_and_load_give_the_same_table(tmp_path: Path) -> None:
    table = Band("alpha:0.5", (0.01, 0.2)).table().verify(1000)
    path = tmp_path / "table.safetensors"
    table.save(path)
    loaded = BandTable.load(path)
    assert loaded == table
    assert hash(loaded) == hash(table)
    assert loaded.metadata == table.metadata
    assert loaded.band == Band("alpha:0.5", (0.01, 0.2))
    # Any reader of safetensors can open it.
    np.testing.assert_array_equal(load_file(path)["words"].view(np.int32), table.words)


def test_a_table_pickles_small() -> None:
    table = Band("kl", 0.05).table()
    data = pickle.dumps(table)
    assert len(data) < 10_000
    assert pickle.loads(data) == table  # noqa: S301 -- our own bytes


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 2000, -1])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "table.safetensors"
    Band("kl", 0.05).table().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TableFileError, match="not a usable bandpo table"):
        BandTable.load(path)


def test_flipped_bits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    Band("kl", 0.05).table().save(path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(data), 300):
        altered = bytearray(data)
        altered[place] ^= 1 << rng.integers(0, 8)
        path.write_bytes(altered)
        with pytest.raises(TableFileError):
            BandTable.load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(TableFileError):
        BandTable.load(path)


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    table = Band("kl", 0.05).table()
    with pytest.raises(OutputPathError, match="cannot write"):
        table.save(tmp_path / "missing" / "table.safetensors")
    with pytest.raises(OutputPathError, match="cannot write"):
        table.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputPathError, match="cannot read"):
        BandTable.load(tmp_path / "nothing.safetensors")
    with pytest.raises(OSError, match="cannot read"):
        BandTable.load(tmp_path / "nothing.safetensors")


def test_a_per_token_delta_has_no_table() -> None:
    with pytest.raises(InvalidValueError, match="one delta for all tokens"):
        Band("kl", np.array([0.1, 0.2])).table()


def test_verify_reports_progress_and_stops_on_an_exception() -> None:
    seen: list[int] = []
    Band("tv", 0.05).table().verify(600_000, progress=seen.append)
    assert seen[-1] == 600_000
    assert seen == sorted(seen)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Band("tv", 0.05).table().verify(600_000, progress=stop)
    with pytest.raises(InvalidValueError, match="samples must be at least 2, got 1"):
        Band("tv", 0.05).table().verify(1)
