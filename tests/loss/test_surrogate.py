"""Surrogates and ratio levels against their formulas, written out in numpy, on every backend."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
import bandpo.torch
from bandpo.check import Float64Array
from bandpo.loss import PolicyLoss, policy_loss
from bandpo.surrogate import BY_NAME, GradientPreserving, Mask, SoftGate, Surrogate
from conftest import BACKENDS
from support.batches import Batch, assert_close, random_batch
from support.formulas import FORMULAS, BoundedTokens, LossAndGradient, rounded_size

KL = bandpo.Band("kl", 0.05)
TV = bandpo.Band("tv", 0.15)
CLIP = bandpo.Clip(0.2, 0.28)
PER_TOKEN = bandpo.Band("kl", np.full((12, 20), 0.05))
REGIONS: tuple[bandpo.Region, ...] = (KL, TV, CLIP, PER_TOKEN, (KL | CLIP).cap(10))

EXACT = 1e-12
"""Relative: both sides are in float64 with bounds of the solver, each off by some 1e-15."""

TABULATED = 4e-6
"""Relative: a table is off by 1e-6 in the log of a bound or in a ratio above 0.3; float32 adds its
rounding."""

# A warning of torch itself, on the first import of its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def check(
    batch: Batch,
    formula: LossAndGradient,
    tolerance: float,
    size: Float64Array | float = 0.0,
    **options: Any,
) -> None:
    """Loss and gradient of each token, whose sum is the loss, equal the formula's.

    The tolerance is relative to the value plus ``size``.
    """
    valid = batch.response_mask.numpy() != 0
    loss, gradient = (np.where(valid, values, 0.0) for values in formula)
    options["loss_agg_mode"] = "token-sum"
    found = batch.loss(**options).per_token, batch.gradient(**options)
    for actual, wanted in zip(found, (loss, gradient), strict=True):
        error = np.abs(actual.detach().double().numpy() - wanted)
        within = error <= tolerance * (np.abs(wanted) + size)
        assert within.all(), (actual[~torch.from_numpy(within)], wanted[~within])
    assert np.count_nonzero(loss) > 0


@pytest.mark.parametrize("region", REGIONS, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_surrogate_equals_its_formula(name: str, region: bandpo.Region, backend: str) -> None:
    surrogate, formula = FORMULAS[name]
    batch = random_batch((12, 20), dtype=torch.float64)
    batch.log_prob[2, 3] = batch.old_log_prob[2, 3] - 30.0
    tokens = BoundedTokens.of(batch, region)
    assert (tokens.beyond & tokens.valid).sum() > 5
    options: dict[str, Any] = {"region": region, "surrogate": surrogate, "backend": backend}
    check(batch, formula(tokens), EXACT, rounded_size(name, tokens), **options, exact=True)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_table_serves_all_surrogates(name: str, backend: str) -> None:
    surrogate, formula = FORMULAS[name]
    batch = random_batch((40, 50), seed=3)
    tokens = BoundedTokens.of(batch, KL)
    # A token whose ratio is nearer to a bound than the table is to the solver decides either way.
    near = [np.abs(tokens.ratio - edge) < 1e-5 * edge for edge in (tokens.lower, tokens.upper)]
    batch.response_mask[torch.from_numpy(near[0] | near[1])] = False
    options: dict[str, Any] = {"region": KL, "surrogate": surrogate, "backend": backend}
    check(batch, formula(tokens), TABULATED, rounded_size(name, tokens), **options)


@pytest.mark.parametrize("name", ["min-clip", *FORMULAS])
@pytest.mark.parametrize("region", [KL, CLIP], ids=str)
def test_backends_agree_to_the_last_digits(name: str, region: bandpo.Region) -> None:
    surrogate = FORMULAS[name][0] if name in FORMULAS else "min-clip"
    batch = random_batch((40, 50), seed=1)
    options: dict[str, Any] = {"region": region, "surrogate": surrogate}
    native, plain = (
        batch.loss(**options, metrics_by_probability=True, backend=name) for name in BACKENDS
    )
    # Exponentials differ by units in the last place.
    size = torch.from_numpy(rounded_size(name, BoundedTokens.of(batch, region)))

    def agree(mine: torch.Tensor, other: torch.Tensor) -> bool:
        return bool(((mine - other).abs() <= 1e-6 * (other.abs() + size)).all())

    assert agree(native.per_token, plain.per_token)
    assert native.metrics.keys() == plain.metrics.keys()
    for metric, value in native.metrics.items():
        np.testing.assert_allclose(value, plain.metrics[metric], rtol=1e-5, err_msg=metric)
    # Of the sum, so that sizes are those of tokens.
    summed = {**options, "loss_agg_mode": "token-sum"}
    assert agree(*(batch.gradient(**summed, backend=name) for name in BACKENDS))


@pytest.mark.parametrize(
    ("level", "surrogate"),
    [
        ("token", "min-clip"),
        ("token", GradientPreserving(0.0, 0.0)),
        ("sequence", "min-clip"),
        ("geometric-mean", "min-clip"),
    ],
)
def test_the_gradient_is_the_derivative_of_the_loss(
    level: Any, surrogate: Surrogate, backend: str
) -> None:
    """Where nothing is stopped by sg(), the gradient is the derivative of the loss.

    At the levels of a sequence that is so for the mean over its tokens, which share an advantage.
    """
    batch = random_batch((4, 5), dtype=torch.float64, seed=4)
    batch.response_mask[1] = False
    advantages = batch.advantages[:, :1]
    region = CLIP if level == "token" else bandpo.Clip(0.03, 0.03)

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        return (
            batch._replace(log_prob=log_prob, advantages=advantages)
            .loss(
                region=region,
                surrogate=surrogate,
                ratio_level=level,
                backend=backend,
                loss_agg_mode="seq-mean-token-mean",
            )
            .loss
        )

    log_prob = batch.log_prob.requires_grad_()
    assert torch.autograd.gradcheck(loss, log_prob)
    (gradient,) = torch.autograd.grad(loss(log_prob), log_prob)
    valid = batch.response_mask
    assert gradient[valid].any(), "all are clipped"
    assert not gradient[valid].all(), "none is clipped"


@pytest.mark.parametrize("surrogate", ["mask", "weight"])
def test_a_stopped_ratio_has_no_second_derivative(surrogate: Any, backend: str) -> None:
    batch = random_batch((3, 5), dtype=torch.float64)
    log_prob = batch.log_prob.requires_grad_()
    loss = batch.loss(region=CLIP, surrogate=surrogate, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, log_prob, create_graph=True)
    assert not gradient.requires_grad or not any(
        torch.autograd.grad(gradient.sum(), log_prob, allow_unused=True)
    )


def sequence_means(values: Float64Array, valid: Any) -> Float64Array:
    """The mean over each row's tokens that count, at all of its tokens."""
    total = np.where(valid, values, 0.0).sum(-1, keepdims=True)
    mean = total / np.maximum(valid.sum(-1, keepdims=True), 1)
    return np.broadcast_to(mean, values.shape)


