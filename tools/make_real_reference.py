"""Writes the digits that the double-double functions of rust/number/dd.rs are tested against.

Each row is a function, its argument and the result to 60 digits as the sum of two float64. The
output depends on this file alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from mpmath import mp, mpf

DIGITS = 60
OUTPUT = Path(__file__).parents[1] / "tests" / "data" / "real_functions.csv"


def main() -> None:
    """Writes the file."""
    mp.dps = DIGITS
    generator = random.Random(3)  # noqa: S311 -- a fixed sample, not a secret
    spread = [10 ** generator.uniform(-12, -0.01) for _ in range(30)]
    signed = [x if i % 2 else -x for i, x in enumerate(spread)]
    functions: dict[str, tuple[Callable[[mpf], mpf], list[float]]] = {
        "exp_m1": (mp.expm1, [*signed, 1.5, 7.25, -7.25, 30.0, -30.0, 300.0, 700.0]),
        "ln_1p": (mp.log1p, [*signed, 1.5, 7.25, 30.0, 1e200]),
        "sin": (mp.sin, [*signed, 1.0, 2.0, -4.0, 5.5, 7.25, 30.0]),
        "cos": (mp.cos, [*signed, 1.0, 2.0, -4.0, 5.5, 7.25, 30.0]),
        "sqrt": (mp.sqrt, [*spread[:12], 1e200, 1e-200]),
    }
    rows = [
        "# python tools/make_real_reference.py",
        f"# {DIGITS} digits by mpmath; the result is hi + lo",
        "function,x,hi,lo",
    ]
    for name, (function, arguments) in functions.items():
        for x in arguments:
            exact = function(mpf(x))
            hi = float(exact)
            rows.append(f"{name},{x.hex()},{hi.hex()},{float(exact - mpf(hi)).hex()}")
    OUTPUT.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
