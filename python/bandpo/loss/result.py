"""What `policy_loss` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch


class Metrics(Mapping[str, torch.Tensor]):
    """Metrics by name, computed when the first of them is looked at."""

    def __init__(self, compute: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._compute: Callable[[], dict[str, torch.Tensor]] | None = compute
        self._computed: dict[str, torch.Tensor] = {}

    def _all(self) -> dict[str, torch.Tensor]:
        if self._compute is not None:
            self._computed, self._compute = self._compute(), None
        return self._computed

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(self._all())

    def __reduce__(self) -> tuple[object, tuple[dict[str, torch.Tensor]]]:
        return dict, (self._all(),)


class PolicyLossResult(Sequence[Any]):
    """What `policy_loss` returns: also a sequence of its attributes, in this order.

    Attributes:
        loss: The aggregated loss, 0-dim, float32, or float64 where a log-prob is.
        per_token: The loss of each token before aggregation, in the shape of ``log_prob`` and the
            dtype of ``loss``, 0 for masked tokens. It carries the gradient as well. On a CPU it is
            computed when it is looked at, for which the inputs must not have been changed in place;
            at once for tensors of `torch.inference_mode`, which do not tell.
        metrics: Detached tensors by name, on the device of the loss; see `policy_loss`.
    """

    def __init__(
        self,
        loss: torch.Tensor,
        per_token: torch.Tensor | Callable[[], torch.Tensor],
        metrics: Mapping[str, torch.Tensor],
    ) -> None:
        self.loss = loss
        self.metrics = metrics
        self._per_token = per_token

    @property
    def per_token(self) -> torch.Tensor:
        """See the class.

        Raises:
            InvalidValueError: If it was not computed yet and an input has been changed in place.
        """
        if not isinstance(self._per_token, torch.Tensor):
            self._per_token = self._per_token()
        return self._per_token

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        names = ("loss", "per_token", "metrics")[index]
        if isinstance(names, str):  # and per_token is left alone unless it is meant
            return getattr(self, names)
        return tuple(getattr(self, name) for name in names)

    def __len__(self) -> int:
        return 3

    def __reduce__(self) -> tuple[object, tuple[Any, ...]]:
        return PolicyLossResult, tuple(self)

    def __repr__(self) -> str:
        return f"PolicyLossResult(loss={self.loss!r}, metrics={self.metrics!r})"
