"""Every implementation on every vector: what ``bandpo conform`` prints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bandpo.conform.batch import HALF
from bandpo.conform.compare import HALF_ULP, MAX_ULP, Report, Verdict, report
from bandpo.conform.frameworks import ADAPTERS, framework_report
from bandpo.conform.ours import DEVICES, KNOWN, backends, loss_of
from bandpo.conform.vectors import FILE, read_vectors


def reports(
    path: str | Path = FILE, names: Iterable[str] = ()
) -> tuple[list[Report], list[Report]]:
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
            KNOWN,
        )
        for name in chosen or backends()
    ]
    others = [] if chosen else [framework_report(name, vectors) for name in ADAPTERS]
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
        "known": sum(bool(each.known) and not each.agrees for each in verdicts),
        "nonfinite": sum(not verdict.finite and not verdict.error for verdict in verdicts),
        "errors": sum(bool(verdict.error) for verdict in verdicts),
        "note": found.note,
    }


def differences(found: Report) -> list[dict[str, Any]]:
    """Returns the vectors that do not agree, those of a preset and a case as one."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in found.verdicts:
        if not verdict.agrees:
            groups.setdefault((verdict.preset, verdict.case), []).append(verdict)
    return [
        {
            "implementation": found.name,
            "preset": preset,
            "case": case,
            "modes": len(group),
            "why": "; ".join(dict.fromkeys(map(_reason, group))),
            "loss_ulp": max(verdict.loss_ulp for verdict in group),
            "gradient_ulp": max(verdict.gradient_ulp for verdict in group),
        }
        for (preset, case), group in groups.items()
    ]


def _reason(verdict: Verdict) -> str:
    """Why a vector does not agree, in few words."""
    if verdict.known or verdict.error:
        return verdict.known or verdict.error
    if not verdict.finite:
        return "NaN or inf"
    if verdict.gradient_ulp > MAX_ULP:
        return "gradient"
    if verdict.loss_ulp > MAX_ULP:
        is_half = verdict.case == HALF and verdict.loss_ulp <= MAX_ULP * HALF_ULP
        return "loss in bfloat16" if is_half else "loss"
    return "counts"
