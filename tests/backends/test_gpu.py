"""Streams, graphs, more than 2^31 tokens, no waiting: skipped, with the reason, without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo
from bandpo.backends.cuda import kernels, launch
from bandpo.backends.native import token_loss_op
from bandpo.error import MissingExtraError
from bandpo.loss import PolicyLoss, policy_loss
from bandpo.tensors.bounds import bounds_of
from bandpo.torch import clip, clip_ratio, contains, log_bounds
from support.batches import random_batch
from support.emulated import INDEXING_TESTS

pytestmark = [
    pytest.mark.usefixtures("gpu"),
    # Warnings of torch's compiler and of its debug mode for synchronisation.
    pytest.mark.filterwarnings("default"),
]

KL = bandpo.Band("kl", 0.05)

FLOAT32 = 1e-6
"""Relative, of a loss added up in another order than on the CPU, in float32."""

MORE_THAN_INT32 = 2**31 + 1


def batch(shape: tuple[int, ...], device: str | torch.device = "cuda") -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in random_batch(shape)]


def gradient(tokens: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    old, new, advantages, valid = tokens
    new = new.detach().requires_grad_()
    result = policy_loss(old, new, advantages, valid, **options)
    [slope] = torch.autograd.grad(result.loss, new)
    return result.loss.detach().cpu(), slope.cpu()


@pytest.mark.parametrize(
    "region", [KL, bandpo.Clip(0.2, 0.28), bandpo.Band("kl", np.full((6, 50), 0.1))]
)
@pytest.mark.parametrize("surrogate", ["min-clip", "mask", "weight", "gradient-preserving"])
def test_the_loss_equals_the_cpu(region: bandpo.Region, surrogate: Any) -> None:
    tokens = batch((6, 50))
    on_cpu = [tensor.cpu() for tensor in tokens]
    options: dict[str, Any] = {"region": region, "surrogate": surrogate}
    loss, slope = gradient(tokens, **options, backend="cuda")
    wanted_loss, wanted_slope = gradient(on_cpu, **options, backend="native")
    torch.testing.assert_close(loss, wanted_loss, rtol=FLOAT32, atol=FLOAT32)
    torch.testing.assert_close(slope, wanted_slope, rtol=FLOAT32, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_half_precision_equals_float32_of_the_same_numbers(dtype: torch.dtype, exact: bool) -> None:
    """The log-probs are read as they are, with the result of a copy in float32."""
    old, new, advantages, valid = batch((64, 1024))
    narrow = [old.to(dtype), new.to(dtype), advantages, valid]
    wide = [narrow[0].float(), narrow[1].float(), advantages, valid]
    loss, slope = gradient(narrow, region=KL, exact=exact)
    wanted_loss, wanted_slope = gradient(wide, region=KL, exact=exact)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wanted_loss)
    assert torch.equal(slope, wanted_slope.to(dtype))


@pytest.mark.parametrize("size", [0, 1, 31, 33])
def test_the_loss_equals_the_cpu_at_sizes_next_to_a_vector_and_a_warp(size: int) -> None:
    tokens = batch((size,))
    on_cpu = [tensor.cpu() for tensor in tokens]
    for region in (KL, bandpo.Clip(0.2, 0.28)):
        options: dict[str, Any] = {"region": region, "loss_agg_mode": "token-sum"}
        loss, slope = gradient(tokens, **options, backend="cuda")
        wanted_loss, wanted_slope = gradient(on_cpu, **options, backend="native")
        torch.testing.assert_close(loss, wanted_loss, rtol=FLOAT32, atol=FLOAT32)
        torch.testing.assert_close(slope, wanted_slope, rtol=FLOAT32, atol=0.0)


def test_auto_runs_the_cuda_backend() -> None:
    tokens = batch((6, 50))
    for mine, other in zip(
        gradient(tokens, region=KL), gradient(tokens, region=KL, backend="cuda"), strict=True
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("exact", [False, True])
def test_bounds_contains_and_clip_equal_the_cpu(exact: bool) -> None:
    old, new, _, _ = batch((7, 41))
    for device_result, wanted in zip(
        (*log_bounds(KL, old, exact=exact), clip(KL, old, new - old, exact=exact)),
        (
            *log_bounds(KL, old.cpu(), exact=exact),
            clip(KL, old.cpu(), (new - old).cpu(), exact=exact),
        ),
        strict=True,
    ):
        # Below, a device flushes derivatives in the table, far beyond the clamp of a loss.
        mine, rusts = (side.clamp(min=-47.0) for side in (device_result.cpu(), wanted))
        torch.testing.assert_close(mine, rusts, rtol=FLOAT32, atol=0.0)
    ratio = (new - old).exp()
    clipped, wanted = (clip_ratio(KL, *pair) for pair in ((old, ratio), (old.cpu(), ratio.cpu())))
    torch.testing.assert_close(clipped.cpu(), wanted, rtol=FLOAT32, atol=FLOAT32)
    low, high = log_bounds(KL, old, exact=exact)
    assert contains(KL, old, 0.99 * low.clamp(min=-20), exact=exact).all()
    assert not contains(KL, old, 1.01 * high + 1e-6, exact=exact).any()


def test_the_host_never_waits() -> None:
    tokens = batch((64, 512))
    per_token = bandpo.Band("kl", np.full((64, 512), 0.1))
    radii = np.full((64, 512), 0.07)
    exact: list[tuple[bandpo.Region, bool]] = [(KL, False), (KL, True), (per_token, False)]
    for region, solve in exact:
        # Compiles, and copies the table.
        gradient(tokens, region=region, exact=solve, backend="cuda")
    old, new, advantages, valid = tokens
    new.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for region, solve in exact:
            result = policy_loss(
                old, new, advantages, valid, region=region, exact=solve, metrics_by_probability=True
            )
            torch.autograd.grad(result.loss, new)
            assert len(dict(result.metrics)) > 10
        # New regions: their constants, table and radii.
        for region in (bandpo.Clip(0.1), bandpo.Band("tv", 0.02), bandpo.Band("kl", radii)):
            clip(region, old, new.detach() - old)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def new_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def long_work(matrix: torch.Tensor) -> torch.Tensor:
    """A finite number that takes the device some milliseconds."""
    for _ in range(8):
        matrix = (matrix @ matrix).sigmoid()
    return matrix.mean()


@pytest.mark.parametrize("name", list(launch.LAUNCHERS))
def test_every_launcher_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of subnormal numbers included, which the options of the compiler flush to 0."""
    old, new, advantages, valid = on_gpu = batch((64, 300))
    on_gpu[0][:, ::50], on_gpu[1][:, ::50] = -(2.0**-130), -(2.0**-128)
    arguments = old, new, None, advantages, valid, bounds_of(KL, old), "min-clip", [3.0], True
    wanted = kernels.token_loss(*arguments)
    monkeypatch.setattr(launch, "LAUNCHERS", {name: launch.LAUNCHERS[name]})
    for function in ("compiled", "_loaded", "launcher"):
        fresh = cache(getattr(launch, function).__wrapped__)
        monkeypatch.setattr(launch, function, fresh)
    try:
        assert launch.launcher().name == name
    except MissingExtraError as reason:
        pytest.skip(f"needs {name}: {reason}")
    for mine, others in zip(kernels.token_loss(*arguments), wanted, strict=True):
        assert torch.equal(mine, others)


