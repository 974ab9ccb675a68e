"""Corrections: decisions, weights, NaN, shapes, metrics and errors."""

from __future__ import annotations

import inspect
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
from bandpo import Band, Clip, order
from bandpo.correction import (
    MISMATCH_LIMIT,
    Correction,
    RolloutCorrection,
    rollout_correction,
    warning,
)
from bandpo.correction.metrics import _quantiles
from bandpo.error import InvalidTypeError, InvalidValueError, MismatchWarning
from bandpo.loss import LOG_RATIO_LIMIT, PROBABILITY_EDGES, PolicyLoss, policy_loss
from bandpo.schedule import Linear, ScheduledBand

Tensor = torch.Tensor

# torch's own, raised on the first import of its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

NAN, INF = math.nan, math.inf
KPOP = Band("kl", 0.1) & Band("reverse-kl", 0.1)

RULES: dict[str, Correction] = {
    "truncate": Correction(Clip.between(0, 2), action="truncate"),
    "mask": Correction(Clip.between(0.5, 2)),
    "mask-only": Correction(Clip.between(0.5, 2), action="mask-only"),
    "band": Correction(KPOP),
    "truncate to a band": Correction(Band("kl", 0.01), action="truncate"),
    "product, truncate": Correction(
        Clip.between(0, 2), level="sequence-product", action="truncate"
    ),
    "product": Correction(Clip.between(0.5, 2), level="sequence-product"),
    "geometric mean, truncate": Correction(
        Clip.between(0.9, 1.1), level="geometric-mean", action="truncate"
    ),
    "geometric mean": Correction(Clip.between(0.9, 1.1), level="geometric-mean"),
    "token k3": Correction(statistic="k3", threshold=0.01),
    "mean k1": Correction(statistic="k1", threshold=0.01, level="sequence-mean"),
    "sum k2": Correction(statistic="k2", threshold=0.1, level="sequence-sum"),
    "max distance": Correction(statistic="ratio-distance", threshold=0.5, level="sequence-max"),
    "mean kl": Correction(statistic="bernoulli-kl", threshold=3e-3, level="sequence-mean"),
    "negative": Correction(
        statistic="k1", threshold=0.0, level="sequence-mean", negative_only=True
    ),
    "outward": Correction(
        statistic="ratio-distance", threshold=0.1, level="sequence-mean", outward_only=True
    ),
    "outward tokens": Correction(KPOP, outward_only=True),
}


COLUMNS_WITH_NAN = [
    (name, column)
    for name, rule in RULES.items()
    for column in ("old", "rollout", "both infinite", "advantages")
    if column != "advantages" or rule.needs_advantages
]


COMPILED = ("truncate", "band", "product", "max distance", "mean kl", "outward")
"""Rules that together take every path; a compilation takes a second."""


