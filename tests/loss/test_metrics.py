"""Metrics: a mapping that is merged over micro-batches, read as floats, pickled and compiled."""

from __future__ import annotations

import copy
import json
import math
import pickle
from functools import partial
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch.utils.data import default_collate

from bandpo import Band, Clip, Mask
from bandpo.batch.metrics import Statistics
from bandpo.check import MAX_LOG_PROB
from bandpo.correction import Correction, rollout_correction
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.loss import Metrics, policy_loss
from support.batches import Batch, random_batch
from support.elsewhere import Elsewhere

BAND = Band("kl", 0.05)

RULES: dict[str, dict[str, Any]] = {
    "dual clip": {"region": BAND, "dual_clip": 2.0, "metrics_by_probability": True},
    "truncated": {"region": BAND, "surrogate": Mask(truncation=1.2)},
    "sequences": {
        "region": Band("tv", 0.3), "surrogate": Mask(whole_sequence=True),
        "metrics_by_probability": True,
    },
    "penalty": {"region": BAND, "surrogate": "weight", "log_ratio_penalty": 0.3},
    "gspo": {"region": Clip(0.2), "ratio_level": "sequence"},
    "gmpo": {"region": Clip(0.2), "ratio_level": "geometric-mean"},
}  # fmt: skip

SPLIT = [[3], [0, 1, 2, 4], [], [5, 6, 7, 8, 9, 10], [11]]
"""Rows of each micro-batch, very unequal; one has none, and the last has no token that counts."""

SUMMED = 1e-14
"""Relative: sums of up to 100 positive numbers, added up in another order."""

EXTREMES = {"ratio_min", "ratio_max", "weight_max", "all_ratios_one"}


def whole_batch() -> Batch:
    batch = random_batch((12, 9), seed=4, dtype=torch.float64)
    batch.response_mask[:, 5:] = torch.arange(12)[:, None] % 5 > 2
    batch.response_mask[11] = False
    batch.log_prob[3] += 1.0  # so that a micro-batch of one row differs from the rest
    return batch


def part(batch: Batch, rows: list[int]) -> Batch:
    return Batch(*(tensor[rows] for tensor in batch))


def assert_same(found: Metrics, wanted: Metrics, without: tuple[str, ...] = ()) -> None:
    assert list(found) == [name for name in wanted if name not in without]
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype
        exact = name in EXTREMES or not value.is_floating_point()
        torch.testing.assert_close(value, wanted[name], rtol=0.0 if exact else SUMMED, atol=0.0)


@pytest.mark.parametrize("rule", RULES)
def test_merged_micro_batches_have_the_metrics_of_the_whole(rule: str, backend: str) -> None:
    batch, options = whole_batch(), {**RULES[rule], "backend": backend}
    whole = batch.loss(**options).metrics
    parts = [part(batch, rows).loss(**options).metrics for rows in SPLIT]
    merged = Metrics.merge(parts)
    assert_same(merged, whole)
    assert_same(Metrics.merge([Metrics.merge(parts[:2]), Metrics.merge(parts[2:])]), whole)
    assert_same(Metrics.merge(iter([whole])), whole)
    # The way that is tempting is wrong.
    for name in ("entropy", "approx_kl"):
        mean = torch.stack([each[name] for each in parts]).mean()
        assert abs(mean / whole[name] - 1.0) > 0.05


def test_merged_corrections_have_no_quantiles_and_else_the_metrics_of_the_whole() -> None:
    batch = whole_batch()
    rollout = batch.old_log_prob + 0.1 * torch.randn(12, 9, dtype=torch.float64)
    for correction in (
        Correction(Clip.between(0.9, 1.1), action="truncate"),
        Correction(Clip.between(0.9, 1.1)),
        Correction(statistic="k3", threshold=0.004, level="sequence-mean"),
    ):
        columns = batch.old_log_prob, rollout, batch.response_mask
        whole = correction(*columns).metrics
        assert 0.0 < whole["outside_fraction"] < 1.0
        parts = [correction(*(column[rows] for column in columns)).metrics for rows in SPLIT]
        assert_same(Metrics.merge(parts), whole, ("weight_p01", "weight_p50", "weight_p99"))