def test_a_thread_without_a_context_launches() -> None:
    """It has none if the allocator has memory for its tensors."""
    tokens = batch((4, 300))
    bounds = bounds_of(KL, tokens[0])
    arguments: Any = (*tokens[:2], None, *tokens[2:], bounds, "min-clip", [], True)
    wanted = kernels.token_loss(*arguments)
    found: list[torch.Tensor] = []
    thread = Thread(target=lambda: found.extend(kernels.token_loss(*arguments)))
    thread.start()
    thread.join()
    assert len(found) == len(wanted)
    for mine, others in zip(found, wanted, strict=True):
        assert torch.equal(mine, others)


def test_the_loss_runs_on_the_current_stream() -> None:
    """Two calls in flight on streams of their own, each behind long work that makes its input."""
    tokens = batch((256, 1024))
    wanted = gradient(tokens, region=KL, backend="cuda")[1]
    work = torch.randn(4096, 4096, device="cuda")
    results: list[torch.Tensor] = []
    torch.cuda.synchronize()
    for _ in range(2):
        stream = new_stream()
        with torch.cuda.stream(stream):
            late = tokens[1] + 0.0 * long_work(work)
            late.requires_grad_()
            result = policy_loss(tokens[0], late, *tokens[2:], region=KL, backend="cuda")
            results += torch.autograd.grad(result.loss, late)
    torch.cuda.synchronize()
    for slope in results:
        assert torch.equal(slope.cpu(), wanted)


