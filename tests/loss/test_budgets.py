"""Budgets, which tell the tokens inside by a divergence: against loops, and against bands."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
from bandpo.check import BoolArray, Float64Array
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.loss import policy_loss
from bandpo.region import PrefixBudget, TensorBand
from bandpo.region.budget import DIVERGENCES
from bandpo.surrogate import Mask
from support.batches import Batch, assert_compiled_gradient_is_eager, random_batch

CPPO = PrefixBudget()
FREE = Mask(truncation=None)

ROUNDING = 1e-12
"""Relative: the same products in double precision."""


def divergence(name: str, p: float, q: float) -> float:
    """Bernoulli divergences as the literature writes them."""
    pairs = ((p, q), (1.0 - p, 1.0 - q))
    if name == "tv":
        return abs(p - q)
    if name == "kl":
        return sum(a * math.log(a / b) for a, b in pairs)
    if name == "reverse-kl":
        return divergence("kl", q, p)
    if name == "hellinger":
        return sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in pairs) / 2.0
    if name == "pearson-chi2":
        return sum((b - a) ** 2 / a for a, b in pairs)
    if name == "neyman-chi2":
        return divergence("pearson-chi2", q, p)
    middle = (p + q) / 2.0
    return (divergence("kl", p, middle) + divergence("kl", q, middle)) / 2.0


def kept_by_loop(
    region: PrefixBudget,
    denominator: Float64Array,
    batch: tuple[Float64Array, Float64Array, Float64Array, BoolArray],
) -> BoolArray:
    """Which tokens of padded sequences a budget keeps, token by token.

    Args:
        region: The budget.
        denominator: Log-probs at which D and the direction are taken.
        batch: Old and new log-probs, advantages, and which tokens count.
    """
    _, new, advantages, valid = batch
    kept = np.zeros(valid.shape, dtype=bool)
    for row in range(len(new)):
        places = np.flatnonzero(valid[row])
        pairs = [(math.exp(denominator[row, t]), math.exp(new[row, t])) for t in places]
        d = [divergence(region.divergence, p, q) for p, q in pairs]
        if isinstance(region.allowance, tuple):
            low, high = region.allowance
            b = min(max(quantile(d, 0.9), low), high) if d else 0.0
        else:
            b = region.allowance
        spent = weights = 0.0
        for k, t in enumerate(places):
            w = 1.0 - (1.0 - region.weight_min) * k / max(len(d) - 1, 1)
            outward = advantages[row, t] * (new[row, t] - denominator[row, t]) > 0.0
            limit = min(region.delta, region.delta + b * weights - spent)
            kept[row, t] = not outward or w * d[k] <= limit
            spent, weights = spent + w * d[k], weights + w
    return kept


def quantile(values: list[float], level: float) -> float:
    """Linear between two neighbours."""
    ordered = sorted(values)
    place = level * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def ragged(shape: tuple[int, int], seed: int = 0, step: float = 0.3) -> Batch:
    """Sequences with masked tokens, one that is empty, one with a single token; none is sure."""
    batch = random_batch(shape, seed, torch.float64)
    noise = np.random.default_rng(seed).normal(0.0, step, shape)
    new = (batch.old_log_prob + torch.from_numpy(noise)).clamp(max=-1e-3)
    old = batch.old_log_prob.clamp(max=-1e-3)
    batch.response_mask[1] = False
    batch.response_mask[2] = False
    batch.response_mask[2, 3] = True
    return Batch(old, new, batch.advantages, batch.response_mask)


def with_last_1(batch: Batch) -> Batch:
    """Log-probs as [B, T, 1]."""
    old, new = batch.old_log_prob[..., None], batch.log_prob[..., None]
    return batch._replace(old_log_prob=old, log_prob=new)


def arrays(batch: Batch) -> tuple[Float64Array, Float64Array, Float64Array, BoolArray]:
    old, new, advantages, mask = (tensor.numpy() for tensor in batch)
    return old, new, advantages, mask


def assert_kept(batch: Batch, kept: BoolArray, **options: Any) -> None:
    """The gradient is that of a mask without bound that keeps these tokens."""
    old, new, advantages, valid = arrays(batch)
    wanted = np.where(kept & valid, -advantages * np.exp(new - old), 0.0)
    for exact in (False, True):
        found = batch.gradient(**options, surrogate=FREE, exact=exact, loss_agg_mode="token-sum")
        np.testing.assert_allclose(found.numpy(), wanted, rtol=ROUNDING, atol=0)


BUDGETS = [
    CPPO,
    *(PrefixBudget(0.02, 0.5, (0.002, 0.01), name) for name in DIVERGENCES),
    PrefixBudget(0.05, 1.0, 0.0),
    PrefixBudget(0.02, 0.1, 0.3),
    PrefixBudget(0.2, 0.8, (0.0, 10.0)),  # a quantile that nothing moves
]


@pytest.mark.parametrize("region", BUDGETS, ids=str)
def test_a_prefix_budget_keeps_what_the_loop_keeps(region: PrefixBudget, backend: str) -> None:
    shares = []
    for seed, shape in enumerate([(30, 20), (8, 200), (200, 4)]):
        batch = ragged(shape, seed)
        kept = kept_by_loop(region, batch.old_log_prob.numpy(), arrays(batch))
        assert_kept(batch, kept, region=region, backend=backend)
        shares.append((~kept)[batch.response_mask.numpy()].mean())
    assert 0.01 < np.mean(shares) < 0.6, "some tokens are dropped and some are not"


def test_a_masked_token_changes_no_decision(backend: str) -> None:
    """Its place, divergence and NaN leave the tokens after it alone, as if it were cut out."""
    batch = ragged((30, 20))
    gradient = batch.gradient(region=CPPO, surrogate=FREE, backend=backend)
    for column in batch[:3]:
        column[~batch.response_mask] = math.nan
    assert torch.equal(batch.gradient(region=CPPO, surrogate=FREE, backend=backend), gradient)
    for row in range(30):
        counts = batch.response_mask[row]
        if not counts.any():
            continue
        one = Batch(*(tensor[row, counts][None] for tensor in batch))
        alone = one.gradient(region=CPPO, surrogate=FREE, backend=backend)
        np.testing.assert_array_equal(alone[0] != 0.0, gradient[row, counts] != 0.0)


@pytest.mark.parametrize("region", BUDGETS, ids=str)
def test_packed_is_padded(region: PrefixBudget, backend: str) -> None:
    batch = ragged((30, 20), seed=3)
    lengths = np.random.default_rng(0).integers(0, 21, 30)
    lengths[-1] = 0  # an empty sequence at the end, whose offset is the number of tokens
    inside = np.arange(20) < lengths[:, None]
    batch.response_mask[torch.from_numpy(~inside)] = False
    flat = Batch(*(tensor[torch.from_numpy(inside)] for tensor in batch))
    options: dict[str, Any] = {"region": region, "surrogate": FREE, "backend": backend}
    options["loss_agg_mode"] = "token-sum"
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    for dtype in (torch.int64, torch.int32):
        packed = flat.gradient(**options, cu_seqlens=offsets.to(dtype))
        padded = batch.gradient(**options)[torch.from_numpy(inside)]
        assert torch.equal(packed, padded)
    third = with_last_1(batch)
    assert torch.equal(third.gradient(**options)[..., 0], batch.gradient(**options))


def test_packed_tokens_of_a_prefix_budget_need_their_sequences() -> None:
    """Otherwise the budget of one sequence would be spent by those before it."""
    with pytest.raises(InvalidValueError, match="cu_seqlens must be given for"):
        random_batch((8,)).loss(region=CPPO, surrogate="mask")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
@pytest.mark.parametrize("region", [CPPO, PrefixBudget(allowance=0.1)], ids=str)
def test_no_tokens_have_no_loss(region: PrefixBudget, shape: tuple[int, ...], backend: str) -> None:
    batch = random_batch(shape, dtype=torch.float64)
    options: dict[str, Any] = {"region": region, "surrogate": FREE, "backend": backend}
    if len(shape) == 1:
        options["cu_seqlens"] = torch.tensor([0, 0, 0])
    assert batch.loss(**options).loss.item() == 0.0
    assert batch.gradient(**options).shape == shape


def test_a_single_token_has_weight_1(backend: str) -> None:
    """With 0.8 in its place it would be kept: w D = 0.144 for D = 0.18 and delta = 0.15."""
    old = torch.tensor([[0.5], [0.5]], dtype=torch.float64).log()
    new = torch.tensor([[0.68], [0.64]], dtype=torch.float64).log()
    batch = Batch(old, new, torch.ones(2, 1), torch.ones(2, 1))
    gradient = batch.gradient(region=CPPO, surrogate=FREE, backend=backend)
    assert (gradient != 0.0).flatten().tolist() == [False, True]


def test_dropped_tokens_and_those_that_move_back_spend_the_budget(backend: str) -> None:
    p = np.array([[0.5] * 4, [0.5] * 4, [0.5] * 4])
    q = np.array(
        [
            [0.9, 0.6, 0.6, 0.6],  # the first is dropped, and with it all that follow
            [0.1, 0.6, 0.6, 0.6],  # the first moves back, is kept, and spends as much
            [0.5, 0.6, 0.6, 0.6],  # an unmoved one leaves its allowance
        ]
    )
    region = PrefixBudget(delta=0.15, weight_min=1.0, allowance=0.02)
    batch = Batch(
        torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q)), torch.ones(3, 1), torch.ones(3, 4)
    )
    gradient = batch.gradient(region=region, surrogate=FREE, backend=backend)
    # Limits of the third row: 0.15, 0.15 + min(0, 0.02 - 0), 0.15 + 0.04 - 0.1, 0.15 + 0.06 - 0.2.
    assert (gradient != 0.0).tolist() == [
        [False, False, False, False],
        [True, False, False, False],
        [True, True, False, False],
    ]


@pytest.mark.parametrize("region", BUDGETS, ids=str)
def test_the_budget_stands_at_the_anchor(region: PrefixBudget, backend: str) -> None:
    batch = ragged((30, 20), seed=4)
    noise = torch.from_numpy(np.random.default_rng(5).normal(0.0, 0.3, (30, 20)))
    anchor = (batch.old_log_prob + noise).clamp(max=-1e-3)
    kept = kept_by_loop(region, anchor.numpy(), arrays(batch))
    assert_kept(batch, kept, region=region, backend=backend, anchor_log_prob=anchor)


def test_no_advantage_and_no_move_are_kept(backend: str) -> None:
    """With A = 0 the loss is 0 in either case, but a token that is dropped would be counted."""
    batch = ragged((4, 30))
    batch.old_log_prob[:, 0], batch.log_prob[:, 0] = math.log(0.1), math.log(0.9)  # spends it all
    batch.log_prob[:, 1::2] = batch.old_log_prob[:, 1::2]  # r = 1
    batch.advantages[:, 2::2] = 0.0
    batch.response_mask[:] = True
    result = batch.loss(region=CPPO, surrogate=FREE, backend=backend)
    gradient = batch.gradient(region=CPPO, surrogate=FREE, backend=backend)
    assert bool((gradient[:, 1::2] != 0.0).all())
    clipped = result.metrics["clip_fraction_low"] + result.metrics["clip_fraction_high"]
    first = (batch.advantages[:, 0] > 0.0).sum()
    assert round(clipped.item() * 120) == int(first)


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_nan_stays_a_nan(column: int, backend: str) -> None:
    batch = ragged((4, 10))
    batch.response_mask[0] = True
    batch[column][0, 4] = math.nan
    result = batch.loss(region=CPPO, surrogate=FREE, backend=backend)
    assert bool(result.per_token[0, 4].isnan())
    assert not result.per_token[1:].isnan().any()
    assert bool(result.loss.isnan())
    assert int(result.metrics["nonfinite_tokens"]) >= 1
    delta = torch.full((4, 10), 1e-9)
    result = batch.loss(region=TensorBand("kl", delta), surrogate=FREE, backend=backend)
    assert result.per_token.isnan().nonzero().tolist() == [[0, 4]]


SURROGATES = [Mask(), FREE, Mask(symmetric=True), Mask(whole_sequence=True)]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_tensor_band_is_the_band_with_the_same_deltas(
    name: str, surrogate: Mask, backend: str
) -> None:
    rng = np.random.default_rng(1)
    batch = ragged((12, 20), seed=1, step=0.5)
    options: dict[str, Any] = {"surrogate": surrogate, "backend": backend}
    for deltas in (
        rng.uniform(0.001, 0.2, (12, 20)),
        rng.uniform(0.001, 0.2, (12, 1)),
        rng.uniform(0.001, 0.2, 20),
        np.full((), 0.05),
    ):
        band = bandpo.Band(name, deltas if deltas.ndim else float(deltas))
        tensor = TensorBand(name, torch.from_numpy(deltas))
        wanted = batch.loss(**options, region=band, exact=True)
        found = batch.loss(**options, region=tensor)
        assert torch.equal(found.per_token, wanted.per_token)
        for metric, value in wanted.metrics.items():
            np.testing.assert_array_equal(found.metrics[metric], value, err_msg=metric)
        assert torch.equal(
            batch.gradient(**options, region=tensor),
            batch.gradient(**options, region=band, exact=True),
        )
        removed = found.metrics["gradient_removed"]
        assert 0.0 < removed < 1.0


@pytest.mark.parametrize("surrogate", SURROGATES[:3], ids=str)
def test_a_tensor_band_takes_every_shape_of_tokens(surrogate: Mask, backend: str) -> None:
    batch = ragged((12, 20), seed=2)
    deltas = torch.from_numpy(np.random.default_rng(2).uniform(0.001, 0.1, (12, 20)))
    options: dict[str, Any] = {"surrogate": surrogate, "backend": backend}
    wanted = batch.gradient(**options, region=TensorBand("kl", deltas))
    third = with_last_1(batch)
    found = third.gradient(**options, region=TensorBand("kl", deltas[..., None]))
    assert torch.equal(found[..., 0], wanted)
    flat = Batch(*(tensor.reshape(-1) for tensor in batch))
    found = flat.gradient(**options, region=TensorBand("kl", deltas.reshape(-1)))
    assert torch.equal(found.reshape(12, 20), wanted)
    anchor = (batch.old_log_prob + 0.1).clamp(max=-1e-3)
    band = bandpo.Band("kl", deltas.numpy())
    assert torch.equal(
        batch.gradient(**options, region=TensorBand("kl", deltas), anchor_log_prob=anchor),
        batch.gradient(**options, region=band, anchor_log_prob=anchor, exact=True),
    )


def test_a_tensor_band_reads_its_delta_at_each_loss_without_gradient(backend: str) -> None:
    batch = ragged((12, 20))
    delta = torch.tensor(10.0, requires_grad=True)
    region = TensorBand("kl", delta)
    options: dict[str, Any] = {"region": region, "surrogate": FREE, "backend": backend}
    assert batch.loss(**options).metrics["gradient_removed"] == 0.0
    with torch.no_grad():
        delta.fill_(1e-6)
    assert batch.loss(**options).metrics["gradient_removed"] > 0.2
    assert not batch.loss(**options).loss.requires_grad


@pytest.mark.parametrize("shape", [(3,), (20, 12), (12, 20, 1), (1, 12, 20), (2, 12, 20)])
def test_a_delta_of_another_shape_is_refused(shape: tuple[int, ...], backend: str) -> None:
    region = TensorBand("tv", torch.full(shape, 0.1))
    with pytest.raises(InvalidValueError, match=r"delta must broadcast to the shape \(12, 20\)"):
        ragged((12, 20)).loss(region=region, surrogate="mask", backend=backend)


@pytest.mark.parametrize(
    "region", [CPPO, PrefixBudget(allowance=0.1), TensorBand("kl", torch.tensor(0.1))], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
def test_no_value_leaves_the_device(region: Any, packed: bool) -> None:
    """Tensors of the device "meta" have no values, so reading one would raise."""
    shape = (12,) if packed else (3, 4)
    if isinstance(region, TensorBand):
        region = TensorBand("kl", region.delta.to("meta"))
    old, new, advantages, mask = (torch.empty(shape, device="meta") for _ in range(4))
    new.requires_grad_()
    offsets = torch.empty(4, dtype=torch.int64, device="meta") if packed else None
    result = policy_loss(
        old, new, advantages, mask, region=region, surrogate=FREE, backend="torch",
        cu_seqlens=offsets, batch_num_tokens=12,
    )  # fmt: skip
    assert result.per_token.shape == shape
    assert {name: value.shape for name, value in result.metrics.items()}
    (gradient,) = torch.autograd.grad(result.loss, new)
    assert gradient.shape == shape


@pytest.mark.parametrize("region", [CPPO, TensorBand("kl", torch.tensor(0.1))], ids=str)
def test_a_budget_goes_with_a_mask_of_tokens_alone(region: Any) -> None:
    batch = ragged((4, 5))
    for options in (
        {"surrogate": "min-clip"},
        {"surrogate": "weight"},
        {"surrogate": "mask", "ratio_level": "sequence"},
    ):
        with pytest.raises(InvalidValueError, match="surrogate must be 'mask' with ratio_level"):
            batch.loss(region=region, **options)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("region", [CPPO, TensorBand("kl", torch.tensor(0.1))], ids=str)
def test_a_budget_compiles_without_a_graph_break(region: Any, backend: Any) -> None:
    batch = ragged((4, 8))

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"region": region, "surrogate": FREE, "backend": backend}
        return batch._replace(log_prob=log_prob).loss(**options).loss

    assert_compiled_gradient_is_eager(loss, batch.log_prob)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PrefixBudget(0.0), InvalidValueError, "delta must be"),
        (lambda: PrefixBudget(math.inf), InvalidValueError, "delta must be"),
        (lambda: PrefixBudget(True), InvalidTypeError, "delta must be a real number"),
        (
            lambda: PrefixBudget(weight_min=0.0),
            InvalidValueError,
            r"weight_min must be in \(0, 1\]",
        ),
        (lambda: PrefixBudget(weight_min=1.1), InvalidValueError, "weight_min must be in"),
        (lambda: PrefixBudget(allowance=-0.1), InvalidValueError, "allowance must be at least 0"),
        (lambda: PrefixBudget(allowance=math.nan), InvalidValueError, "allowance must be"),
        (lambda: PrefixBudget(allowance=(0.2, 0.1)), InvalidValueError, "a pair that rises"),
        (
            lambda: PrefixBudget(allowance=(0.1,)),  # type: ignore[arg-type]
            InvalidTypeError,
            "a number or a pair",
        ),
        (lambda: PrefixBudget(divergence="renyi"), InvalidValueError, "divergence must be one of"),
        (
            lambda: TensorBand("kl", 0.1),  # type: ignore[arg-type]
            InvalidTypeError,
            "delta must be a tensor of floats, got float",
        ),
        (
            lambda: TensorBand("kl", torch.tensor([0.1, math.nan])),
            InvalidValueError,
            "delta must be at least 0, got nan",
        ),
        (
            lambda: TensorBand("kl", torch.tensor(-0.5)),
            InvalidValueError,
            "delta must be at least 0, got -0.5",
        ),
        (
            lambda: TensorBand("kl", np.full(3, 0.1)),  # type: ignore[arg-type]
            InvalidTypeError,
            "a number or an array is for a Band",
        ),
        (
            lambda: TensorBand("kl", torch.tensor(1)),
            InvalidTypeError,
            "delta must be a tensor of floats, got torch.int64",
        ),
        (
            lambda: TensorBand("jeffreys", torch.tensor(0.1)),
            InvalidValueError,
            "divergence must be one of tv, kl",
        ),
    ],
)
def test_a_bad_budget_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_infinite_divergence_spends_the_budget_of_its_own_sequence_alone() -> None:
    old = torch.full((6,), -0.5)
    new = torch.tensor([0.0, -0.5, -0.45, -0.49, -0.49, -0.49])
    budget = PrefixBudget(0.1, divergence="kl")
    options: dict[str, Any] = {"region": budget, "surrogate": Mask(truncation=None)}
    options["loss_agg_mode"] = "none"
    ones = torch.ones(6)
    packed = policy_loss(old, new, ones, ones, **options, cu_seqlens=torch.tensor([0, 3, 6]))
    rows = (tensor.reshape(2, 3) for tensor in (old, new, ones, ones))
    assert torch.equal(packed.loss.reshape(2, 3), policy_loss(*rows, **options).loss)
    assert packed.loss[3:].all()
    assert not packed.loss[2]
