"""The policy loss as a trainer calls it: `policy_loss(...).loss.backward()` on whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import bandpo
from bandpo.error import BrokenExtraError, InvalidValueError, MissingExtraError
from bandpo.rule import BACKENDS
from bandpo.surrogate import NAMES
from benchmarks import peers
from benchmarks.availability import (
    DEVICES,
    HAS_TORCH,
    need_patience,
    need_torch,
    synchronize,
    torch,
)
from benchmarks.interleaved import Comparison, compare
from benchmarks.tokens import DELTA, SIZE, SIZES, batch

EAGER_CLIP, COMPILED_CLIP = PEERS = ("eager PPO clip", "compiled PPO clip")
COMPILED = "torch compiled"
"""The backend torch under `torch.compile`."""

if HAS_TORCH:
    from bandpo.loss import policy_loss

METHODS = (*(name for name in BACKENDS if name != "auto"), COMPILED)

REGION = bandpo.Band("kl", DELTA)
DTYPES = ("float32", "float64", "bfloat16")
SURROGATES = NAMES


class Step:
    """One loss of one batch; raises NotImplementedError if the method cannot run here."""

    def __init__(
        self,
        method: str,
        device: str = "cpu",
        size: int = SIZE,
        dtype: str = "float32",
        surrogate: Any = "min-clip",
        region: bandpo.Region = REGION,
        anchored: bool = False,
    ) -> None:
        need_torch(device)
        self.device = device
        *floats, mask = batch(size)
        old_log_prob, log_prob, advantages = (
            torch.tensor(array, dtype=getattr(torch, dtype), device=device) for array in floats
        )
        self.log_prob = log_prob.requires_grad_()
        tensors = (old_log_prob, log_prob, advantages, torch.tensor(mask, device=device))
        self.loss: Callable[[], torch.Tensor]
        if method in PEERS:
            peer = peers.ppo_clip if method == EAGER_CLIP else peers.compiled_ppo_clip()
            self.loss = lambda: peer(*tensors)
            return
        backend: Any = "torch" if method == COMPILED else method
        # The rollout policy is nearer to the old policy than the new one is.
        anchor = 0.9 * old_log_prob + 0.1 * log_prob.detach() if anchored else None
        rule: dict[str, Any] = {"region": region, "surrogate": surrogate, "anchor_log_prob": anchor}

        def loss() -> torch.Tensor:
            return policy_loss(*tensors, **rule, backend=backend).loss

        try:
            loss()
        except (InvalidValueError, MissingExtraError, BrokenExtraError) as reason:
            raise NotImplementedError(f"{backend} on {device}: {reason}") from reason
        self.loss = (
            torch.compile(loss, fullgraph=True, dynamic=False) if method == COMPILED else loss
        )

    def forward(self) -> None:
        """Computes the loss."""
        self.loss()
        synchronize(self.device)

    def forward_backward(self) -> None:
        """Computes the loss and its gradient, as a training step does."""
        self.log_prob.grad = None
        self.loss().backward()  # type: ignore[no-untyped-call]
        synchronize(self.device)


def compare_to_clip(
    method: str,
    peer: str,
    device: str = "cpu",
    size: int = SIZE,
    dtype: str = "float32",
    seconds: float = 2.0,
) -> Comparison:
    """Times forward and backward of a backend and of a PPO clip on the same batch."""
    ours, other = (Step(name, device, size, dtype) for name in (method, peer))
    return compare(ours.forward_backward, other.forward_backward, seconds=seconds)


def compare_to_own_edge(surrogate: str, size: int = SIZE, seconds: float = 2.0) -> Comparison:
    """Times a loss with and without an anchor for its region."""
    ours, other = (
        Step("native", size=size, surrogate=surrogate, anchored=anchored)
        for anchored in (True, False)
    )
    return compare(ours.forward_backward, other.forward_backward, seconds=seconds)


class Loss:
    """Times of bandpo's backends and of PPO's clip, at every size."""

    params: ClassVar = [(*METHODS, *PEERS), DEVICES, SIZES]
    param_names: ClassVar = ["method", "device", "size"]
    timeout = 300

    def setup(self, method: str, device: str, size: int) -> None:
        """Prepares the batch; raises NotImplementedError if a requirement is missing."""
        need_torch(device)
        if method in ("torch", COMPILED) and size > SIZE:
            need_patience()
        self.step = Step(method, device, size)
        self.step.forward_backward()

    def time_forward(self, *_: object) -> None:
        """Times the loss."""
        self.step.forward()

    def time_forward_backward(self, *_: object) -> None:
        """Times the loss and its gradient."""
        self.step.forward_backward()


class Rules:
    """Times of every surrogate and dtype, at one size."""

    params: ClassVar = [METHODS, DEVICES, DTYPES, SURROGATES]
    param_names: ClassVar = ["backend", "device", "dtype", "surrogate"]
    timeout = 300

    def setup(self, backend: str, device: str, dtype: str, surrogate: str) -> None:
        """Prepares the batch; raises NotImplementedError if a requirement is missing."""
        need_torch(device)
        if backend == COMPILED:
            need_patience()
        self.step = Step(backend, device, SIZE, dtype, surrogate)
        self.step.forward_backward()

    def time_forward_backward(self, *_: object) -> None:
        """Times the loss and its gradient."""
        self.step.forward_backward()


class Ratio:
    """Times relative to PPO's clip, in turns in one process."""

    params: ClassVar = [METHODS, DEVICES, (min(SIZES), SIZE)]
    param_names: ClassVar = ["backend", "device", "size"]
    timeout = 300

    def setup(self, backend: str, device: str, size: int) -> None:
        """Raises NotImplementedError if a requirement is missing."""
        Step(backend, device, min(SIZES))

    def track_time_ratio_to_compiled_clip(self, backend: str, device: str, size: int) -> float:
        """Returns the time of forward and backward over that of the compiled clip."""
        return compare_to_clip(backend, COMPILED_CLIP, device, size).ratio

    def track_time_ratio_to_eager_clip(self, backend: str, device: str, size: int) -> float:
        """Returns the time of forward and backward over that of the eager clip."""
        return compare_to_clip(backend, EAGER_CLIP, device, size).ratio

    track_time_ratio_to_compiled_clip.unit = "ratio"  # type: ignore[attr-defined]
    track_time_ratio_to_eager_clip.unit = "ratio"  # type: ignore[attr-defined]


class Anchor:
    """Times with an anchor relative to those without one, in turns in one process."""

    params: ClassVar = [SURROGATES, (min(SIZES), SIZE)]
    param_names: ClassVar = ["surrogate", "size"]
    timeout = 300

    def setup(self, surrogate: str, size: int) -> None:
        """Raises NotImplementedError if a requirement is missing."""
        need_torch("cpu")

    def track_time_ratio_to_own_edge(self, surrogate: str, size: int) -> float:
        """Returns the time of forward and backward over that without an anchor."""
        return compare_to_own_edge(surrogate, size).ratio

    track_time_ratio_to_own_edge.unit = "ratio"  # type: ignore[attr-defined]
