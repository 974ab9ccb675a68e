"""The adapter to verl where verl has changed or is not there: a package of that name, made here."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from bandpo import doctor, integrations, policy_loss, preset
from bandpo.error import InvalidTypeError, MissingHookError, VersionWarning
from bandpo.integrations import version
from bandpo.integrations.settings import LossSettings

ROOT = Path(__file__).parents[2]

REGISTRY = """
POLICY_LOSS_REGISTRY = {}
def register_policy_loss(name):
    return lambda function: POLICY_LOSS_REGISTRY.setdefault(name, function)
def get_policy_loss_fn(name):
    if name not in POLICY_LOSS_REGISTRY:
        raise ValueError(f"Unsupported loss mode: {name}")
    return POLICY_LOSS_REGISTRY[name]
"""

CONFIG = """
from dataclasses import dataclass
@dataclass
class PolicyLossConfig:
    loss_mode: str = "vanilla"
    def get(self, name, default=None):
        return getattr(self, name, default)
"""

ADAPTER = "bandpo.integrations.verl"


class FakeVerl:
    """A package verl in a folder that is searched first, by processes as well."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        monkeypatch.syspath_prepend(str(folder))
        paths = [str(folder), *sys.path]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
        for name in list(sys.modules):
            if name.startswith(ADAPTER) or name.split(".")[0] == "verl":
                monkeypatch.delitem(sys.modules, name)
            if name.startswith(ADAPTER):  # hydra finds it as an attribute
                monkeypatch.delattr(integrations, name.rpartition(".")[2])
        monkeypatch.setattr(version, "_WARNED", set())

    def install(
        self, release: str, registry: str = REGISTRY, config: str = CONFIG, code: str = ""
    ) -> None:
        for path, text in (
            ("verl/__init__.py", code),
            ("verl/trainer/__init__.py", ""),
            ("verl/trainer/ppo/__init__.py", ""),
            ("verl/trainer/ppo/core_algos.py", registry),
            ("verl/workers/__init__.py", ""),
            ("verl/workers/config.py", config),
            (f"verl-{release}.dist-info/METADATA", f"Name: verl\nVersion: {release}\n"),
        ):
            file = self.folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        importlib.invalidate_caches()

    def adapter(self) -> ModuleType:
        module = importlib.import_module(ADAPTER)
        # So that they are dropped at the end of the test, where they were not there before.
        for name in [name for name in sys.modules if name.startswith(ADAPTER)]:
            self._monkeypatch.setitem(sys.modules, name, sys.modules[name])
        return module


@pytest.fixture
def verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVerl:
    return FakeVerl(tmp_path, monkeypatch)


def batch() -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(0)
    old = -4 * torch.rand(2, 5, generator=make)
    new = old + 0.5 * torch.randn(2, 5, generator=make)
    return old, new, torch.randn(2, 5, generator=make), torch.ones(2, 5, dtype=torch.bool)


def test_the_hook_of_the_documentation_is_enough(verl: FakeVerl) -> None:
    verl.install("0.9.1")
    adapter = verl.adapter()
    core = sys.modules["verl.trainer.ppo.core_algos"]
    loss_fn = core.get_policy_loss_fn("bandpo")
    assert loss_fn is adapter.policy_loss
    loss, metrics = loss_fn(*batch(), loss_agg_mode="seq-mean-token-mean")
    paper = preset("bandpo-kl").arguments(loss_agg_mode="seq-mean-token-mean")
    expected = policy_loss(*batch(), **{**paper, "region": "(kl@0.01).cap(10)"})
    assert torch.equal(loss, expected.loss)
    assert metrics["actor/band/ratio_max"] == expected.metrics["ratio_max"].item()
    config: dict[str, Any] = {
        "policy_loss": adapter.BandPOPolicyLossConfig(preset="dapo"),
        "global_batch_info": {"batch_num_tokens": 20, "dp_size": 2},
    }
    loss, metrics = loss_fn(*batch(), config=config)
    expected = policy_loss(*batch(), **preset("dapo").arguments(), batch_num_tokens=20, dp_size=2)
    assert torch.equal(loss, expected.loss)
    assert metrics["actor/pg_clipfrac_lower"] == 0.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"registry": ""}, "cannot import name 'register_policy_loss'"),
        ({"config": ""}, "cannot import name 'PolicyLossConfig'"),
        ({"registry": "import no_such_module"}, "No module named 'no_such_module'"),
    ],
)
def test_a_hook_that_is_gone_is_an_error_with_the_version(
    verl: FakeVerl, changes: dict[str, str], reason: str
) -> None:
    verl.install("0.6.0", **changes)
    with pytest.raises(
        MissingHookError, match=rf"^verl 0.6.0 has no hook for a policy loss \({reason}.*adapter"
    ):
        verl.adapter()


