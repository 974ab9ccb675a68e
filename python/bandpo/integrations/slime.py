"""slime: its policy loss with the bounds of a region, as a loss of type ``custom_loss``.

``--loss-type custom_loss``, ``--custom-loss-function-path bandpo.integrations.slime.band_loss``,
and the rule as ``bandpo`` in the file of ``--custom-config-path``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.settings import LossSettings
from bandpo.integrations.version import check_version, require, require_reads

check_version("slime", "0.3.1")

_WITHOUT_A_TOKEN_RATIO = ("gspo", "cispo")


def band_loss(
    args: Namespace,
    batch: Mapping[str, Any],
    logits: torch.Tensor,
    sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns what slime's ``policy_loss_function`` returns with two epsilons for each token.

    Reduction, dual clip, corrections, entropy and KL terms are slime's. The region stands at the
    old log-probs of the ratio, or with the anchor "rollout" at ``batch["rollout_log_probs"]``.

    Args:
        args: slime's arguments, and ``bandpo``, the rule; see `LossSettings`.
        batch: slime's micro-batch.
        logits: Those of the policy, [1, T, V].
        sum_of_sample_mean: slime's reduction.

    Raises:
        InvalidTypeError: If ``args.bandpo`` is missing or has the wrong type.
        InvalidValueError: If the rule is more than a clamp, or ``advantage_estimator`` does not
            clip the ratio of a token, or the batch lacks the log-probs of the anchor.
    """
    import slime.backends.megatron_utils.loss as theirs

    require("slime", theirs, "policy_loss_function")
    require_reads("slime", theirs.policy_loss_function, "eps_clip", "eps_clip_high")
    if args.advantage_estimator in _WITHOUT_A_TOKEN_RATIO:
        raise InvalidValueError(
            f"advantage_estimator must clip the ratio of a token with a region, "
            f"got {args.advantage_estimator!r}"
        )
    settings = LossSettings.of(_rule(args))
    settings.refuse_correction("slime", "use_tis and custom_tis_function_path have slime's own")
    settings.refuse_changes("slime")
    region = settings.clamp_region("slime")
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    if old:  # otherwise slime takes the present policy, and every ratio is 1
        anchor = None
        if settings.anchor == "rollout":
            if not batch.get("rollout_log_probs"):
                raise InvalidValueError(
                    "anchor must be 'old' with slime where a batch has no rollout_log_probs"
                )
            anchor = torch.cat(batch["rollout_log_probs"])
        low, high = epsilons(region, torch.cat(old), anchor)
        args = Namespace(**{**vars(args), "eps_clip": low, "eps_clip_high": high})
    found: tuple[torch.Tensor, dict[str, torch.Tensor]] = theirs.policy_loss_function(
        args, batch, logits, sum_of_sample_mean
    )
    return found


def _rule(args: Namespace) -> Mapping[str, Any]:
    rule = getattr(args, "bandpo", None)
    if not isinstance(rule, Mapping):
        raise InvalidTypeError(
            f"bandpo must be the fields of a rule in the file of --custom-config-path, such as "
            f"bandpo: {{region: kl@0.01}}, got {type(rule).__name__}"
        )
    return rule