def packed(batch: Batch) -> tuple[Batch, torch.Tensor]:
    """The same sequences, packed, without the padding at their ends."""
    rows, width = batch.log_prob.shape
    lengths = [width - 3 * (row % 3) for row in range(rows)]
    for row, length in enumerate(lengths):
        batch.response_mask[row, length:] = False
    kept = torch.cat([torch.arange(n) + row * width for row, n in enumerate(lengths)])
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    return Batch(*(tensor.reshape(-1)[kept] for tensor in batch)), offsets


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", [*BY_NAME, Mask(symmetric=True)], ids=str)
def test_backends_agree_on_what_is_not_finite(surrogate: Any, level: Any) -> None:
    """An infinite advantage has no gradient where its token is clipped; a NaN is not hidden."""
    batch = random_batch((4, 32), dtype=torch.float64)
    batch.response_mask[:] = True
    batch.log_prob[1, 3] = math.nan
    for row, infinity in ((2, math.inf), (3, -math.inf)):
        batch.advantages[row, ::2] = infinity
    for region in (bandpo.Clip(0.2, 0.2), bandpo.Clip(0.0, 0.0)):
        options = {"region": region, "surrogate": surrogate, "ratio_level": level}
        native, plain = (batch.gradient(backend=backend, **options) for backend in BACKENDS)
        assert bool(native[1, 3].isnan())
        torch.testing.assert_close(native, plain, rtol=1e-13, atol=0.0, equal_nan=True)
        native, plain = (batch.loss(backend=backend, **options).per_token for backend in BACKENDS)
        torch.testing.assert_close(native, plain, rtol=1e-13, atol=0.0, equal_nan=True)


