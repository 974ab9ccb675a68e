"""The clip rules of the study: families, and the strengths of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bandpo import Clip
from bandpo.spec import region_from_spec
from bandpo.surrogate import Mask

CAP = 10.0
"""Max ratio of a band, as published (arXiv 2603.04918)."""


@dataclass(frozen=True)
class Rule:
    """A region, a surrogate and a ratio level; ``region`` is a spec of `bandpo.spec`."""

    family: str
    region: str
    surrogate: str = "min-clip"
    ratio_level: str = "token"

    @property
    def scaled(self) -> bool:
        """True for a band whose radius depends on the advantage."""
        return self.family == "scaled kl"

    @property
    def name(self) -> str:
        """Unique name: the family and the spec."""
        return f"{self.family}: {self.region}"

    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of `bandpo.loss.policy_loss`.

        A region is given as its table where bounds are looked up, because a root costs more.
        """
        region = region_from_spec(self.region)
        surrogate = Mask(truncation=None) if self.surrogate == "mask" else self.surrogate
        if self.surrogate != "mask" and not isinstance(region, Clip) and not self.scaled:
            region = region.table()
        return {"region": region, "surrogate": surrogate, "ratio_level": self.ratio_level}


def _capped(divergence: str, *deltas: float) -> list[str]:
    return [f"({divergence}@{delta:g}).cap({CAP:g})" for delta in deltas]


_KL = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
_FOUR = ("0.002", "0.005", "0.01", "0.05")

# "kl 0.05" is the published radius, which stands beside the best one of the family.
FAMILIES: Mapping[str, list[str]] = {
    "fixed clip": [f"clip@{eps}" for eps in ("0.1", "0.2", "0.3", "0.5", "0.7", "0.9")],
    "asymmetric clip": [
        f"clip@{pair}" for pair in ("0.2,0.28", "0.3,0.42", "0.2,1", "0.5,1", "0.5,3", "0.8,4")
    ],
    "wide constant": ["clip@0.8,4", "clip@0.9,9", "clip@0.95,19"],
    # Log-ratios are clamped at 20 in the loss, so that this upper bound never acts.
    "no clipping": ["clip@1,1e9"],
    "dcpo": [
        f"(dcpo@{pair}).cap(10)" for pair in ("0.16,0.2", "0.08,0.1", "0.04,0.05", "0.02,0.025")
    ],
    "cispo": ["clip@1,0.28", "clip@1,1", "clip@1,4"],
    "dppo-tv": [f"tv@{delta}" for delta in ("0.02", "0.05", "0.15", "0.3")],
    "dppo-kl": [f"kl@{delta}" for delta in ("0.005", "0.01", "0.05", "0.2")],
    "kl": _capped("kl", *_KL),
    "kl 0.05": _capped("kl", 0.05),
    "reverse-kl": _capped("reverse-kl", *_KL),
    # The radius is 1/4 or twice that of kl where f''(1) is, so that narrow bands are equally wide.
    "hellinger": _capped("hellinger", *(delta / 4 for delta in _KL)),
    "jensen-shannon": _capped("jensen-shannon", *(delta / 4 for delta in _KL)),
    "pearson-chi2": _capped("pearson-chi2", *(delta * 2 for delta in _KL)),
    "tv": _capped("tv", 0.005, 0.01, 0.02, 0.05, 0.1, 0.15),
    "band above": [f"sides(clip@0.2, (kl@{delta}).cap(10))" for delta in _FOUR],
    "band below": [f"sides(kl@{delta}, clip@0.28)" for delta in _FOUR],
    "union": [f"((kl@{delta}) | clip@0.2,0.28).cap(10)" for delta in _FOUR],
    # Radius times min(1, (A/2)^2), token by token.
    "scaled kl": [f"kl@{delta}" for delta in _FOUR],
    "cap": [f"({band}).cap({cap})" for band in ("kl@0.005", "kl@0.05") for cap in (2, 100)],
}
"""Specs of each family that acts on single tokens."""

SEQUENCE_FAMILIES: Mapping[str, list[str]] = {
    "gspo": ["clip@3e-4,4e-4", "clip@0.003,0.004", "clip@0.03,0.04"],
}
"""Families whose ratio is a sequence's; with answers of one token they equal a fixed clip."""

MULTI_TOKEN_FAMILIES: Mapping[str, list[str]] = {
    "fixed clip": ["clip@0.1", "clip@0.2", "clip@0.5"],
    "asymmetric clip": ["clip@0.2,0.28", "clip@0.5,1", "clip@0.5,3"],
    "wide constant": ["clip@0.9,9"],
    "no clipping": FAMILIES["no clipping"],
    "dcpo": ["(dcpo@0.16,0.2).cap(10)", "(dcpo@0.04,0.05).cap(10)"],
    "dppo-tv": ["tv@0.05", "tv@0.15"],
    "kl": _capped("kl", 0.002, 0.005, 0.01, 0.05),
    "kl 0.05": FAMILIES["kl 0.05"],
    "reverse-kl": _capped("reverse-kl", 0.005, 0.01, 0.05),
    "band above": [f"sides(clip@0.2, (kl@{delta}).cap(10))" for delta in ("0.005", "0.05")],
    "band below": [f"sides(kl@{delta}, clip@0.28)" for delta in ("0.005", "0.05")],
    "union": [f"((kl@{delta}) | clip@0.2,0.28).cap(10)" for delta in ("0.005", "0.05")],
    **SEQUENCE_FAMILIES,
}
"""Families and strengths on tasks of several tokens, whose runs take ten times as long."""

_SURROGATES = {"cispo": "weight", "dppo-tv": "mask", "dppo-kl": "mask"}


def rule_of(family: str, spec: str) -> Rule:
    """Returns the rule of a strength of a family."""
    level = "sequence" if family in SEQUENCE_FAMILIES else "token"
    return Rule(family, spec, _SURROGATES.get(family, "min-clip"), level)


def rules_of(families: Mapping[str, list[str]], *names: str) -> list[Rule]:
    """Returns every rule of a table, or of the named families of it, in the order of the table.

    Raises:
        KeyError: If a family is not in the table.
    """
    return [rule_of(family, spec) for family in names or families for spec in families[family]]
