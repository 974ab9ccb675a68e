"""Constants of the checks of a Python function and of its solver."""

from __future__ import annotations

import math

import numpy as np

EPS = float(np.finfo(np.float64).eps)

LOG_REACH = 708.39
"""Max ``|ln u|`` at which the callable is evaluated; beyond, float64 numbers are not normal."""

BLOCK = 2**18
"""Tokens that are solved at the same time; it bounds the memory of a call."""

SMALLEST = math.exp(-LOG_REACH - 0.001)

LARGEST = math.exp(LOG_REACH + 0.001)

# ln m of an outcome that shrinks to the min u of the callable.
FARTHEST = math.log(LOG_REACH)

# Odds from which on the growth of the other outcome is formed from logarithms.
FAR_ODDS = 650.0

# ln(D/delta) is cut off here, so that a D of 0 or inf can be interpolated.
STEEPEST = 700.0

# The solver's loops; 35 iterations interpolate, the others halve a bracket that is at most 1500
# wide. A bound is moved inwards by factors that grow to 1.
MAX_EXPANSIONS = 14

MAX_INTERPOLATIONS = 35

MAX_ITERATIONS = 100

MAX_MOVES = 27

MAX_CALLS = 2 + MAX_EXPANSIONS + MAX_ITERATIONS + MAX_MOVES
"""Max calls of the callable for the bounds of a block of `BLOCK` tokens, for any arguments.

Two are for saturation and for the far end. The mean over tokens is about 8, but the slowest token
of 100 000 takes 15 to 80.
"""

# Grid of the checks on construction: |ln u| <= GRID_REACH, 6e-5 apart around u = 1 and 1.6 apart at
# the ends. The tail beyond GRID_REACH serves limits only.
GRID_REACH = 300.0

GRID_HALF = 2000

# The rounding errors, in units of eps and of the terms of f, that are no violation.
ROUNDING = 32.0

# Finer grids are laid where f'' is below DIP times its values two points away on both sides. Each
# grid has FINER points over 4 intervals; the MAX_SUSPECTS deepest dips get one.
DIP = 0.99

FINER = 24

MAX_SUSPECTS = 64

MAX_REFINEMENTS = 9

# f has exploded where it exceeds its max within 0.001 of u = 1 by this factor.
EXPLODED = 1e13

# A value next to an overflow is at least this many times f around 1, or 1e285; else f has an edge
# there.
HUGE = 1e150

# A slope or a value that grew this far, in units of f around 1, has no finite limit.
UNBOUNDED = 1e50

# Relative steps of the two difference formulas for f': of order 2 and of order 4.
SHORT_STEP = 2.0**-17

LONG_STEP = 2.0**-8

# Min of the number that a step is relative to.
SHORTEST_STEP = 2.0**-46

# A polynomial stands for f around 1: its order, the |u-1| it is tried for, and how far f may be off
# it, in units of f around 1. Nodes: Chebyshev's, and some towards 1, where details show that do not
# show elsewhere.
SERIES_ORDER = 12

SERIES_REACHES = (2.0**-4, 2.0**-6, 2.0**-8)

SERIES_NOISE = 1e-12

SERIES_NODES = np.sort(
    np.concatenate(
        [
            np.sin(np.linspace(-0.5 * np.pi, 0.5 * np.pi, 601)),
            *(side * np.logspace(-8.0, -1.0, 100) for side in (-1.0, 1.0)),
        ]
    )
)