def test_an_argument_that_is_new_is_an_error_with_the_version(verl: FakeVerl) -> None:
    verl.install("1.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VersionWarning)
        loss_fn = verl.adapter().policy_loss
        loss_fn(*batch(), rollout_log_prob=None)
        with pytest.raises(InvalidTypeError, match=r"^verl 1.0 gives its policy loss rollout_log"):
            loss_fn(*batch(), rollout_log_prob=batch()[0])


def test_another_version_warns_once_where_the_loss_is_taken(verl: FakeVerl) -> None:
    verl.install("0.12.3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = verl.adapter()  # also imported where verl trains by another loss
        with pytest.raises(
            VersionWarning, match=r"^verl is 0.12.3; .* tested with 0.7.1 to 0.9.1$"
        ):
            adapter.policy_loss(*batch())
        adapter.policy_loss(*batch())


def test_every_field_and_metric_is_documented(verl: FakeVerl) -> None:
    verl.install("0.9.1")
    adapter = verl.adapter()
    page = (ROOT / "docs" / "integrations" / "verl.md").read_text(encoding="utf-8")
    assert {field.name for field in fields(LossSettings)} <= set(re.findall(r"`(\w+)", page))
    rules: list[dict[str, Any]] = [
        {"schedule": "constant(0.05)"},
        {"surrogate": "mask", "log_ratio_penalty": 0.1},
        {"surrogate": {"name": "mask", "whole_sequence": True}},
    ]
    named = set(re.findall(r"`(actor/[a-z_0-9/]+)`", page))
    found = set()
    for rule in rules:
        config = {"policy_loss": adapter.BandPOPolicyLossConfig(**rule)}
        found |= set(adapter.policy_loss(*batch(), config=config)[1])
    assert found == named


def test_doctor_has_the_error_that_verl_hides(verl: FakeVerl) -> None:
    verl.install("0.6.0", registry="def get_policy_loss_fn(name): raise ValueError(name)")
    found = doctor.report(verl=True)
    assert found["verl_loss"] is False
    assert found["problems"][-1].startswith(
        "the adapter to verl 0.6.0 cannot be imported: bandpo.error.MissingHookError: verl 0.6.0"
    )


@pytest.mark.parametrize(
    ("entry_points", "plugins", "problem"),
    [
        ([], None, "verl cannot find bandpo, because no distribution of it with an entry point"),
        (["bandpo"], "others", "VERL_USE_EXTERNAL_PLUGINS is 'others', which may leave bandpo out"),
        (["bandpo"], None, "verl 0.8.0 does not load bandpo, as versions before 0.9"),
    ],
)
def test_doctor_says_why_verl_does_not_load_the_adapter(
    monkeypatch: pytest.MonkeyPatch, entry_points: list[str], plugins: str | None, problem: str
) -> None:
    def error_of(code: str) -> str | None:
        return None if code == f"import {ADAPTER}" else "ValueError: Unsupported loss mode"

    monkeypatch.setattr(doctor, "_error_of", error_of)
    monkeypatch.setattr(doctor, "_version", lambda names: "0.8.0")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: entry_points)
    if plugins is None:
        monkeypatch.delenv("VERL_USE_EXTERNAL_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", plugins)
    found = doctor.report(verl=True)
    assert found["verl_loss"] is False
    assert found["problems"][-1].startswith(problem)
    assert f"set VERL_USE_EXTERNAL_MODULES={ADAPTER}" in found["problems"][-1]


def test_doctor_finds_a_loss_that_verl_loads(verl: FakeVerl) -> None:
    # As verl 0.9 loads its plugins, at the end of its own import.
    verl.install("0.9.1", code=f"import {ADAPTER}")
    found = doctor.report(verl=True)
    assert found["verl_loss"] is True
    assert doctor.as_text(found)["verl's loss bandpo"] == "registered"


def test_doctor_misses_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda names: None)
    found = doctor.report(verl=True)
    assert (found["verl_loss"], found["problems"][-1]) == (False, "verl is not installed")
    assert doctor.as_text(found)["verl's loss bandpo"] == "not registered"