@pytest.mark.parametrize("kind", ["constants", "table", "radii"])
def test_another_stream_waits_until_cached_tensors_are_filled(kind: str) -> None:
    """They are filled behind long work on the stream of their first use."""
    old, new, _, _ = batch((64, 1024))
    regions: dict[str, Callable[[], bandpo.Region]] = {
        "constants": lambda: bandpo.Clip(0.2, 0.28),
        "table": lambda: bandpo.Band("kl", 0.05),
        "radii": lambda: bandpo.Band("kl", np.full((64, 1024), 0.05)),
    }
    wanted = clip(regions[kind](), old, new - old)
    region = regions[kind]()
    work = torch.randn(4096, 4096, device="cuda")
    one, other = (new_stream() for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(one):
        long_work(work)
        first = clip(region, old, new - old)
    with torch.cuda.stream(other):
        second = clip(region, old, new - old)
    torch.cuda.synchronize()
    assert torch.equal(first, wanted)
    assert torch.equal(second, wanted)


def test_replays_of_a_graph_equal_eager_calls() -> None:
    old, new, advantages, valid = batch((32, 256))
    new.requires_grad_()
    options: dict[str, Any] = {"backend": "cuda", "metrics_by_probability": True}
    for region, surrogate in (
        (KL, "min-clip"),
        (bandpo.Clip(0.2, 0.28), "gradient-preserving"),
        (bandpo.Band("kl", np.full((32, 256), 0.1)), "min-clip"),
        (bandpo.Band("kl", np.full((32, 256), 0.1)), "mask"),
    ):

        def run(region: bandpo.Region = region, surrogate: Any = surrogate) -> list[torch.Tensor]:
            result = policy_loss(
                old, new, advantages, valid, region=region, surrogate=surrogate, **options
            )
            metrics = [result.metrics[name] for name in sorted(result.metrics)]
            return [result.loss, *torch.autograd.grad(result.loss, new), *metrics]

        side = new_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # compiles, and copies what belongs to the region
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                new.copy_(old + 0.5 * torch.randn_like(old))
            graph.replay()
            for mine, other in zip(captured, run(), strict=True):
                assert torch.equal(mine, other)


def test_a_region_is_refused_at_its_first_use_in_a_graph() -> None:
    old, new, _, _ = batch((4, 64))
    clip(KL, old, new - old)  # compiles
    for region in (bandpo.Clip(0.3), bandpo.Band("kl", 0.06), bandpo.Band("kl", np.full(64, 0.1))):
        with (
            pytest.raises(ValueError, match="once before a CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            clip(region, old, new - old)
        assert clip(region, old, new - old).isfinite().all()


def test_the_operator_allocates_its_outputs_alone() -> None:
    """Beyond a loss and a gradient, 8 bytes a token, there are sums of each chunk."""
    old, new, advantages, valid = batch((512, 4096))
    bounds = bounds_of(KL, old)
    inputs = old.t(), new.t(), None, advantages[:1].t(), valid.t()
    outputs = token_loss_op(*inputs, bounds, "min-clip", [], True)  # compiles
    del outputs
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = token_loss_op(*inputs, bounds, "min-clip", [], True)
    peak = torch.cuda.max_memory_allocated() - before
    assert outputs[0].shape == (4096, 512)
    assert peak <= 8 * old.numel() + 2**18


def test_compiles_without_a_graph_break() -> None:
    old, new, advantages, valid = batch((8, 64))
    module = PolicyLoss(KL, dual_clip=3.0, backend="cuda", metrics_by_probability=True)
    compiled = torch.compile(module, fullgraph=True)
    losses: list[torch.Tensor] = []
    slopes: list[torch.Tensor] = []
    for run in (module, compiled):
        moved = new.detach().requires_grad_()
        result = run(old, moved, advantages, valid)
        losses.append(result.loss.detach())
        slopes += torch.autograd.grad(result.loss, moved)
    torch.testing.assert_close(losses[0], losses[1], rtol=FLOAT32, atol=0.0)
    assert torch.equal(slopes[0], slopes[1])


def test_forward_mode_agrees_with_backward_mode() -> None:
    tokens = batch((8, 64))
    old, new, advantages, valid = tokens
    tangent = torch.linspace(0.5, 1.5, 64, device="cuda").expand(8, 64)

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        return policy_loss(old, log_prob, advantages, valid, region=KL, backend="cuda").loss

    slope = gradient(tokens, region=KL, backend="cuda")[1]
    forward = torch.func.jvp(loss, (new,), (tangent,))[1].cpu()
    # Terms of both signs.
    terms = slope * tangent.cpu()
    assert (forward - terms.sum()).abs() <= FLOAT32 * terms.abs().sum()
    assert terms.abs().sum() > 0.0
    torch.testing.assert_close(torch.func.grad(loss)(new).cpu(), slope, rtol=FLOAT32, atol=0.0)
    inside = clip(KL, old, new - old) == new - old
    moved = torch.func.jvp(lambda x: clip(KL, old, x), (new - old,), (tangent,))[1]
    assert torch.equal(moved, torch.where(inside, tangent, 0.0))


def test_tensors_of_the_host_are_refused() -> None:
    old, new, _, _ = batch((4, 64))
    for pair in ((old.cpu(), new), (old, new.cpu())):
        with pytest.raises(ValueError, match="must be on old_log_prob's device"):
            clip(KL, *pair)


def test_more_tokens_than_the_max_int32_are_counted() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 50 * 2**30:
        pytest.skip(f"needs 50 GiB of GPU memory, {free / 2**30:.0f} are free")
    half = torch.full((1, MORE_THAN_INT32), -2.0, dtype=torch.bfloat16, device="cuda")
    new = half.clone()
    new[0, -1] = 0.0  # beyond the bound
    valid = torch.ones_like(half, dtype=torch.bool)
    advantages = torch.ones((1, 1), device="cuda")
    bounds = bounds_of(KL, torch.zeros(1, device="cuda"))
    loss, slope, counts, sums = kernels.token_loss(
        half, new, None, advantages, valid, bounds, "min-clip", [], False
    )
    assert counts.tolist() == [MORE_THAN_INT32, 0, 0, 1, 0, 0]
    assert sums[0].item() == -2.0
    assert (loss[0, -2].item(), slope[0, -2].item(), slope[0, -1].item()) == (-1.0, -1.0, 0.0)
    del loss, slope
    log_lower, log_upper = kernels.table_log_bounds(bounds, new[0])
    for end, logp in ((-2, -2.0), (-1, 0.0)):
        wanted = KL.table().log_bounds(logp)
        found = [log_lower[end].item(), log_upper[end].item()]
        np.testing.assert_allclose(found, wanted, rtol=FLOAT32)


def test_two_devices_give_the_same_gradient() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = (gradient(batch((5, 70), f"cuda:{index}"), region=KL) for index in (0, 1))
    assert torch.equal(first[1], second[1])


FRESH = """
import torch, bandpo
from bandpo.loss import policy_loss
old = torch.full((2, 3), -1.0, device="cuda")
print(policy_loss(old, old, old, old, region=bandpo.Band("kl", 0.05), backend="cuda").loss.item())
"""
FORKED = f"""
import os
import bandpo.backends.cuda.kernels, bandpo.loss
child = os.fork()
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
{FRESH}
"""


@pytest.mark.parametrize("program", [FRESH, FORKED], ids=["spawn", "fork"])
def test_spawned_and_forked_processes_compute_the_loss(program: str) -> None:
    """Not on import: a process that has a CUDA context must not be forked."""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == 1.0


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_every_kernel_passes_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer on the PATH")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no",
         "--kernel-regex", "kns=bandpo", sys.executable, "-m", "pytest", "-q", "-W", "default",
         "-p", "no:cacheprovider", str(Path(__file__).with_name("test_cuda.py")),
         "-k", f"gpu and ({INDEXING_TESTS})"],
        # Otherwise its allocator puts tensors next to each other, which hides an overrun.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout[-3000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout
