"""Tables against the solver, and files that are damaged."""

from __future__ import annotations

import json
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import bandpo
from bandpo import Band, BandTable, Clip, Divergence, Region, TableAccuracyWarning
from bandpo.error import (
    InputPathError,
    InvalidTypeError,
    InvalidValueError,
    OutputPathError,
    TableFileError,
)

TARGET = 1e-6
"""Absolute error of log_upper and lower beyond one float32 ulp of the bound, as documented."""


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
def test_tables_of_bands_are_small_and_within_the_target(spec: str, delta: float) -> None:
    table = Band(spec, delta).table()
    assert table.nbytes <= 32 * 1024
    assert max(table.max_error) <= TARGET
    verified = table.verify(100_000)
    assert max(verified.max_error) <= TARGET
    assert verified.metadata["verification"] == "sampled"


def test_limits_are_exact_and_nan_stays_nan() -> None:
    table = Band("reverse-kl", 0.05).table()
    log_lower, log_upper = table.log_bounds([0.0, 0.04, -np.inf, np.nan])
    np.testing.assert_array_equal(log_upper, [0.0, 0.0, np.inf, np.nan])
    np.testing.assert_array_equal(log_lower, [0.0, 0.0, -np.inf, np.nan])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_precisions_of_log_probs_are_all_read_in_float32(dtype: Any) -> None:
    table = bandpo.Band("kl", 0.05).table()
    logp = -np.linspace(0.0, 30.0, 40_000).reshape(2, 20_000).astype(dtype)
    found = table.log_bounds(logp)
    rounded = logp.astype(np.float32)
    for bound, same in zip(found, table.log_bounds(rounded.astype(np.float64)), strict=True):
        assert bound.dtype == np.float64
        np.testing.assert_array_equal(bound, same)
    strided = table.log_bounds(logp[:, ::3])
    for bound, same in zip(strided, found, strict=True):
        np.testing.assert_array_equal(bound, same[:, ::3])


def test_a_table_is_a_region_and_is_cached() -> None:
    table = Band("kl", 0.05).table()
    assert Band("kl", 0.05).table() is table
    assert table.table() is table
    assert table.region == Band("kl", 0.05)
    logp = np.log([0.1, 0.5])
    assert table.contains(logp, [0.5, 0.5]).tolist() == [True, False]
    _, upper = table.bounds(logp)
    np.testing.assert_allclose(upper, Band("kl", 0.05).bounds(logp)[1], rtol=TARGET, atol=0)


def test_save_and_load_give_the_same_table(tmp_path: Path) -> None:
    table = Band("alpha:0.5", (0.01, 0.2)).table().verify(1000)
    path = tmp_path / "table.safetensors"
    table.save(path)
    loaded = BandTable.load(path)
    assert loaded == table
    assert hash(loaded) == hash(table)
    assert loaded.metadata == table.metadata
    assert loaded.region == Band("alpha:0.5", (0.01, 0.2))
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