class TestLevels:
    # Bounds so near that the means of random sequences reach them.
    near = bandpo.Clip(0.05, 0.04)

    def test_sequence_is_gspo(self, backend: str) -> None:
        """arXiv 2507.18071: min(s A, clip(s) A), the gradient s A shared by the tokens."""
        batch = random_batch((60, 20), dtype=torch.float64)
        old, new, advantage = (tensor.numpy() for tensor in batch[:3])
        valid = batch.response_mask.numpy()
        s = np.exp(sequence_means(new - old, valid))
        low, high = (advantage < 0) & (s < 0.95), (advantage > 0) & (s > 1.04)
        loss = -np.minimum(advantage * s, advantage * np.clip(s, 0.95, 1.04))
        gradient = np.where(low | high, 0.0, -advantage * s)
        assert (low & valid).any()
        assert (high & valid).any()
        options: dict[str, Any] = {"ratio_level": "sequence", "region": self.near}
        check(batch, (loss, gradient), EXACT, **options, backend=backend)

    @pytest.mark.parametrize("name", FORMULAS)
    def test_surrogates_of_a_sequence_equal_their_formulas(self, name: str, backend: str) -> None:
        surrogate, formula = FORMULAS[name]
        batch = random_batch((60, 20), dtype=torch.float64)
        valid = batch.response_mask.numpy()
        own = batch.log_prob.numpy() - batch.old_log_prob.numpy()
        tokens = BoundedTokens.of(batch, self.near, sequence_means(own, valid))
        options: dict[str, Any] = {"ratio_level": "sequence", "region": self.near}
        options |= {"surrogate": surrogate, "backend": backend}
        check(batch, formula(tokens), EXACT, rounded_size(name, tokens), **options)

    @pytest.mark.parametrize("region", [KL, CLIP, PER_TOKEN, TV], ids=str)
    def test_geometric_mean_is_gmpo(self, region: bandpo.Region, backend: str) -> None:
        """arXiv 2507.20673: token ratios clipped on the side of A, then their geometric mean."""
        batch = random_batch((12, 20), dtype=torch.float64)
        tokens = BoundedTokens.of(batch, region)
        clipped = np.log(np.where(tokens.beyond, tokens.bound, tokens.ratio))
        loss = -tokens.advantage * np.exp(sequence_means(clipped, tokens.valid))
        gradient = np.where(tokens.beyond, 0.0, loss)
        assert (tokens.beyond & tokens.valid).sum() > 5
        options: dict[str, Any] = {"ratio_level": "geometric-mean", "region": region}
        options |= {"backend": backend, "exact": True}
        check(batch, (loss, gradient), EXACT, **options)

        metrics = batch.loss(**options, metrics_by_probability=True).metrics
        low, high = tokens.below & tokens.valid, tokens.above & tokens.valid
        count = tokens.valid.sum()
        assert_close(metrics["clip_fraction_low"], low.sum() / count, EXACT)
        assert_close(metrics["clip_fraction_high"], high.sum() / count, EXACT)
        removed = np.abs(loss - gradient)[tokens.valid].sum() / np.abs(loss)[tokens.valid].sum()
        assert_close(metrics["gradient_removed"], removed, EXACT)
        by_bin = metrics["clip_fraction_low_by_probability"] * metrics["tokens_by_probability"]
        assert_close(by_bin.sum(), low.sum(), EXACT)

    @pytest.mark.parametrize("level", ["sequence", "geometric-mean"])
    @pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
    def test_packed_is_padded(self, level: Any, mode: Any, backend: str) -> None:
        batch = random_batch((7, 20), dtype=torch.float64)
        flat, offsets = packed(batch)
        options: dict[str, Any] = {"region": self.near, "ratio_level": level, "backend": backend}
        options["loss_agg_mode"] = mode
        whole, parts = batch.loss(**options), flat.loss(**options, cu_seqlens=offsets)
        torch.testing.assert_close(parts.loss, whole.loss, rtol=EXACT, atol=0.0)
        for name, metric in whole.metrics.items():
            torch.testing.assert_close(parts.metrics[name], metric, rtol=1e-9, atol=0.0)
        gradient = batch.gradient(**options)
        mine = flat.gradient(**options, cu_seqlens=offsets)
        kept = gradient[gradient != 0.0]
        torch.testing.assert_close(mine[mine != 0.0], kept, rtol=EXACT, atol=0.0)


