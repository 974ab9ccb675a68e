"""`policy_loss`: check, choose a backend, call it, reduce, wrap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from operator import add
from typing import Any

import torch

from bandpo.backends.contract import Backend, Count
from bandpo.backends.select import select
from bandpo.batch.check import (
    check_cu_seqlens,
    check_gradient,
    check_mask,
    check_tokens,
    check_weights,
)
from bandpo.batch.metrics import Metrics, Statistics
from bandpo.batch.tokens import Tokens, shaped, shaped_by_row
from bandpo.check import check_bool, check_name, nonnegative_number
from bandpo.correction import Correction, RolloutCorrection
from bandpo.correction.rule import correction_of
from bandpo.correction.warning import warn_of_first_mismatch
from bandpo.error import InvalidValueError
from bandpo.loss.levels import inputs_of, token_losses
from bandpo.loss.metrics import statistics_of
from bandpo.loss.penalty import log_ratio_penalty as penalty_of
from bandpo.loss.reduction import GlobalBatch, Reduction
from bandpo.loss.region import resolved
from bandpo.loss.result import PolicyLossResult
from bandpo.loss.warning import warn_of_no_step, warn_of_positive
from bandpo.region import PrefixBudget
from bandpo.rule import (
    BACKENDS,
    AggregationMode,
    BackendName,
    RatioLevel,
    Rule,
    RuleRegion,
)
from bandpo.schedule import RegionSource
from bandpo.surrogate import Surrogate
from bandpo.tensors.check import compute_dtype, converted
from bandpo.tensors.internals import is_concrete, savable, version_of


def policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    region: RuleRegion | str,
    surrogate: Surrogate = "min-clip",
    dual_clip: float | None = None,
    ratio_level: RatioLevel = "token",
    loss_agg_mode: AggregationMode = "token-mean",
    log_ratio_penalty: float = 0.0,
    rollout_is_weights: torch.Tensor | RolloutCorrection | None = None,
    correction: Correction | Mapping[str, Any] | None = None,
    rollout_log_prob: torch.Tensor | None = None,
    anchor_log_prob: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: BackendName = "auto",
    exact: bool = False,
    dp_size: int = 1,
    batch_num_tokens: Count | None = None,
    global_batch_size: Count | None = None,
    loss_scale_factor: float | None = None,
    global_batch: GlobalBatch | None = None,
    metrics_by_probability: bool = False,
) -> PolicyLossResult:
    """Returns the clipped loss of a batch, with its gradient to ``log_prob`` and its metrics.

    Let r be ``exp(log_prob - old_log_prob)``, and lower and upper the region's bounds at the old
    probability. A token is *beyond* its bound where ``A > 0`` and ``r > upper``, or ``A < 0`` and
    ``r < lower``; at a bound it is not. In the loss, logarithms of r and of its bounds are clamped
    to plus and minus 20. sg() stops the gradient. The loss of a token, by surrogate:

    - min-clip: ``-A min(r, upper)`` for ``A > 0`` and ``min(-A max(r, lower), -A c)`` for
      ``A < 0`` (PPO; with a band: BandPO, arXiv 2603.04918; dual clip ``c``: Ye et al. 2020, arXiv
      1912.09729). Its gradient is ``-A r``, but 0 beyond, where ``A < 0`` and ``r >= c``, and where
      the clamp acts.
    - mask: ``-A sg(min(r, truncation)) log_prob``, and 0 beyond (DPPO, arXiv 2602.04879), or with
      ``symmetric`` 0 outside either bound (IPO of prime-rl); see `bandpo.Mask`.
    - weight: ``-A sg(clip(r, lower, upper)) log_prob`` (CISPO, arXiv 2506.13585). Every token keeps
      a gradient, and both bounds hold for either sign of A.
    - gradient-preserving: ``-A r``, and beyond ``-A beta bound r/sg(r)`` (CE-GPPO, arXiv
      2509.20712); see `bandpo.GradientPreserving`.
    - soft-gate: ``-A (2 + 2 w tanh(tau (r - 1)/(2 w)))/tau`` (SAPO, arXiv 2511.20347, with w = 1);
      see `bandpo.SoftGate`.
    - quadratic: ``-A r + abs(A) (r - 1)^2/(2 w)`` (SPO, arXiv 2401.16025; DRPO, arXiv 2606.09821).
      Its gradient is 0 at the bound on the side of the advantage and turns back beyond.
    - gamma-weight: ``-A sg(R^k exp(lambda (1 - R))) log_prob``, with R = clip(r, lower, upper)
      (VESPO, arXiv 2602.10693); see `bandpo.GammaWeight`.

    w is the width of the region on the side of r: ``upper - 1`` or ``1 - lower``, at least 1e-6.

    With an ``anchor_log_prob`` the region stands at a third policy, such as the one that sampled.
    The bounds at the anchor's probability limit ``v = exp(log_prob - anchor_log_prob)``, while r
    stays the ratio to the old policy. So the bounds of r are lower and upper times anchor/old.
    soft-gate and quadratic take v for r in the factor that they put to the gradient ``-A r``.

    With ``ratio_level`` "sequence", r is ``exp`` of the mean log-ratio of a sequence's tokens, and
    the gradient passes to each of them as if it were its own (GSPO's token variant, arXiv
    2507.18071; with loss_agg_mode seq-mean-token-mean it is GSPO); with "sequence-product", of
    their sum. Only a `Clip` bounds it, because a band needs the probability of a token. With
    "geometric-mean" each token's log-ratio is clipped by the region on the side of its advantage.
    The loss of all tokens of a sequence is then ``-A`` times ``exp`` of the mean, and clipped
    tokens have no gradient (GMPO, arXiv 2507.20673).

    The gradient flows to ``log_prob`` alone, never to ``old_log_prob``, ``advantages`` or
    ``rollout_is_weights``. So ``old_log_prob`` needs no detach(): where it is ``log_prob`` itself,
    r is 1 and the gradient is ``-A``, as on policy. Everything is computed in float32, or in
    float64 if a log-prob is.

    A ``log_ratio_penalty`` c adds ``c (ln r)^2`` to the loss of every token that counts, also of
    dropped ones, with the token's own r at every level (prime-rl; Kimi k1.5, arXiv 2501.12599).
    Weights leave it alone.

    Masked tokens have no effect, even if they hold NaN or inf. A NaN in a token that counts makes
    the loss NaN. If no token counts, the loss and its gradient are 0.

    Tensors may be made in `torch.inference_mode`. A function that `torch.compile` compiles needs
    clones of them, because torch saves its inputs for the backward pass and refuses these.

    Modes, over the tokens that count, as verl defines them; sequences without such a token do not
    count:

    - token-mean: sum / tokens in the batch
    - token-sum: sum
    - seq-mean-token-sum: sum / sequences in the batch
    - seq-mean-token-mean: sum of the mean of each sequence / sequences in the batch
    - seq-mean-token-sum-norm: sum / sequences in the batch / ``loss_scale_factor``
    - none: the loss of each token, in the shape of ``log_prob``, 0 where masked

    All but none are multiplied by ``dp_size``. Given the counts of the global batch and, for -norm,
    the ``loss_scale_factor``, micro-batches add up, and data-parallel ranks average, to the loss
    and the gradient of the whole.

    Metrics, over the tokens that count (0, and 1 for ratios, if there is none):

    - clip_fraction_low: fraction with ``A < 0`` and ``r < lower``; for weight, soft-gate,
      quadratic, gamma-weight and a symmetric mask of either sign
    - clip_fraction_high: fraction with ``A > 0`` and ``r > upper``; likewise
    - dual_clip_fraction (min-clip): fraction with ``A < 0`` and ``r >= c``
    - truncation_fraction (mask): fraction with ``r > truncation`` that is neither beyond nor in a
      masked sequence
    - masked_sequence_fraction (mask of whole sequences): fraction of the sequences that are masked
    - log_ratio_penalty (with one): its mean
    - gradient_removed: share of the gradient that the rule removes: sum of ``abs(A r - A' r')`` /
      sum of ``abs(A) r``, where ``-A' r'`` is the gradient
    - all_ratios_one (bool): no ratio differs from 1, so no rule can act, as in the first step on a
      batch
    - entropy: mean of ``-old_log_prob``, in nats, an estimate of the entropy of the old policy
    - approx_kl: mean of ``-ln r``, approx_kl_k3: mean of ``r - 1 - ln r``, both with the clamped r
    - ratio_min, ratio_max: extremes of the clamped r
    - valid_tokens (int64), and nonfinite_tokens (int64): those of them whose loss is inf or NaN
    - positive_log_probs (int64): tokens with ``old_log_prob`` or ``log_prob`` above 0.05, more than
      rounding puts a logarithm of a probability above 0
    - with ``metrics_by_probability``, over the bins of the old probability between
      `PROBABILITY_EDGES`: tokens_by_probability (int64), and clip_fraction_low_by_probability and
      clip_fraction_high_by_probability, as fractions of the bin's tokens

    Metrics are detached tensors, computed at the first access, without waiting for the device.

    Args:
        old_log_prob: Natural log-probabilities of the tokens under the policy in the denominator
            of the ratio, [B, T], [B, T, 1] or packed [N]; float32, float64, bfloat16 or float16.
        log_prob: The same under the policy being trained. In float16, a gradient above 65504 is
            inf. No metric counts it, because the scale of the loss is known at the backward pass
            alone; ``torch.amp.GradScaler`` skips such a step.
        advantages: One a token, or one a sequence as [B, 1] or [B]; same dtypes.
        response_mask: Which tokens count (0: not), bool, int or float; a float is 0 or 1, which is
            checked on a CPU only.
        region: Source of the bounds: `Band`, `Clip`, `BandTable` or another `Region`, a
            `bandpo.schedule.RegionSource`, whose region is the one of its last step, or a spec such
            as ``"(kl@0.05).cap(10)"`` (see `bandpo.spec`). A band with one delta is tabulated at
            its first use. One with an array of deltas, which must broadcast to the shape of
            ``old_log_prob``, takes the exact solver, or for mask one evaluation of the divergence.
        surrogate: The loss of a token: a name, `bandpo.Mask`, `bandpo.GradientPreserving`,
            `bandpo.SoftGate`, `bandpo.Quadratic` or `bandpo.GammaWeight`.
        dual_clip: Max ratio c for ``A < 0`` of min-clip, above 1; None for none.
        ratio_level: Whose ratio is bounded: "token", "sequence", "sequence-product" or
            "geometric-mean".
        loss_agg_mode: How the losses of the tokens become one number, or "none".
        log_ratio_penalty: Coefficient c of the squared log-ratio, finite and at least 0.
        rollout_is_weights: Weights at least 0, which is checked on a CPU only. They correct for a
            rollout engine whose probabilities differ from ``old_log_prob``, shaped and typed like
            advantages, or the result of `bandpo.correction.rollout_correction`. They multiply the
            loss; a token of weight 0 is not counted as clipped where the sign of the advantage
            selects its bound.
        correction: A `bandpo.correction.Correction` that makes these weights, or its arguments by
            name, as a preset has them.
        rollout_log_prob: Log-probabilities that the rollout engine returned, like ``old_log_prob``;
            needed by a correction alone.
        anchor_log_prob: Log-probabilities at which the region stands, like ``old_log_prob``; by
            default ``old_log_prob``. On a CPU the first one is compared with it: above a mean
            difference of 0.5 a `bandpo.error.MismatchWarning` gives the number.
        cu_seqlens: Offsets of the sequences in packed tensors, int32 or int64 [S + 1], from 0 to N.
            Their values are checked on a CPU only, outside `torch.compile`.
        backend: ``"native"`` is compiled and runs on the CPU; ``"cuda"`` is a kernel for NVIDIA
            GPUs and needs the extra ``cuda12`` or ``cuda13``; ``"torch"`` is plain torch and runs
            on any device (CUDA, ROCm, MPS); ``"auto"`` is native for CPU tensors, cuda for CUDA
            tensors if the kernel can run (otherwise a `bandpo.error.BackendWarning` gives the
            reason once), else torch.
        exact: Take the bounds from the exact solver instead of a table. It runs on the CPU, but
            for CUDA tensors on the device if the kernels can run and the divergence has a name. A
            table of a band without a cap has no upper bound below a probability of e^-128.
        dp_size: Number of data-parallel ranks whose gradients are averaged.
        batch_num_tokens: Tokens that count in the global batch, a number or a 0-dim tensor, for
            token-mean; by default those of this batch. It is finite and at least 0, which is
            checked of a tensor on a CPU only.
        global_batch_size: The same of sequences, for the seq-mean modes.
        loss_scale_factor: Divisor of seq-mean-token-sum-norm; T by default, needed if packed, and
            with a dp_size or a count of the global batch, because widths of micro-batches differ.
        global_batch: The last four as one `GlobalBatch`.
        metrics_by_probability: Add the metrics by bin of the old probability.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype; the message names the right
            ones.
        InvalidValueError: If shapes or devices do not match, a value is out of range or a name not
            known, arguments do not go together, ``cu_seqlens`` or a global count (for
            ``dp_size > 1``) is missing, other log-probs require a gradient and ``log_prob`` does
            not, the backend cannot run on the tensors' device, or the call is in `torch.jit.trace`.
        MissingExtraError: With backend "cuda", if neither cuda-bindings nor CuPy is installed.
        BrokenExtraError: With backend "cuda", if the kernels cannot run.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise InvalidValueError(
            "policy_loss must be called outside of torch.jit.trace, which would keep the shapes "
            "and the region of one batch for all others: use torch.compile"
        )
    rule = Rule.of(resolved(region), surrogate, dual_clip, ratio_level)
    # Not checked at every call, because the default needs no check.
    if type(log_ratio_penalty) is not float or log_ratio_penalty != 0.0:
        log_ratio_penalty = nonnegative_number("log_ratio_penalty", log_ratio_penalty)
    check_name("backend", backend, BACKENDS)
    check_bool("exact", exact)
    check_bool("metrics_by_probability", metrics_by_probability)
    reduction = Reduction.of(
        loss_agg_mode,
        global_batch,
        dp_size,
        batch_num_tokens,
        global_batch_size,
        loss_scale_factor,
    )
    corrected, weights = _weights(
        correction,
        old_log_prob,
        rollout_log_prob,
        response_mask,
        rollout_is_weights,
        advantages,
        cu_seqlens,
    )
    given = (old_log_prob, log_prob, advantages, response_mask, weights, anchor_log_prob)
    shape = check_tokens(*given)
    check_gradient(
        log_prob,
        old_log_prob=old_log_prob,
        anchor_log_prob=anchor_log_prob,
        rollout_log_prob=rollout_log_prob,
    )
    _check_sequences(rule, reduction, cu_seqlens, log_prob)
    chosen = select(backend, log_prob.device)

    if anchor_log_prob is None:
        dtype = compute_dtype(old_log_prob, log_prob)
    else:
        dtype = compute_dtype(old_log_prob, log_prob, anchor_log_prob)
    check_mask(response_mask)
    valid = shaped(response_mask, shape)
    valid = savable(valid) if valid.dtype == torch.bool else valid != 0
    weighted = shaped_by_row(converted(advantages.detach(), dtype), shape)
    if weights is not None:
        # Every surrogate is homogeneous in the advantage, so a weight may go there.
        weights = shaped_by_row(converted(weights.detach(), dtype), shape)
        check_weights(weights, valid)
        weighted = weighted * weights
    # Half precision needs no copy in float32, unless torch has to compute with it as well.
    narrow = (
        chosen.reads_half
        and log_prob.dtype == old_log_prob.dtype
        and (anchor_log_prob is None or anchor_log_prob.dtype == log_prob.dtype)
        and ratio_level == "token"
        and rule.surrogate.needs_bounds
        and not rule.changes_tokens()
        and log_ratio_penalty == 0.0
    )
    stored = log_prob.dtype if narrow else dtype
    tokens = Tokens(
        converted(old_log_prob.detach(), stored),
        shaped(converted(log_prob, stored), shape),
        weighted,
        valid,
        cu_seqlens,
        None
        if anchor_log_prob is None
        else shaped(converted(anchor_log_prob.detach(), stored), tuple(old_log_prob.shape)),
    )
    for argument, given_log_prob in (("old_log_prob", old_log_prob), ("log_prob", log_prob)):
        warn_of_positive(argument, given_log_prob, valid)
    if isinstance(region, RegionSource):
        warn_of_no_step(region)
    if tokens.anchor_log_prob is not None:
        warn_of_first_mismatch(
            "anchor_log_prob", tokens.old_log_prob, tokens.anchor_log_prob, valid
        )
    if (
        chosen.weighted_sum is not None
        and (count_valid := chosen.count_valid) is not None
        and reduction.is_one_weight()
        and not rule.changes_tokens()
        and log_ratio_penalty == 0.0
        and is_concrete(
            log_prob, tokens.old_log_prob, weighted, valid, tokens.anchor_log_prob, cu_seqlens
        )
    ):
        weight = reduction.weight(lambda: count_valid(valid), tokens)
        inputs = inputs_of(rule, tokens, exact=exact, by_probability=metrics_by_probability)
        loss, totals = chosen.weighted_sum(weight, inputs)
        return PolicyLossResult(
            loss,
            _per_token_later(rule, tokens, chosen, exact, log_prob.shape, given),
            Metrics(lambda: statistics_of(rule, totals(), dtype, {})),
            corrected,
        )
    losses, more = token_losses(
        rule, tokens, chosen, exact=exact, by_probability=metrics_by_probability
    )
    parts = [losses]
    if log_ratio_penalty != 0.0:
        penalty = penalty_of(log_ratio_penalty, tokens, losses.totals())
        parts.append(penalty)
        more = {**more, "log_ratio_penalty": penalty.total.detach()}
    per_token = shaped(reduce(add, (part.per_token for part in parts)), log_prob.shape)
    if loss_agg_mode == "none":
        loss = per_token
    else:
        loss = reduce(add, (reduction.aggregate(part, tokens) for part in parts))

    def statistics() -> Statistics:
        return statistics_of(rule, losses.totals(), dtype, more)

    # A compiler computes metrics in one kernel; otherwise most callers read few of them.
    metrics = Metrics(statistics() if torch.compiler.is_compiling() else statistics)
    return PolicyLossResult(loss, per_token, metrics, corrected)


