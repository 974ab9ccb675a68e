"""The policy loss against its definition, written out in numpy, on every backend."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bandpo
import bandpo.torch
from bandpo.backends.select import default_backend, gpu_report
from bandpo.check import Float64Array
from bandpo.correction import Correction
from bandpo.error import InvalidValueError
from bandpo.loss import (
    PROBABILITY_EDGES,
    PolicyLoss,
    PolicyLossResult,
    policy_loss,
)
from bandpo.schedule import Linear, ScheduledBand
from bandpo.tensors.bounds import bounds_of
from conftest import BACKENDS
from support.batches import Batch, assert_close, random_batch
from support.elsewhere import Elsewhere
from support.formulas import BoundedTokens, dual_clipped, min_clip
from support.surrogates import SURROGATES
from support.waits import Waits

Array: TypeAlias = NDArray[Any]
Tensor: TypeAlias = torch.Tensor

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
SEQUENCE_MODES = MODES[2:]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KL = bandpo.Band("kl", 0.05)
CLIP = bandpo.Clip(0.2, 0.28)

# A warning of torch itself, on the first import of its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def exact_losses(batch: Batch, region: bandpo.Region) -> Float64Array:
    """The loss of every token, masked or not, by exact bounds."""
    return min_clip(BoundedTokens.of(batch, region))[0]


class TestMinClip:
    @pytest.mark.parametrize("spec", ["kl", "tv", "reverse-kl", "jensen-shannon"])
    def test_gradient_is_the_mask_rule(self, spec: str, backend: str) -> None:
        """Zero exactly where r leaves {D <= delta} on the side of the sign of A; -A r elsewhere."""
        rng = np.random.default_rng(1)
        count, delta = 100_000, 0.05
        region = bandpo.Band(spec, delta)
        old = np.log(10.0) * -rng.uniform(0.0, 12.0, count)
        old[: count // 4] = np.log(-np.expm1(np.log(10.0) * -rng.uniform(0.0, 9.0, count // 4)))
        log_ratio = rng.normal(0.0, 1.0, count) * 10.0 ** rng.uniform(-2.0, 0.5, count)
        # A third of them next to a bound, on either side.
        near = rng.integers(0, 3, count) == 0
        bounds = np.where(rng.random(count) < 0.5, *region.log_bounds(old))
        offset = 1.0 + rng.choice([-1.0, 1.0], count) * 10.0 ** rng.uniform(-9.0, -2.0, count)
        near &= np.isfinite(bounds) & (np.abs(bounds * offset) < 20.0)
        new = old + np.clip(np.where(near, bounds * offset, log_ratio), -20.0, 20.0)
        log_ratio = new - old  # as rounded
        advantages = rng.normal(0.0, 1.0, count)

        arrays = old, new, advantages, np.ones(count, dtype=bool)
        batch = Batch(*(torch.from_numpy(values) for values in arrays))
        gradient = batch.gradient(
            region=region, backend=backend, exact=True, loss_agg_mode="token-sum"
        ).numpy()

        outside = ~region.contains(old, log_ratio)
        stopped = np.where(advantages > 0, outside & (log_ratio > 0), outside & (log_ratio < 0))
        assert 1000 < stopped.sum() < count - 1000
        assert np.array_equal(gradient == 0.0, stopped)
        wanted = -advantages * np.exp(log_ratio)
        np.testing.assert_allclose(gradient[~stopped], wanted[~stopped], rtol=5e-16)

    @pytest.mark.parametrize("dual_clip", [None, 1.5])
    @pytest.mark.parametrize(
        "region",
        [
            KL,
            bandpo.Band("tv", (0.02, 0.3)),
            KL.table(),
            (KL | CLIP).table(),
            CLIP,
            bandpo.Clip(1.0, math.inf),
        ],
    )
    def test_loss_and_gradient_of_every_token_equal_the_formula(
        self, region: bandpo.Region, dual_clip: float | None, backend: str
    ) -> None:
        exact = not isinstance(region, bandpo.BandTable)
        reference = region.region if isinstance(region, bandpo.BandTable) else region
        batch = random_batch((50, 40), dtype=torch.float64)
        per_token, gradient = min_clip(BoundedTokens.of(batch, reference), dual_clip or math.inf)
        options: dict[str, Any] = {
            "region": region, "dual_clip": dual_clip, "backend": backend, "exact": exact,
        }  # fmt: skip
        valid = batch.response_mask.numpy()
        tolerance = 1e-13 if exact else 1e-5
        found = batch.loss(**options).per_token
        assert_close(found, np.where(valid, per_token, 0.0), tolerance)
        found = batch.gradient(**options, loss_agg_mode="token-sum")
        assert_close(found, np.where(valid, gradient, 0.0), tolerance)

    def test_radii_per_token_equal_single_radii(self, backend: str) -> None:
        batch = random_batch((6, 50, 1), dtype=torch.float64)
        radii = np.random.default_rng(2).uniform(0.01, 0.5, (1, 50, 1))
        result = batch.loss(region=bandpo.Band("kl", radii), backend=backend)
        for t in range(50):
            column = Batch(*(tensor[:, t] for tensor in batch))
            one = column.loss(region=bandpo.Band("kl", radii[0, t, 0]), backend=backend, exact=True)
            assert torch.equal(one.per_token, result.per_token[:, t])

    def test_a_region_with_log_bounds_alone_is_accepted(self, backend: str) -> None:
        class Union(bandpo.Region):
            def log_bounds(self, logp: Any) -> tuple[Float64Array, Float64Array]:
                pairs = KL.log_bounds(logp), CLIP.log_bounds(logp)
                return np.minimum(*(p[0] for p in pairs)), np.maximum(*(p[1] for p in pairs))

        batch = random_batch((20, 30), dtype=torch.float64)
        wanted = exact_losses(batch, Union()) * batch.response_mask.numpy()
        assert_close(batch.loss(region=Union(), backend=backend).per_token, wanted, 1e-13)

    def test_at_a_bound_the_gradient_passes_and_at_the_dual_clip_it_stops(
        self, backend: str
    ) -> None:
        log_lower, log_upper = CLIP.log_lower, CLIP.log_upper
        new = torch.tensor([log_upper, log_lower, math.log(3.0), -0.1], dtype=torch.float64)
        advantages = torch.tensor([2.0, -2.0, -2.0, 0.0], dtype=torch.float64)
        old = torch.zeros(4, dtype=torch.float64)
        batch = Batch(old, new, advantages, torch.ones(4))
        options: dict[str, Any] = {"region": CLIP, "dual_clip": 3.0, "backend": backend}
        assert_close(batch.loss(**options).per_token, [-2.56, 1.6, 6.0, 0.0], 1e-15)
        gradient = batch.gradient(**options, loss_agg_mode="token-sum")
        assert_close(gradient, [-2.56, 1.6, 0.0, 0.0], 1e-15)
        beyond = new + torch.tensor([1e-12, -1e-12, 1e-12, 0.0], dtype=torch.float64)
        assert not batch._replace(log_prob=beyond).gradient(**options).any()

    def test_a_new_probability_of_1_is_not_clipped_where_every_ratio_is_allowed(
        self, backend: str
    ) -> None:
        for region in (bandpo.Band("tv", 0.3), KL | CLIP):
            old = torch.linspace(-0.2, 0.0, 500, dtype=torch.float64)
            batch = Batch(old, torch.zeros(500, dtype=torch.float64), *torch.ones(2, 500))
            for exact in (False, True):
                result = batch.loss(region=region, backend=backend, exact=exact)
                assert result.metrics["clip_fraction_high"] == 0.0

    def test_log_ratio_is_clamped_at_20(self, backend: str) -> None:
        old = torch.tensor([-20.0, -21.0, -1e30, 0.0, 0.0, -math.inf], dtype=torch.float64)
        new = torch.tensor([0.0, 0.0, -1.0, -20.0, -math.inf, -1.0], dtype=torch.float64)
        batch = Batch(old, new, torch.ones_like(old), torch.ones_like(old))
        options: dict[str, Any] = {"region": bandpo.Clip(1.0, math.inf), "backend": backend}
        high, low = -math.exp(20.0), -math.exp(-20.0)
        result = batch.loss(**options)
        assert_close(result.per_token, [high, high, high, low, low, high], 1e-15)
        gradient = batch.gradient(**options, loss_agg_mode="token-sum")
        assert_close(gradient, [high, 0.0, 0.0, low, 0.0, 0.0], 1e-15)
        assert result.metrics["nonfinite_tokens"] == 0

    def test_gradients_pass_gradcheck(self, backend: str) -> None:
        batch = random_batch((4, 5), seed=3, dtype=torch.float64)
        kwargs: dict[str, Any] = {"region": KL, "backend": backend, "dual_clip": 1.4}
        stopped = batch.gradient(**kwargs, exact=True)[batch.response_mask] == 0.0
        assert stopped.any()
        assert not stopped.all()
        for mode in MODES:
            for exact in (False, True):

                def loss(log_prob: Tensor, mode: str = mode, exact: bool = exact) -> Tensor:
                    changed = batch._replace(log_prob=log_prob)
                    return changed.loss(**kwargs, exact=exact, loss_agg_mode=mode).loss

                log_prob = batch.log_prob.clone().requires_grad_()
                assert torch.autograd.gradcheck(loss, (log_prob,))
                assert torch.autograd.gradgradcheck(loss, (log_prob,))

    def test_backends_agree_on_the_gradient_of_a_gradient_penalty(self) -> None:
        batch = random_batch((4, 5), dtype=torch.float64)
        log_prob = batch.log_prob.requires_grad_()
        gradients: list[Tensor] = []
        for name in BACKENDS:
            loss = batch.loss(region=KL, backend=name).loss
            (first,) = torch.autograd.grad(loss, log_prob, create_graph=True)
            gradients += torch.autograd.grad(loss + first.square().sum(), log_prob)
        torch.testing.assert_close(*gradients)

    def test_loss_is_homogeneous_in_the_advantage(self, backend: str) -> None:
        batch = random_batch((8, 16), dtype=torch.float64)
        for mode in MODES:
            options: dict[str, Any] = {
                "region": KL, "dual_clip": 1.5, "backend": backend, "loss_agg_mode": mode,
            }  # fmt: skip
            for factor in (2.0**-40, 0.5, 2.0**60):
                scaled = batch._replace(advantages=factor * batch.advantages)
                assert torch.equal(scaled.loss(**options).loss, factor * batch.loss(**options).loss)
                assert torch.equal(scaled.gradient(**options), factor * batch.gradient(**options))

    def test_gradient_goes_to_log_prob_alone(self, backend: str) -> None:
        batch = random_batch((3, 4))
        for tensor in batch[:3]:
            tensor.requires_grad_()
        result = batch.loss(region=KL, backend=backend, metrics_by_probability=True)
        torch.autograd.backward(result.loss)
        assert batch.log_prob.grad is not None
        assert batch.old_log_prob.grad is None
        assert batch.advantages.grad is None
        assert not any(metric.requires_grad for metric in result.metrics.values())

    @pytest.mark.parametrize("mode", ["token-mean", "none"])
    @pytest.mark.parametrize("argument", ["old_log_prob", "anchor_log_prob", "rollout_log_prob"])
    def test_a_gradient_to_other_log_probs_alone_is_refused(
        self, argument: str, mode: str, backend: str
    ) -> None:
        batch = random_batch((3, 4))
        options: dict[str, Any] = {"region": KL, "backend": backend, "loss_agg_mode": mode}
        other = batch.old_log_prob.clone().requires_grad_()
        if argument == "rollout_log_prob":
            options["correction"] = Correction(region=KL)
        if argument == "old_log_prob":
            batch = batch._replace(old_log_prob=other)
        else:
            options[argument] = other
        wanted = rf"log_prob must require a gradient if {argument} does.*swapped.*\.detach\(\)"
        with pytest.raises(InvalidValueError, match=wanted):
            batch.loss(**options)
        # Metrics alone, and training with log-probs that nobody detached, want none of it.
        with torch.no_grad():
            batch.loss(**options)
        leaf = batch.log_prob.clone().requires_grad_()
        batch._replace(log_prob=leaf).loss(**options).loss.sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        assert other.grad is None
        if argument == "old_log_prob":  # a transform hides that its tensors require one
            hidden = torch.func.vmap(lambda x: batch._replace(log_prob=x).loss(**options).loss)
            assert hidden(batch.log_prob[None]).isfinite().all()

    @pytest.mark.parametrize("surrogate", [*SURROGATES])
    def test_a_log_prob_beside_itself_has_the_gradient_of_a_step_on_policy(
        self, surrogate: str, backend: str
    ) -> None:
        """The ratio is 1, but does not cancel: the loss takes the old log-prob for a constant."""
        batch = random_batch((3, 4), dtype=torch.float64)
        batch.response_mask[:] = True
        leaf = batch.log_prob.requires_grad_()
        for old in (leaf, leaf * 1.0, leaf.detach()):
            loss = batch._replace(old_log_prob=old).loss(
                region=KL, surrogate=SURROGATES[surrogate], backend=backend,
                loss_agg_mode="token-sum",
            ).loss  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, leaf)
            torch.testing.assert_close(gradient, -batch.advantages, rtol=1e-14, atol=0.0)

    def test_gradient_through_the_loss_of_each_token(self, backend: str) -> None:
        batch = random_batch((3, 40))
        log_prob = batch.log_prob.requires_grad_()
        weight = torch.rand(3, 40)
        weighted = weight * batch.loss(region=KL, backend=backend).per_token
        (gradient,) = torch.autograd.grad(weighted.sum(), log_prob)
        plain = batch.gradient(region=KL, backend=backend, loss_agg_mode="token-sum")
        torch.testing.assert_close(gradient, weight * plain)


class TestLossOfEachToken:
    """It is computed at its first access, with the values of the call."""

    @pytest.mark.parametrize("surrogate", ["min-clip", "mask", "weight", "gradient-preserving"])
    def test_it_adds_up_to_the_loss_with_its_gradient(self, surrogate: str, backend: str) -> None:
        batch = random_batch((8, 64), dtype=torch.float64)
        log_prob = batch.log_prob.requires_grad_()
        result = batch.loss(region=KL, surrogate=surrogate, backend=backend)
        assert result.per_token is result.per_token
        mean = result.per_token.sum() / batch.response_mask.sum()
        torch.testing.assert_close(mean, result.loss, rtol=1e-14, atol=0.0)
        torch.testing.assert_close(
            torch.autograd.grad(mean, log_prob, retain_graph=True)[0],
            torch.autograd.grad(result.loss, log_prob)[0],
            rtol=1e-15,
            atol=0.0,
        )

    def test_a_later_step_of_a_schedule_does_not_matter(self, backend: str) -> None:
        batch = random_batch((8, 64))
        schedule = ScheduledBand("kl", Linear(0.05, 0.01, 2))
        result = batch.loss(region=schedule, backend=backend)
        schedule.step()
        want = batch.loss(region=KL, backend=backend).per_token
        assert torch.equal(result.per_token, want)

    def test_without_gradient_it_has_none(self, backend: str) -> None:
        batch = random_batch((8, 64))
        batch.log_prob.requires_grad_()
        with torch.no_grad():
            result = batch.loss(region=KL, backend=backend)
        assert not result.per_token.requires_grad
        with torch.inference_mode():
            inferred = Batch(*(tensor.clone() for tensor in batch)).loss(region=KL, backend=backend)
        assert torch.equal(inferred.per_token, result.per_token)

    @pytest.mark.parametrize("changed", Batch._fields)
    def test_changed_inputs_are_refused(self, changed: str) -> None:
        batch = random_batch((8, 64))
        result = batch.loss(region=KL)
        getattr(batch, changed).zero_()
        with pytest.raises(bandpo.error.InvalidValueError, match="changed in place"):
            _ = result.per_token
        assert result.metrics["valid_tokens"] > 0

    def test_losses_of_inference_tensors_outlive_a_change_in_place(self) -> None:
        want = random_batch((8, 64)).loss(region=KL).per_token
        with torch.inference_mode():
            batch = Batch(*(tensor.clone() for tensor in random_batch((8, 64))))
            result = batch.loss(region=KL)
            batch.log_prob.zero_()
        assert torch.equal(result.per_token, want)

    def test_it_has_its_gradient_when_first_read_without_grad(self, backend: str) -> None:
        batch = random_batch((8, 64))
        batch.log_prob.requires_grad_()
        for mode in (torch.no_grad(), torch.inference_mode()):
            result = batch.loss(region=KL, backend=backend)
            with mode:
                per_token = result.per_token
            assert per_token.requires_grad

    def test_loss_and_metrics_outlive_a_change_in_place(self) -> None:
        batch = random_batch((8, 64))
        result = batch.loss(region=KL)
        batch.log_prob.zero_()
        assert result[0] is result.loss
        assert result[::2] == (result.loss, result.metrics)

    def test_a_result_is_a_sequence_and_pickles(self, backend: str) -> None:
        result = random_batch((2, 8)).loss(region=KL, backend=backend)
        loss, per_token, metrics = result
        assert loss is result[0]
        assert per_token is result[1]
        assert metrics is result[-1]
        copy = pickle.loads(pickle.dumps(result))  # noqa: S301
        assert isinstance(copy, PolicyLossResult)
        assert torch.equal(copy.per_token, per_token)


class TestSavedGradientIsNotShared:
    """The native backward pass scales the saved gradient in place if nothing else can use it."""

    def test_a_retained_graph_gives_the_same_gradient_again(self, backend: str) -> None:
        batch = random_batch((8, 64))
        log_prob = batch.log_prob.requires_grad_()
        loss = batch.loss(region=KL, backend=backend).loss
        first = torch.autograd.grad(3.0 * loss, log_prob, retain_graph=True)[0]
        copy = first.clone()
        second = torch.autograd.grad(3.0 * loss, log_prob, retain_graph=True)[0]
        assert torch.equal(first, copy)
        assert torch.equal(second, copy)
        torch.autograd.backward([4.0 * loss], retain_graph=True)
        torch.autograd.backward([loss])
        once = torch.autograd.grad(batch.loss(region=KL, backend=backend).loss, log_prob)[0]
        assert log_prob.grad is not None
        assert torch.equal(log_prob.grad, 5.0 * once)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.backward([loss])

    def test_a_changed_grad_leaves_a_retained_graph_alone(self, backend: str) -> None:
        batch = random_batch((8, 64))
        log_prob = batch.log_prob.requires_grad_()
        loss = batch.loss(region=KL, backend=backend).loss
        torch.autograd.backward([loss], retain_graph=True)
        assert log_prob.grad is not None
        once = log_prob.grad.clone()
        log_prob.grad.zero_()
        torch.autograd.backward([loss])
        assert torch.equal(log_prob.grad, once)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_factor_of_the_loss_scales_the_gradient(self, mode: str, backend: str) -> None:
        batch = random_batch((8, 64))
        log_prob = batch.log_prob.requires_grad_()
        options: dict[str, Any] = {"region": KL, "backend": backend, "loss_agg_mode": mode}
        once = torch.autograd.grad(batch.loss(**options).loss, log_prob)[0]
        torch.autograd.backward([0.25 * batch.loss(**options).loss])
        assert log_prob.grad is not None
        assert torch.equal(log_prob.grad, 0.25 * once)

    def test_tensors_that_hooks_keep_stay_unchanged(self, backend: str) -> None:
        batch = random_batch((8, 64))
        log_prob = batch.log_prob.requires_grad_()
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = 3.0 * batch.loss(region=KL, backend=backend).loss
        copies = [tensor.clone() for tensor in kept]
        gradient = torch.autograd.grad(loss, log_prob)[0]
        assert kept
        assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
        torch.testing.assert_close(gradient, 3.0 * batch.gradient(region=KL))

    def test_batched_gradients_equal_single_ones(self, backend: str) -> None:
        batch = random_batch((4, 8))
        log_prob = batch.log_prob.requires_grad_()
        factors = torch.tensor([1.0, -2.0, 3.0])
        wanted = batch.gradient(region=KL, backend=backend) * factors[:, None, None]

        def new_loss() -> Tensor:
            return batch.loss(region=KL, backend=backend).loss

        batched = torch.autograd.grad(new_loss(), log_prob, factors, is_grads_batched=True)[0]
        torch.testing.assert_close(batched, wanted)
        loss = new_loss()
        batched = torch.func.vmap(
            lambda factor: torch.autograd.grad(loss, log_prob, factor, retain_graph=True)[0]
        )(factors)
        torch.testing.assert_close(batched, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32], ids=str)
def test_the_loss_keeps_its_dtype_with_a_count_of_any_dtype(
    dtype: torch.dtype, backend: str
) -> None:
    batch = random_batch((8, 64))
    count = torch.tensor(64, dtype=dtype)
    loss = batch.loss(region=KL, backend=backend, batch_num_tokens=count).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, batch.loss(region=KL, backend=backend, batch_num_tokens=64).loss)


FORKED = """
import os, signal
import numpy as np
import bandpo
import torch
from bandpo.loss import policy_loss

