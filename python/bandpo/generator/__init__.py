"""The f of an f-divergence as a Python callable over arrays."""

from bandpo.generator.function import checked_limit
from bandpo.generator.limits import BLOCK, LOG_REACH, MAX_CALLS
from bandpo.generator.solve import CallableGenerator

__all__ = ["BLOCK", "LOG_REACH", "MAX_CALLS", "CallableGenerator", "checked_limit"]
