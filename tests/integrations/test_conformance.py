"""The conformance vectors on the losses of frameworks, each where it is installed.

Those of TRL and verl are in the tests of their adapters.
"""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

pytest.importorskip("torch")

import typing_extensions

from bandpo.conform.frameworks import framework_report
from bandpo.conform.run import summary
from bandpo.conform.vectors import read_vectors
from support.packages import fake, is_installed, without_init

ROOT = Path(__file__).parents[2]

TITLES = {
    "liger_kernel": "Liger-Kernel",
    "openrlhf": "OpenRLHF",
    "skyrl": "SkyRL",
    "torchrl": "torchrl",
}
"""Frameworks by the name of their package; the page has their titles."""

OF_CASES = {
    "liger_kernel": {"bfloat16", "padding", "empty-row", "ratio89"},
    "openrlhf": {"bfloat16", "padding"},
    "skyrl": {"bfloat16", "padding", "empty-row"},
    "torchrl": {"bfloat16", "padding", "empty-row", "ratio89"},
}
"""Cases in which some of the vectors of a rule differ."""

OF_RULES = {
    "liger_kernel": {("sapo", "float32"), ("sapo", "split")},
    "openrlhf": {("gspo", "ratio89"), ("luspo", "ratio89")},
    "skyrl": {("sapo", "float32"), ("gspo", "ratio89"), ("luspo", "ratio89")},
    "torchrl": {("cispo", "float32"), ("cispo", "p1"), ("cispo", "positive")},
}
"""Other rules and cases in which they differ."""


@pytest.mark.parametrize("name", TITLES)
def test_vectors_differ_where_the_page_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_installed(name):
        pytest.skip(f"needs {name}: make test-trainers, make test-torchrl")
    if name == "openrlhf":  # whose models import what needs a GPU
        fake(monkeypatch, "deepspeed")
        without_init(monkeypatch, "openrlhf", "openrlhf.models")
    # The configuration of SkyRL needs the one of Python 3.12.
    monkeypatch.setattr(typing, "TypedDict", typing_extensions.TypedDict)
    found = framework_report(name, read_vectors())
    assert found.note == ""
    different = {(v.preset, v.case) for v in found.verdicts if not v.agrees}
    assert {case for _, case in different} >= OF_CASES[name]
    assert {(p, c) for p, c in different if c not in OF_CASES[name]} == OF_RULES[name]

    counts = summary(found)
    text = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    title = re.escape(found.name.replace(name, TITLES[name]))
    stated = re.search(
        rf"^{title} was run [^:]*: (\d+) of (\d+) vectors agree, within\s([\d.]+) ulp for\s"
        r"the\sloss\sand\s(\d+)\sulp\sfor\sthe\sgradient",
        text,
        re.MULTILINE,
    )
    assert stated
    assert (int(stated[1]), int(stated[2])) == (counts["agree"], counts["vectors"])
    assert counts["loss_ulp"] <= float(stated[3]) < counts["loss_ulp"] + 0.1
    assert counts["gradient_ulp"] <= float(stated[4]) < counts["gradient_ulp"] + 1


def test_an_error_of_a_framework_is_a_verdict() -> None:
    from bandpo.conform.compare import report

    def fails(vector: object) -> object:
        raise RuntimeError("no kernel")

    vectors = read_vectors()[:1]
    (verdict,) = report("one", vectors, lambda vector: fails).verdicts  # type: ignore[arg-type,return-value]
    assert verdict.error == "RuntimeError: no kernel"
    assert not verdict.agrees
