"""Ways to give a rule and a batch to the loss, and ways to read its result."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

import torch

import bandpo
import bandpo.torch
from bandpo.correction import Correction
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.loss import GlobalBatch, Metrics, PolicyLoss, policy_loss
from bandpo.presets import PRESETS, preset
from support.batches import random_batch

if TYPE_CHECKING:
    from typing_extensions import assert_type

KL = bandpo.Band("kl", 0.05)


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestLossOfEachTokenAsTheLoss:
    @pytest.mark.parametrize("shape", [(6, 50), (6, 50, 1), (300,)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_is_per_token_at_once_with_its_gradient(
        self, shape: tuple[int, ...], dtype: torch.dtype, backend: str
    ) -> None:
        batch = random_batch(shape, dtype=dtype)
        log_prob = batch.log_prob.requires_grad_()
        options: dict[str, Any] = {"region": KL, "backend": backend}
        result = batch.loss(**options, loss_agg_mode="none")
        assert result.loss is result.per_token
        assert result.loss.shape == shape
        assert result.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(result.loss, batch.loss(**options).per_token)
        (slope,) = torch.autograd.grad(result.loss.sum(), log_prob)
        assert torch.equal(slope, batch.gradient(**options, loss_agg_mode="token-sum"))
        assert result.metrics["valid_tokens"] == batch.response_mask.sum()

    def test_outlives_a_change_of_the_inputs(self) -> None:
        batch = random_batch((4, 8))
        result = batch.loss(region=KL, loss_agg_mode="none")
        want = result.per_token.clone()
        batch.log_prob.zero_()
        assert torch.equal(result.per_token, want)

    def test_needs_no_offsets_of_packed_tokens(self, backend: str) -> None:
        assert random_batch((7,)).loss(region=KL, loss_agg_mode="none").loss.shape == (7,)

    def test_refuses_ranks_because_it_averages_nothing(self) -> None:
        with pytest.raises(InvalidValueError, match=r"dp_size must be 1 .* 'none', .* got 2"):
            PolicyLoss(KL, loss_agg_mode="none", dp_size=2)

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_compiles_without_a_graph_break(self) -> None:
        torch.compiler.reset()
        batch = random_batch((4, 8))
        module = PolicyLoss(KL, loss_agg_mode="none")
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*batch).loss, module(*batch).loss)


class TestPresetAsModule:
    @pytest.mark.parametrize("name", PRESETS)
    def test_has_the_rule_of_the_preset(self, name: str) -> None:
        arguments = preset(name).arguments()
        module = PolicyLoss.from_preset(name)
        if arguments["correction"] is not None:
            arguments["correction"] = Correction(**arguments["correction"])
        for argument in set(arguments) - {"region"}:
            assert getattr(module, argument) == arguments[argument]
        assert repr(module.region) == repr(arguments["region"])

    def test_takes_changes(self) -> None:
        module = PolicyLoss.from_preset("dppo-kl", loss_agg_mode="token-sum", backend="torch")
        assert (module.loss_agg_mode, module.backend) == ("token-sum", "torch")
        assert module.surrogate == bandpo.Mask(truncation=None)

    def test_refuses_unknown_names(self) -> None:
        with pytest.raises(InvalidValueError, match=r"preset must be one of .* got 'dapoo'"):
            PolicyLoss.from_preset("dapoo")
        with pytest.raises(TypeError, match="delta"):
            PolicyLoss.from_preset("dapo", delta=0.1)


class TestRegionAsText:
    def test_is_the_region_that_it_names(self) -> None:
        batch = random_batch((4, 8))
        spec = "(kl@0.05).cap(10)"
        want = batch.loss(region=KL.cap(10.0)).loss
        assert torch.equal(batch.loss(region=spec).loss, want)
        assert PolicyLoss(spec).region == KL.cap(10.0)
        assert PolicyLoss("preset:dapo").region == bandpo.Clip(0.2, 0.28)

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_compiles_in_a_module_which_reads_it_once(self) -> None:
        torch.compiler.reset()
        batch = random_batch((4, 8))
        module = PolicyLoss("kl@0.05")
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*batch).loss, module(*batch).loss)

    def test_refuses_a_preset_which_has_a_surrogate_as_well(self) -> None:
        wanted = r"PolicyLoss\.from_preset\('dppo-kl'\)"
        with pytest.raises(InvalidValueError, match=wanted):
            PolicyLoss("dppo-kl")
        with pytest.raises(InvalidTypeError, match=wanted):
            PolicyLoss(preset("dppo-kl"))  # type: ignore[arg-type]
        with pytest.raises(InvalidTypeError, match=wanted):
            random_batch((4, 8)).loss(region=preset("dppo-kl"))

    def test_refuses_what_cannot_be_read(self) -> None:
        with pytest.raises(InvalidValueError):
            random_batch((4, 8)).loss(region="kl")


class TestGlobalBatch:
    COUNTS = (
        ("token-mean", GlobalBatch(tokens=90, dp_size=2), {"batch_num_tokens": 90, "dp_size": 2}),
        ("seq-mean-token-sum", GlobalBatch(sequences=torch.tensor(9)), {"global_batch_size": 9}),
        (
            "seq-mean-token-sum-norm",
            GlobalBatch(sequences=9, loss_scale_factor=7.0),
            {"global_batch_size": 9, "loss_scale_factor": 7.0},
        ),
    )

    @pytest.mark.parametrize(("mode", "counts", "separate"), COUNTS, ids=str)
    def test_is_the_four_counts(
        self, mode: Any, counts: GlobalBatch, separate: dict[str, Any], backend: str
    ) -> None:
        batch = random_batch((4, 8))
        options: dict[str, Any] = {"region": KL, "loss_agg_mode": mode, "backend": backend}
        want = batch.loss(**options, **separate).loss
        assert torch.equal(batch.loss(**options, global_batch=counts).loss, want)
        module = PolicyLoss(**options)
        assert torch.equal(module(*batch, global_batch=counts).loss, want)

    @pytest.mark.parametrize(
        "separate",
        [{"dp_size": 2}, {"batch_num_tokens": torch.tensor(3)}, {"global_batch_size": 4},
         {"loss_scale_factor": 2.0}],
        ids=str,
    )  # fmt: skip
    def test_refuses_to_be_given_twice(self, separate: dict[str, Any]) -> None:
        with pytest.raises(InvalidValueError, match="global_batch must be left out"):
            random_batch((4, 8)).loss(region=KL, global_batch=GlobalBatch(tokens=3), **separate)

    def test_refuses_bad_counts(self) -> None:
        with pytest.raises(InvalidValueError, match=r"tokens must be .* at least 0, got -1"):
            GlobalBatch(tokens=-1)
        with pytest.raises(InvalidTypeError, match="sequences must be a real number, got str"):
            GlobalBatch(sequences="9")  # type: ignore[arg-type]
        with pytest.raises(InvalidValueError, match="dp_size must be a whole number"):
            GlobalBatch(dp_size=0)
        with pytest.raises(InvalidTypeError, match=r"bandpo\.loss\.GlobalBatch, got dict"):
            random_batch((4, 8)).loss(region=KL, global_batch={"tokens": 3})


def test_the_first_use_imports_torch_and_initialises_neither_cupy_nor_cuda() -> None:
    """Otherwise a process could not be forked after its imports."""
    assert bandpo.policy_loss is policy_loss
    assert bandpo.preset is preset
    assert {"policy_loss", "preset", "loss", "torch"} <= set(dir(bandpo))
    with pytest.raises(AttributeError, match="no attribute 'policy_los'"):
        _ = bandpo.policy_los  # type: ignore[attr-defined]
    program = """
