"""`Metrics`: tensors by name, computed at the first access, and what they are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from bandpo.check import check_text
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.notebook import html_table
from bandpo.ranks import of_all_ranks
from bandpo.surrogate import PROBABILITY_EDGES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Tensors: TypeAlias = dict[str, torch.Tensor]


class Statistics(NamedTuple):
    """Numerators, denominators and extremes, 0-dim or [bins], and how metrics are made of them."""

    sums: Tensors
    """Counts (int64) and sums (floats), which add up over batches."""
    minima: Tensors
    """Minima, inf where there is nothing."""
    maxima: Tensors
    """Maxima, -inf where there is nothing."""
    formula: Callable[..., Tensors]
    """A function of a module, because it is pickled, from these statistics to the metrics."""
    arguments: tuple[object, ...] = ()
    """Its other arguments."""

    def metrics(self) -> Tensors:
        """Returns the metrics by name."""
        return self.formula(self, *self.arguments)

    def on_cpu(self) -> Statistics:
        """Returns the same on the CPU.

        Raises:
            InvalidValueError: If the tensors hold no numbers.
        """
        return self._replace(
            sums=_on_cpu(self.sums), minima=_on_cpu(self.minima), maxima=_on_cpu(self.maxima)
        )

    @classmethod
    def merged(cls, parts: list[Statistics]) -> Statistics:
        """Returns the statistics of several batches together, on their device if it is one.

        Raises:
            InvalidValueError: If there is none, they are not made for the same metrics, or some of
                them alone hold no numbers.
        """
        if not parts:
            raise InvalidValueError("parts must hold at least one Metrics, got none")
        first = parts[0]
        for part in parts:
            if part[3:] != first[3:] or part.sums.keys() != first.sums.keys():
                raise InvalidValueError(
                    f"parts must be of the same rule, dtype and choice of metrics, got sums of "
                    f"{list(first.sums)} for {first.arguments} and of {list(part.sums)} for "
                    f"{part.arguments}"
                )
        if len({tensor.device for part in parts for tensor in part.sums.values()}) > 1:
            parts = [part.on_cpu() for part in parts]
        sums = {name: [part.sums[name] for part in parts] for name in first.sums}
        minima = {name: [part.minima[name] for part in parts] for name in first.minima}
        maxima = {name: [part.maxima[name] for part in parts] for name in first.maxima}
        return first._replace(
            sums={name: torch.stack(values).sum(0) for name, values in sums.items()},
            minima={name: torch.stack(values).amin(0) for name, values in minima.items()},
            maxima={name: torch.stack(values).amax(0) for name, values in maxima.items()},
        )


class Metrics(Mapping[str, torch.Tensor]):
    """Metrics by name: detached tensors, computed at the first access to any of them.

    The numerators, denominators and extremes that they are made of are kept, so that `merge` gives
    the metrics of micro-batches and ranks together.

    Args:
        metrics: Statistics, or a function that returns them and is called at the first access; or
            metrics by name, which cannot be merged.
        of_one_batch: Returns further metrics that are made of nothing that adds up, such as
            quantiles. Merged metrics have none.
    """

    def __init__(
        self,
        metrics: Statistics | Callable[[], Statistics] | Mapping[str, torch.Tensor],
        of_one_batch: Callable[[], Tensors] | None = None,
    ) -> None:
        self._statistics: Statistics | Callable[[], Statistics] | None = None
        self._of_one_batch = of_one_batch
        self._values: Tensors | None = None
        if callable(metrics):
            self._statistics = metrics
        elif isinstance(metrics, Statistics):
            self._statistics = metrics
            self._all()
        else:
            self._values = dict(metrics)

    @staticmethod
    def merge(parts: Iterable[Metrics], *, group: ProcessGroup | None = None) -> Metrics:
        """Returns the metrics of several batches as those of one.

        Sums add up and extremes stay extremes, so the result does not depend on how a batch was
        split, but for rounding. The quantiles of a correction's weights are left out, because they
        follow from neither.

        >>> import torch
        >>> from bandpo import policy_loss
        >>> def clipped(*ratios):
        ...     new = torch.tensor([ratios]).log() - 2.0
        ...     old, one = torch.full_like(new, -2.0), torch.ones_like(new)
        ...     return policy_loss(old, new, one, one, region="clip@0.2").metrics
        >>> parts = [clipped(1.5, 1.0, 1.0), clipped(1.5)]
        >>> [round(part["clip_fraction_high"].item(), 3) for part in parts]
        [0.333, 1.0]
        >>> Metrics.merge(parts)["clip_fraction_high"]
        tensor(0.5000)

        Args:
            parts: Metrics of one rule; a rank of a group may have none. Those of several devices
                are merged on the CPU, for which the host waits.
            group: Process group of ranks whose metrics are merged as well, such as
                ``torch.distributed.group.WORLD``. All of them must call. They get the same result,
                on the CPU, for which the host waits.

        Raises:
            InvalidTypeError: If a part is no Metrics, on any rank.
            InvalidValueError: If there is no part, or parts are of different rules or dtypes, were
                made from values alone, or would leave the device meta, likewise.
        """
        if not isinstance(parts, Iterable):
            raise InvalidTypeError(f"parts must be several Metrics, got {type(parts).__name__}")
        if group is None:
            return Metrics(Statistics.merged([_statistics_of(part) for part in parts]))

        def of_this_rank() -> list[Statistics]:
            own = [_statistics_of(part) for part in parts]
            return [Statistics.merged(own).on_cpu()] if own else []

        ranks = of_all_ranks(of_this_rank, group)
        return Metrics(Statistics.merged([part for rank in ranks for part in rank]))

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Returns the metrics as floats, for a logger.

        Those by probability become one for each bin, with its edges in the name, such as
        ``tokens_by_probability/0.001-0.01``. Others of several elements, which a collation makes,
        are numbered, such as ``entropy/0``. The host waits for the device, once.

        Args:
            prefix: Begins every name, such as ``"actor/"``.

        Raises:
            InvalidTypeError: If the prefix is not a str.
            InvalidValueError: If a metric is on the device meta.
        """
        check_text("prefix", prefix)
        names: list[str] = []
        values = self._tensors()
        for name, value in values.items():
            ends = [f"/{low:g}-{high:g}" for low, high in pairwise(PROBABILITY_EDGES)]
            if not (name.endswith("_by_probability") and value.shape == (len(ends),)):
                ends = [f"/{k}" for k in range(value.numel())] if value.ndim else [""]
            names += [prefix + name + end for end in ends]
        # One copy, because each waits. Float64 holds every count; MPS does not have it.
        _check_numbers("metrics", values)
        parts = [value.reshape(-1) for value in values.values()]
        if len({part.device for part in parts}) > 1:
            parts = [part.cpu() for part in parts]
        on_mps = any(part.device.type == "mps" for part in parts)
        dtype = torch.float32 if on_mps else torch.float64
        row = torch.cat([part.to(dtype) for part in parts]).tolist() if parts else []
        return dict(zip(names, row, strict=True))

    def _tensors(self) -> Tensors:
        """The metrics, of which a rebuilt mapping may hold plain numbers, as tensors."""
        return {
            name: value
            if isinstance(value, torch.Tensor)
            else torch.tensor(value, dtype=torch.float64, device="cpu")
            for name, value in self._all().items()
        }

    def _all(self) -> Tensors:
        if self._values is None:
            self._values = _statistics_of(self).metrics()
            if self._of_one_batch is not None:
                self._values |= self._of_one_batch()
                self._of_one_batch = None
        return self._values

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
        values = self._tensors()
        by_bin = {name: value for name, value in values.items() if value.shape == (len(bins),)}
        single = {name: value for name, value in values.items() if name not in by_bin}
        tables = [html_table(("metric", "value"), ([n, *_texts(v)] for n, v in single.items()))]
        if by_bin:
            rows = ([name, *_texts(value)] for name, value in by_bin.items())
            tables.append(html_table(("metric", *bins), rows))
        return "".join(tables)

    def __getstate__(self) -> dict[str, Any]:
        self._all()
        if self._statistics is not None:
            self._statistics = _statistics_of(self)
        return self.__dict__