def test_paths_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
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
    seen: list[tuple[int, int]] = []
    Band("tv", 0.05).table().verify(1_200_000, progress=lambda *counts: seen.append(counts))
    assert seen == [(1 << 20, 1_200_000), (1_200_000, 1_200_000)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Band("tv", 0.05).table().verify(600_000, progress=stop)
    with pytest.raises(InvalidValueError, match=r"samples must be from 2 to \d+, got 1"):
        Band("tv", 0.05).table().verify(1)
    with pytest.raises(InvalidTypeError, match="samples must be an int or None, got float"):
        Band("tv", 0.05).table().verify(2.5)  # type: ignore[arg-type]


class Interrupted(Exception):  # noqa: N818 -- not an error
    pass


def test_an_interrupted_verification_continues_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bandpo.table.verification._SAVE_EVERY", 0.0)
    table = Band("tv", 0.05).table()
    checkpoint = tmp_path / "checkpoint.json"
    count = 5 << 20

    def stop_after_two_blocks(done: int, total: int) -> None:
        if done >= 3 << 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        table.verify(count, progress=stop_after_two_blocks, checkpoint=checkpoint)
    assert json.loads(checkpoint.read_text())["done"] == 2 << 20
    seen: list[int] = []
    resumed = table.verify(
        count, progress=lambda done, total: seen.append(done), checkpoint=checkpoint
    )
    assert seen[0] == 3 << 20
    assert not checkpoint.exists()
    assert resumed.max_error == table.verify(count).max_error

    checkpoint.write_text("{}")
    with pytest.raises(InvalidValueError, match="cannot be used"):
        table.verify(count, checkpoint=checkpoint)
    content = {"table": "0" * 64, "count": count, "done": 1, "max_error": [0.0, 0.0]}
    checkpoint.write_text(json.dumps(content))
    with pytest.raises(InvalidValueError, match="belongs to another verification"):
        table.verify(count, checkpoint=checkpoint)
    with pytest.raises(OutputPathError, match="cannot write"):
        table.verify(count, checkpoint=tmp_path / "missing" / "checkpoint.json")


def test_a_later_sample_lowers_no_stated_error() -> None:
    table = Band("kl", 0.05).table()
    assert max(table.max_error) > 0.0
    verified = table.verify(2)
    assert all(map(operator.ge, verified.max_error, table.max_error))
    # Errors that two samples found are kept by the next two.
    assert verified.verify(2).max_error == verified.max_error


def test_metadata_states_sampled_or_exhaustive() -> None:
    core = Band("kl", 0.05).table()._core
    every = core.checkable()
    assert every == int(np.float32(104.0).view(np.uint32)) + 1
    assert dict(core.verified(every, 1e-7, 2e-7).metadata)["verification"] == "exhaustive"
    assert dict(core.verified(every - 1, 1e-7, 2e-7).metadata)["verification"] == "sampled"
    assert core.verified(every, 1e-7, 2e-7).max_error == (1e-7, 2e-7)


REGIONS = [
    Band("kl", (0.01, 0.2)),
    Band("kl", 0.05).cap(10),
    Band("kl", 0.05) | Clip(0.2, 0.28),
    (Band("tv", 0.1) | Clip(0.2, 0.28)).cap(5),
    Band("reverse-kl", 0.3) & Clip(0.9, 9.0),
    Band("kl", 0.05) & Band("tv", 0.15),
    Band("jensen-shannon", 0.02) | Band("pearson-chi2", 0.05),
    Clip(0.2, 0.28),
    Clip(1.0, np.inf),
    Band(Divergence.from_expression("abs(u-1) + max(u-1.3, 0)"), (0.3, 0.01)),
    Band(Divergence.from_expression("abs(u-1) + max(u-1.3, 0)"), 0.05).cap(3) | Clip(0.1),
    Band(Divergence.from_expression("max(abs(u-1) - 0.2, 0)"), 0.05) & Band("kl", 0.1),
]


def kinked(u: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.abs(u - 1.0) + np.maximum(u - 1.3, 0.0)


def flat_bottomed(u: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(np.abs(u - 1.0) - 0.2, 0.0)


def two_parabolas(u: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum((u - 1.0) ** 2, 3.0 * (u - 1.0) ** 2 - 0.1)


def smooth(u: NDArray[np.float64]) -> NDArray[np.float64]:
    return (u - 1.0) ** 2 / (1.0 + u)


@pytest.mark.parametrize("delta", [0.003, (0.2, 0.05)])
@pytest.mark.parametrize("fn", [kinked, flat_bottomed, two_parabolas, smooth])
def test_tables_of_python_functions_hold_the_target(
    fn: Callable[[NDArray[np.float64]], NDArray[np.float64]], delta: float | tuple[float, float]
) -> None:
    region = Band(Divergence.from_callable(fn), delta)
    for tabulated in region, region.cap(4):
        table = tabulated.table()  # warnings are errors
        assert table.nbytes <= 32 * 1024
        assert max(table.verify(50_000, region=tabulated).max_error) <= TARGET


@pytest.mark.parametrize("region", REGIONS, ids=repr)
def test_any_region_can_be_tabulated(region: Region) -> None:
    table = region.table()
    assert table is region.table()
    assert table.nbytes <= 32 * 1024
    assert max(table.max_error) <= TARGET
    assert max(table.verify(200_000).max_error) <= TARGET
    assert table.region == region
    # `verify` has compared log bounds; these are ratios, in float64.
    logp = -np.random.default_rng(1).exponential(3.0, 10_000)
    exact, tabulated = region.bounds(logp), table.bounds(logp)
    np.testing.assert_allclose(tabulated[0], exact[0], rtol=0, atol=TARGET + 1e-7)
    # A table keeps to the simplex, whether its region does or not.
    upper = np.minimum(exact[1], np.exp(-logp))
    np.testing.assert_allclose(tabulated[1], upper, rtol=3e-6, atol=0)


def test_kinks_lie_exactly_where_curves_cross() -> None:
    capped = Band("kl", 0.05).cap(10)
    at = [start for start, _ in capped.curves(True)]
    assert len(at) == 2
    _, log_upper = Band("kl", 0.05).log_bounds(-at[1])
    assert log_upper == pytest.approx(np.log(10), rel=1e-14, abs=0)


def test_a_table_above_the_target_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    # No region is known to need more than 32 KiB, so the target is set below a float32 ulp.
    monkeypatch.setattr(bandpo.table, "TARGET", 1e-9)
    with pytest.warns(TableAccuracyWarning, match=r"off by .*e-0\d, above 1e-09"):
        table = BandTable.build(Band("reverse-kl", 0.0123))
    assert max(table.max_error) > 1e-9


def test_combinations_equal_their_definitions() -> None:
    logp = np.log(np.linspace(0.001, 0.999, 500))
    band, clip = Band("kl", 0.05), Clip(0.2, 0.28)
    (low_b, up_b), (low_c, up_c) = band.log_bounds(logp), clip.log_bounds(logp)
    low, up = (band | clip).log_bounds(logp)
    np.testing.assert_array_equal(low, np.minimum(low_b, low_c))
    np.testing.assert_array_equal(up, np.maximum(up_b, up_c))
    low, up = (band & clip).log_bounds(logp)
    np.testing.assert_array_equal(low, np.maximum(low_b, low_c))
    np.testing.assert_array_equal(up, np.minimum(up_b, up_c))
    ratio = np.random.default_rng(0).normal(0.0, 0.5, 500)
    np.testing.assert_array_equal(
        (band | clip).contains(logp, ratio), band.contains(logp, ratio) | clip.contains(logp, ratio)
    )
    np.testing.assert_array_equal(
        (band & clip).contains(logp, ratio), band.contains(logp, ratio) & clip.contains(logp, ratio)
    )
    assert band.cap(10).bounds(-9.0)[1] == pytest.approx(10.0)
    assert pickle.loads(pickle.dumps(band | clip)) == band | clip  # noqa: S301
    assert repr(band.cap(10)) == "(Band('kl', 0.05) & Clip(1.0, 9.0))"
    assert (band | clip) != (band & clip)
    assert (band == clip) is False
    with pytest.raises(InvalidValueError, match=r"upper must be at least 1, got 0\.5"):
        band.cap(0.5)
    with pytest.raises(TypeError):
        band | 3  # type: ignore[operator]


def test_a_region_of_too_many_pieces_is_refused() -> None:
    region: Region = Band("kl", 0.05)
    for i in range(8):
        region = region | (Band("tv", 0.02 * 1.7**i) & Clip(0.1, 0.02 * 3.0**i))
    with pytest.raises(InvalidValueError, match="at most 8 smooth pieces"):
        region.table()


def test_the_stated_error_is_one_that_a_lookup_can_have() -> None:
    # The end of a piece cuts a cell of this one next to its middle.
    table = Band("hockey-stick:3.2578494112067435", 0.25).table()
    exact = table.region.log_bounds(float32_log_probs(300_000))[1]
    found = table.log_bounds(float32_log_probs(300_000))[1]
    assert np.abs(found - exact)[exact < 8.0].max() <= TARGET
    assert table.max_error.log_upper <= TARGET


def test_errors_are_those_of_bounds_as_a_loss_clamps_them() -> None:
    below = Clip.from_log_ratio(1.0, 19.999998).table()
    beyond = below.verify(1000, region=Clip.from_log_ratio(1.0, 20.0000001))
    assert beyond.max_error.log_upper <= TARGET
    far = Clip.from_log_ratio(1.0, 19.5).table().verify(1000, region=Clip(1.0, np.inf))
    assert far.max_error.log_upper == pytest.approx(0.5, abs=1e-5)
