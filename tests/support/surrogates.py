"""A surrogate of each kind, by name."""

from __future__ import annotations

from bandpo.surrogate import GammaWeight, GradientPreserving, Mask, SoftGate, Surrogate

SURROGATES: dict[str, Surrogate] = {
    "min-clip": "min-clip",
    "mask": "mask",
    "symmetric mask": Mask(symmetric=True),
    "mask of sequences": Mask(whole_sequence=True),
    "weight": "weight",
    "gradient-preserving": GradientPreserving(0.7, 0.9),
    "soft-gate": SoftGate(2.0, 0.5),
    "quadratic": "quadratic",
    "gamma-weight": GammaWeight(),
}