class TestWholeSequences:
    """Trust region masking, arXiv 2512.23075: one token outside drops its whole sequence."""

    @pytest.mark.parametrize("region", [KL, CLIP, PER_TOKEN], ids=str)
    def test_any_token_outside_drops_all(self, region: bandpo.Region, backend: str) -> None:
        batch = random_batch((12, 20), dtype=torch.float64)
        batch.log_prob[::2] = batch.old_log_prob[::2] + 0.03 * batch.advantages[::2]
        tokens = BoundedTokens.of(batch, region)
        below, above = tokens.outside
        dropped = ((below | above) & tokens.valid).any(-1, keepdims=True)
        assert 0 < dropped.sum() < 12
        gradient = np.where(dropped, 0.0, -tokens.advantage * np.minimum(tokens.ratio, 20.0))
        surrogate = Mask(whole_sequence=True)
        options: dict[str, Any] = {"region": region, "surrogate": surrogate, "backend": backend}
        options["exact"] = True
        truncated = batch.loss(**{**options, "surrogate": replace(surrogate, truncation=1.01)})
        limited = (tokens.ratio > 1.01) & ~dropped & tokens.valid
        assert_close(
            truncated.metrics["truncation_fraction"], limited.sum() / tokens.valid.sum(), EXACT
        )
        check(batch, (gradient * tokens.log_prob, gradient), EXACT, **options)

        metrics = batch.loss(**options).metrics
        assert_close(metrics["masked_sequence_fraction"], dropped.sum() / 12, EXACT)
        beyond = {"low": tokens.below, "high": tokens.above}
        by_bin = batch.loss(**options, metrics_by_probability=True).metrics
        for side, flag in beyond.items():
            share = flag[tokens.valid].mean()
            assert share > 0
            assert_close(metrics[f"clip_fraction_{side}"], share, EXACT)
            of_bin = by_bin[f"clip_fraction_{side}_by_probability"] @ (
                by_bin["tokens_by_probability"].to(torch.float64)
            )
            assert_close(of_bin, flag[tokens.valid].sum(), EXACT)
        free = np.abs(tokens.advantage) * tokens.ratio
        kept = np.abs(gradient)
        removed = (free - kept)[tokens.valid].sum() / free[tokens.valid].sum()
        assert_close(metrics["gradient_removed"], removed, EXACT)

    def test_a_masked_token_drops_nothing_and_a_nan_is_not_hidden(self, backend: str) -> None:
        batch = random_batch((3, 8))
        batch.log_prob[:] = batch.old_log_prob
        batch.response_mask[:] = True
        batch.log_prob[0, 2] += 3.0
        batch.response_mask[0, 2] = False
        batch.log_prob[1, 4] = math.nan
        batch.log_prob[1, 5] += 3.0
        options: dict[str, Any] = {"region": CLIP, "surrogate": Mask(whole_sequence=True)}
        result = batch.loss(**options, backend=backend)
        assert result.metrics["nonfinite_tokens"] == 1
        assert bool(result.per_token[1, 4].isnan())
        assert not result.per_token[1, torch.tensor([0, 1, 2, 3, 5, 6, 7])].any()
        assert (result.per_token[0] != 0).sum() == 7
        assert_close(result.metrics["masked_sequence_fraction"], 1 / 3, 1e-7)

        batch.log_prob[1, 4] = batch.old_log_prob[1, 4]
        batch.advantages[1, 4] = math.nan
        result = batch.loss(**options, backend=backend)
        assert result.metrics["nonfinite_tokens"] == 1
        assert bool(result.per_token[1, 4].isnan())