def test_batches_without_a_token_merge_to_the_metrics_of_nothing(backend: str) -> None:
    batch = part(whole_batch(), [11])
    for rule in RULES.values():
        empty = batch.loss(**rule, backend=backend).metrics
        assert_same(Metrics.merge([empty, empty]), empty)
        assert empty["ratio_min"] == 1.0
        assert empty["valid_tokens"] == 0
    nothing = rollout_correction(*batch[:2], batch.response_mask, region=Clip(0.2)).metrics
    assert Metrics.merge([nothing, nothing])["weight_max"] == 1.0


@pytest.mark.filterwarnings("ignore::bandpo.error.LogProbWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_positive_log_probs_are_counted(rule: str, dtype: torch.dtype, backend: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    shape = 9, 131  # several blocks of vectors, and an end
    # Above 0 by rounding, at the limit, and beyond it.
    values = torch.tensor([-math.inf, -2.0, -1e-3, 0.0, 0.01, 0.05, 0.0508, 0.4, 7.0, math.inf])
    old, new = (
        values[torch.randint(len(values), shape, generator=generator)].to(dtype) for _ in range(2)
    )
    old[3, 5], new[3, 5], old[4, 6], new[4, 6] = math.nan, 0.1, 0.1, math.nan
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[3:5] = True
    advantages = torch.randn(shape, generator=generator)
    wide = dtype if dtype == torch.float64 else torch.float32
    above = [(log_prob.to(wide) > MAX_LOG_PROB) & mask for log_prob in (old, new)]
    wanted = int((above[0] | above[1]).sum())
    assert 100 < wanted < int(mask.sum())
    parts = [
        policy_loss(
            old[rows], new[rows], advantages[rows], mask[rows], **RULES[rule], backend=backend
        ).metrics
        for rows in (slice(None), slice(1), slice(1, None))
    ]
    assert int(parts[0]["positive_log_probs"]) == wanted
    assert int(Metrics.merge(parts[1:])["positive_log_probs"]) == wanted


def test_a_nan_stays_in_the_merged_metrics(backend: str) -> None:
    batch = whole_batch()
    batch.log_prob[3, 0] = math.nan
    whole = batch.loss(region=BAND, backend=backend).metrics
    parts = [part(batch, rows).loss(region=BAND, backend=backend).metrics for rows in SPLIT]
    merged = Metrics.merge(parts)
    assert merged["nonfinite_tokens"] == 1
    for name, value in whole.items():
        assert bool(merged[name].isnan()) == bool(value.isnan()), name


def test_scalars_are_floats_with_a_prefix_and_names_of_bins() -> None:
    metrics = whole_batch().loss(**RULES["dual clip"]).metrics
    scalars = metrics.scalars("actor/")
    assert json.loads(json.dumps(scalars)) == scalars
    assert {type(value) for value in scalars.values()} == {float}
    bins = ["0-0.001", "0.001-0.01", "0.01-0.1", "0.1-0.5", "0.5-1"]
    names: list[str] = []
    for name, value in metrics.items():
        names += [f"actor/{name}/{one}" for one in bins] if value.ndim else [f"actor/{name}"]
    assert list(scalars) == names
    for k, one in enumerate(bins):
        count = scalars[f"actor/tokens_by_probability/{one}"]
        assert count == metrics["tokens_by_probability"][k]
    assert scalars["actor/all_ratios_one"] == 0.0
    assert scalars["actor/ratio_max"] == metrics["ratio_max"]
    assert metrics.scalars() == {name.removeprefix("actor/"): v for name, v in scalars.items()}
    assert Metrics({}).scalars() == {}


def test_metrics_are_a_mapping() -> None:
    metrics = whole_batch().loss(region=BAND).metrics
    plain = dict(metrics)
    assert {**metrics} == plain == dict(metrics.items()) == metrics
    assert len(metrics) == len(plain)
    assert repr(metrics) == repr(plain)
    assert Metrics(plain) == metrics
    collated = default_collate([metrics, metrics])  # builds one of its kind from a dict
    assert isinstance(collated, Metrics)
    assert collated["valid_tokens"].tolist() == 2 * [metrics["valid_tokens"].item()]


@pytest.mark.parametrize("read_before", [False, True])
def test_a_copy_and_a_pickle_can_be_merged(read_before: bool, backend: str) -> None:
    batch = whole_batch()
    rule = {**RULES["sequences"], "backend": backend}
    rollout = batch.old_log_prob - 0.05
    correction = Correction(Clip.between(0.9, 1.1))(*batch[:1], rollout, batch.response_mask)
    for metrics in (batch.loss(**rule).metrics, correction.metrics):
        if read_before:
            dict(metrics)
        data = pickle.dumps(metrics)
        assert len(data) < 12 * 1024
        loaded = pickle.loads(data)  # noqa: S301 -- our own bytes
        for copied in (loaded, copy.deepcopy(metrics), copy.copy(metrics)):
            assert_same(copied, metrics)
            twice = Metrics.merge([copied, metrics])
            assert twice["valid_tokens"] == 2 * metrics["valid_tokens"]


def test_metrics_of_a_compiled_loss_can_be_merged(backend: str) -> None:
    torch.compiler.reset()
    batch = whole_batch()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*columns: torch.Tensor) -> Metrics:
        return Batch(*columns).loss(**RULES["sequences"], backend=backend).metrics

    wanted = batch.loss(**RULES["sequences"], backend=backend).metrics
    parts = [compiled(*part(batch, rows)) for rows in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11])]
    assert_same(Metrics.merge(parts), wanted)
    torch.compiler.reset()


