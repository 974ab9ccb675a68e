"""Arguments out of their domain are named, and containers are what their types say."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch.utils.data import default_collate

import bandpo.loss.warning as warned
from bandpo import Band, Clip, Divergence, PriceBand, Region
from bandpo.error import InvalidTypeError, InvalidValueError, LogProbWarning, StepWarning
from bandpo.loss import Metrics, PolicyLoss, policy_loss
from bandpo.region import Dcpo
from bandpo.schedule import Bapo, Constant, Linear, RegionSource, ScheduledBand
from support.batches import Batch, random_batch

CLIP = Clip(0.2)


@pytest.fixture
def first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a process that computed no loss yet."""
    monkeypatch.setattr(warned, "_CHECKED", set())


# --- numbers -----------------------------------------------------------------------------------

READERS: dict[str, Callable[[Any], object]] = {
    "band": Band("kl", 0.05).log_bounds,
    "ratios": Band("kl", 0.05).bounds,
    "contains": lambda logp: Band("kl", 0.05).contains(logp, -0.01),
    "table": Band("kl", 0.05).table().log_bounds,
    "float32": lambda logp: Band("kl", 0.05).table().log_bounds(np.ma.asarray(logp).astype("f4")),
    "clip": CLIP.log_bounds,
    "clip contains": lambda logp: CLIP.contains(logp, -0.01),
    "dcpo": Dcpo().log_bounds,
    "price": PriceBand("kl", 0.1).log_bounds,
    "price contains": lambda logp: PriceBand("kl", 0.1).contains(logp, -0.01),
    "union": (Band("kl", 0.05) | CLIP).log_bounds,
    "cap": Band("kl", 0.05).cap(10).log_bounds,
    "divergence": lambda logp: Divergence("kl").between(logp, -0.01),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("value", [0.051, 0.5, 3.0, math.inf])
def test_numbers_above_rounding_are_no_log_probs(name: str, value: float) -> None:
    for logp in (value, [-1.0, value], [math.nan, value]):
        with pytest.raises(InvalidValueError, match=r"logp must be natural logarithms.* got"):
            READERS[name](np.array(logp))


@pytest.mark.parametrize("name", READERS)
def test_rounding_above_0_is_0_and_nan_is_nan(name: str) -> None:
    rounded, zero = (READERS[name](np.array([value, math.nan])) for value in (0.049, 0.0))
    assert repr(rounded) == repr(zero)


@pytest.mark.parametrize("name", [name for name in READERS if name != "float32"])
def test_masked_numbers_are_refused(name: str) -> None:
    with pytest.raises(InvalidTypeError, match=r"logp must have no masked elements.*compressed"):
        READERS[name](np.ma.array([-1.0, -2.0], mask=[True, False]))
    READERS[name](np.ma.array([-1.0, -2.0], mask=False))


# --- tensors -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("first_batch")
@pytest.mark.parametrize("argument", ["old_log_prob", "log_prob"])
def test_positive_log_probs_are_said_once_and_counted(argument: str, backend: str) -> None:
    batch = random_batch((4, 6))
    changed = getattr(batch, argument).clone()
    changed[0, :3] = torch.tensor([0.06, 1.0, 0.04])
    batch.response_mask[:] = True
    batch = batch._replace(**{argument: changed})
    with pytest.warns(LogProbWarning, match=f"{argument} must be .*; 2 of 24 tokens") as found:
        batch.loss(region=CLIP, backend=backend)
    assert found[0].filename == __file__ or found[0].filename.endswith("batches.py")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch.loss(region=CLIP, backend=backend)


@pytest.mark.usefixtures("first_batch")
def test_masked_and_rounded_log_probs_are_not_positive(backend: str) -> None:
    batch = random_batch((4, 6))
    batch.old_log_prob[:, 0] = 5.0
    batch.log_prob[:, 0] = math.inf
    batch.response_mask[:, 0] = False
    batch.old_log_prob[:, 1] = 0.03
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch.loss(region=CLIP, backend=backend)


@pytest.mark.filterwarnings("ignore::bandpo.error.LogProbWarning")
@pytest.mark.parametrize("region", [Band("kl", 0.05), Band("kl", 0.05) | CLIP], ids=str)
def test_positive_log_probs_are_read_as_0_by_table_and_solver(region: Region, backend: str) -> None:
    batch = random_batch((3, 5))
    zero = batch._replace(old_log_prob=torch.zeros(3, 5))
    above = zero._replace(old_log_prob=torch.full((3, 5), 3.0), log_prob=zero.log_prob + 3.0)
    for exact in (False, True):
        options: dict[str, Any] = {"region": region, "backend": backend, "exact": exact}
        found, wanted = above.gradient(**options), zero.gradient(**options)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("surrogate", ["min-clip", "mask", "weight", "gradient-preserving"])
@pytest.mark.parametrize(
    "region",
    [Band("kl", 0.05) | CLIP, (Band("tv", 0.1) | CLIP).cap(10), Dcpo(), Band("kl", 0.1) & CLIP],
    ids=str,
)
def test_a_sure_token_has_the_same_loss_from_table_and_solver(
    region: Region, surrogate: Any, backend: str
) -> None:
    """Only a new probability above 1 shows that a table ends at the ratio 1/p."""
    old = torch.tensor([-0.1, -0.01, -1e-3, -1e-7, 0.0, 1e-3], dtype=torch.float64)
    moves = torch.tensor([[-0.4], [-0.05], [5e-4], [0.02], [0.15], [0.3]])
    old = old.expand(6, 6).contiguous()
    for sign in (1.0, -1.0):
        new = torch.minimum(old + moves, 0.01 * old).clamp(max=0.0)
        batch = Batch(old, new, torch.full_like(old, sign), torch.ones_like(old))
        options: dict[str, Any] = {"region": region, "backend": backend, "surrogate": surrogate}
        found, wanted = (
            batch.gradient(**options, loss_agg_mode="token-sum", exact=exact)
            for exact in (False, True)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)
        assert found.any()


@pytest.mark.parametrize("per_row", [False, True])
def test_a_weight_below_0_is_refused_where_a_token_counts(per_row: bool, backend: str) -> None:
    batch = random_batch((3, 5))
    batch.response_mask[:] = True
    batch.response_mask[2] = False
    weights = torch.ones(3) if per_row else torch.ones(3, 5)
    weights[2] = -1.0
    batch.loss(region=CLIP, rollout_is_weights=weights, backend=backend)
    weights[1] = -0.5
    with pytest.raises(InvalidValueError, match=r"weights must be at least 0, got -0\.5"):
        batch.loss(region=CLIP, rollout_is_weights=weights, backend=backend)


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_mask_of_floats_has_0_and_1_alone(value: float, dtype: torch.dtype, backend: str) -> None:
    batch = random_batch((3, 5))
    mask = batch.response_mask.to(dtype)
    wanted = batch.loss(region=CLIP, backend=backend).loss
    found = batch._replace(response_mask=mask).loss(region=CLIP, backend=backend).loss
    assert torch.equal(found, wanted)
    mask[1, 2] = value
    with pytest.raises(InvalidValueError, match="response_mask must hold 0 and 1 if it is a float"):
        batch._replace(response_mask=mask).loss(region=CLIP, backend=backend)


# --- containers --------------------------------------------------------------------------------


def test_metrics_can_be_rebuilt_as_a_mapping() -> None:
    batch = random_batch((3, 5))
    metrics = batch.loss(region=CLIP, metrics_by_probability=True).metrics
    for rebuilt in (type(metrics)(dict(metrics)), copy.deepcopy(metrics), Metrics(metrics)):
        assert list(rebuilt) == list(metrics)
        assert all(torch.equal(rebuilt[name], metrics[name]) for name in metrics)
    together = default_collate([metrics, metrics])
    assert torch.equal(together["approx_kl"], metrics["approx_kl"].repeat(2))


def test_scalars_of_a_rebuilt_mapping_are_named_by_what_they_are() -> None:
    metrics = random_batch((3, 5)).loss(region=CLIP, metrics_by_probability=True).metrics
    wanted = metrics.scalars("a/")
    single = {name: value for name, value in metrics.items() if value.ndim == 0}
    floats = Metrics({name: value.item() for name, value in single.items()})  # type: ignore[misc]
    assert floats.scalars("a/") == {f"a/{name}": wanted[f"a/{name}"] for name in single}
    assert "approx_kl" in floats._repr_html_()
    collated = default_collate([metrics] * 5)  # as many as there are bins
    found = collated.scalars("a/")
    for name in single:
        assert [found[f"a/{name}/{k}"] for k in range(5)] == [wanted[f"a/{name}"]] * 5
    assert f"a/approx_kl/{0:g}-{1e-3:g}" not in found
    with pytest.raises(InvalidTypeError, match="prefix must be a str, got NoneType"):
        metrics.scalars(None)  # type: ignore[arg-type]


SOURCES: dict[str, Callable[[], RegionSource]] = {
    "linear": lambda: ScheduledBand("kl", Linear(0.1, 0.01, steps=10)),
    "bapo": Bapo,
}


def advanced(source: RegionSource) -> RegionSource:
    if isinstance(source, Bapo):
        source.step([0.3, -1.0], [0.5, -0.2], [-1.0, -1.0])
    else:
        source.step()  # type: ignore[attr-defined]
    return source


@pytest.mark.parametrize("name", SOURCES)
def test_the_state_of_a_region_is_in_that_of_the_module(name: str) -> None:
    trained: Any = torch.nn.ModuleDict({"loss": PolicyLoss(advanced(SOURCES[name]()))})
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    resumed: Any = torch.nn.ModuleDict({"loss": PolicyLoss(SOURCES[name]())})
    was = resumed["loss"].region.region
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed["loss"].region.region == trained["loss"].region.region != was
    copied: Any = copy.deepcopy(trained)
    assert copied["loss"].region.region == trained["loss"].region.region


def test_the_state_of_another_kind_of_region_is_refused() -> None:
    plain, scheduled = PolicyLoss(CLIP), PolicyLoss(SOURCES["linear"]())
    PolicyLoss(CLIP).load_state_dict(plain.state_dict())
    with pytest.raises(InvalidValueError, match="region must be a RegionSource to take the state"):
        plain.load_state_dict(scheduled.state_dict())
    with pytest.raises(InvalidValueError, match="state must have the entries"):
        scheduled.load_state_dict(plain.state_dict())


# --- steps -------------------------------------------------------------------------------------


def losses(source: RegionSource, count: int) -> list[warnings.WarningMessage]:
    batch = random_batch((2, 3))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(count):
            batch.loss(region=source)
    return [each for each in found if issubclass(each.category, StepWarning)]


@pytest.mark.parametrize("name", SOURCES)
def test_a_region_that_nobody_steps_is_said_once(name: str) -> None:
    source = SOURCES[name]()
    assert not losses(source, 49)
    (warning,) = losses(source, 100)
    assert "served 50 losses without a step" in str(warning.message)


@pytest.mark.parametrize("name", SOURCES)
def test_a_region_that_is_stepped_or_restored_is_not(name: str) -> None:
    assert not losses(advanced(SOURCES[name]()), 120)
    restored = SOURCES[name]()
    restored.load_state_dict(SOURCES[name]().state_dict())
    assert not losses(restored, 120)


def test_a_constant_needs_no_steps() -> None:
    assert not losses(ScheduledBand("kl", Constant(0.05)), 120)


def test_the_width_of_a_micro_batch_is_no_norm_of_the_global_batch() -> None:
    batch = random_batch((4, 8))
    mode: Any = "seq-mean-token-sum-norm"
    with pytest.raises(InvalidValueError, match="loss_scale_factor must be given"):
        policy_loss(*batch, region=CLIP, loss_agg_mode=mode, global_batch_size=4)


@pytest.mark.parametrize("argument", ["exact", "metrics_by_probability"])
@pytest.mark.parametrize("value", ["no", 0, None, np.True_])
def test_a_flag_is_a_bool(argument: str, value: Any) -> None:
    options: dict[str, Any] = {"region": CLIP, argument: value}
    for make in (lambda: random_batch((2, 3)).loss(**options), lambda: PolicyLoss(**options)):
        with pytest.raises(InvalidTypeError, match=f"{argument} must be a bool, got"):
            make()


@pytest.mark.parametrize("argument", ["batch_num_tokens", "global_batch_size"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_count_on_the_cpu_is_finite_and_at_least_0(argument: str, value: float) -> None:
    for count in (value, torch.tensor(value)):
        with pytest.raises(InvalidValueError, match=f"{argument} must be finite and at least 0"):
            random_batch((2, 3)).loss(region=CLIP, **{argument: count})


@pytest.mark.parametrize("value", [np.array(0.5), torch.tensor(0.5), np.float32(0.5)])
def test_a_penalty_is_a_number_of_any_origin(value: Any) -> None:
    batch = random_batch((2, 3))
    found = batch.loss(region=CLIP, log_ratio_penalty=value).loss
    assert torch.equal(found, batch.loss(region=CLIP, log_ratio_penalty=0.5).loss)
    assert PolicyLoss(CLIP, log_ratio_penalty=value).log_ratio_penalty == 0.5


def test_only_several_metrics_are_merged() -> None:
    metrics = random_batch((2, 3)).loss(region=CLIP).metrics
    for parts in (None, 1.0, metrics):
        with pytest.raises(InvalidTypeError, match="parts must be "):
            Metrics.merge(parts)  # type: ignore[arg-type]
