"""Environment variables that put an adapter into every Ray worker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations import ray_workers
from support.packages import is_installed
from support.trainer_batch import REGION

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python"

CONTRACT = """
import torch

class PolicyLoss(torch.nn.Module):
    def __init__(self, policy_loss_type="ppo"):
        super().__init__()
        self.policy_loss_type = policy_loss_type

    def forward(self, log_probs):
        return self.clip_eps_low, self.clip_eps_high
"""

DRIVER = """
import ray

@ray.remote
def found():
    from openrlhf.models import PolicyLoss
    return repr(PolicyLoss().region)

ray.init(num_cpus=1, include_dashboard=False, runtime_env={"env_vars": {"OTHER": "1"}})
print(ray.get(found.remote()))
"""


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = {"BANDPO_TRAINER": "openrlhf", "BANDPO_RULE": json.dumps({"region": REGION})}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return found


def test_workers_get_the_variables_and_the_hook(variables: dict[str, str]) -> None:
    given = {"env_vars": {"OTHER": "1"}, "excludes": [".git/"]}
    assert ray_workers.runtime_env(given) == {
        "excludes": [".git/"],
        "env_vars": {"OTHER": "1", **variables},
        "worker_process_setup_hook": "bandpo.integrations.ray_workers.install",
    }
    assert given == {"env_vars": {"OTHER": "1"}, "excludes": [".git/"]}
    assert ray_workers.runtime_env(None)["env_vars"] == variables


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("BANDPO_TRAINER", None, "BANDPO_TRAINER must be set"),
        ("BANDPO_TRAINER", "openrlfh", "openrlfh.*openrlhf"),
        ("BANDPO_RULE", None, "BANDPO_RULE must be set"),
        ("BANDPO_RULE", "kl@0.05", "BANDPO_RULE must be JSON"),
        ("BANDPO_RULE", '"kl@0.05"', "fields by name"),
        ("BANDPO_RULE", '{"region": "kll@0.05"}', "kll"),
        ("BANDPO_RULE", '{"regoin": "kl@0.05"}', "regoin.*region"),
        ("BANDPO_RULE", "{}", "dual_clip must be None .* preset 'bandpo-kl'.*region='.kl@0.01"),
        ("BANDPO_RULE", '{"preset": "icepop"}', "preset must be left out with OpenRLHF"),
        ("BANDPO_RULE", '{"preset": "dppo-kl"}', "surrogate must be 'min-clip' with OpenRLHF"),
        (
            "BANDPO_RULE",
            '{"region": "kl@0.05", "schedule": "constant(0.1)"}',
            "schedule must be left out with OpenRLHF",
        ),
    ],
)
@pytest.mark.usefixtures("variables")
def test_wrong_variables_are_refused_in_the_driver(
    name: str, value: str | None, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises((InvalidTypeError, InvalidValueError), match=match):
        ray_workers.runtime_env({})


@pytest.mark.usefixtures("variables")
def test_open_instruct_has_its_own_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDPO_TRAINER", "open_instruct")
    rule = json.dumps({"region": REGION, "anchor": "rollout"})
    monkeypatch.setenv("BANDPO_RULE", rule)
    with pytest.raises(InvalidValueError, match="anchor must be left out with Open-Instruct"):
        ray_workers.runtime_env({})
    monkeypatch.setenv("BANDPO_TRAINER", "openrlhf")
    assert ray_workers.runtime_env({})["env_vars"]["BANDPO_RULE"] == rule


def test_an_environment_that_has_the_hook_stays_as_it_is(variables: dict[str, str]) -> None:
    once = ray_workers.runtime_env({"env_vars": None})
    assert once["env_vars"] == variables
    assert ray_workers.runtime_env(once) == once


@pytest.mark.usefixtures("variables")
def test_another_hook_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"worker_process_setup_hook .* got 'mine\.hook'"):
        ray_workers.runtime_env({"worker_process_setup_hook": "mine.hook"})


@pytest.mark.skipif(not is_installed("ray"), reason="needs Ray: make test-trainers")
def test_a_ray_worker_has_the_loss(variables: dict[str, str], tmp_path: Path) -> None:
    models = tmp_path / "openrlhf/models"
    models.mkdir(parents=True)
    (tmp_path / "openrlhf/__init__.py").touch()
    (models / "loss.py").write_text(CONTRACT)
    (models / "__init__.py").write_text("from openrlhf.models.loss import PolicyLoss\n")
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "run").write_text(f"{sys.executable} driver.py\nexit $?\n")
    environment: dict[str, Any] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE)]),
        "RAY_RUNTIME_ENV_HOOK": "bandpo.integrations.ray_workers.runtime_env",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    outcome = subprocess.run(
        ["uv", "run"],  # a shell of that name, by which Ray recognises uv
        executable="/bin/sh",
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    told = f"bandpo: the loss of openrlhf has the rule {variables['BANDPO_RULE']}"
    assert told in outcome.stdout + outcome.stderr
    assert outcome.stdout.splitlines()[-1] == "(Band('kl', 0.05) & Clip(1.0, 9.0))"


def test_the_variables_of_the_examples_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = 0
    for script in (ROOT / "examples").glob("*/*.sh"):
        given = dict(re.findall(r"^export (\w+)='?(.*?)'?$", script.read_text(), re.MULTILINE))
        if "BANDPO_RULE" not in given:
            continue
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert ray_workers.runtime_env({})["env_vars"]["BANDPO_TRAINER"] == script.parent.name
        assert given["RAY_RUNTIME_ENV_HOOK"] == f"{ray_workers.__name__}.runtime_env"
        assert given["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"  # otherwise uv's hook is taken
        found += 1
    assert found
