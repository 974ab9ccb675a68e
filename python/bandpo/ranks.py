"""Exchange between the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from bandpo.error import InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def of_all_ranks(compute: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """Returns the results of all ranks, the same list on each of them.

    Every rank of the group must call it. A bad argument on one rank is an error on all, because the
    others would wait for its result.

    Args:
        compute: The function of this rank; its result is pickled.
        group: A group of `torch.distributed`; None for this process alone.

    Raises:
        InvalidTypeError: If ``compute`` raises it on any rank; the message names the rank.
        InvalidValueError: Likewise.
    """
    if group is None:
        return [compute()]
    import torch.distributed as dist

    result: T | InvalidTypeError | InvalidValueError
    try:
        result = compute()
    except (InvalidTypeError, InvalidValueError) as error:
        result = error
    results: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(results, result, group)
    for rank, found in enumerate(results):
        if isinstance(found, (InvalidTypeError, InvalidValueError)):
            raise type(found)(f"{found} (rank {rank} of the group)")
    return results