def _weights(
    correction: Correction | Mapping[str, Any] | None,
    old_log_prob: torch.Tensor,
    rollout_log_prob: torch.Tensor | None,
    response_mask: torch.Tensor,
    rollout_is_weights: torch.Tensor | RolloutCorrection | None,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> tuple[RolloutCorrection | None, torch.Tensor | None]:
    """The correction that is given, or is made by a rule, and the weights.

    Raises:
        InvalidValueError: If it is given twice, or only one of rule and log-probs is given.
    """
    if correction is None:
        if rollout_log_prob is not None:
            raise InvalidValueError(
                "rollout_log_prob must be left out without a correction; a region that stands at "
                "the rollout policy takes it as anchor_log_prob"
            )
        if isinstance(rollout_is_weights, RolloutCorrection):
            return rollout_is_weights, rollout_is_weights.weights
        return None, rollout_is_weights
    if rollout_is_weights is not None:
        raise InvalidValueError(
            "rollout_is_weights must be left out with a correction, which makes them: "
            "a correction given twice would count twice"
        )
    if rollout_log_prob is None:
        raise InvalidValueError(
            f"rollout_log_prob must be given with correction {correction!r}: the log-probabilities "
            f"that the rollout engine returned with the tokens"
        )
    rule = correction_of(correction)
    made = rule(
        old_log_prob, rollout_log_prob, response_mask, advantages=advantages, cu_seqlens=cu_seqlens
    )
    return made, made.weights


def _check_sequences(
    rule: Rule, reduction: Reduction, cu_seqlens: torch.Tensor | None, log_prob: torch.Tensor
) -> None:
    """Raises unless the arguments that the rule and the mode need are given."""
    packed = log_prob.ndim == 1
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "log_prob", log_prob)
    elif packed:
        for needs, what in (
            (rule.ratio_level != "token", f"ratio_level {rule.ratio_level!r}"),
            (rule.surrogate.whole_sequence, "a mask of whole sequences"),
            (isinstance(rule.region, PrefixBudget), "a PrefixBudget"),
        ):
            if needs:
                raise InvalidValueError(
                    f"cu_seqlens must be given for {what} with packed tensors: "
                    f"offsets of the sequences, int32 or int64 [S + 1]"
                )
    reduction.check_given(packed, cu_seqlens)


