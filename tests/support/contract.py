"""The accuracy that docs/accuracy.md promises of a bound.

A bound is never outside the exact one. It is within `RELATIVE` of it or one ULP or, where its
condition number is above `ILL_CONDITIONED`, the divergence at it is within `BACKWARD` ULP of delta.
"""

RELATIVE = 1e-14
"""Relative error of a log bound."""

ILL_CONDITIONED = 20.0
"""Condition number above which the divergence may be near delta instead."""

BACKWARD = 2.0
"""Distance of that divergence from delta, in ULP of delta."""