band = bandpo.Band("kl", 0.05)
torch.set_num_threads(2)

def work():
    band.log_bounds(np.linspace(-9.0, -0.1, 20_000))
    # Below the size from which torch takes threads: it would wait in vain for its own.
    old = torch.full((2, 12_000), -1.0)
    new = old.clone().requires_grad_()
    (3.0 * policy_loss(old, new, old, old < 0.0, region=band).loss).backward()

work()
for generation in range(2):
    child = os.fork()
    if child:
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    signal.alarm(30)
    work()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_does_not_wait_for_threads_of_its_parent() -> None:
    """Otherwise it would wait for ever, because a fork copies no threads."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True)


class TestBackendsAgree:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "region", [KL, bandpo.Band("hellinger", 0.1), KL | CLIP, CLIP], ids=str
    )
    @pytest.mark.parametrize("exact", [False, True])
    def test_on_every_dtype_and_mode(
        self, dtype: torch.dtype, region: bandpo.Region, exact: bool
    ) -> None:
        batch = random_batch((32, 48), dtype=dtype)
        tight = 1e-12 if dtype == torch.float64 else 2e-6
        for mode in MODES:
            options: dict[str, Any] = {
                "region": region, "dual_clip": 2.0, "loss_agg_mode": mode, "exact": exact,
                "metrics_by_probability": True,
            }  # fmt: skip
            native, plain = (batch.loss(**options, backend=name) for name in BACKENDS)
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            assert native.loss.dtype == plain.loss.dtype == native.per_token.dtype == compute
            assert_close(native.per_token, plain.per_token.numpy(), tight)
            assert_close(native.loss, plain.loss.numpy(), tight, atol=tight)
            assert native.metrics.keys() == plain.metrics.keys()
            for name, metric in native.metrics.items():
                assert metric.dtype == plain.metrics[name].dtype
                assert metric.shape == plain.metrics[name].shape
                assert_close(metric, plain.metrics[name].numpy(), 10 * tight, atol=tight)
            gradients = [batch.gradient(**options, backend=name) for name in BACKENDS]
            assert gradients[0].dtype == dtype
            # In 8 or 11 bits both round to a neighbour.
            rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else tight
            # Half precision loses digits below its min normal number.
            largest = float(gradients[1].abs().max())
            floor = 1e-7 if dtype.itemsize == 2 else tight * largest
            assert_close(gradients[0], gradients[1].double().numpy(), rounding, atol=floor)

    def test_auto_is_native_on_a_cpu(self) -> None:
        batch = random_batch((4, 8))
        with torch.profiler.profile() as profile:
            batch.loss(region=KL)
        assert any(event.key == "_WeightedSum" for event in profile.key_averages())

    def test_mixed_dtypes_are_computed_in_the_wider(self, backend: str) -> None:
        batch = random_batch((8, 8), dtype=torch.float64)
        narrow = batch._replace(log_prob=batch.log_prob.bfloat16())
        widened = narrow._replace(log_prob=narrow.log_prob.double())
        options: dict[str, Any] = {"region": KL, "backend": backend, "exact": True}
        assert torch.equal(narrow.loss(**options).loss, widened.loss(**options).loss)
        assert narrow.gradient(**options).dtype == torch.bfloat16

    def test_autocast_changes_nothing(self, backend: str) -> None:
        for dtype in (torch.float32, torch.float64):
            batch = random_batch((16, 16), dtype=dtype)
            outside = batch.loss(region=KL, backend=backend, loss_agg_mode="seq-mean-token-mean")
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = batch.loss(region=KL, backend=backend, loss_agg_mode="seq-mean-token-mean")
                gradient = batch.gradient(region=KL, backend=backend)
            assert inside.loss.dtype == dtype
            assert torch.equal(inside.loss, outside.loss)
            assert torch.equal(gradient, batch.gradient(region=KL, backend=backend))

    @pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode])
    def test_tensors_cached_by_a_fake_or_inference_call_serve_later_calls(
        self, mode: Any, backend: str
    ) -> None:
        region = bandpo.Band("kl", 0.0123)
        batch = random_batch((4, 4))
        with mode():
            old, new, advantages = (-torch.rand(4, 4) for _ in range(3))
            Batch(old, new, advantages, old < -0.5).loss(region=region, backend=backend)
        assert batch.gradient(region=region, backend=backend).any()


def aggregated(
    per_token: Array, mask: Array, mode: str, *, dp_size: int = 1, tokens: float | None = None,
    sequences: float | None = None, scale: float | None = None,
) -> float:  # fmt: skip
    """verl's agg_loss, one sequence after another."""
    sums = [float(row[valid].sum()) for row, valid in zip(per_token, mask, strict=True)]
    lengths = [int(valid.sum()) for valid in mask]
    if mode == "token-sum":
        return sum(sums) * dp_size
    if mode == "token-mean":
        return sum(sums) / (sum(lengths) if tokens is None else tokens) * dp_size
    if mode == "seq-mean-token-mean":
        sums = [s / length if length else 0.0 for s, length in zip(sums, lengths, strict=True)]
    count = sum(length > 0 for length in lengths) if sequences is None else sequences
    loss = sum(sums) / count * dp_size
    if mode == "seq-mean-token-sum-norm":
        loss /= mask.shape[1] if scale is None else scale
    return loss


