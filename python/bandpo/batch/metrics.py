"""`Metrics`: tensors by name, computed at the first access."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import torch

from bandpo.notebook import html_table
from bandpo.surrogate import PROBABILITY_EDGES


class Metrics(Mapping[str, torch.Tensor]):
    """Metrics by name, computed at the first access to any of them."""

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

    def _repr_html_(self) -> str:
        bins = [f"p in {low:g}..{high:g}" for low, high in pairwise(PROBABILITY_EDGES)]
        single = {name: value for name, value in self.items() if value.ndim == 0}
        by_bin = {name: value for name, value in self.items() if value.ndim == 1}
        tables = [html_table(("metric", "value"), ([n, *_texts(v)] for n, v in single.items()))]
        if by_bin:
            rows = ([name, *_texts(value)] for name, value in by_bin.items())
            tables.append(html_table(("metric", *bins), rows))
        return "".join(tables)

    def __reduce__(self) -> tuple[object, tuple[dict[str, torch.Tensor]]]:
        return dict, (self._all(),)


def _texts(value: torch.Tensor) -> list[str]:
    """The numbers of a metric; a count has all its digits."""
    return [f"{v:.4g}" if isinstance(v, float) else str(v) for v in value.reshape(-1).tolist()]