def moved(metrics: Metrics, device: str) -> Statistics:
    """What metrics are made of on a device that this machine need not have."""
    made_of = metrics._statistics
    statistics = made_of if isinstance(made_of, Statistics) else made_of()  # type: ignore[misc]

    def there(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: Elsewhere(tensor, device) for name, tensor in tensors.items()}

    sums, minima, maxima = map(there, statistics[:3])
    return statistics._replace(sums=sums, minima=minima, maxima=maxima)


@pytest.mark.parametrize("rule", RULES)
def test_metrics_of_several_devices_are_merged_on_the_cpu(rule: str) -> None:
    batch, options = whole_batch(), {**RULES[rule], "backend": "torch"}
    parts = [part(batch, rows).loss(**options).metrics for rows in SPLIT]
    devices = ("cuda:0", "cuda:1", "cpu", "cuda:1", "xpu")
    apart = [
        given if device == "cpu" else Metrics(partial(moved, given, device))
        for given, device in zip(parts, devices, strict=True)
    ]
    merged = Metrics.merge(apart)
    assert {type(value) for value in merged.values()} == {torch.Tensor}
    assert_same(merged, Metrics.merge(parts))
    # On one device nothing is copied.
    there = Statistics.merged([moved(given, "cuda:1") for given in parts[:2]])
    assert {str(value.device) for value in there.sums.values()} == {"cuda:1"}


def on_meta(**options: Any) -> Metrics:
    return Batch(*(column.to("meta") for column in whole_batch())).loss(**options).metrics


def test_metrics_without_numbers_are_refused_where_numbers_are_needed() -> None:
    with_numbers, without = whole_batch().loss(region=BAND).metrics, on_meta(region=BAND)
    for parts in ([with_numbers, without], [without, with_numbers]):
        with pytest.raises(InvalidValueError, match="parts must hold numbers, got 'valid' on dev"):
            Metrics.merge(parts)
    assert Metrics.merge([without, without])["entropy"].is_meta
    for metrics in (without, Metrics({"loss": torch.ones(()), **without})):
        with pytest.raises(InvalidValueError, match="metrics must hold numbers, got 'clip_fr"):
            metrics.scalars()


def test_scalars_of_several_devices_are_read_from_each() -> None:
    there = Elsewhere(torch.tensor(0.25), "cuda:1")
    metrics = Metrics({"here": torch.tensor(3, dtype=torch.int64), "there": there})
    assert metrics.scalars() == {"here": 3.0, "there": 0.25}


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([], InvalidValueError, "parts must hold at least one Metrics, got none"),
        ([{"entropy": torch.ones(())}], InvalidTypeError, "parts must be Metrics.* got dict"),
        ([Metrics({})], InvalidValueError, "parts must be Metrics with the sums.* values alone"),
        (
            [random_batch((2, 3)).loss(region=BAND).metrics,
             random_batch((2, 3), dtype=torch.float64).loss(region=BAND).metrics],
            InvalidValueError, r"parts must be of the same rule, dtype .*\.float32\) and .*float64",
        ),
        (
            [random_batch((2, 3)).loss(region=BAND).metrics,
             random_batch((2, 3)).loss(region=BAND, metrics_by_probability=True).metrics],
            InvalidValueError, "parts must be of the same rule, .* 'by_probability'",
        ),
    ],
    ids=["none", "dict", "values", "dtypes", "choices"],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(
    parts: list[Metrics], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Metrics.merge(parts)