class TestWeights:
    def test_weights_multiply_loss_and_gradient(self, backend: str) -> None:
        batch = random_batch((12, 20), dtype=torch.float64)
        rollout = batch.old_log_prob + 0.5 * torch.sin(torch.arange(240.0)).reshape(12, 20)
        ratio = (batch.old_log_prob - rollout).exp()
        truncated = ratio.clamp(max=1.2)
        masked = torch.where((ratio > 0.8) & (ratio < 1.25), ratio, 0.0)
        tokens = BoundedTokens.of(batch, KL)
        for name, (surrogate, formula) in FORMULAS.items():
            for weights in (truncated, masked):
                padded = weights.clone()
                padded[~batch.response_mask] = math.nan
                of_token = weights.numpy()
                loss, gradient = (of_token * values for values in formula(tokens))
                check(
                    batch, (loss, gradient), EXACT, region=KL, surrogate=surrogate, exact=True,
                    rollout_is_weights=padded, backend=backend,
                )  # fmt: skip
            assert name

    def test_a_weight_of_a_sequence_equals_weights_of_its_tokens(self, backend: str) -> None:
        batch = random_batch((6, 8))
        weights = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 1.0])
        each = weights[:, None].expand(6, 8)
        want = batch.loss(region=KL, rollout_is_weights=each, backend=backend)
        for shaped in (weights, weights[:, None]):
            for advantages in (batch.advantages, batch.advantages[:, :1]):
                per_row = batch._replace(advantages=advantages)
                want = per_row.loss(region=KL, rollout_is_weights=each, backend=backend)
                got = per_row.loss(region=KL, rollout_is_weights=shaped, backend=backend)
                torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)
        assert not want.per_token[0].any()


# One of each path through the code: numbers alone differ in "mask, c = 1.5" and "preserving .75".
LEVELS_OF = [
    *(
        (name, level)
        for name in ("min-clip", "mask", "mask, no c", "weight", "preserving", "whole")
        for level in ("token", "sequence")
    ),
    ("min-clip", "geometric-mean"),
]


@pytest.mark.parametrize(("name", "level"), LEVELS_OF)
def test_compiles_without_a_graph_break(name: str, level: Any, backend: str) -> None:
    surrogate: Surrogate = FORMULAS[name][0] if name in FORMULAS else "min-clip"
    surrogate = Mask(whole_sequence=True) if name == "whole" else surrogate
    region = CLIP if level == "sequence" else KL
    batch = random_batch((4, 8))

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        return policy_loss(
            batch.old_log_prob, log_prob, *batch[2:], region=region, surrogate=surrogate,
            ratio_level=level, backend=backend,  # type: ignore[arg-type]
        ).loss  # fmt: skip

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    log_prob = batch.log_prob.requires_grad_()
    for run in (loss, compiled):
        assert torch.isfinite(run(log_prob))
    torch.testing.assert_close(compiled(log_prob), loss(log_prob))
    torch.testing.assert_close(
        *(torch.autograd.grad(f(log_prob), log_prob) for f in (loss, compiled))
    )


