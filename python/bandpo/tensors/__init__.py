"""Regions as tensors. The import of torch is checked here, for every module that needs it."""

from bandpo.error import BrokenExtraError, MissingExtraError

try:
    import torch  # noqa: F401
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise BrokenExtraError(f"torch is installed but cannot be imported: {missing}") from missing
    raise MissingExtraError("torch", "torch") from missing
except (ImportError, OSError) as broken:
    raise BrokenExtraError(f"torch is installed but cannot be imported: {broken}") from broken
