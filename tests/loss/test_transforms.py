"""Whatever records, transforms or redirects a loss: each gives the number of an ordinary call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import bandpo
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.loss import levels
from bandpo.region import BySign
from bandpo.schedule import Linear, ScheduledBand
from bandpo.surrogate import Surrogate
from support.batches import Batch, random_batch
from support.surrogates import SURROGATES

Loss: TypeAlias = Callable[[Tensor], Tensor]

# Warnings of torch itself, on the first import of its compiler or its forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

REGIONS = bandpo.Band("kl", 0.05).cap(10), bandpo.Clip(0.2, 0.28)
"""A table, and constants."""

MODES = ("token-mean", "seq-mean-token-mean")
"""The first takes one pass without the dispatcher, the second takes the operator."""


def _random(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(5), dtype=like.dtype)


def _dual(loss: Loss, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        make: Any = torch.autograd.forward_ad.make_dual
        unpack: Any = torch.autograd.forward_ad.unpack_dual
        out = loss(make(x, _random(x)))
        tangent: Tensor = unpack(out).tangent
        return tangent


def _jvp(loss: Loss, x: Tensor) -> Tensor:
    tangent: Tensor = torch.func.jvp(loss, (x,), (_random(x),))[1]
    return tangent


def _linearize(loss: Loss, x: Tensor) -> Tensor:
    return torch.func.linearize(loss, x)[1](_random(x))  # type: ignore[no-any-return]


def _backward(loss: Loss, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    torch.autograd.backward(loss(leaf))
    assert leaf.grad is not None
    return leaf.grad


def _batched_gradients(loss: Loss, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    scales = torch.tensor([1.0, -2.0], dtype=x.dtype)
    (rows,) = torch.autograd.grad(loss(leaf), leaf, scales, is_grads_batched=True)
    torch.testing.assert_close(rows[1], -2.0 * rows[0])
    return rows[0]


def _saved(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
    def run(loss: Loss, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return _backward(loss, x)

    return run


def _kept_graph(loss: Loss, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    value = loss(leaf)
    (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(3.0 * value, leaf)
    torch.testing.assert_close(second, 3.0 * first)
    return first


class _Redirect(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and hands each on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _under_a_mode(loss: Loss, x: Tensor) -> Tensor:
    with _Redirect() as mode:
        gradient = _backward(loss, x)
    # It sees the loss, as one operator or as those of torch.
    assert any("bandpo" in name or "exp" in name for name in mode.seen), mode.seen
    return gradient


def _traced(tracing: Any) -> Any:
    def run(loss: Loss, x: Tensor) -> Tensor:
        # The graph must depend on its input, not hold the numbers of the trace.
        graph = make_fx(torch.func.grad(loss), tracing_mode=tracing, _allow_non_fake_inputs=True)(
            torch.zeros_like(x) - 3.0
        )
        return graph(x)  # type: ignore[no-any-return]

    return run


class _Called(torch.nn.Module):
    """A module that is a loss, for `torch.export`."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(x)


def _exported(strict: bool) -> Any:
    def run(loss: Loss, x: Tensor) -> Tensor:
        example = (torch.zeros_like(x) - 3.0,)
        program = torch.export.export(_Called(loss), example, strict=strict)
        return _backward(program.module(), x)

    return run


def _compiled(function: Callable[[Loss, Tensor], Tensor]) -> Any:
    def run(loss: Loss, x: Tensor) -> Tensor:
        torch.compiler.reset()

        def whole(x: Tensor) -> Tensor:
            return function(loss, x)

        return torch.compile(whole, backend="aot_eager")(x)

    return run


def _in_context(context: Callable[[], Any]) -> Any:
    def run(loss: Loss, x: Tensor) -> Tensor:
        with context():
            return loss(x)

    return run


def _default_dtype(dtype: torch.dtype) -> Any:
    def run(loss: Loss, x: Tensor) -> Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            gradient = _backward(loss, x)
        finally:
            torch.set_default_dtype(before)
        return gradient

    return run


def _default_device(loss: Loss, x: Tensor) -> Tensor:
    with torch.device("meta"):
        return _backward(loss, x)


