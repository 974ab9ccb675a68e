"""A correction within the loss: the weights that a rollout correction makes by hand."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
from bandpo.correction import Correction, RolloutCorrection, rollout_correction
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.loss import PolicyLoss, PolicyLossResult
from bandpo.presets import PRESETS, preset
from bandpo.schedule import Quantile
from bandpo.surrogate import BY_NAME
from support.batches import Batch, assert_compiled_gradient_is_eager, random_batch

CLIP = bandpo.Clip(0.2)
ICEPOP = Correction(bandpo.Clip.between(0.5, 2.0))
CORRECTIONS = [
    ICEPOP,
    Correction(bandpo.Clip.between(0.0, 1.1), action="truncate"),
    Correction(bandpo.Clip.between(0.95, 1.05), level="geometric-mean"),
    Correction(bandpo.Clip.between(0.0, 1.5), level="sequence-product"),
    Correction(bandpo.Band("kl", 0.01), action="mask-only"),
    Correction(statistic="k3", threshold=0.01, level="sequence-mean", negative_only=True),
    Correction(statistic="bernoulli-tv", threshold=0.02, outward_only=True),
]
OF_PRESETS = [name for name in PRESETS if PRESETS[name].correction is not None]


def with_rollout(shape: tuple[int, ...], seed: int = 0) -> tuple[Batch, torch.Tensor]:
    """A batch, and the log-probs of the engine that drew it."""
    batch = random_batch(shape, seed, torch.float64)
    noise = np.random.default_rng(seed + 1).normal(0.0, 0.3, shape)
    return batch, (batch.old_log_prob + torch.from_numpy(noise)).clamp(max=0.0)


def by_hand(correction: Correction, batch: Batch, rollout: torch.Tensor) -> RolloutCorrection:
    return correction(batch.old_log_prob, rollout, batch.response_mask, advantages=batch.advantages)


@pytest.mark.parametrize("surrogate", BY_NAME)
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_it_is_the_loss_with_its_weights(
    correction: Correction, surrogate: Any, backend: str
) -> None:
    batch, rollout = with_rollout((12, 20))
    options: dict[str, Any] = {"region": CLIP, "surrogate": surrogate, "backend": backend}
    weights = by_hand(correction, batch, rollout)
    given: dict[str, Any] = {"correction": correction, "rollout_log_prob": rollout}
    wanted = batch.loss(**options, rollout_is_weights=weights.weights)
    found = batch.loss(**options, **given)
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.per_token, wanted.per_token)
    assert torch.equal(
        batch.gradient(**options, **given),
        batch.gradient(**options, rollout_is_weights=weights.weights),
    )
    assert found.metrics.keys() == wanted.metrics.keys()
    assert all(torch.equal(value, wanted.metrics[name]) for name, value in found.metrics.items())


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_the_result_has_the_correction(correction: Correction, backend: str) -> None:
    batch, rollout = with_rollout((12, 20))
    weights = by_hand(correction, batch, rollout)
    result = batch.loss(
        region=CLIP, correction=correction, rollout_log_prob=rollout, backend=backend
    )
    found = result.correction
    assert isinstance(found, RolloutCorrection)
    assert torch.equal(found.weights, weights.weights)
    assert torch.equal(found.kept, weights.kept)
    assert found.metrics.keys() == weights.metrics.keys()
    for name, value in weights.metrics.items():
        assert torch.equal(found.metrics[name], value), name
    assert found.metrics["outside_fraction"] > 0.0
    # The result is a sequence of three, with or without a correction.
    loss, per_token, metrics = result
    assert torch.equal(loss, result.loss)
    assert torch.equal(per_token, result.per_token)
    assert metrics is result.metrics
    assert batch.loss(region=CLIP, backend=backend).correction is None


def test_arguments_by_name_make_the_same_correction(backend: str) -> None:
    batch, rollout = with_rollout((12, 20))
    options: dict[str, Any] = {"region": CLIP, "backend": backend, "rollout_log_prob": rollout}
    named = {"statistic": "k2", "threshold": 0.02, "level": "sequence-max", "action": "mask-only"}
    wanted = batch.loss(**options, correction=Correction(**named))  # type: ignore[arg-type]
    assert torch.equal(batch.loss(**options, correction=named).loss, wanted.loss)
    module = PolicyLoss(CLIP, correction=named, backend=backend)  # type: ignore[arg-type]
    assert module.correction == Correction(**named)  # type: ignore[arg-type]
    assert torch.equal(module(*batch, rollout_log_prob=rollout).loss, wanted.loss)
    assert repr(module.correction) in repr(module)


@pytest.mark.parametrize("name", OF_PRESETS)
def test_a_preset_makes_the_weights_of_its_correction(name: str, backend: Any) -> None:
    batch, rollout = with_rollout((30, 10), seed=2)
    found = preset(name)
    assert isinstance(found.correction, Mapping)
    module = PolicyLoss.from_preset(name, backend=backend)
    result = module(*batch, rollout_log_prob=rollout)
    weights = by_hand(Correction(**found.correction), batch, rollout)
    plain = {**found.arguments(), "correction": None}
    wanted = batch.loss(**plain, rollout_is_weights=weights, backend=backend)
    assert torch.equal(result.loss, wanted.loss)
    assert result.correction is not None
    assert torch.equal(result.correction.weights, weights.weights)
    with pytest.raises(InvalidValueError, match="rollout_log_prob must be given with correction"):
        module(*batch)
    without = PolicyLoss.from_preset(name, correction=None, backend=backend)
    assert torch.equal(without(*batch).loss, batch.loss(**plain, backend=backend).loss)


def test_the_presets_with_a_correction_are_these() -> None:
    names = ["icepop", "tis", "mis", "geo-mask", "seq-mask-tis", "opsm", "flash-reinforce"]
    assert names == OF_PRESETS


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_shapes_packed_and_by_sequence_agree(correction: Correction, backend: str) -> None:
    batch, rollout = with_rollout((12, 20), seed=4)
    batch = batch._replace(advantages=batch.advantages[:, :1])
    options: dict[str, Any] = {"region": CLIP, "correction": correction, "backend": backend}
    wanted = batch.gradient(**options, rollout_log_prob=rollout)
    assert wanted.any()
    rows = batch._replace(advantages=batch.advantages[:, 0])
    assert torch.equal(rows.gradient(**options, rollout_log_prob=rollout), wanted)
    old, new = batch.old_log_prob[..., None], batch.log_prob[..., None]
    third = batch._replace(old_log_prob=old, log_prob=new)
    found = third.gradient(**options, rollout_log_prob=rollout[..., None])
    assert torch.equal(found[..., 0], wanted)
    each = batch._replace(advantages=batch.advantages.expand(12, 20))
    flat = Batch(*(tensor.reshape(-1) for tensor in each))
    packed = flat.gradient(
        **options, rollout_log_prob=rollout.reshape(-1), cu_seqlens=torch.arange(0, 241, 20)
    )
    torch.testing.assert_close(packed.reshape(12, 20), wanted, rtol=1e-12, atol=0.0)


def test_weights_leave_the_penalty_alone_and_an_anchor_goes_along(backend: str) -> None:
    batch, rollout = with_rollout((12, 20))
    options: dict[str, Any] = {"region": CLIP, "backend": backend, "log_ratio_penalty": 0.1}
    options["anchor_log_prob"] = rollout
    weights = by_hand(ICEPOP, batch, rollout)
    found = batch.gradient(**options, correction=ICEPOP, rollout_log_prob=rollout)
    assert torch.equal(found, batch.gradient(**options, rollout_is_weights=weights))
    assert not torch.equal(found, batch.gradient(**options))


def test_the_region_of_a_source_is_the_one_of_its_last_step(backend: str) -> None:
    batch, rollout = with_rollout((12, 20))
    source = Quantile(0.5)
    options: dict[str, Any] = {"region": CLIP, "backend": backend, "rollout_log_prob": rollout}
    free = batch.loss(**options, correction=Correction(source)).correction
    assert free is not None
    assert free.metrics["kept_fraction"] == 1.0
    valid = batch.response_mask
    source.update(batch.advantages[valid], (batch.old_log_prob - rollout)[valid])
    half = batch.loss(**options, correction=Correction(source)).correction
    assert half is not None
    assert abs(float(half.metrics["kept_fraction"]) - 0.5) < 0.01


def test_a_rollout_correction_is_taken_as_weights(backend: str) -> None:
    batch, rollout = with_rollout((12, 20))
    weights = rollout_correction(
        batch.old_log_prob, rollout, batch.response_mask, region=bandpo.Clip.between(0.5, 2.0)
    )
    options: dict[str, Any] = {"region": CLIP, "backend": backend}
    found = batch.loss(**options, rollout_is_weights=weights)
    assert found.correction is weights
    wanted = batch.loss(**options, rollout_is_weights=weights.weights)
    assert wanted.correction is None
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.per_token, wanted.per_token)
    module = PolicyLoss(CLIP, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(module(*batch, rollout_is_weights=weights).loss, wanted.loss)


def test_nothing_has_a_gradient_but_log_prob(backend: str) -> None:
    batch, rollout = with_rollout((4, 5))
    rollout = rollout.requires_grad_()
    old, new = batch.old_log_prob.requires_grad_(), batch.log_prob.requires_grad_()
    loss = batch.loss(
        region=CLIP, correction=ICEPOP, rollout_log_prob=rollout, backend=backend
    ).loss
    found = torch.autograd.grad(loss, (new, old, rollout), allow_unused=True)
    assert found[0] is not None
    assert found[1] is found[2] is None


def test_a_masked_nan_has_no_effect_and_a_nan_that_counts_is_seen(backend: str) -> None:
    batch, rollout = with_rollout((4, 5))
    batch.response_mask[0, 0], batch.response_mask[1, 1] = False, True
    options: dict[str, Any] = {"region": CLIP, "correction": ICEPOP, "backend": backend}
    options["rollout_log_prob"] = rollout
    rollout[0, 0] = math.nan
    assert not batch.loss(**options).per_token.isnan().any()
    rollout[1, 1] = math.nan
    result = batch.loss(**options)
    assert result.per_token.isnan().nonzero().tolist() == [[1, 1]]
    assert result.correction is not None
    assert bool(result.correction.kept[1, 1])


def same(one: PolicyLossResult, other: PolicyLossResult) -> bool:
    assert one.correction is not None
    assert other.correction is not None
    pairs = [
        (one.loss, other.loss),
        (one.per_token, other.per_token),
        (one.correction.weights, other.correction.weights),
        (one.correction.kept, other.correction.kept),
        *((value, other.metrics[name]) for name, value in one.metrics.items()),
        *(
            (value, other.correction.metrics[name])
            for name, value in one.correction.metrics.items()
        ),
    ]
    return all(torch.equal(mine, yours) for mine, yours in pairs)


def test_the_result_is_pickled_with_its_correction(backend: str) -> None:
    batch, rollout = with_rollout((4, 5))
    result = batch.loss(region=CLIP, correction=ICEPOP, rollout_log_prob=rollout, backend=backend)
    assert same(pickle.loads(pickle.dumps(result)), result)  # noqa: S301 -- our own bytes
    assert same(copy.deepcopy(result), result)
    assert same(copy.copy(result), result)
    plain = batch.loss(region=CLIP, backend=backend)
    assert pickle.loads(pickle.dumps(plain)).correction is None  # noqa: S301 -- our own bytes
    module = PolicyLoss(CLIP, correction=ICEPOP)
    loaded = pickle.loads(pickle.dumps(module))  # noqa: S301 -- our own bytes
    assert loaded.correction == ICEPOP


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("correction", CORRECTIONS[:4], ids=str)
def test_it_compiles_without_a_graph_break(correction: Correction, backend: Any) -> None:
    batch, rollout = with_rollout((4, 8))
    module = PolicyLoss(CLIP, correction=correction, backend=backend)

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        changed = batch._replace(log_prob=log_prob)
        return module(*changed, rollout_log_prob=rollout).loss

    assert_compiled_gradient_is_eager(loss, batch.log_prob)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"correction": ICEPOP, "rollout_is_weights": torch.ones(4, 5)},
            InvalidValueError,
            "rollout_is_weights must be left out with a correction",
        ),
        (
            {"correction": ICEPOP, "rollout_log_prob": None},
            InvalidValueError,
            r"rollout_log_prob must be given with correction Correction\(region=Clip",
        ),
        (
            {"correction": None},
            InvalidValueError,
            "rollout_log_prob must be left out without a correction; .* anchor_log_prob",
        ),
        (
            {"correction": bandpo.Clip.between(0.5, 5)},
            InvalidTypeError,
            "correction must be a bandpo.correction.Correction or its arguments by name, got Clip",
        ),
        ({"correction": "icepop"}, InvalidTypeError, "correction must be .*, got str"),
        (
            {"correction": {"regions": CLIP}},
            InvalidValueError,
            "argument of a correction must be one of region, .*, got 'regions'; did you mean 'reg",
        ),
        (
            {"correction": {"region": CLIP, "statistic": "k1"}},
            InvalidValueError,
            "region or statistic must be given, and not both",
        ),
        (
            {"correction": ICEPOP, "rollout_log_prob": torch.zeros(4, 6)},
            InvalidValueError,
            r"rollout_log_prob must have shape \(4, 5\)",
        ),
        (
            {"correction": ICEPOP, "rollout_log_prob": torch.zeros(4, 5, dtype=torch.int64)},
            InvalidTypeError,
            "rollout_log_prob must be float32",
        ),
        (
            {"correction": ICEPOP, "rollout_log_prob": 0.0},
            InvalidTypeError,
            "rollout_log_prob must be a torch.Tensor, got float",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    batch, rollout = with_rollout((4, 5))
    with pytest.raises(error, match=message):
        batch.loss(**{"region": CLIP, "rollout_log_prob": rollout, **options})
    of_module = {name: value for name, value in options.items() if name == "correction"}
    of_call = {name: value for name, value in options.items() if name != "correction"}
    with pytest.raises(error, match=message):
        PolicyLoss(CLIP, **of_module)(*batch, **{"rollout_log_prob": rollout, **of_call})


def test_a_correction_of_sequences_needs_those_of_packed_tokens() -> None:
    batch, rollout = with_rollout((8,))
    with pytest.raises(InvalidValueError, match="cu_seqlens must be given for level 'geometric-"):
        batch.loss(region=CLIP, correction=CORRECTIONS[2], rollout_log_prob=rollout)


def test_a_module_refuses_a_bad_correction_when_it_is_made() -> None:
    bad: Any = "icepop"
    with pytest.raises(InvalidTypeError, match="correction must be"):
        PolicyLoss(CLIP, correction=bad)
    with pytest.raises(InvalidValueError, match="argument of a correction must be one of"):
        PolicyLoss.from_preset("tis", correction={"clip": 2.0})
