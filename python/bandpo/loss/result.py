"""Result of `bandpo.loss.policy_loss`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bandpo.batch.metrics import Metrics
from bandpo.correction import RolloutCorrection
from bandpo.notebook import html_table

if TYPE_CHECKING:
    # For type checkers a tuple, because only a tuple unpacks to three different types.
    _Triple = tuple[torch.Tensor, torch.Tensor, Metrics]
else:
    _Triple = Sequence


class PolicyLossResult(_Triple):
    """Loss, losses of the tokens and metrics; also a sequence of the three.

    Attributes:
        loss: The aggregated loss, 0-dim, float32, or float64 if a log-prob is; with loss_agg_mode
            "none" the losses of the tokens.
        per_token: The loss of each token before aggregation, in the shape of ``log_prob`` and the
            dtype of ``loss``, 0 for masked tokens, with gradient. On a CPU it is computed at the
            first access, because it is rarely read; until then no input may be changed in place.
            For tensors of `torch.inference_mode`, which count no changes, it is computed at once.
            loss_agg_mode "none" computes it at once as well.
        metrics: Detached tensors by name, on the device of the loss; see `policy_loss`.
            `Metrics.merge` joins those of micro-batches and ranks.
        correction: The weights of a correction with its own metrics; None without one.
    """

    def __init__(
        self,
        loss: torch.Tensor,
        per_token: torch.Tensor | Callable[[], torch.Tensor],
        metrics: Metrics,
        correction: RolloutCorrection | None = None,
    ) -> None:
        self.loss = loss
        self.metrics = metrics
        self.correction = correction
        self._per_token = per_token

    @property
    def per_token(self) -> torch.Tensor:
        """The loss of each token; see the class.

        Raises:
            InvalidValueError: If it was not computed yet and an input has been changed in place.
        """
        if not isinstance(self._per_token, torch.Tensor):
            self._per_token = self._per_token()
        return self._per_token

    if not TYPE_CHECKING:

        def __getitem__(self, index: int | slice) -> Any:
            names = ("loss", "per_token", "metrics")[index]
            if isinstance(names, str):  # so that another index does not compute per_token
                return getattr(self, names)
            return tuple(getattr(self, name) for name in names)

        def __len__(self) -> int:
            return 3

    def __reduce__(self) -> tuple[object, tuple[Any, ...]]:
        return PolicyLossResult, (*self, self.correction)

    def _repr_html_(self) -> str:
        loss = f"{self.loss:.6g}" if self.loss.ndim == 0 else f"shape {tuple(self.loss.shape)}"
        return html_table(("loss",), [(loss,)]) + self.metrics._repr_html_()

    def __repr__(self) -> str:
        return f"PolicyLossResult(loss={self.loss!r}, metrics={self.metrics!r})"