def _autocast(loss: Loss, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return _backward(loss, x)


def _checkpointed(loss: Loss, x: Tensor) -> Tensor:
    return _backward(lambda x: checkpoint(loss, x, use_reentrant=False), x)


def _negated(loss: Loss, x: Tensor) -> Tensor:
    """The log-probs are a view that torch negates where it is read."""
    leaf = (-x.detach()).requires_grad_()
    torch.autograd.backward(loss(torch._neg_view(leaf)))
    assert leaf.grad is not None
    return -leaf.grad


class _Subclass(Tensor):
    """A tensor of another class, as DTensor or a parameter is."""


class _Module(torch.nn.Module):
    """A module whose parameter is the log-probs, and whose value is the loss."""

    def __init__(self, loss: Loss, x: Tensor) -> None:
        super().__init__()
        self.loss = loss
        self.log_prob = torch.nn.Parameter(torch.zeros_like(x))

    def forward(self) -> Tensor:
        return self.loss(self.log_prob)


def _functional_call(loss: Loss, x: Tensor) -> Tensor:
    module = _Module(loss, x)

    def called(x: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(module, {"log_prob": x}, ())
        return value

    torch.testing.assert_close(torch.func.grad(called)(x), _backward(loss, x))
    return _backward(called, x)


@contextmanager
def _one_rank() -> Iterator[DeviceMesh]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield DeviceMesh("cpu", [0])
    finally:
        dist.destroy_process_group()


def _distributed(loss: Loss, x: Tensor) -> Tensor:
    """The log-probs are a shard or a replica of one rank, and the loss is of its local tensor."""
    with _one_rank() as mesh:
        for place in (Shard(0), Replicate()):
            leaf = distribute_tensor(x.detach(), mesh, [place])
            local: Tensor = leaf.requires_grad_().to_local()  # type: ignore[attr-defined]
            torch.autograd.backward(loss(local))
            assert isinstance(leaf.grad, DTensor)
            found = leaf.grad.full_tensor()
    return found


def _vmapped(loss: Loss, x: Tensor) -> Tensor:
    values: Tensor = torch.func.vmap(loss)(torch.stack([x, x - 0.125]))
    torch.testing.assert_close(values[1], loss(x - 0.125))
    return values[0]


def _gradients_vmapped(loss: Loss, x: Tensor) -> Tensor:
    rows: Tensor = torch.func.vmap(torch.func.grad(loss))(torch.stack([x, x - 0.125]))
    torch.testing.assert_close(rows[1], _backward(loss, x - 0.125))
    return rows[0]


VALUES: dict[str, Callable[[Loss, Tensor], Tensor]] = {
    "no_grad": _in_context(torch.no_grad),
    "inference_mode": _in_context(torch.inference_mode),
    "vmap": _vmapped,
    "compiled vmap": _compiled(lambda loss, x: torch.func.vmap(loss)(x[None])[0]),
    "grad_and_value": lambda loss, x: torch.func.grad_and_value(loss)(x)[1],
    "default device": lambda loss, x: _in_context(lambda: torch.device("meta"))(loss, x),
}
"""Ways to the value of a loss."""

GRADIENTS: dict[str, Callable[[Loss, Tensor], Tensor]] = {
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "vjp": lambda loss, x: torch.func.vjp(loss, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jacrev": lambda loss, x: torch.func.jacrev(loss)(x),
    "jacfwd": lambda loss, x: torch.func.jacfwd(loss)(x),
    "vmap of grad": _gradients_vmapped,
    "is_grads_batched": _batched_gradients,
    "kept graph": _kept_graph,
    "hooks that copy": _saved(lambda tensor: tensor.clone(), lambda tensor: tensor),
    "hooks that keep": _saved(lambda tensor: [tensor], lambda kept: kept[0]),
    "save_on_cpu": lambda loss, x: _in_context(torch.autograd.graph.save_on_cpu)(
        lambda x: _backward(loss, x), x
    ),
    "checkpoint": _checkpointed,
    "dispatch mode": _under_a_mode,
    "make_fx, real": _traced("real"),
    "make_fx, fake": _traced("fake"),
    "make_fx, symbolic": _traced("symbolic"),
    "export": _exported(False),
    "export, strict": _exported(True),
    "compiled": lambda loss, x: _backward(torch.compile(loss, backend="aot_eager"), x),
    "compiled grad": _compiled(lambda loss, x: torch.func.grad(loss)(x)),
    "compiled vmap of grad": _compiled(
        lambda loss, x: torch.func.vmap(torch.func.grad(loss))(x[None])[0]
    ),
    "default device": _default_device,
    "default bfloat16": _default_dtype(torch.bfloat16),
    "default float64": _default_dtype(torch.float64),
    "autocast": _autocast,
    "subclass": lambda loss, x: _backward(lambda x: loss(x.as_subclass(_Subclass)), x),
    "parameter": lambda loss, x: _backward(loss, torch.nn.Parameter(x)),
    "negated view": _negated,
    "functional_call": _functional_call,
    "DTensor": _distributed,
}
"""Ways to its gradient."""

TANGENTS: dict[str, Callable[[Loss, Tensor], Tensor]] = {
    "jvp": _jvp,
    "linearize": _linearize,
    "dual level": _dual,
    "compiled jvp": _compiled(_jvp),
    "compiled dual level": _compiled(_dual),
}
"""Ways to its derivative in a random direction."""


SLOW = [
    name
    for name in (*VALUES, *GRADIENTS, *TANGENTS)
    if name.startswith(("compiled", "make_fx", "export", "linearize"))
]
"""Ways that compile or trace."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*", DeprecationWarning)  # of torch itself
        warnings.filterwarnings("ignore", "Attempted to insert a get_attr Node")  # of linearize
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def batch() -> Batch:
    made = random_batch((3, 7), dtype=torch.float64)
    made.response_mask[1] = False
    made.response_mask[0, :3] = True
    near = made.old_log_prob[2] + 0.01  # a sequence that no mask drops
    made.log_prob[2] = near
    made.response_mask[2, :4] = True
    return made


def loss_of(batch: Batch, backend: str, surrogate: Surrogate, kinds: int) -> Loss:
    """The sum of the losses of so many regions in as many modes."""

    def loss(log_prob: Tensor) -> Tensor:
        parts = [
            batch._replace(log_prob=log_prob).loss(
                region=region, surrogate=surrogate, backend=backend, loss_agg_mode=mode
            )
            for region in REGIONS[:kinds]
            for mode in MODES[:kinds]
        ]
        return torch.stack([part.loss for part in parts]).sum()

    return loss


def cases() -> list[tuple[str, str]]:
    """Ways and surrogates; a way that compiles takes a second, so it has few."""
    few = ("min-clip", "soft-gate")
    return [
        (name, surrogate)
        for name in (*VALUES, *GRADIENTS, *TANGENTS)
        for surrogate in (few if name in SLOW else SURROGATES)
    ]


@pytest.mark.parametrize(("name", "surrogate"), cases())
def test_each_gives_the_number_of_an_ordinary_call(
    name: str, surrogate: str, backend: str, batch: Batch
) -> None:
    kinds = 1 if name in SLOW else 2
    plain = loss_of(batch, "torch", SURROGATES[surrogate], kinds)
    loss = loss_of(batch, backend, SURROGATES[surrogate], kinds)
    x = batch.log_prob
    if name in VALUES:
        wanted, found = plain(x), VALUES[name](loss, x)
    else:
        wanted = _backward(plain, x)
        assert wanted.any()
        ways = GRADIENTS if name in GRADIENTS else TANGENTS
        found = ways[name](loss, x)
        if name in TANGENTS:
            wanted = (wanted * _random(x)).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("argument", Batch._fields)
def test_a_distributed_tensor_is_refused_with_what_to_pass(
    batch: Batch, argument: str, backend: str
) -> None:
    with _one_rank() as mesh:
        tensor = distribute_tensor(getattr(batch, argument), mesh, [Shard(0)])
        with pytest.raises(InvalidTypeError, match=rf"{argument} must be .* \.to_local\(\)"):
            batch._replace(**{argument: tensor}).loss(region=REGIONS[0], backend=backend)


def test_masked_tensors_are_refused_with_what_to_pass(batch: Batch, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about a prototype
        masked = torch.masked.masked_tensor(batch.old_log_prob, batch.response_mask.bool())
        with pytest.raises(InvalidTypeError, match=r"old_log_prob must be .* \.get_data\(\)"):
            batch._replace(old_log_prob=masked).loss(region=REGIONS[0], backend=backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("region", REGIONS, ids=["table", "constants"])
def test_a_trace_of_torchscript_is_refused_with_what_to_use(
    batch: Batch, region: bandpo.Region, mode: str, backend: str
) -> None:
    module = bandpo.loss.PolicyLoss(region, backend=backend, loss_agg_mode=mode)  # type: ignore[arg-type]
    example = tuple(batch)

    def loss(*tokens: Tensor) -> Tensor:
        return module(*tokens).loss

    for traced in (loss, module):
        with pytest.raises(InvalidValueError, match=r"outside of torch\.jit\.trace.*compile"):
            torch.jit.trace(traced, example)  # type: ignore[no-untyped-call]
    assert module(*batch).loss.isfinite()  # and nothing of the trace stays


class _Wrapped(Tensor):
    """A tensor without memory of its own, whose operators run on the one inside."""

    within: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Wrapped:
        made: _Wrapped = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )
        made.within = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        def opened(value: object) -> object:
            return value.within if isinstance(value, _Wrapped) else value

        def wrapped(value: object) -> object:
            return _Wrapped(value) if isinstance(value, Tensor) else value

        return tree_map(wrapped, func(*tree_map(opened, args), **tree_map(opened, kwargs or {})))


@pytest.mark.parametrize("argument", Batch._fields)
@pytest.mark.parametrize("mode", MODES)
def test_any_argument_may_be_of_another_class_or_a_negated_view(
    batch: Batch, argument: str, mode: str, backend: str
) -> None:
    given: Tensor = getattr(batch, argument)
    ways: list[Tensor] = [_Wrapped(given)]
    if given.is_floating_point():
        ways.append(torch._neg_view(-given))
    for region in REGIONS:
        options: dict[str, Any] = {"region": region, "loss_agg_mode": mode, "backend": backend}
        wanted = batch.loss(**options).loss
        for way in ways:
            found = batch._replace(**{argument: way}).loss(**options).loss
            if isinstance(found, _Wrapped):
                found = found.within
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("mode", MODES)
def test_a_mask_may_be_made_in_inference_mode(
    batch: Batch, surrogate: str, mode: str, backend: str
) -> None:
    with torch.inference_mode():
        of_rollout = batch._replace(
            old_log_prob=batch.old_log_prob.clone(),
            advantages=batch.advantages.clone(),
            response_mask=batch.response_mask.clone(),
        )
    assert of_rollout.response_mask.is_inference()
    results = []
    for made in (batch, of_rollout):
        leaf = batch.log_prob.detach().clone().requires_grad_()
        result = made._replace(log_prob=leaf).loss(
            region=REGIONS[0],
            surrogate=SURROGATES[surrogate],
            loss_agg_mode=mode,
            backend=backend,
            log_ratio_penalty=0.5,
        )
        torch.autograd.backward(result.loss)
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["response_mask", "advantages", "batch_num_tokens"])
def test_a_compiled_loss_takes_copies_of_tensors_of_inference_mode(
    batch: Batch, name: str, backend: str
) -> None:
    """Torch saves inputs of a graph for its backward pass, and refuses these; native needs few."""
    given: dict[str, Any] = {**batch._asdict(), "batch_num_tokens": torch.tensor(9.0)}
    with torch.inference_mode():
        made = given[name].clone()
    given |= {"region": REGIONS[0], "backend": backend}

    def loss(log_prob: Tensor, made: Tensor) -> Tensor:
        return bandpo.policy_loss(**{**given, "log_prob": log_prob, name: made}).loss

    def gradient(function: Callable[[Tensor, Tensor], Tensor], made: Tensor) -> Tensor:
        leaf = batch.log_prob.detach().clone().requires_grad_()
        return torch.autograd.grad(function(leaf, made), leaf)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted = gradient(loss, given[name])
    assert made.is_inference()
    torch.testing.assert_close(gradient(loss, made), wanted)
    torch.testing.assert_close(gradient(compiled, made.clone()), wanted)
    if backend == "native" and name != "batch_num_tokens":
        torch.testing.assert_close(gradient(compiled, made), wanted)
    else:
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            gradient(compiled, made)


NEW: dict[str, Callable[[], Any]] = {
    "clip": lambda: bandpo.Clip(0.2, 0.28),
    "band": lambda: bandpo.Band("kl", 0.05).cap(10),
    "deltas": lambda: bandpo.Band("kl", np.full((3, 7), 0.05)),
    "source of a clip": lambda: ScheduledBand(
        "kl", Linear(0.1, 0.01, steps=5), within=lambda band: bandpo.Clip(0.2)
    ),
    "source": lambda: ScheduledBand("kl", Linear(0.1, 0.01, steps=5)),
    "signs": lambda: BySign(bandpo.Clip(0.1), bandpo.Band("tv", 0.05)),
}
"""Regions that no tensor has used."""


@pytest.mark.parametrize("region", NEW)
@pytest.mark.parametrize("surrogate", ["min-clip", "gamma-weight"])
@pytest.mark.parametrize(
    "name", ["grad", "jvp", "jacfwd", "vmap", "dual level", "functionalize", "inference_mode"]
)
def test_a_region_may_be_new_in_a_transform(
    name: str,
    surrogate: str,
    region: str,
    batch: Batch,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(levels, "_NO_CLIP", bandpo.Clip(1.0, math.inf))
    used, new = NEW[region](), NEW[region]()

    def loss_by(region: Any) -> Loss:
        return lambda x: (
            batch._replace(log_prob=x)
            .loss(region=region, surrogate=SURROGATES[surrogate], backend=backend)
            .loss
        )

    wanted = _backward(loss_by(used), batch.log_prob)
    monkeypatch.setattr(levels, "_NO_CLIP", bandpo.Clip(1.0, math.inf))
    ways: dict[str, Callable[[Loss, Tensor], Tensor]] = {
        **VALUES,
        **GRADIENTS,
        **TANGENTS,
        "functionalize": lambda loss, x: torch.func.functionalize(torch.func.grad(loss))(x),
    }
    for _ in range(2):  # a tensor of the first transform is dead in the second
        ways[name](loss_by(new), batch.log_prob)
    torch.testing.assert_close(_backward(loss_by(new), batch.log_prob), wanted)


@pytest.mark.parametrize("name", ["make_fx, fake", "make_fx, symbolic", "export", "export, strict"])
@pytest.mark.parametrize("region", NEW)
def test_a_graph_has_the_numbers_of_a_region_that_is_new_in_its_trace(
    region: str, name: str, batch: Batch, backend: str
) -> None:
    """Its constants are of no trace, so that the graph does not hold memory that nothing fills."""
    new = NEW[region]()

    def loss(x: Tensor) -> Tensor:
        return batch._replace(log_prob=x).loss(region=new, backend=backend).loss

    found = GRADIENTS[name](loss, batch.log_prob)
    wanted = _backward(
        lambda x: batch._replace(log_prob=x).loss(region=NEW[region](), backend=backend).loss,
        batch.log_prob,
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(_backward(loss, batch.log_prob), wanted)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_fake_mode_takes_regions_that_real_tensors_have_used(
    batch: Batch, mode: str, exact: bool, backend: str
) -> None:
    stepped = ScheduledBand("kl", Linear(0.1, 0.01, steps=5))
    for region in (*REGIONS, stepped, BySign(bandpo.Clip(0.1), bandpo.Band("tv", 0.05))):
        options: dict[str, Any] = {
            "region": region, "loss_agg_mode": mode, "exact": exact, "backend": backend,
        }  # fmt: skip
        before = batch.loss(**options).loss
        with FakeTensorMode() as fake:
            faked = Batch(*(fake.from_tensor(tensor) for tensor in batch))
            faked.log_prob.requires_grad_()
            loss = faked.loss(**options).loss
            loss.backward()  # type: ignore[no-untyped-call]
            assert faked.log_prob.grad is not None
            assert faked.log_prob.grad.shape == batch.log_prob.shape
        assert torch.equal(batch.loss(**options).loss, before)


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # about speed
def test_offsets_of_packed_sequences_may_be_batched(batch: Batch, backend: str) -> None:
    packed = Batch(*(tensor.reshape(-1) for tensor in batch))

    def loss(offsets: Tensor) -> Tensor:
        return packed.loss(
            region=REGIONS[0],
            cu_seqlens=offsets,
            loss_agg_mode="seq-mean-token-mean",
            backend=backend,
        ).loss

    offsets = torch.tensor([[0, 7, 14, 21], [0, 3, 15, 21]])
    found = torch.func.vmap(loss)(offsets)
    torch.testing.assert_close(found, torch.stack([loss(row) for row in offsets]))