@pytest.fixture(autouse=True)
def already_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies are far apart here; the warning of it has tests of its own."""
    monkeypatch.setattr(warning, "_WARNED", {"rollout_log_prob"})


class SampledBatch:
    def __init__(self, shape: tuple[int, ...] = (16, 8), seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        rollout = -rng.exponential(1.5, shape)
        old = np.minimum(rollout + rng.normal(0.0, 0.3, shape), -1e-6)
        self.old, self.rollout = torch.from_numpy(old), torch.from_numpy(rollout)
        self.mask = torch.from_numpy(rng.random(shape) < 0.8)
        self.advantages = torch.from_numpy(rng.normal(size=shape))

    def correct(self, rule: Correction, **options: Any) -> RolloutCorrection:
        options = {"advantages": self.advantages, **options}
        return rule(self.old, self.rollout, self.mask, **options)

    def of_loss(self) -> tuple[Tensor, ...]:
        """Arguments of a loss whose ratios are 1."""
        return self.old, self.old, self.advantages, self.mask


def tensor(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def weights_of(rule: Correction, log_ratio: Tensor, **options: Any) -> Tensor:
    """The weights of tokens of rollout probability e^-2 that all count."""
    rollout = torch.full_like(log_ratio, -2.0)
    mask = torch.ones_like(log_ratio)
    return rule(rollout + log_ratio, rollout, mask, **options).weights


class TestDecision:
    @pytest.mark.parametrize("level", ["token", "sequence-product", "geometric-mean"])
    def test_ends_of_a_region_are_inside(self, level: Any) -> None:
        clip = Clip.from_log_ratio(0.5)
        for end, outside in ((0.5, 0.5 + 1e-12), (-0.5, -0.5 - 1e-12)):
            rule = Correction(clip, level=level, action="mask-only")
            assert weights_of(rule, tensor(end)) == 1.0
            assert weights_of(rule, tensor(outside)) == 0.0

    def test_a_statistic_equal_to_its_threshold_is_kept(self) -> None:
        rule = Correction(statistic="k2", threshold=0.125)
        assert weights_of(rule, tensor(0.5)) == pytest.approx(math.exp(0.5), rel=1e-15)
        assert weights_of(rule, tensor(0.500001)) == 0.0

    def test_a_region_is_read_at_the_rollout_probability(self) -> None:
        region = Band("kl", 0.05)
        rollout = torch.tensor([[1e-3, 0.9]], dtype=torch.float64).log()
        old = rollout + math.log(1.1)  # within the band of the rare token alone
        kept = Correction(region)(old, rollout, torch.ones(1, 2)).kept
        assert kept.tolist() == [[True, False]]
        assert region.contains(rollout.numpy(), math.log(1.1)).tolist() == [[True, False]]

    def test_an_array_of_deltas_has_the_shape_of_the_batch(self) -> None:
        batch = SampledBatch()
        each = Band("kl", np.full((16, 8), 0.01))
        for action in ("mask", "truncate"):
            wanted = batch.correct(Correction(Band("kl", 0.01), action=action)).weights
            found = batch.correct(Correction(each, action=action)).weights
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0.0)

    def test_a_region_that_changes_takes_effect(self) -> None:
        batch = SampledBatch()
        source = ScheduledBand("kl", Linear(0.1, 1e-4, steps=1))
        rule = Correction(source)
        before = int(batch.correct(rule).kept.sum())
        source.step()
        assert int(batch.correct(rule).kept.sum()) < before

    def test_outward_keeps_tokens_that_move_back(self) -> None:
        rule = Correction(Clip(0.1), outward_only=True, action="mask-only")
        log_ratio = tensor(0.5, 0.5, -0.5, -0.5, 0.5, 0.01)
        advantages = tensor(1.0, -1.0, 1.0, -1.0, 0.0, 1.0)
        found = weights_of(rule, log_ratio, advantages=advantages)
        assert found.tolist() == [[0.0, 1.0, 1.0, 0.0, 1.0, 1.0]]

    def test_negative_takes_the_mean_advantage_of_a_sequence(self) -> None:
        by_sequence = Correction(
            statistic="k1", threshold=0.1, level="sequence-mean", negative_only=True,
            action="mask-only",
        )  # fmt: skip
        by_token = Correction(statistic="k1", threshold=0.1, negative_only=True, action="mask-only")
        log_ratio, advantages = tensor(-0.5, -0.5), tensor(1.0, -3.0)
        assert weights_of(by_sequence, log_ratio, advantages=advantages).tolist() == [[0.0, 0.0]]
        assert weights_of(by_token, log_ratio, advantages=advantages).tolist() == [[1.0, 0.0]]
        advantages = tensor(3.0, -1.0)
        assert weights_of(by_sequence, log_ratio, advantages=advantages).tolist() == [[1.0, 1.0]]


class TestInfinityAndNan:
    @pytest.mark.parametrize("name", RULES)
    def test_masked_tokens_have_no_effect(self, name: str) -> None:
        batch = SampledBatch()
        wanted = batch.correct(RULES[name])
        rng = np.random.default_rng(1)
        junk = torch.from_numpy(rng.choice([NAN, INF, -INF, 1e300], (16, 8)))
        for column in ("old", "rollout", "advantages"):
            setattr(batch, column, torch.where(batch.mask, getattr(batch, column), junk))
        found = batch.correct(RULES[name])
        assert torch.equal(found.weights, wanted.weights)
        assert torch.equal(found.kept, wanted.kept)
        assert not found.weights[~batch.mask].any()
        for metric, value in wanted.metrics.items():
            assert torch.equal(found.metrics[metric], value), metric

    @pytest.mark.parametrize(("name", "column"), COLUMNS_WITH_NAN)
    def test_a_nan_is_neither_dropped_nor_kept_unseen(self, name: str, column: str) -> None:
        rule, batch = RULES[name], SampledBatch()
        wanted = batch.correct(rule)
        batch.mask[3, 5] = True
        if column == "both infinite":
            batch.old[3, 5] = batch.rollout[3, 5] = -INF
        else:
            getattr(batch, column)[3, 5] = NAN
        for packed in (False, True):
            found = self.packed(batch, rule) if packed else batch.correct(rule)
            unseen = ~found.weights.isnan()
            if rule.level == "token":
                assert not unseen[3, 5]
                unseen[3, 5] = True
            else:
                assert not unseen[3][batch.mask[3]].any()
                unseen[3] = True
            assert unseen.all()
            assert found.kept[3, 5]
            others = torch.arange(16) != 3
            torch.testing.assert_close(found.weights[others], wanted.weights[others])
            assert found.metrics["weight_mean"].isnan()
            assert found.metrics["weight_max"].isnan()

    @staticmethod
    def packed(batch: SampledBatch, rule: Correction) -> RolloutCorrection:
        columns = (batch.old, batch.rollout, batch.mask)
        found = rule(
            *(column.reshape(-1) for column in columns),
            advantages=batch.advantages.reshape(-1),
            cu_seqlens=torch.arange(0, 129, 8),
        )
        shape = batch.mask.shape
        return RolloutCorrection(
            found.weights.reshape(shape), found.kept.reshape(shape), found.metrics
        )

    def test_infinite_ratios_are_limits_and_weights_clamped(self) -> None:
        e20 = math.exp(LOG_RATIO_LIMIT)
        everything = Correction(Clip(1.0, INF), action="truncate")
        for rollout, old, wanted in ((-INF, -1.0, e20), (-1.0, -INF, 1 / e20), (-60.0, -1.0, e20)):
            found = everything(tensor(old), tensor(rollout), torch.ones(1, 1)).weights
            torch.testing.assert_close(found, tensor(wanted))
            for statistic in ("k1", "k2", "k3", "ratio-distance", "bernoulli-kl", "bernoulli-tv"):
                rule = Correction(statistic=statistic, threshold=10.0)
                kept = rule(tensor(old), tensor(rollout), torch.ones(1, 1)).kept
                at_most_1 = statistic == "bernoulli-tv" or (
                    statistic == "ratio-distance" and old == -INF
                )
                falling = statistic == "k1" and old == -1.0  # -ln B is -inf
                finite = statistic == "bernoulli-kl" and old == -1.0  # KL(rollout || old)
                assert bool(kept) is (at_most_1 or falling or finite), (statistic, rollout, old)

    def test_a_product_beyond_the_clamp_still_decides(self) -> None:
        rule = Correction(Clip.between(0, 1e12), level="sequence-product")
        assert (weights_of(rule, tensor(*[1.0] * 27)) == math.exp(20.0)).all()
        assert (weights_of(rule, tensor(*[1.0] * 28)) == 0.0).all()

    def test_a_sequence_without_tokens_changes_nothing(self) -> None:
        for name, rule in RULES.items():
            batch = SampledBatch()
            wanted = batch.correct(rule).weights
            batch.mask[2] = False
            found = batch.correct(rule)
            assert not found.weights[2].any(), name
            others = torch.arange(16) != 2
            assert torch.equal(found.weights[others], wanted[others])


class TestTensors:
    @pytest.mark.parametrize("name", RULES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_half_precision_is_computed_in_float32(self, name: str, dtype: torch.dtype) -> None:
        batch = SampledBatch()
        batch.old, batch.rollout = batch.old.to(dtype), batch.rollout.to(dtype)
        found = batch.correct(RULES[name])
        batch.old, batch.rollout = batch.old.float(), batch.rollout.float()
        wanted = batch.correct(RULES[name])
        assert found.weights.dtype == torch.float32
        assert torch.equal(found.weights, wanted.weights)
        assert all(not v.is_floating_point() or v.dtype == torch.float32
                   for v in found.metrics.values())  # fmt: skip

    def test_float64_is_kept(self) -> None:
        batch = SampledBatch()
        assert batch.correct(RULES["mask"]).weights.dtype == torch.float64
        batch.rollout = batch.rollout.float()
        assert batch.correct(RULES["mask"]).weights.dtype == torch.float64

    @pytest.mark.parametrize("name", RULES)
    def test_shapes(self, name: str) -> None:
        batch, rule = SampledBatch(), RULES[name]
        wanted = batch.correct(rule)
        column = rule(
            *(t[..., None] for t in (batch.old, batch.rollout, batch.mask)),
            advantages=batch.advantages[..., None],
        )
        assert column.weights.shape == column.kept.shape == (16, 8, 1)
        assert torch.equal(column.weights[..., 0], wanted.weights)
        of_sequence = batch.advantages[:, :1].expand(16, 8)
        wanted = batch.correct(rule, advantages=of_sequence)
        for advantages in (of_sequence[:, :1], of_sequence[:, 0]):
            assert torch.equal(batch.correct(rule, advantages=advantages).weights, wanted.weights)
        empty = torch.zeros(0, 8)
        assert rule(empty, empty, empty, advantages=empty).weights.shape == (0, 8)
        empty = torch.zeros(2, 0)
        assert rule(empty, empty, empty, advantages=empty).weights.shape == (2, 0)

    def test_masks_of_numbers(self) -> None:
        batch = SampledBatch()
        wanted = batch.correct(RULES["product"]).weights
        for dtype in (torch.int64, torch.float32, torch.uint8):
            found = RULES["product"](batch.old, batch.rollout, batch.mask.to(dtype)).weights
            assert torch.equal(found, wanted)

    def test_nothing_has_a_gradient(self) -> None:
        batch = SampledBatch()
        batch.old.requires_grad_()
        batch.rollout.requires_grad_()
        found = batch.correct(RULES["outward"])
        assert not found.weights.requires_grad
        assert not any(value.requires_grad for value in found.metrics.values())

    @pytest.mark.parametrize("name", RULES)
    def test_a_device_without_values_will_do(self, name: str) -> None:
        batch = SampledBatch()
        for column in ("old", "rollout", "mask", "advantages"):
            setattr(batch, column, getattr(batch, column).to("meta"))
        found = batch.correct(RULES[name])
        assert found.weights.device.type == "meta"
        assert all(value.device.type == "meta" for value in found.metrics.values())

    @pytest.mark.parametrize("name", COMPILED)
    def test_compiles_without_a_break(self, name: str) -> None:
        torch.compiler.reset()
        batch, rule = SampledBatch(), RULES[name]

        def run(old: Tensor, rollout: Tensor, mask: Tensor, advantages: Tensor) -> Any:
            return rule(old, rollout, mask, advantages=advantages)

        arguments = (batch.old, batch.rollout, batch.mask, batch.advantages)
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
        wanted = run(*arguments)
        torch.testing.assert_close(found.weights, wanted.weights)
        assert torch.equal(found.kept, wanted.kept)
        for metric, value in wanted.metrics.items():
            torch.testing.assert_close(found.metrics[metric], value)

    def test_the_one_call_compiles_on_packed_tensors(self) -> None:
        torch.compiler.reset()
        batch = SampledBatch((128,))
        offsets = torch.tensor([0, 5, 5, 128])

        def run(old: Tensor, rollout: Tensor, mask: Tensor, offsets: Tensor) -> Any:
            return rollout_correction(
                old, rollout, mask, statistic="k3", threshold=0.05, level="sequence-max",
                cu_seqlens=offsets,
            )  # fmt: skip

        arguments = (batch.old, batch.rollout, batch.mask, offsets)
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
        torch.testing.assert_close(found.weights, run(*arguments).weights)


class TestMetrics:
    def test_are_their_formulas(self) -> None:
        batch = SampledBatch((64, 16))
        rule = RULES["band"]
        found = batch.correct(rule)
        mask = batch.mask.numpy()
        weights, kept = found.weights.numpy()[mask], found.kept.numpy()[mask]
        log_ratio = (batch.old - batch.rollout).numpy()[mask]
        wanted = {
            "kept_fraction": kept.mean(),
            "outside_fraction": 1.0 - kept.mean(),
            "effective_sample_size": weights.sum() ** 2 / (len(weights) * (weights**2).sum()),
            "weight_mean": weights.mean(),
            "weight_max": weights.max(),
            "weight_p01": np.quantile(weights, 0.01),
            "weight_p50": np.quantile(weights, 0.5),
            "weight_p99": np.quantile(weights, 0.99),
            "log_ratio_abs": np.abs(log_ratio).mean(),
            "valid_tokens": mask.sum(),
        }
        index = np.digitize(np.exp(batch.rollout.numpy()[mask]), PROBABILITY_EDGES[1:-1])
        counts = np.bincount(index, minlength=5)
        by_bin = {
            "tokens_by_probability": counts,
            "kept_fraction_by_probability": np.bincount(index, kept, 5) / counts,
        }
        assert found.metrics.keys() == wanted.keys() | by_bin.keys()
        for name, value in (wanted | by_bin).items():
            np.testing.assert_allclose(found.metrics[name].numpy(), value, rtol=1e-12, err_msg=name)

    def test_outside_counts_tokens_that_are_truncated_or_move_back(self) -> None:
        batch = SampledBatch()
        outside = batch.correct(Correction(Clip(0.2))).metrics["outside_fraction"]
        assert outside > 0.0
        for rule in (Correction(Clip(0.2), action="truncate"),
                     Correction(Clip(0.2), outward_only=True)):  # fmt: skip
            found = batch.correct(rule)
            assert found.metrics["outside_fraction"] == outside
            assert found.metrics["kept_fraction"] > 1.0 - outside
        everywhere = batch.correct(Correction(Clip(0.2), action="truncate"))
        assert torch.equal(everywhere.kept, batch.mask)

    def test_are_neutral_for_an_empty_batch(self) -> None:
        batch = SampledBatch()
        batch.mask[:] = False
        metrics = batch.correct(RULES["product"]).metrics
        ones = {"kept_fraction", "effective_sample_size", "weight_mean", "weight_max",
                "weight_p01", "weight_p50", "weight_p99"}  # fmt: skip
        for name, value in metrics.items():
            if name != "kept_fraction_by_probability":
                assert (value == (1.0 if name in ones else 0.0)).all(), name

    def test_are_0_for_a_batch_that_is_all_dropped(self) -> None:
        batch = SampledBatch()
        metrics = batch.correct(Correction(statistic="k2", threshold=0.0)).metrics
        assert metrics["kept_fraction"] == metrics["effective_sample_size"] == 0.0
        assert metrics["weight_mean"] == metrics["weight_max"] == 0.0

    def test_equal_weights_are_a_full_sample(self) -> None:
        batch = SampledBatch()
        batch.old = batch.rollout + 0.1
        metrics = batch.correct(RULES["mask"]).metrics
        assert metrics["effective_sample_size"] == pytest.approx(1.0)

    def test_keep_their_values_when_an_input_changes_in_place(self) -> None:
        batch = SampledBatch()
        wanted = dict(batch.correct(RULES["mask"]).metrics)
        found = batch.correct(RULES["mask"])
        for column in (batch.old, batch.rollout):
            column.fill_(-1.0)
        batch.mask.fill_(False)
        for name, value in wanted.items():
            assert torch.equal(found.metrics[name], value), name


def by_a_rule(batch: SampledBatch) -> None:
    RULES["mask"](batch.old, batch.rollout, batch.mask)


def by_arguments(batch: SampledBatch) -> None:
    rollout_correction(batch.old, batch.rollout, batch.mask, region=Clip(0.2))


def in_a_loss(batch: SampledBatch) -> None:
    rule: dict[str, Any] = {"region": Clip(0.2), "correction": RULES["mask"]}
    policy_loss(*batch.of_loss(), rollout_log_prob=batch.rollout, **rule)


def in_a_module(batch: SampledBatch) -> None:
    module = PolicyLoss(Clip(0.2), correction=RULES["mask"])
    module(*batch.of_loss(), rollout_log_prob=batch.rollout)


class TestMismatchWarning:
    @pytest.fixture(autouse=True)
    def fresh(self, already_warned: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(warning, "_WARNED", set())

    @pytest.mark.parametrize("call", [by_a_rule, by_arguments, in_a_loss, in_a_module])
    def test_is_given_at_the_callers_line(self, call: Callable[[SampledBatch], None]) -> None:
        batch = SampledBatch()
        batch.old = batch.rollout - 1.1 * MISMATCH_LIMIT
        with pytest.warns(MismatchWarning) as caught:
            call(batch)
        lines, first = inspect.getsourcelines(call)
        assert (caught[0].filename, caught[0].lineno) == (__file__, first + len(lines) - 1)

    def test_is_given_once(self) -> None:
        batch = SampledBatch()
        batch.old = batch.rollout - 1.1 * MISMATCH_LIMIT
        with pytest.warns(MismatchWarning, match=r"0\.55 on average, above 0\.5"):
            batch.correct(RULES["mask"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batch.correct(RULES["mask"])

    def test_needs_more_than_the_limit_in_tokens_that_count(self) -> None:
        batch = SampledBatch()
        batch.old = batch.rollout - 0.9 * MISMATCH_LIMIT
        batch.old[~batch.mask] = -100.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batch.correct(RULES["mask"])


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "region or statistic must be given, and not both: .*; got neither"),
            ({"region": Clip(0.2), "statistic": "k1"}, r"; got Clip\(0.2, 0.2\) and 'k1'"),
            ({"statistic": "k1"}, "threshold must be given with statistic 'k1'"),
            ({"statistic": "k1", "threshold": -1.0}, "threshold must be finite and at least 0"),
            ({"statistic": "k1", "threshold": NAN}, "threshold must be finite and at least 0"),
            ({"statistic": "k1", "threshold": INF}, "threshold must be finite and at least 0"),
            ({"region": Clip(0.2), "threshold": 2.0}, "threshold must be left out with a region"),
            ({"region": Clip(0.2), "level": "sequence"},
             "level of a region must be one of token, sequence-product, geometric-mean"),
            ({"region": Clip(0.2), "level": "sequence-mean"}, "level of a region must be one of"),
            ({"statistic": "k1", "threshold": 1.0, "level": "geometric-mean"},
             "level of a statistic must be one of token, sequence-mean"),
            ({"statistic": "kl", "threshold": 1.0}, "statistic must be one of k1, .* got 'kl'"),
            ({"statistic": "bernoulli-renyi:2", "threshold": 1.0},
             "statistic must be one of .*bernoulli-tv, bernoulli-kl"),
            ({"region": Band("kl", 0.1), "level": "geometric-mean"},
             "region must be a Clip with level 'geometric-mean'"),
            ({"region": Clip(0.2), "action": "drop"}, "action must be one of truncate, mask"),
            ({"statistic": "k1", "threshold": 1.0, "action": "truncate"},
             "action must be 'mask' or 'mask-only' with statistic"),
            ({"region": Clip(0.2), "negative_only": True, "outward_only": True},
             "outward_only must be left out with negative_only"),
            ({"region": Clip(0.2), "negative_only": True, "action": "truncate"},
             "negative_only must be left out with action 'truncate'"),
        ],
        ids=str,
    )  # fmt: skip
    def test_a_rule_that_makes_no_sense_is_refused(
        self, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InvalidValueError, match=message):
            Correction(**arguments)
        ones = torch.ones(2, 3)
        with pytest.raises(InvalidValueError, match=message):
            rollout_correction(ones, ones, ones, **arguments)

    def test_a_spec_is_its_region(self) -> None:
        assert Correction("kl@0.1 & reverse-kl@0.1") == Correction(
            Band("kl", 0.1) & Band("reverse-kl", 0.1)
        )
        assert Correction("preset:ppo").region == Clip(0.2)
        with pytest.raises(InvalidValueError, match=r"preset\('icepop'\)\.correction has the arg"):
            Correction("icepop")
        with pytest.raises(InvalidValueError, match=r"column 1: .* did you mean 'kl'"):
            Correction("kll@0.1")

    def test_wrong_types_are_refused(self) -> None:
        with pytest.raises(InvalidTypeError, match=r"region must be a bandpo\.Band, .* got float"):
            Correction(0.1)  # type: ignore[arg-type]
        with pytest.raises(InvalidTypeError, match="negative_only must be a bool, got int"):
            Correction(Clip(0.2), negative_only=1)  # type: ignore[arg-type]
        with pytest.raises(InvalidTypeError, match="threshold must be a real number, got str"):
            Correction(statistic="k1", threshold="1")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"rollout": None}, InvalidTypeError, "rollout_log_prob must be .* got None: the log-"),
            ({"old": torch.ones(2, 3, dtype=torch.int64)}, InvalidTypeError,
             "old_log_prob must be float32"),
            ({"rollout": torch.ones(2, 3, dtype=torch.int64)}, InvalidTypeError,
             "rollout_log_prob must be float32"),
            ({"mask": None}, InvalidTypeError, "response_mask must be a torch.Tensor"),
            ({"mask": torch.ones(2, 3, dtype=torch.complex64)}, InvalidTypeError,
             "response_mask must be bool, int or float"),
            ({"rollout": torch.ones(2, 4)}, InvalidValueError,
             r"rollout_log_prob must have shape \(2, 3\) like old_log_prob's \(2, 3\), got \(2, 4"),
            ({"mask": torch.ones(2)}, InvalidValueError, "response_mask must have shape"),
            ({"old": torch.ones(2, 3, 2)}, InvalidValueError, "old_log_prob must have shape"),
            ({"advantages": torch.ones(3)}, InvalidValueError, "advantages must have shape"),
            ({"advantages": None}, InvalidValueError,
             "advantages must be given with negative_only"),
            ({"rollout": torch.ones(2, 3, device="meta")}, InvalidValueError,
             "rollout_log_prob must be on old_log_prob's device cpu, got meta"),
        ],
        ids=str,
    )  # fmt: skip
    def test_a_batch_that_does_not_fit_is_refused(
        self, changes: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        ones = torch.ones(2, 3)
        given = {"old": ones, "rollout": ones, "mask": ones, "advantages": ones, **changes}
        with pytest.raises(error, match=message):
            RULES["negative"](
                given["old"], given["rollout"], given["mask"], advantages=given["advantages"]
            )

    def test_packed_tensors_need_offsets_for_sequences(self) -> None:
        ones = torch.ones(6)
        assert (RULES["mask"](ones, ones, ones).weights == 1.0).all()
        with pytest.raises(InvalidValueError, match="cu_seqlens must be given for level 'sequence"):
            RULES["mean kl"](ones, ones, ones)
        with pytest.raises(InvalidValueError, match="cu_seqlens must rise from 0"):
            RULES["mean kl"](ones, ones, ones, cu_seqlens=torch.tensor([0, 5]))
        with pytest.raises(InvalidValueError, match=r"packed, .*: old_log_prob has shape"):
            RULES["mask"](*[ones[None]] * 3, cu_seqlens=torch.tensor([0, 6]))


class TestRuleAsData:
    def test_is_compared_hashed_and_pickled(self) -> None:
        rule = Correction(Clip.between(0.5, 5), action="mask-only")
        assert rule == Correction(Clip(0.5, 4.0), action="mask-only")
        assert rule != Correction(Clip(0.5, 4.0))
        assert len({rule, Correction(Clip(0.5, 4.0), action="mask-only")}) == 1
        assert pickle.loads(pickle.dumps(rule)) == rule  # noqa: S301  # made in this line
        assert Correction(statistic="k1", threshold=np.float32(0.5)).threshold == 0.5
        with pytest.raises(AttributeError):
            rule.level = "token"  # type: ignore[misc]

    def test_one_call_is_the_same(self) -> None:
        batch = SampledBatch()
        wanted = batch.correct(RULES["outward"])
        found = rollout_correction(
            batch.old, batch.rollout, batch.mask, statistic="ratio-distance", threshold=0.1,
            level="sequence-mean", outward_only=True, advantages=batch.advantages,
        )  # fmt: skip
        assert torch.equal(found.weights, wanted.weights)

    def test_a_result_is_pickled_and_shown(self) -> None:
        found = SampledBatch().correct(RULES["mask"])
        again = pickle.loads(pickle.dumps(found))  # noqa: S301  # made in this line
        assert torch.equal(again.weights, found.weights)
        assert again.metrics.keys() == found.metrics.keys()
        assert repr(found).startswith("RolloutCorrection(weights=")

    def test_needs_no_torch_until_it_is_called(self) -> None:
        program = """
