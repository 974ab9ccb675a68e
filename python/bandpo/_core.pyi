"""The compiled half of bandpo. Private: use `bandpo` itself."""

from collections.abc import Sequence
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DIVERGENCES",
    "KERNEL_SOURCE",
    "BandTable",
    "Divergence",
    "PriceBand",
    "__version__",
    "contains",
    "count_valid",
    "diagnose",
    "divergences",
    "log_bounds",
    "parse_spec",
    "policy_loss",
    "scale",
    "simd_level",
    "table_bounds",
    "thread_count",
]

__version__: str
KERNEL_SOURCE: str
DIVERGENCES: list[str]

_FloatArray: TypeAlias = NDArray[np.float32] | NDArray[np.float64]

@final
class Divergence:
    def __new__(cls, spec: str) -> Divergence: ...
    @staticmethod
    def from_expression(
        text: str, at_zero: float | None, slope_at_infinity: float | None
    ) -> Divergence: ...
    @property
    def spec(self) -> str: ...
    @property
    def curvature(self) -> float | None: ...
    @property
    def kernel_generator(self) -> tuple[int, float] | None: ...
    def generator_radii(self, delta: NDArray[np.float64]) -> NDArray[np.float64]: ...

@final
class PriceBand:
    def __new__(cls, divergence: Divergence, price_low: float, price_high: float) -> PriceBand: ...
    def log_bounds(
        self, logp: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
    def contains(
        self, logp: NDArray[np.float64], log_ratio: NDArray[np.float64]
    ) -> NDArray[np.bool_]: ...

@final
class BandTable:
    @staticmethod
    def build(
        lower: Sequence[tuple[float, object]],
        upper: Sequence[tuple[float, object]],
        region: str,
        exact: object,
    ) -> BandTable: ...
    @staticmethod
    def from_bytes(data: bytes) -> BandTable: ...
    @staticmethod
    def load(path: str) -> BandTable: ...
    def to_bytes(self) -> bytes: ...
    def save(self, path: str) -> None: ...
    def log_bounds(
        self,
        logp: _FloatArray,
        log_lower: NDArray[np.float64],
        log_upper: NDArray[np.float64],
    ) -> None: ...
    def words(self) -> NDArray[np.int32]: ...
    @staticmethod
    def checkable() -> int: ...
    def errors_between(
        self, start: int, stop: int, count: int, exact: object
    ) -> tuple[float, float]: ...
    def errors_in_cells(self, exact: object) -> tuple[float, float]: ...
    def verified(self, count: int, log_upper: float, lower: float) -> BandTable: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def metadata(self) -> list[tuple[str, str]]: ...
    @property
    def region(self) -> str: ...
    @property
    def max_error(self) -> tuple[float, float]: ...
    @property
    def exhaustive(self) -> bool: ...

def log_bounds(
    divergence: Divergence,
    delta_low: float | NDArray[np.float64],
    delta_high: float | NDArray[np.float64],
    logp: NDArray[np.float64],
    /,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def contains(
    divergence: Divergence,
    delta_low: float | NDArray[np.float64],
    delta_high: float | NDArray[np.float64],
    logp: NDArray[np.float64],
    log_ratio: NDArray[np.float64],
    /,
) -> NDArray[np.bool_]: ...
def parse_spec(text: str, /) -> str: ...
def policy_loss(
    old_log_prob: _FloatArray,
    log_prob: _FloatArray,
    log_ratio: _FloatArray | None,
    advantages: _FloatArray,
    mask: NDArray[np.uint8],
    bounds: NDArray[np.uint32] | _FloatArray,
    row_length: int,
    surrogate: str,
    parameters: Sequence[float],
    by_probability: bool,
    anchor_log_prob: _FloatArray | None,
    weight: float,
    per_token: _FloatArray | None,
    gradient: _FloatArray,
    /,
) -> tuple[float, NDArray[np.int64], NDArray[np.float64]]: ...
def table_bounds(
    words: NDArray[np.uint32],
    old_log_prob: _FloatArray,
    lower: _FloatArray,
    log_upper: _FloatArray,
    /,
) -> None: ...
def count_valid(mask: NDArray[np.uint8], /) -> int: ...
def scale(gradient: _FloatArray, factor: _FloatArray, /) -> None: ...
def diagnose(
    divergence: Divergence,
    delta: float | NDArray[np.float64],
    logp: NDArray[np.float64],
    upper: bool,
    /,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.uint8], NDArray[np.uint32]]: ...
def divergences(
    divergence: Divergence, logp: NDArray[np.float64], log_ratio: NDArray[np.float64], /
) -> NDArray[np.float64]: ...
def simd_level() -> str: ...
def thread_count() -> int: ...