def ragged_batch(dtype: torch.dtype = torch.float64) -> Batch:
    """Sequences of all lengths, two of them empty."""
    batch = random_batch((9, 12), seed=5, dtype=dtype)
    batch.response_mask[[0, 4]] = False
    assert not batch.response_mask.all(1).any()
    return batch


class TestAggregation:
    @pytest.mark.parametrize("mode", MODES)
    def test_every_mode_equals_its_definition(self, mode: str, backend: str) -> None:
        batch = ragged_batch()
        mask = batch.response_mask.numpy()
        per_token = exact_losses(batch, KL)
        for counts in (
            {},
            {"dp_size": 4, "tokens": 400, "sequences": 31.0, "scale": 17.0},
            {"tokens": torch.tensor(400), "sequences": torch.tensor(31.0), "scale": 12.0},
        ):
            given: dict[str, Any] = dict(counts)
            numbers: dict[str, Any] = {name: float(count) for name, count in given.items()}
            wanted = aggregated(per_token, mask, mode, **numbers)
            result = batch.loss(
                region=KL,
                exact=True,
                backend=backend,
                loss_agg_mode=mode,
                dp_size=given.get("dp_size", 1),
                batch_num_tokens=given.get("tokens"),
                global_batch_size=given.get("sequences"),
                loss_scale_factor=given.get("scale"),
            )
            assert_close(result.loss, wanted, 1e-13)

    @pytest.mark.parametrize("mode", MODES)
    def test_ranks_and_micro_batches_give_the_whole(self, mode: str, backend: str) -> None:
        batch = ragged_batch()
        lengths = batch.response_mask.sum(1)
        options: dict[str, Any] = {
            "region": KL, "backend": backend, "loss_agg_mode": mode, "loss_scale_factor": 12.0,
        }  # fmt: skip
        whole, gradient = batch.loss(**options).loss, batch.gradient(**options)
        # Two ranks, the second with a micro-batch that has only empty sequences.
        ranks = [[[1, 2, 3], [5]], [[0, 4], [6, 7, 8]]]
        options |= {
            "dp_size": len(ranks),
            "batch_num_tokens": int(lengths.sum()),
            "global_batch_size": int((lengths > 0).sum()),
        }
        losses, parts = [], torch.zeros_like(gradient)
        for rank in ranks:
            losses.append(torch.zeros((), dtype=torch.float64))
            for rows in rank:
                micro = Batch(*(tensor[rows] for tensor in batch))
                losses[-1] += micro.loss(**options).loss
                parts[rows] = micro.gradient(**options) / len(ranks)
        assert_close(torch.stack(losses).mean(), whole.item(), 1e-13)
        assert_close(parts, gradient.numpy(), 1e-13)

    @pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "seq-mean-token-mean"])
    def test_a_sequence_may_be_split_where_its_mean_does_not_count(
        self, mode: str, backend: str
    ) -> None:
        batch = ragged_batch()
        lengths = batch.response_mask.sum(1)
        options: dict[str, Any] = {
            "region": KL, "backend": backend, "loss_agg_mode": mode, "loss_scale_factor": 12.0,
            "batch_num_tokens": int(lengths.sum()),
            "global_batch_size": int((lengths > 0).sum()),
        }  # fmt: skip
        halves = [Batch(*(part[:, cut] for part in batch)) for cut in (slice(5), slice(5, 12))]
        losses = torch.stack([half.loss(**options).loss for half in halves])
        assert_close(losses.sum(), batch.loss(**options).loss.item(), 1e-13)
        gradient = torch.cat([half.gradient(**options) for half in halves], -1)
        assert_close(gradient, batch.gradient(**options).numpy(), 1e-13)

    @pytest.mark.parametrize("mode", MODES)
    def test_packed_is_padded_without_the_padding(self, mode: str, backend: str) -> None:
        padded = ragged_batch()
        lengths = [12, 0, 3, 12, 5, 1, 0, 12, 7]
        kept = torch.arange(12) < torch.tensor(lengths)[:, None]
        padded = padded._replace(response_mask=padded.response_mask & kept)
        packed = Batch(*(tensor[kept] for tensor in padded))
        options: dict[str, Any] = {
            "region": KL, "backend": backend, "loss_agg_mode": mode, "loss_scale_factor": 12.0,
        }  # fmt: skip
        for dtype in (torch.int32, torch.int64):
            cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=dtype)
            result = packed.loss(**options, cu_seqlens=cu_seqlens)
            assert result.per_token.shape == packed.log_prob.shape
            assert_close(result.loss, padded.loss(**options).loss.item(), 1e-13)
            gradient = packed.gradient(**options, cu_seqlens=cu_seqlens)
            assert_close(gradient, padded.gradient(**options)[kept].numpy(), 1e-13)

    def test_per_token_radii_on_packed_tokens(self, backend: str) -> None:
        batch = random_batch((30,), dtype=torch.float64)
        region = bandpo.Band("kl", np.linspace(0.01, 0.5, 30))
        result = batch.loss(region=region, backend=backend)
        wanted = exact_losses(batch, region) * batch.response_mask.numpy()
        assert_close(result.per_token, wanted, 1e-13)