import sys
sys.modules["torch"] = None
import bandpo
rule = bandpo.correction.Correction(bandpo.Clip.between(0.5, 5))
try:
    rule(None, None, None)
except bandpo.error.MissingExtraError as error:
    print(error.extra)
"""
        run = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        )
        assert run.stdout == "torch\n"

    def test_dir_shows_public_names_alone(self) -> None:
        assert sorted(dir(bandpo.correction)) == sorted(bandpo.correction.__all__)


@pytest.mark.parametrize("name", RULES)
def test_weights_multiply_the_loss_of_a_policy(name: str) -> None:
    batch = SampledBatch()
    found = batch.correct(RULES[name])
    new = batch.old + 0.1
    given = (batch.old, new, batch.advantages, batch.mask)
    options: dict[str, Any] = {"region": Clip(0.2), "loss_agg_mode": "none"}
    plain = policy_loss(*given, **options).loss
    corrected = policy_loss(*given, rollout_is_weights=found.weights, **options).loss
    torch.testing.assert_close(corrected, plain * found.weights)


@pytest.mark.parametrize("value", [0.5, math.nan, -1.0, 2.0])
def test_a_mask_of_floats_has_0_and_1_alone(value: float) -> None:
    log_prob = torch.full((2, 3), -1.0)
    mask = torch.ones(2, 3)
    mask[1, 1] = value
    with pytest.raises(InvalidValueError, match="response_mask must hold 0 and 1 if it is a float"):
        Correction(Clip(0.2))(log_prob, log_prob, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ends", [(), (math.inf,), (math.nan,), (0.0, -0.0, 0.0)])
def test_quantiles_of_many_weights_are_those_of_a_sort(
    ends: tuple[float, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "_SORTED", 5)
    weight = torch.randn(1000, dtype=dtype, generator=torch.Generator().manual_seed(3)).exp()
    weight[: len(ends)] = torch.tensor(ends, dtype=dtype)
    valid = torch.ones(1000, dtype=torch.bool)
    valid[10:20] = False
    found = _quantiles(weight, valid, valid.sum())
    wanted = weight[valid].double()
    for percent in (1, 50, 99):
        quantile = torch.quantile(wanted, percent / 100.0).to(dtype)
        torch.testing.assert_close(found(percent), quantile, equal_nan=True)