def _statistics_of(metrics: Metrics) -> Statistics:
    """The statistics of metrics, computed now if they were not.

    Raises:
        InvalidTypeError: If they are no Metrics.
        InvalidValueError: If they hold values alone.
    """
    if not isinstance(metrics, Metrics):
        raise InvalidTypeError(
            f"parts must be Metrics, as a loss returns them, got {type(metrics).__name__}"
        )
    made_of = metrics._statistics
    if made_of is None:
        raise InvalidValueError(
            "parts must be Metrics with the sums that they are made of, got values alone"
        )
    if not isinstance(made_of, Statistics):
        made_of = metrics._statistics = made_of()
    return made_of


def _on_cpu(tensors: Tensors) -> Tensors:
    """The tensors on the CPU, by one copy for each dtype."""
    _check_numbers("parts", tensors)
    found = dict(tensors)
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        names = [name for name, tensor in tensors.items() if tensor.dtype == dtype]
        row = torch.cat([tensors[name].reshape(-1) for name in names]).cpu()
        for name in names:
            size = tensors[name].numel()
            found[name], row = row[:size].reshape(tensors[name].shape), row[size:]
    return found


def _check_numbers(argument: str, tensors: Tensors) -> None:
    """Raises InvalidValueError if a tensor is on the device meta."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise InvalidValueError(f"{argument} must hold numbers, got {name!r} on device meta")


def _texts(value: torch.Tensor) -> list[str]:
    """The numbers of a metric; a count has all its digits."""
    return [f"{v:.4g}" if isinstance(v, float) else str(v) for v in value.reshape(-1).tolist()]
