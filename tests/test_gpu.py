"""What only a GPU shows: streams, graphs, more than 2^31 tokens, no waiting; else skipped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import bandpo
from bandpo import cuda
from bandpo.loss import PolicyLoss, policy_loss
from bandpo.torch import bounds_of, clip, contains, log_bounds, token_loss_op, torch

pytestmark = [
    pytest.mark.usefixtures("gpu"),
    # Of torch's compiler and its debug mode for synchronization, which say what they are.
    pytest.mark.filterwarnings("default"),
]

KL = bandpo.Band("kl", 0.05)

FLOAT32 = 1e-6
"""Relative, of a loss added up in another order than on the CPU, in float32."""

MORE_THAN_INT32 = 2**31 + 1


def batch(shape: tuple[int, ...], device: str | torch.device = "cuda") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = -torch.empty(shape).exponential_(0.3, generator=generator)
    new = old + 0.5 * torch.randn(shape, generator=generator)
    advantages = torch.randn(shape, generator=generator)
    valid = torch.rand(shape, generator=generator) < 0.8
    return [tensor.to(device) for tensor in (old, new, advantages, valid)]


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
def test_the_loss_is_that_of_the_cpu(region: bandpo.Region, surrogate: Any) -> None:
    tokens = batch((6, 50))
    on_cpu = [tensor.cpu() for tensor in tokens]
    options: dict[str, Any] = {"region": region, "surrogate": surrogate}
    loss, slope = gradient(tokens, **options, backend="cuda")
    wanted_loss, wanted_slope = gradient(on_cpu, **options, backend="native")
    torch.testing.assert_close(loss, wanted_loss, rtol=FLOAT32, atol=FLOAT32)
    torch.testing.assert_close(slope, wanted_slope, rtol=FLOAT32, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_half_precision_is_read_where_it_is(dtype: torch.dtype, exact: bool) -> None:
    """Without a copy in float32, and with the same result."""
    old, new, advantages, valid = batch((64, 1024))
    narrow = [old.to(dtype), new.to(dtype), advantages, valid]
    wide = [narrow[0].float(), narrow[1].float(), advantages, valid]
    loss, slope = gradient(narrow, region=KL, exact=exact)
    wanted_loss, wanted_slope = gradient(wide, region=KL, exact=exact)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wanted_loss)
    assert torch.equal(slope, wanted_slope.to(dtype))


def test_auto_is_cuda() -> None:
    tokens = batch((6, 50))
    for mine, other in zip(
        gradient(tokens, region=KL), gradient(tokens, region=KL, backend="cuda"), strict=True
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("exact", [False, True])
def test_bounds_contains_and_clip(exact: bool) -> None:
    old, new, _, _ = batch((7, 41))
    for device_result, wanted in zip(
        (*log_bounds(KL, old, exact=exact), clip(KL, old, new - old, exact=exact)),
        (
            *log_bounds(KL, old.cpu(), exact=exact),
            clip(KL, old.cpu(), (new - old).cpu(), exact=exact),
        ),
        strict=True,
    ):
        torch.testing.assert_close(device_result.cpu(), wanted, rtol=FLOAT32, atol=0.0)
    low, high = log_bounds(KL, old, exact=exact)
    assert contains(KL, old, 0.99 * low.clamp(min=-20), exact=exact).all()
    assert not contains(KL, old, 1.01 * high + 1e-6, exact=exact).any()


def test_the_host_never_waits() -> None:
    tokens = batch((64, 512))
    per_token = bandpo.Band("kl", np.full((64, 512), 0.1))
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
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream() -> None:
    """Two calls in flight on streams of their own, each behind long work that makes its input."""
    tokens = batch((256, 1024))
    wanted = gradient(tokens, region=KL, backend="cuda")[1]
    slow = torch.randn(4096, 4096, device="cuda")
    results: list[torch.Tensor] = []
    torch.cuda.synchronize()
    for _ in range(2):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for _ in range(4):
                slow = slow @ slow.sigmoid()
            late = tokens[1] + 0.0 * slow.sum().nan_to_num(0.0, 0.0, 0.0)
            late.requires_grad_()
            result = policy_loss(tokens[0], late, *tokens[2:], region=KL, backend="cuda")
            results += torch.autograd.grad(result.loss, late)
    torch.cuda.synchronize()
    for slope in results:
        assert torch.equal(slope.cpu(), wanted)


def test_records_in_a_graph() -> None:
    old, new, advantages, valid = batch((32, 256))
    arguments = bounds_of(KL, old), "min-clip", [3.0], True
    token_loss_op(old, new, None, advantages, valid, *arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_loss_op(old, new, None, advantages, valid, *arguments)
    for seed in range(3):
        torch.manual_seed(seed)
        new.copy_(old + 0.5 * torch.randn_like(old))
        graph.replay()
        wanted = token_loss_op(old, new, None, advantages, valid, *arguments)
        for mine, other in zip(captured, wanted, strict=True):
            assert torch.equal(mine, other)


def test_compiles_without_a_break() -> None:
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


def test_more_tokens_than_an_int32_counts() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 50 * 2**30:
        pytest.skip(f"needs 50 GiB of GPU memory, {free / 2**30:.0f} are free")
    half = torch.full((1, MORE_THAN_INT32), -2.0, dtype=torch.bfloat16, device="cuda")
    new = half.clone()
    new[0, -1] = 0.0  # beyond the bound
    valid = torch.ones_like(half, dtype=torch.bool)
    advantages = torch.ones((1, 1), device="cuda")
    bounds = bounds_of(KL, torch.zeros(1, device="cuda"))
    loss, slope, counts, sums = cuda.token_loss(
        half, new, None, advantages, valid, bounds, "min-clip", [], False
    )
    assert counts.tolist() == [MORE_THAN_INT32, 0, 0, 1, 0]
    assert sums[0].item() == -2.0
    assert (loss[0, -2].item(), slope[0, -2].item(), slope[0, -1].item()) == (-1.0, -1.0, 0.0)


def test_every_device_has_its_own_kernels() -> None:
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
import bandpo.cuda, bandpo.loss
child = os.fork()
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
{FRESH}
"""


@pytest.mark.parametrize("program", [FRESH, FORKED], ids=["spawn", "fork"])
def test_a_process_initialises_itself_at_the_first_use(program: str) -> None:
    """Not on import: a process that has a CUDA context must not be forked."""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == 1.0


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_of_cuda_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer on the PATH")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q",
         "-p", "no:cacheprovider", "tests/test_cuda.py", "-k", "gpu and (size or strides or half)"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
