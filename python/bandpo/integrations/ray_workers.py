"""Adapters in Ray workers, for trainers that build their loss there and have no setting for it.

Ray calls `runtime_env` in the driver, and `install` in each worker, which writes a line::

    export RAY_RUNTIME_ENV_HOOK=bandpo.integrations.ray_workers.runtime_env
    export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
    export BANDPO_TRAINER=openrlhf BANDPO_RULE='{"region": "(kl@0.01).cap(10)"}'

The second line matters under ``uv run``: without it Ray takes a hook of its own for uv in place of
this one, and the clip stays the trainer's. It has no effect otherwise. With it, workers have the
environment in which Ray was started, or that of a ``py_executable``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from bandpo.check import check_name
from bandpo.error import InvalidValueError
from bandpo.integrations.clamps import REGIONS
from bandpo.integrations.settings import LossSettings

_HOOK = f"{__name__}.install"


def runtime_env(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the runtime environment of a job, with `install` as the hook of its workers.

    Args:
        given: The environment that the trainer gives to ``ray.init``.

    Raises:
        InvalidTypeError: If the rule has a field of the wrong type.
        InvalidValueError: If the two variables are wrong, the trainer cannot take the rule, or
            there is another hook already.
    """
    trainer, fields = _variables()
    REGIONS[trainer](LossSettings.of(fields))
    found = dict(given or {})
    if found.get("worker_process_setup_hook") not in (None, _HOOK):
        raise InvalidValueError(
            f"worker_process_setup_hook must be left out, because it installs the loss, "
            f"got {found['worker_process_setup_hook']!r}"
        )
    variables = {name: os.environ[name] for name in ("BANDPO_TRAINER", "BANDPO_RULE")}
    found["env_vars"] = {**(found.get("env_vars") or {}), **variables}
    found["worker_process_setup_hook"] = _HOOK
    return found


def install() -> None:
    """Installs the loss of the variables in this process, and writes so to standard error."""
    trainer, fields = _variables()
    if trainer == "openrlhf":
        from bandpo.integrations.openrlhf import install as install_loss
    else:
        from bandpo.integrations.open_instruct import install as install_loss

    install_loss(**fields)
    # Ray shows it in the driver's output; a logger would need a level that Ray does not set.
    sys.stderr.write(f"bandpo: the loss of {trainer} has the rule {json.dumps(fields)}\n")
    sys.stderr.flush()


def _variables() -> tuple[str, dict[str, Any]]:
    """The trainer, and the fields of the rule.

    Raises:
        InvalidValueError: If a variable is not set, or cannot be read.
    """
    for name in ("BANDPO_TRAINER", "BANDPO_RULE"):
        if name not in os.environ:
            raise InvalidValueError(f"{name} must be set in the environment")
    trainer, rule = os.environ["BANDPO_TRAINER"], os.environ["BANDPO_RULE"]
    check_name("BANDPO_TRAINER", trainer, REGIONS)
    try:
        fields = json.loads(rule)
    except json.JSONDecodeError as error:
        raise InvalidValueError(f"BANDPO_RULE must be JSON, got {rule!r}: {error}") from None
    return trainer, fields
