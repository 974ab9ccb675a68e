"""Adapters in Ray workers, for trainers that build their loss there and have no setting for it.

Ray calls `runtime_env` in the driver, and `install` in each worker::

    export RAY_RUNTIME_ENV_HOOK=bandpo.integrations.ray_workers.runtime_env
    export BANDPO_TRAINER=openrlhf BANDPO_RULE='{"region": "(kl@0.05).cap(10)"}'
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from bandpo.check import check_name
from bandpo.error import InvalidValueError
from bandpo.integrations.settings import LossSettings

TRAINERS = ("openrlhf", "open_instruct")


def runtime_env(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the runtime environment of a job, with `install` as the hook of its workers.

    Args:
        given: The environment that the trainer gives to ``ray.init``.

    Raises:
        InvalidValueError: If the two variables are wrong, or there is a hook already.
    """
    _, fields = _variables()
    LossSettings.of(fields)
    found = dict(given or {})
    if found.get("worker_process_setup_hook") is not None:
        raise InvalidValueError(
            f"worker_process_setup_hook must be left out, because it installs the loss, "
            f"got {found['worker_process_setup_hook']!r}"
        )
    variables = {name: os.environ[name] for name in ("BANDPO_TRAINER", "BANDPO_RULE")}
    found["env_vars"] = {**found.get("env_vars", {}), **variables}
    found["worker_process_setup_hook"] = f"{__name__}.install"
    return found


def install() -> None:
    """Installs the loss of the variables in this process."""
    trainer, fields = _variables()
    if trainer == "openrlhf":
        from bandpo.integrations.openrlhf import install as install_loss
    else:
        from bandpo.integrations.open_instruct import install as install_loss

    install_loss(**fields)


def _variables() -> tuple[str, dict[str, Any]]:
    """The trainer, and the fields of the rule.

    Raises:
        InvalidValueError: If a variable is not set, or cannot be read.
    """
    for name in ("BANDPO_TRAINER", "BANDPO_RULE"):
        if name not in os.environ:
            raise InvalidValueError(f"{name} must be set in the environment")
    trainer, rule = os.environ["BANDPO_TRAINER"], os.environ["BANDPO_RULE"]
    check_name("BANDPO_TRAINER", trainer, TRAINERS)
    try:
        fields = json.loads(rule)
    except json.JSONDecodeError as error:
        raise InvalidValueError(f"BANDPO_RULE must be JSON, got {rule!r}: {error}") from None
    return trainer, fields
