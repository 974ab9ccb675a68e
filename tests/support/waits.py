"""Operations of torch that make the host wait for a value of a device."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = ("_local_scalar_dense", "aten.item", "is_nonzero", "nonzero", "aten.equal")


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the names of such operations inside a ``with``, also on a CPU, where none waits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(part in str(func) for part in _WAITING):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