class TestShapes:
    @pytest.mark.parametrize("mode", MODES)
    def test_advantages_of_rows_equal_those_of_tokens(self, mode: str, backend: str) -> None:
        batch = random_batch((6, 10))
        rows = torch.linspace(-1.0, 2.0, 6)
        options: dict[str, Any] = {"region": KL, "backend": backend, "loss_agg_mode": mode}
        each = batch._replace(advantages=rows[:, None].expand(6, 10))
        for advantages in (rows, rows[:, None], rows[:, None].expand(6, 10).contiguous()):
            other = batch._replace(advantages=advantages)
            assert torch.equal(other.loss(**options).loss, each.loss(**options).loss)
            assert torch.equal(other.gradient(**options), each.gradient(**options))

    def test_a_trailing_dimension_of_1_is_kept(self, backend: str) -> None:
        batch = random_batch((6, 10))
        column = Batch(*(tensor[..., None] for tensor in batch))
        rows = batch.advantages[:, 0]
        for mode in MODES:
            options: dict[str, Any] = {"region": KL, "backend": backend, "loss_agg_mode": mode}
            result = column.loss(**options)
            assert result.per_token.shape == (6, 10, 1)
            assert torch.equal(result.loss, batch.loss(**options).loss)
            assert torch.equal(column.gradient(**options)[..., 0], batch.gradient(**options))
            by_row = [
                batch._replace(advantages=rows).loss(**options),
                column._replace(advantages=rows).loss(**options),
                column._replace(advantages=rows[:, None, None]).loss(**options),
            ]
            assert by_row[0].loss == by_row[1].loss == by_row[2].loss

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.float16])
    def test_a_mask_of_any_dtype_gives_the_same_loss(
        self, dtype: torch.dtype, backend: str
    ) -> None:
        batch = random_batch((6, 10))
        other = batch._replace(response_mask=batch.response_mask.to(dtype))
        options: dict[str, Any] = {"region": KL, "backend": backend}
        assert torch.equal(other.loss(**options).loss, batch.loss(**options).loss)

    def test_strides_do_not_matter(self, backend: str) -> None:
        batch = random_batch((12, 10))
        strided = Batch(*(tensor.t().contiguous().t() for tensor in batch))
        assert not strided.log_prob.is_contiguous()
        options: dict[str, Any] = {"region": KL, "backend": backend}
        assert torch.equal(strided.loss(**options).per_token, batch.loss(**options).per_token)
        assert torch.equal(strided.gradient(**options), batch.gradient(**options))