def test_all_ratios_one_is_false_once_a_ratio_differs(backend: str) -> None:
    batch = random_batch((4, 8))
    same = batch._replace(log_prob=batch.old_log_prob.clone())
    metrics = same.loss(region=KL, backend=backend).metrics
    assert metrics["all_ratios_one"]
    assert metrics["gradient_removed"] == 0.0
    one = same.log_prob.clone()
    one[torch.where(same.response_mask)[0][0], torch.where(same.response_mask)[1][0]] -= 1e-3
    assert (
        not same._replace(log_prob=one).loss(region=KL, backend=backend).metrics["all_ratios_one"]
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"surrogate": "clip"}, ValueError, "surrogate must be one of min-clip, mask, weight"),
        ({"surrogate": Mask}, ValueError, "surrogate must be one of"),
        ({"ratio_level": "tokens"}, ValueError, "ratio_level must be one of token, sequence"),
        ({"surrogate": "mask", "dual_clip": 3.0}, ValueError, "dual_clip must be left out"),
        ({"surrogate": Mask(), "dual_clip": 3.0}, ValueError, "it limits 'min-clip'"),
        ({"ratio_level": "sequence"}, ValueError, "region must be a Clip with ratio_level"),
        (
            {"ratio_level": "sequence", "surrogate": "weight", "region": PER_TOKEN},
            ValueError,
            "which depends on each token's probability; use ratio_level 'token'",
        ),
        (
            {"ratio_level": "geometric-mean", "surrogate": "weight"},
            ValueError,
            "surrogate must be 'min-clip' with ratio_level 'geometric-mean', got 'weight'",
        ),
        (
            {"ratio_level": "geometric-mean", "dual_clip": 3.0},
            ValueError,
            "dual_clip must be left out with ratio_level 'geometric-mean', got 3.0",
        ),
        ({"rollout_is_weights": 1.0}, TypeError, "rollout_is_weights must be a torch.Tensor"),
        ({"rollout_is_weights": torch.ones(3)}, ValueError, "rollout_is_weights must have shape"),
        (
            {"rollout_is_weights": torch.ones(4, 8, dtype=torch.int64)},
            TypeError,
            "rollout_is_weights must be float32, float64, bfloat16 or float16",
        ),
    ],
)
def test_incompatible_choices_are_refused_with_a_remedy(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    batch = random_batch((4, 8))
    with pytest.raises(error, match=message) as raised:
        batch.loss(**{"region": KL, **options})
    assert isinstance(raised.value, bandpo.BandpoError)
    rule = {name: value for name, value in options.items() if name != "rollout_is_weights"}
    if rule:
        with pytest.raises(error, match=message):
            PolicyLoss(**{"region": KL, **rule})


@pytest.mark.parametrize(
    "options",
    [
        {"region": CLIP, "ratio_level": "sequence"},
        {"region": KL, "ratio_level": "geometric-mean"},
        {"region": KL, "surrogate": Mask(whole_sequence=True)},
    ],
)
def test_packed_tokens_need_their_sequences(options: dict[str, Any]) -> None:
    with pytest.raises(bandpo.error.InvalidValueError, match="cu_seqlens must be given for"):
        random_batch((8,)).loss(**options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Mask(truncation=1.0), ValueError, "truncation must be above 1, got 1.0"),
        (lambda: Mask(truncation=math.nan), ValueError, "truncation must be above 1, got nan"),
        (
            lambda: Mask(truncation="2"),  # type: ignore[arg-type]
            TypeError,
            "truncation must be a real number, got str",
        ),
        (
            lambda: Mask(whole_sequence=1),  # type: ignore[arg-type]
            TypeError,
            "whole_sequence must be a bool, got int",
        ),
        (lambda: GradientPreserving(-0.1), ValueError, "beta_low must be finite and at least 0"),
        (lambda: GradientPreserving(1.0, math.inf), ValueError, "beta_high must be finite"),
        (lambda: GradientPreserving(True), TypeError, "beta_low must be a real number, got bool"),
    ],
)
def test_parameters_out_of_range_are_refused(
    make: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_a_jagged_tensor_is_refused_with_the_way_to_pack_it() -> None:
    batch = random_batch((4, 8))
    rows = [torch.ones(3), torch.ones(5)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    for nested in (jagged, torch.nested.nested_tensor(rows)):
        with pytest.raises(bandpo.error.InvalidTypeError, match=r"\.values\(\) as packed \[N\]"):
            batch._replace(log_prob=nested).loss(region=KL)
    values = jagged.values()
    packed = values - 2.0, values - 1.5, values, values
    offsets = jagged.offsets()  # type: ignore[attr-defined]
    result = policy_loss(*packed, region=CLIP, cu_seqlens=offsets, ratio_level="sequence")
    assert result.metrics["valid_tokens"] == 8


@pytest.mark.parametrize("name", ["min-clip", "mask"])
def test_forward_mode_agrees_with_backward_mode(name: str, backend: str) -> None:
    batch = random_batch((3, 8), dtype=torch.float64)
    surrogate: Any = name

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"region": KL, "surrogate": surrogate, "backend": backend}
        return policy_loss(batch.old_log_prob, log_prob, *batch[2:], **options).loss

    make_dual: Any = torch.autograd.forward_ad.make_dual
    unpack_dual: Any = torch.autograd.forward_ad.unpack_dual
    tangent = torch.ones_like(batch.log_prob)
    forward = torch.func.jvp(loss, (batch.log_prob,), (tangent,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = loss(make_dual(batch.log_prob, tangent))
        by_dual = unpack_dual(dual).tangent
    leaf = batch.log_prob.clone().requires_grad_()
    (backward,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(forward, backward.sum().item(), EXACT)
    assert_close(by_dual, backward.sum().item(), EXACT)


@pytest.mark.parametrize("upper", [False, True])
def test_a_table_clips_from_its_bound_on(backend: str, upper: bool) -> None:
    """In double precision the bound of a table is met to 1e-10, far nearer than it is exact."""
    old = -torch.logspace(-3, 0.5, 50, dtype=torch.float64)[None]
    log_bound = bandpo.torch.log_bounds(KL, old)[int(upper)]
    advantages = torch.tensor([1.0 if upper else -1.0])
    for beyond in (False, True):
        outwards = 1e-10 if beyond is upper else -1e-10
        new = old + log_bound + outwards
        metrics = policy_loss(
            old, new, advantages, torch.ones_like(old), region=KL, backend=backend  # type: ignore[arg-type]
        ).metrics  # fmt: skip
        assert metrics[f"clip_fraction_{'high' if upper else 'low'}"] == float(beyond)


@pytest.mark.parametrize("surrogate", ["min-clip", "mask", "weight", "gradient-preserving"])
def test_the_clamp_counts_as_removed_gradient(backend: Any, surrogate: Any) -> None:
    old = torch.tensor([[-30.0, -2.0]], dtype=torch.float64)
    leaf = (old + torch.tensor([[25.0, 0.5]])).requires_grad_()
    region = bandpo.Clip(1.0, math.inf)
    result = policy_loss(
        old, leaf, torch.ones(1), torch.ones(1, 2), region=region, surrogate=surrogate,
        loss_agg_mode="token-sum", backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    free = torch.tensor([[20.0, 0.5]], dtype=torch.float64).exp()
    removed = (free + gradient).abs().sum() / free.sum()
    assert_close(result.metrics["gradient_removed"], removed.item(), EXACT)


LIMITED_AT_0 = (
    bandpo.PriceBand("kl", 0.3),
    bandpo.Band("kl", 0.05).cap(10),
    bandpo.Band("pearson-chi2", 0.05).cap(3) | CLIP,
    bandpo.sides(lower=KL, upper=CLIP),
)
"""Regions whose upper bound is finite at an old probability of 0."""


@pytest.mark.parametrize("region", LIMITED_AT_0, ids=str)
@pytest.mark.parametrize("surrogate", ["mask", "weight", "gradient-preserving", "soft-gate"])
def test_the_bounds_hold_for_any_old_log_prob(
    surrogate: Any, region: bandpo.Region, backend: str
) -> None:
    """A safe distance that spares a lookup must not be infinite where a bound is finite."""
    old = torch.tensor([[-math.inf, -3.4e38, -1e30, -200.0, -128.0, -127.9, -50.0]])
    batch = Batch(old, torch.full_like(old, -1.5), torch.ones(1), torch.ones_like(old))
    options: dict[str, Any] = {"region": region, "surrogate": surrogate}
    options["loss_agg_mode"] = "token-sum"
    found = batch.gradient(**options, backend=backend)
    wide = Batch(*(tensor.double() for tensor in batch))
    wanted = wide.gradient(**options, backend="torch", exact=True)
    assert_close(found, wanted.numpy(), 2e-6)
    _, high = region.bounds(old.numpy())
    assert np.isfinite(high).all()


def test_a_nan_of_a_masked_token_is_no_width(backend: str) -> None:
    region = bandpo.by_sign(positive=bandpo.Clip(0.1), negative=KL)
    old, new, advantages = (
        torch.tensor([row]) for row in ([-1.0, math.nan], [-1.2, -1.2], [1.0, -1.0])
    )
    batch = Batch(old, new, advantages, torch.tensor([[1, 0]]))
    for surrogate in ("soft-gate", "quadratic"):
        found = batch.loss(region=region, surrogate=surrogate, backend=backend)
        assert bool(found.loss.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_soft_gate_closes_at_one_place_in_all_backends(dtype: torch.dtype) -> None:
    """Where sech^2 is below the rounding error of 1: at 40 widths over tau."""
    old = torch.zeros(3, dtype=dtype)
    # tau (r - 1)/width of 39.5, 40.5 and 60.
    new = torch.log(1.0 + torch.tensor([39.5, 40.5, 60.0], dtype=dtype) / 10.0)
    for backend in ("native", "torch"):
        moved = new.clone().requires_grad_()
        given: dict[str, Any] = {
            "region": bandpo.Clip(1.0, 1.0),
            "surrogate": SoftGate(10.0, 10.0),
            "backend": backend,
        }
        loss = policy_loss(old - 1.0, moved - 1.0, torch.ones(3), torch.ones(3), **given).loss
        (gradient,) = torch.autograd.grad(loss, moved)
        wanted = -math.exp(float(new[0])) / 3.0 / math.cosh(39.5 / 2.0) ** 2
        torch.testing.assert_close(gradient[0].item(), wanted, rtol=1e-4, atol=0.0)
        assert gradient[1:].tolist() == [0.0, 0.0]