def _per_token_later(
    rule: Rule,
    tokens: Tokens,
    backend: Backend,
    exact: bool,
    shape: torch.Size,
    given: tuple[torch.Tensor | None, ...],
) -> torch.Tensor | Callable[[], torch.Tensor]:
    """Returns a function that computes the losses of the tokens with the state of now.

    They are rarely read and cost as much to write as the gradient, so they are computed on first
    access. Inference-mode tensors have no version counter; for them the losses are returned.
    """
    if isinstance(rule.region, RegionSource):  # which may have another one by then
        rule = rule._replace(region=rule.region.region)
    tensors = [tensor for tensor in given if tensor is not None]
    versions = list(map(version_of, tensors))
    untracked = None in versions
    with_gradient = torch.is_grad_enabled()
    inference = torch.is_inference_mode_enabled()

    def compute() -> torch.Tensor:
        if not untracked and list(map(version_of, tensors)) != versions:
            raise InvalidValueError(
                "per_token must be read before a tensor that was given to policy_loss is changed "
                "in place; loss_agg_mode 'none' computes it at once"
            )
        with torch.inference_mode(inference), torch.set_grad_enabled(with_gradient):
            losses, _ = token_losses(rule, tokens, backend, exact=exact, by_probability=False)
            return shaped(losses.per_token, shape)

    return compute() if untracked else compute
