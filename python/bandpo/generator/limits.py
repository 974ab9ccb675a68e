"""Constants of the checks of a Python function and of its solver."""

from __future__ import annotations

import math

import numpy as np

EPS = float(np.finfo(np.float64).eps)

# The range of u. Beyond it float64 numbers are not normal.

LOG_REACH = 708.39
"""Max ``|ln u|`` at which the callable is evaluated."""

MIN_U = math.exp(-LOG_REACH - 0.001)

MAX_U = math.exp(LOG_REACH + 0.001)

MAX_LOG_M = math.log(LOG_REACH)
"""``ln m`` at which the shrinking outcome has the min u."""

FAR_ODDS = 650.0
"""Log-odds from which on the growth of the other outcome is formed from logarithms."""

# The solver.

BLOCK = 2**18
"""Tokens that are solved at the same time; it bounds the memory of a call."""

MAX_LOG_EXCESS = 700.0
"""Max ``|ln(D/delta)|``, so that a D of 0 or inf can be interpolated."""

MAX_EXPANSIONS = 14
"""Max evaluations that look for a bracket."""

MAX_ITERATIONS = 100
"""Max evaluations within a bracket."""

MAX_INTERPOLATIONS = 35
"""Iterations that may interpolate; the others halve a bracket that is at most 1500 wide."""

MAX_MOVES = 27
"""Max moves of a bound inwards, by factors that grow to 1."""

MAX_CALLS = 2 + MAX_EXPANSIONS + MAX_ITERATIONS + MAX_MOVES
"""Max calls of the callable for the bounds of a block of `BLOCK` tokens, for any arguments.

Two are for saturation and for the max unknown. The mean over tokens is about 8, but the slowest
token of 100 000 takes 15 to 80.
"""

# The checks on construction.

GRID_REACH = 300.0
"""Max ``|ln u|`` of the grid; only limits are taken from values beyond."""

GRID_HALF = 2000
"""Points on each side of 1: 6e-5 apart in ln u around 1 and 1.6 apart at the ends."""

ROUNDING = 32.0
"""Rounding errors that are no violation, in units of eps and of the terms of f."""

DIP = 0.999
"""A finer grid is laid where f'' is below this times its course, which its neighbours tell."""

REFINED_INTERVALS = 24
"""Intervals of a finer grid, which spans 4 of the coarser one."""

MAX_SUSPECTS = 64
"""Max finer grids; the deepest dips get them."""

MAX_REFINEMENTS = 9
"""Max times that a grid is refined."""

EXPLODED = 1e13
"""f has exploded where it exceeds its max within 0.001 of u = 1 by this factor."""

OVERFLOWING = 1e150
"""Min value next to an overflow, in units of f around 1; below it, and below 1e285, f jumps."""

UNBOUNDED = 1e50
"""A slope or a value above this, in units of f around 1, has no finite limit."""

# The derivative by differences.

SHORT_STEP = 2.0**-17
"""Relative step of the formula of order 2."""

LONG_STEP = 2.0**-8
"""Relative step of the formula of order 4."""

MIN_STEP = 2.0**-46
"""Min of the number that a step is relative to."""

# The polynomial that stands for f around 1.

SERIES_ORDER = 12

SERIES_REACHES = (2.0**-4, 2.0**-6, 2.0**-8)
"""The ``|u-1|`` that it is fitted for, until one fits."""

SERIES_NOISE = 1e-12
"""Max distance of f from the polynomial, in units of f around 1."""

SERIES_NODES = np.sort(
    np.concatenate(
        [
            np.sin(np.linspace(-0.5 * np.pi, 0.5 * np.pi, 601)),
            *(side * np.logspace(-8.0, -1.0, 100) for side in (-1.0, 1.0)),
        ]
    )
)
"""Chebyshev's nodes, and some towards 1, where alone some details of f show."""