import sys, bandpo
assert "torch" not in sys.modules
print(bandpo.policy_loss.__name__, bandpo.loss.__name__, bandpo.torch.__name__)
import torch, bandpo.backends.cuda.kernels
assert "cupy" not in sys.modules and not torch.cuda.is_initialized()
"""
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert run.stdout == "policy_loss bandpo.loss bandpo.torch\n"


def test_a_missing_torch_names_the_extra_at_the_first_use() -> None:
    program = """
import sys
sys.modules["torch"] = None
import bandpo
for name in ("policy_loss", "loss", "torch"):
    try:
        getattr(bandpo, name)
    except bandpo.error.MissingExtraError as error:
        print(error.extra)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert run.stdout.split() == ["torch"] * 3


@pytest.mark.parametrize("module", [bandpo.torch, bandpo.loss], ids=str)
def test_dir_shows_public_names_alone(module: Any) -> None:
    assert sorted(dir(module)) == sorted(module.__all__)


if TYPE_CHECKING:

    def types_are_known(module: PolicyLoss, tensor: torch.Tensor) -> None:
        loss, per_token, metrics = module(tensor, tensor, tensor, tensor)
        assert_type(loss, torch.Tensor)
        assert_type(per_token, torch.Tensor)
        assert_type(metrics, Metrics)
        module(tensor)  # type: ignore[call-arg]
