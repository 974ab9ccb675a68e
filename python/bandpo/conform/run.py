"""Every implementation on every vector: what ``bandpo conform`` prints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bandpo.conform.compare import MAX_ULP, Report, report
from bandpo.conform.frameworks import ADAPTERS, OTHERS, framework_report
from bandpo.conform.ours import DEVICES, backends, loss_of
from bandpo.conform.vectors import FILE, read_vectors


def reports(path: str | Path = FILE, names: Iterable[str] = ()) -> tuple[list[Report], list[Report]]:
    """Returns the comparisons of our backends, and those of the frameworks.

    Args:
        path: The file of vectors.
        names: Backends to run; all that can, and the frameworks, where there are none.
    """
    vectors, chosen = read_vectors(path), list(names)
    ours = [
        report(
            f"bandpo {name}",
            vectors,
            lambda vector, name=name: loss_of(vector, name),  # type: ignore[misc]
            DEVICES[name],
        )
        for name in chosen or backends()
    ]
    others = [] if chosen else [framework_report(name, vectors) for name in (*ADAPTERS, *OTHERS)]
    return ours, others


def summary(found: Report) -> dict[str, Any]:
    """Returns the counts of a comparison."""
    verdicts = found.verdicts
    agreeing = [verdict for verdict in verdicts if verdict.agrees]
    return {
        "implementation": found.name,
        "rules": len({verdict.preset for verdict in verdicts}),
        "vectors": len(verdicts),
        "agree": len(agreeing),
        "loss_ulp": max((verdict.loss_ulp for verdict in agreeing), default=0.0),
        "gradient_ulp": max((verdict.gradient_ulp for verdict in agreeing), default=0.0),
        "nonfinite": sum(not verdict.finite and not verdict.error for verdict in verdicts),
        "errors": sum(bool(verdict.error) for verdict in verdicts),
        "note": found.note,
    }


def differences(found: Report) -> list[dict[str, Any]]:
    """Returns the vectors that do not agree, those of a preset and a case as one."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for verdict in found.verdicts:
        if not verdict.agrees:
            groups.setdefault((verdict.preset, verdict.case), []).append(verdict)
    rows = []
    for (preset, case), group in groups.items():
        reasons = [
            verdict.error
            or ("NaN or inf" if not verdict.finite else "")
            or ("counts" if verdict.counts_agree is False and _near(verdict) else "values")
            for verdict in group
        ]
        rows.append(
            {
                "implementation": found.name,
                "preset": preset,
                "case": case,
                "modes": [verdict.mode for verdict in group],
                "why": "; ".join(dict.fromkeys(reasons)),
                "loss_ulp": max(verdict.loss_ulp for verdict in group),
                "gradient_ulp": max(verdict.gradient_ulp for verdict in group),
            }
        )
    return rows


def _near(verdict: Any) -> bool:
    return max(verdict.loss_ulp, verdict.gradient_ulp) <= MAX_ULP