class TestMask:
    @pytest.mark.parametrize(
        "region", [KL, CLIP, bandpo.Band("kl", np.full((8, 16), 0.05))], ids=str
    )
    def test_masked_values_change_no_result(self, region: bandpo.Region, backend: str) -> None:
        clean = random_batch((8, 16))
        padding = ~clean.response_mask
        for value in (math.nan, math.inf, -math.inf):
            for changed in ("old_log_prob", "log_prob", "advantages", "all"):
                names = clean._fields[:3] if changed == "all" else (changed,)
                dirty = clean._replace(
                    **{name: getattr(clean, name).masked_fill(padding, value) for name in names}
                )
                for mode in MODES:
                    options: dict[str, Any] = {
                        "region": region, "backend": backend, "loss_agg_mode": mode,
                        "metrics_by_probability": True,
                    }  # fmt: skip
                    result, wanted = dirty.loss(**options), clean.loss(**options)
                    assert torch.equal(result.loss, wanted.loss)
                    assert torch.equal(result.per_token, wanted.per_token)
                    for name, metric in result.metrics.items():
                        assert torch.equal(metric, wanted.metrics[name]), name
                    gradient = dirty.gradient(**options)
                    assert torch.equal(gradient, clean.gradient(**options))
                    assert not gradient[padding].any()

    @pytest.mark.parametrize("changed", ["old_log_prob", "log_prob", "advantages"])
    @pytest.mark.parametrize("region", [KL, CLIP], ids=str)
    @pytest.mark.parametrize("exact", [False, True])
    def test_an_unmasked_nan_reaches_loss_gradient_and_metrics(
        self, changed: str, region: bandpo.Region, exact: bool, backend: str
    ) -> None:
        batch = random_batch((8, 16))
        batch.response_mask[2, 3] = batch.response_mask[5, 6] = True
        values = getattr(batch, changed).clone()
        values[2, 3] = values[5, 6] = math.nan
        batch = batch._replace(**{changed: values})
        options: dict[str, Any] = {"region": region, "backend": backend, "exact": exact}
        result = batch.loss(**options)
        assert result.loss.isnan()
        assert result.metrics["nonfinite_tokens"] == 2
        assert result.per_token.isnan().nonzero().tolist() == [[2, 3], [5, 6]]
        gradient = batch.gradient(**options, loss_agg_mode="token-sum")
        assert gradient.isnan().nonzero().tolist() == [[2, 3], [5, 6]]

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        "shape", [(3, 4), (0, 4), (3, 0), (0, 0), (5,), (0,), (2, 0, 1)], ids=str
    )
    def test_without_a_valid_token_the_loss_is_0(
        self, shape: tuple[int, ...], mode: str, backend: str
    ) -> None:
        for region in (KL, CLIP, bandpo.Band("kl", np.full(shape, 0.05))):
            batch = random_batch(shape)._replace(response_mask=torch.zeros(shape))
            batch.log_prob.fill_(math.nan)
            options: dict[str, Any] = {"metrics_by_probability": True, "loss_agg_mode": mode}
            if len(shape) == 1:
                options |= {"cu_seqlens": torch.tensor([0, 0, *shape]), "loss_scale_factor": 9}
            of_none = {"batch_num_tokens": 0, "global_batch_size": torch.tensor(0)}
            for counts in ({}, {**of_none, "loss_scale_factor": 9}):
                options |= {"region": region, "backend": backend, **counts}
                result = batch.loss(**options)
                assert result.loss == 0.0
                assert result.per_token.shape == shape
                assert not result.per_token.any()
                of_nothing = {"ratio_min": 1, "ratio_max": 1, "all_ratios_one": True}
                for name, metric in result.metrics.items():
                    assert (metric == of_nothing.get(name, 0)).all(), name
                gradient = batch.gradient(**options)
                assert gradient.shape == shape
                assert not gradient.any()


class TestMetrics:
    @pytest.mark.parametrize("region", [KL, CLIP], ids=str)
    def test_metrics_equal_their_definitions(self, region: bandpo.Region, backend: str) -> None:
        batch = random_batch((40, 50), dtype=torch.float64)
        batch.log_prob[3, 4] = batch.old_log_prob[3, 4] + 25.0
        dual_clip = 1.6
        tokens = BoundedTokens.of(batch, region)
        valid, ratio, log_ratio = tokens.valid, tokens.ratio, tokens.log_ratio
        count = valid.sum()
        unclipped = np.abs(tokens.advantage) * ratio
        removed = unclipped - np.abs(min_clip(tokens, dual_clip)[1])
        definitions = {
            "clip_fraction_low": (tokens.below & valid).sum() / count,
            "clip_fraction_high": (tokens.above & valid).sum() / count,
            "dual_clip_fraction": (dual_clipped(tokens, dual_clip) & valid).sum() / count,
            "gradient_removed": removed[valid].sum() / unclipped[valid].sum(),
            "all_ratios_one": False,
            "entropy": -batch.old_log_prob.numpy()[valid].mean(),
            "approx_kl": -log_ratio[valid].mean(),
            "approx_kl_k3": (ratio - 1.0 - log_ratio)[valid].mean(),
            "ratio_min": ratio[valid].min(),
            "ratio_max": ratio[valid].max(),
            "nonfinite_tokens": 0,
            "positive_log_probs": (batch.log_prob.numpy()[valid] > 0.05).sum(),
            "valid_tokens": count,
        }
        options: dict[str, Any] = {
            "region": region, "dual_clip": dual_clip, "backend": backend, "exact": True,
        }  # fmt: skip
        metrics = batch.loss(**options).metrics
        assert metrics.keys() == definitions.keys()
        for name, value in definitions.items():
            assert metrics[name].shape == ()
            assert value > 0 or name in ("nonfinite_tokens", "approx_kl", "all_ratios_one")
            assert_close(metrics[name], value, 1e-12)

        metrics = batch.loss(**options, metrics_by_probability=True).metrics
        bins = np.histogram_bin_edges([], PROBABILITY_EDGES)
        old = np.exp(batch.old_log_prob.numpy())
        total, low, high = (
            np.histogram(old[chosen & valid], bins)[0]
            for chosen in (valid, tokens.below, tokens.above)
        )
        assert total.all()
        assert_close(metrics["tokens_by_probability"], total, 0.0)
        assert_close(metrics["clip_fraction_low_by_probability"], low / total, 1e-15)
        assert_close(metrics["clip_fraction_high_by_probability"], high / total, 1e-15)

    def test_small_steps_keep_their_digits(self, backend: str) -> None:
        old = torch.full((1, 1000), -1.0)
        new = old + torch.linspace(-1e-3, 1e-3, 1000)
        batch = Batch(old, new, torch.ones(1, 1000), torch.ones(1, 1000))
        log_ratio = (new - old).double().numpy()
        k3 = batch.loss(region=KL, backend=backend).metrics["approx_kl_k3"]
        assert_close(k3, (np.expm1(log_ratio) - log_ratio).mean(), 1e-6)

    def test_a_bin_includes_its_lower_edge(self, backend: str) -> None:
        old = torch.tensor([0.0, *(math.log(edge) for edge in PROBABILITY_EDGES[1:]), -math.inf])
        batch = Batch(old, old.clamp(min=-5.0), torch.ones(7), torch.ones(7))
        metrics = batch.loss(region=KL, backend=backend, metrics_by_probability=True).metrics
        assert metrics["tokens_by_probability"].tolist() == [1, 1, 1, 1, 3]


@pytest.mark.parametrize("mode", MODES)
def test_the_host_never_waits(mode: str, backend: str) -> None:
    batch = random_batch((4, 8))
    batch.log_prob.requires_grad_()
    options: dict[str, Any] = {
        "dual_clip": 3.0, "loss_agg_mode": mode, "metrics_by_probability": True,
        "batch_num_tokens": torch.tensor(9), "global_batch_size": torch.tensor(9),
        "loss_scale_factor": 8.0, "backend": backend,
    }  # fmt: skip
    packed = Batch(*(tensor.reshape(32) for tensor in batch))
    for region in (KL, CLIP):
        batch.loss(region=region, **options)
        with Waits() as waits:
            for result in (
                batch.loss(region=region, **options),
                packed.loss(region=region, **options, cu_seqlens=torch.tensor([0, 10, 10, 32])),
            ):
                torch.autograd.backward(result.loss)
        assert waits.names == []


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("token-sum", "none")])
def test_a_count_may_be_on_another_device_if_it_is_a_number(mode: str, backend: str) -> None:
    batch = random_batch((4, 8))
    options: dict[str, Any] = {"region": CLIP, "loss_agg_mode": mode, "backend": backend}
    options["loss_scale_factor"] = 8.0
    argument = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    wanted = batch.loss(**options, **{argument: 9}).loss
    found = batch.loss(**options, **{argument: Elsewhere(torch.tensor(9), "cuda:1")}).loss
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, wanted)
    with pytest.raises(InvalidValueError, match=f"{argument} must hold a number, got one on dev"):
        batch.loss(**options, **{argument: torch.tensor(9, device="meta")})


@pytest.mark.parametrize("mode", MODES)
def test_meta_tensors_are_accepted(mode: str) -> None:
    """They have no values to depend on; devices other than CPU and CUDA take torch."""
    batch = Batch(*(tensor.to("meta") for tensor in random_batch((4, 8))))
    batch.log_prob.requires_grad_()
    options: dict[str, Any] = {"loss_agg_mode": mode, "metrics_by_probability": True}
    for region in (KL, CLIP):
        result = batch.loss(region=region, **options)
        torch.autograd.backward(result.loss)
        assert result.loss.device.type == "meta"
        assert all(metric.device.type == "meta" for metric in result.metrics.values())


def test_torch_func_gives_the_same_gradient(backend: str) -> None:
    batch = random_batch((6, 8))

    def loss(log_prob: Tensor) -> Tensor:
        return batch._replace(log_prob=log_prob).loss(region=KL, backend=backend).loss

    gradient, value = torch.func.grad_and_value(loss)(batch.log_prob)
    torch.testing.assert_close(value, loss(batch.log_prob))
    torch.testing.assert_close(gradient, batch.gradient(region=KL, backend=backend))


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @staticmethod
    def compare(
        batch: Batch, compiler: str, function: Callable[..., PolicyLossResult] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        def run(old: Tensor, new: Tensor, advantages: Tensor, mask: Tensor) -> PolicyLossResult:
            return policy_loss(old, new, advantages, mask, **options)

        function = function or run
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        outcomes = []
        for call in (function, compiled):
            log_prob = batch.log_prob.detach().requires_grad_()
            result = call(*batch._replace(log_prob=log_prob))
            outcomes.append((result, torch.autograd.grad(result.loss, log_prob)[0]))
        (eager, eager_gradient), (fused, fused_gradient) = outcomes
        torch.testing.assert_close(fused.loss, eager.loss)
        torch.testing.assert_close(fused.per_token, eager.per_token)
        torch.testing.assert_close(fused_gradient, eager_gradient)
        for name, metric in eager.metrics.items():
            torch.testing.assert_close(fused.metrics[name], metric)

    def test_inductor_equals_eager(self, backend: str) -> None:
        try:
            torch.compile(torch.sin, backend="inductor")(torch.ones(2))
        except RuntimeError as reason:  # it needs a C++ compiler, which bandpo does not
            pytest.skip(f"inductor does not work here: {str(reason).splitlines()[0]}")
        batch = random_batch((16, 32))
        options: dict[str, Any] = {
            "region": KL, "backend": backend, "dual_clip": 3.0, "metrics_by_probability": True,
            "loss_agg_mode": "seq-mean-token-mean",
        }  # fmt: skip
        self.compare(batch, "inductor", **options)

    @pytest.mark.parametrize("region", [CLIP, KL.table()], ids=["clip", "table"])
    @pytest.mark.parametrize("exact", [False, True])
    def test_every_source_of_bounds_compiles(
        self, region: bandpo.Region, exact: bool, backend: str
    ) -> None:
        options: dict[str, Any] = {"region": region, "backend": backend, "exact": exact}
        self.compare(random_batch((6, 8)), "aot_eager", **options)

    def test_per_token_radii(self, backend: str) -> None:
        region = bandpo.Band("kl", np.full((6, 8), 0.05))
        self.compare(random_batch((6, 8)), "aot_eager", region=region, backend=backend)

    @pytest.mark.parametrize("mode", SEQUENCE_MODES[1:])
    def test_packed_tokens_compile(self, mode: str, backend: str) -> None:
        cu_seqlens = torch.tensor([0, 20, 20, 48])
        self.compare(
            random_batch((48,)), "aot_eager", region=KL, backend=backend, cu_seqlens=cu_seqlens,
            loss_agg_mode=mode, loss_scale_factor=20.0,
        )  # fmt: skip

    def test_the_module_compiles(self, backend: str) -> None:
        module = PolicyLoss(KL, backend=backend, dual_clip=3.0)  # type: ignore[arg-type]
        self.compare(random_batch((6, 8)), "aot_eager", module)

    def test_sizes_counts_and_regions_may_change_after_compilation(self, backend: str) -> None:
        def run(batch: Batch, region: bandpo.Region, count: int) -> Tensor:
            return batch.loss(region=region, backend=backend, batch_num_tokens=count).loss

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for step, region in enumerate((KL, CLIP, KL)):
            batch = random_batch((4 + step, 8 + 3 * step), seed=step)
            count = 10 + 7 * step
            torch.testing.assert_close(compiled(batch, region, count), run(batch, region, count))

    @pytest.mark.parametrize("kind", ["table", "constant", "per token"])
    def test_operators_pass_opcheck(self, kind: str) -> None:
        batch = random_batch((4, 8), dtype=torch.float64)
        old = batch.old_log_prob
        region: bandpo.Region = CLIP if kind == "constant" else KL
        bounds = bounds_of(region, old, exact=kind == "per token")
        for by_probability in (False, True):
            torch.library.opcheck(
                torch.ops.bandpo.token_loss.default,
                (old, batch.log_prob.requires_grad_(), None, batch.advantages[:, :1],
                 batch.response_mask, bounds, "min-clip", [2.0], by_probability),
            )  # fmt: skip
        torch.library.opcheck(torch.ops.bandpo.exact_log_bounds.default, (old, register(KL)))
        ratio = batch.log_prob.detach() - old
        torch.library.opcheck(torch.ops.bandpo.exact_contains.default, (old, ratio, register(KL)))


def register(region: bandpo.Region) -> int:
    """The number of a region for the solver's operator."""
    bounds_of(region, torch.zeros(1), exact=True)
    return id(region)


LOSS_DIGEST = """
import hashlib, torch, bandpo
from bandpo.loss import policy_loss

shape = 512, 256
generator = torch.Generator().manual_seed(0)
old = -torch.empty(shape).exponential_(0.3, generator=generator)
new = (old + 0.4 * torch.randn(shape, generator=generator)).requires_grad_()
advantages = torch.randn(shape, generator=generator)
result = policy_loss(
    old, new, advantages, torch.ones(shape), region=bandpo.Band("kl", 0.05),
    backend="native", loss_agg_mode="token-sum", metrics_by_probability=True,
)
result.loss.backward()
digest = hashlib.sha256()
for tensor in (result.per_token, new.grad, *result.metrics.values()):
    digest.update(tensor.detach().numpy().tobytes())
print(bandpo._core.thread_count(), digest.hexdigest())
"""


def test_results_do_not_depend_on_the_number_of_threads(capsys: pytest.CaptureFixture[str]) -> None:
    exec(LOSS_DIGEST, {})  # noqa: S102
    threads, digest = capsys.readouterr().out.split()
    others = "2" if threads == "1" else "1"
    run = subprocess.run(
        [sys.executable, "-c", LOSS_DIGEST], env=os.environ | {"RAYON_NUM_THREADS": others},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout.split() == [others, digest]


def test_the_module_equals_the_function(backend: str) -> None:
    batch = random_batch((40,))
    options: dict[str, Any] = {
        "dual_clip": 2.0, "loss_agg_mode": "seq-mean-token-sum-norm", "backend": backend,
        "exact": True, "dp_size": 2, "loss_scale_factor": 7.0, "metrics_by_probability": True,
    }  # fmt: skip
    call: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 11, 40]), "global_batch_size": 5}
    module = PolicyLoss(KL, **options)
    assert "Band('kl', 0.05)" in repr(module)
    result, wanted = module(*batch, **call), batch.loss(region=KL, **options, **call)
    assert torch.equal(result.loss, wanted.loss)
    assert result.metrics.keys() == wanted.metrics.keys()
    with pytest.raises(bandpo.BandpoError, match="dual_clip"):
        PolicyLoss(KL, dual_clip=0.5)
    with pytest.raises(bandpo.BandpoError, match="loss_agg_mode"):
        PolicyLoss(KL, loss_agg_mode="mean")  # type: ignore[arg-type]


NO_TENSOR: Any = np.zeros((4, 6))
BATCH = random_batch((4, 6))
PACKED = random_batch((24,))


@pytest.mark.parametrize(
    ("batch", "options", "error", "message"),
    [
        (BATCH, {"region": 0.05}, TypeError, "region must be .* got float"),
        (BATCH, {"backend": "gpu"}, ValueError, "backend .* auto, native, cuda, torch, got 'gpu'"),
        (BATCH, {"backend": None}, ValueError, "backend must be one of"),
        (BATCH, {"loss_agg_mode": "mean"}, ValueError, "token-mean, token-sum, seq-mean-.*'mean'"),
        (BATCH, {"dual_clip": 1.0}, ValueError, "dual_clip must be above 1, got 1.0"),
        (BATCH, {"dual_clip": math.nan}, ValueError, "dual_clip must be above 1, got nan"),
        (BATCH, {"dual_clip": "3"}, TypeError, "dual_clip must be a real number, got str"),
        (BATCH, {"dp_size": 0}, ValueError, "dp_size must be a whole number above 0, got 0"),
        (BATCH, {"dp_size": 1.5}, ValueError, "dp_size must be a whole number above 0, got 1.5"),
        (BATCH, {"dp_size": math.nan}, ValueError, "dp_size must be a whole number above 0, got n"),
        (BATCH, {"dp_size": math.inf}, ValueError, "dp_size must be a whole number above 0, got i"),
        (BATCH, {"dp_size": True}, TypeError, "dp_size must be a real number, got bool"),
        (BATCH, {"dp_size": 2}, ValueError, "batch_num_tokens must be given .* dp_size 2"),
        (
            BATCH, {"dp_size": 2, "loss_agg_mode": "seq-mean-token-sum", "batch_num_tokens": 9},
            ValueError, "global_batch_size must be given .*'seq-mean-token-sum' with dp_size 2",
        ),
        (BATCH, {"batch_num_tokens": -1}, ValueError, "batch_num_tokens must be .* got -1"),
        (BATCH, {"batch_num_tokens": math.nan}, ValueError, "batch_num_tokens .* got nan"),
        (BATCH, {"global_batch_size": "9"}, TypeError, "global_batch_size must be a real number"),
        (
            BATCH, {"global_batch_size": torch.ones(2)},
            ValueError, r"global_batch_size must be a number or a 0-dim tensor, got shape \(2,\)",
        ),
        (BATCH, {"loss_scale_factor": 0.0}, ValueError, "loss_scale_factor .* above 0, got 0.0"),
        (BATCH, {"loss_scale_factor": "1"}, TypeError, "loss_scale_factor must be a real number"),
        (
            BATCH._replace(log_prob=NO_TENSOR), {},
            TypeError, "log_prob must be a torch.Tensor, got ndarray",
        ),
        (
            BATCH._replace(old_log_prob=BATCH.old_log_prob.int()), {},
            TypeError, "old_log_prob must be float32, .* float16, got torch.int32",
        ),
        (
            BATCH._replace(advantages=BATCH.advantages.to(torch.complex64)), {},
            TypeError, "advantages must be float32, .* got torch.complex64",
        ),
        (
            BATCH._replace(log_prob=BATCH.log_prob.to_sparse()), {},
            TypeError, "log_prob must be a dense tensor, got layout torch.sparse_coo",
        ),
        (
            BATCH._replace(response_mask=BATCH.log_prob.to(torch.complex64)), {},
            TypeError, "response_mask must be bool, int or float, got torch.complex64",
        ),
        (
            Batch(*(tensor.reshape(2, 2, 6) for tensor in BATCH)), {},
            ValueError, r"log_prob must have shape \[B, T\].*\[N\], got \(2, 2, 6\)",
        ),
        (
            Batch(*(tensor.sum() for tensor in BATCH)), {},
            ValueError, r"log_prob must have shape .* got \(\)",
        ),
        (
            BATCH._replace(old_log_prob=BATCH.old_log_prob[:3]), {},
            ValueError, r"old_log_prob must have shape \(4, 6\) like .*, got \(3, 6\)",
        ),
        (
            BATCH._replace(response_mask=BATCH.response_mask[:, 1:]), {},
            ValueError, r"response_mask must have shape \(4, 6\) like .*, got \(4, 5\)",
        ),
        (
            BATCH._replace(advantages=BATCH.advantages[0]), {},
            ValueError, r"advantages .* \(4, 6\) or \(4, 1\) or \(4,\) like .*, got \(6,\)",
        ),
        (
            PACKED._replace(advantages=PACKED.advantages[:3]), {},
            ValueError, r"advantages must have shape \(24,\) like .*, got \(3,\)",
        ),
        (
            BATCH._replace(advantages=BATCH.advantages.to("meta")), {},
            ValueError, "advantages must be on log_prob's device cpu, got meta",
        ),
        (
            Batch(*(tensor.to("meta") for tensor in BATCH)), {"backend": "native"},
            ValueError, "backend 'native' runs on CPU tensors, log_prob is on meta",
        ),
        (
            BATCH, {"region": bandpo.Band("kl", np.full(5, 0.1))},
            ValueError, r"do not broadcast: logp \(4, 6\), delta \(5,\)",
        ),
        (
            BATCH, {"region": bandpo.Band("kl", np.full((2, 4, 6), 0.1))},
            ValueError, r"delta must broadcast to the shape \(4, 6\) .* \(2, 4, 6\)",
        ),
        (
            BATCH, {"cu_seqlens": torch.tensor([0, 4])},
            ValueError, r"cu_seqlens must be left out unless .* shape \(4, 6\)",
        ),
        *(
            (
                PACKED, {"loss_agg_mode": mode, "loss_scale_factor": 6},
                ValueError, f"cu_seqlens must be given for loss_agg_mode '{mode}'",
            )
            for mode in SEQUENCE_MODES
        ),
        (
            PACKED,
            {"loss_agg_mode": "seq-mean-token-sum-norm", "cu_seqlens": torch.tensor([0, 24])},
            ValueError, "loss_scale_factor must be given .* no width",
        ),
        (
            BATCH,
            {"loss_agg_mode": "seq-mean-token-sum-norm", "dp_size": 2, "global_batch_size": 9},
            ValueError, "loss_scale_factor must be given .* dp_size 2, because widths of ranks",
        ),
        (
            BATCH, {"loss_agg_mode": "seq-mean-token-sum-norm", "global_batch_size": 9},
            ValueError, "loss_scale_factor must be given .* global_batch_size, because widths",
        ),
        (PACKED, {"cu_seqlens": [0, 24]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        (
            PACKED, {"cu_seqlens": torch.tensor([0.0, 24.0])},
            TypeError, "cu_seqlens must be int32 or int64, got torch.float32",
        ),
        (
            PACKED, {"cu_seqlens": torch.zeros(0, dtype=torch.int32)},
            ValueError, r"cu_seqlens must have shape \[S \+ 1\], got \(0,\)",
        ),
        (
            PACKED, {"cu_seqlens": torch.tensor([0, 24], device="meta")},
            ValueError, "cu_seqlens must be on log_prob's device cpu, got meta",
        ),
        *(
            (
                PACKED, {"cu_seqlens": torch.tensor(offsets)},
                ValueError, "cu_seqlens must rise from 0 to the number of tokens, 24, got",
            )
            for offsets in ([0, 23], [1, 24], [0, 9, 8, 24])
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_the_argument(
    batch: Batch, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        batch.loss(**{"region": KL} | options)
    assert isinstance(caught.value, bandpo.BandpoError)


class TestBoundsOnTensors:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("region", [KL, bandpo.Band("tv", 0.1), CLIP], ids=str)
    @pytest.mark.parametrize("exact", [False, True])
    def test_log_bounds_equal_those_of_the_region(
        self, dtype: torch.dtype, region: bandpo.Region, exact: bool
    ) -> None:
        rng = np.random.default_rng(7)
        old = torch.from_numpy(-rng.exponential(3.0, (20, 30))).to(dtype)
        old[0, :4] = torch.tensor([0.0, 0.03125, -math.inf, math.nan])
        bounds = bandpo.torch.log_bounds(region, old, exact=exact)
        eps = {torch.float64: 0.0 if exact else 1e-6}.get(dtype, torch.finfo(dtype).eps)
        for bound, wanted in zip(bounds, region.log_bounds(old.double().numpy()), strict=True):
            assert bound.dtype == dtype
            assert bound.shape == old.shape
            ratio = bound.double().exp().numpy()
            np.testing.assert_allclose(ratio, np.exp(wanted), rtol=40 * eps, atol=2e-6)

    def test_bounds_from_a_table_equal_its_lookups(self) -> None:
        bits = np.linspace(0, 0x7F800000, 20_001).astype(np.uint32)
        old = torch.from_numpy(-bits.view(np.float32))
        for spec, delta in (("kl", 0.05), ("tv", 0.1), ("hellinger", 0.3), ("pearson-chi2", 1e-3)):
            table = bandpo.Band(spec, delta).table()
            log_lower, log_upper = bandpo.torch.log_bounds(table, old)
            wanted_lower, wanted_upper = table.log_bounds(old.numpy())
            assert np.array_equal(log_upper.numpy(), wanted_upper.astype(np.float32))
            assert_close(log_lower, wanted_lower, 2e-7)

    @pytest.mark.parametrize("exact", [False, True])
    def test_contains_and_clip_follow_the_bounds(self, exact: bool) -> None:
        batch = random_batch((20, 30), dtype=torch.float64)
        old, log_ratio = batch.old_log_prob, batch.log_prob - batch.old_log_prob
        inside = bandpo.torch.contains(KL, old, log_ratio, exact=exact)
        assert inside.dtype == torch.bool
        bounds = KL.log_bounds(old.numpy())
        wanted = KL.contains(old.numpy(), log_ratio.numpy())
        # Next to a bound a table may be off by its error.
        gap = np.abs(np.stack(bounds) - log_ratio.numpy()).min(0)
        differs = inside.numpy() != wanted
        assert not differs[gap > (0.0 if exact else 1e-5)].any()
        log_ratio.requires_grad_()
        clipped = bandpo.torch.clip(KL, old, log_ratio, exact=exact)
        assert_close(
            clipped, np.clip(log_ratio.detach().numpy(), *bounds), 1e-12 if exact else 1e-5
        )
        (gradient,) = torch.autograd.grad(clipped.sum(), log_ratio)
        assert torch.equal(gradient.bool(), inside)
        assert bandpo.torch.contains(KL, old, bandpo.torch.log_bounds(KL, old)[1]).all()

    @pytest.mark.parametrize("exact", [False, True])
    def test_clip_of_ratios_follows_the_bounds(self, exact: bool) -> None:
        batch = random_batch((20, 30), dtype=torch.float64)
        old, ratio = batch.old_log_prob, (batch.log_prob - batch.old_log_prob).exp()
        lower, upper = KL.bounds(old.numpy())
        ratio.requires_grad_()
        clipped = bandpo.torch.clip_ratio(KL, old, ratio, exact=exact)
        wanted = np.clip(ratio.detach().numpy(), lower, upper)
        assert_close(clipped, wanted, 1e-12 if exact else 1e-5)
        (gradient,) = torch.autograd.grad(clipped.sum(), ratio)
        assert torch.equal(gradient.bool(), clipped == ratio)
        assert 0 < gradient.sum() < gradient.numel()

    def test_nan_is_not_contained_and_stays_nan(self) -> None:
        nan = torch.tensor([math.nan, -1.0]), torch.tensor([0.0, math.nan])
        assert not bandpo.torch.contains(KL, *nan).any()
        assert bandpo.torch.clip(KL, *nan).isnan().all()
        assert bandpo.torch.clip_ratio(KL, *nan).isnan().all()

    def test_half_precision_is_clipped_in_float32(self) -> None:
        old = torch.tensor([-3.0, -0.125], dtype=torch.bfloat16)
        log_ratio = torch.tensor([2.0, -2.0], dtype=torch.bfloat16)
        clipped = bandpo.torch.clip(KL, old, log_ratio)
        assert clipped.dtype == torch.bfloat16
        log_lower, log_upper = KL.log_bounds(old.float().numpy())
        assert_close(clipped, [log_upper[0], log_lower[1]], 2**-8)

    def test_bad_input_is_refused_with_the_argument(self) -> None:
        for function in (bandpo.torch.contains, bandpo.torch.clip):
            with pytest.raises(TypeError, match=r"log_ratio must be a torch\.Tensor, got float"):
                function(KL, torch.zeros(2), 0.0)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^ratio must be a torch\.Tensor, got float"):
            bandpo.torch.clip_ratio(KL, torch.zeros(2), 1.0)  # type: ignore[arg-type]
        elsewhere = torch.zeros(2), torch.zeros(2, device="meta")
        wanted = "must be on old_log_prob's device cpu, got meta"
        for function in (bandpo.torch.contains, bandpo.torch.clip):
            with pytest.raises(ValueError, match=f"log_ratio {wanted}"):
                function(KL, *elsewhere)
        with pytest.raises(ValueError, match=f"ratio {wanted}"):
            bandpo.torch.clip_ratio(KL, *elsewhere)
        with pytest.raises(TypeError, match=r"old_log_prob must be float32, .* got torch\.int64"):
            bandpo.torch.log_bounds(KL, torch.zeros(2, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"region must be .* got Divergence"):
            bandpo.torch.log_bounds(bandpo.Divergence("kl"), torch.zeros(2))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"delta \(3,\)"):
            bandpo.torch.log_bounds(bandpo.Band("kl", np.full(3, 0.1)), torch.zeros(2))


def test_a_missing_torch_names_the_extra() -> None:
    program = """
import sys
sys.modules["torch"] = None
import bandpo
for module in ("bandpo.torch", "bandpo.loss"):
    try:
        __import__(module)
    except bandpo.error.MissingExtraError as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert run.stdout.splitlines() == 2 * [
        "torch is not installed; run: pip install '.[torch]' in a checkout of bandpo, "
        "which is not on PyPI yet"
    ]


def test_the_gpu_report_begins_with_its_verdict() -> None:
    assert default_backend("cpu") == "native"
    report = gpu_report()
    assert "\n" not in report
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert report.startswith("usable: " if accelerated else "not usable: ")
