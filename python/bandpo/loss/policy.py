"""The clipped policy loss of PPO and GRPO with the bounds of any region.

Every backend turns tokens into a loss of each token, first; one reducer turns those into a scalar.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bandpo.backends.contract import (
    Backend,
)
from bandpo.backends.internals import needs_no_dispatcher
from bandpo.backends.native import count_valid
from bandpo.backends.select import select
from bandpo.check import check_name
from bandpo.error import InvalidValueError
from bandpo.loss.levels import inputs_of, token_losses
from bandpo.loss.metrics import metrics_of
from bandpo.loss.reduction import (
    Count,
    Reduction,
    aggregate,
    check_reduction,
    check_sequences,
    divisor_of,
)
from bandpo.loss.result import Metrics, PolicyLossResult
from bandpo.loss.tokens import Tokens, advantages_shape, check_tokens, shaped
from bandpo.rule import (
    BACKENDS,
    AggregationMode,
    AnyRegion,
    BackendName,
    RatioLevel,
    Rule,
    current,
)
from bandpo.surrogate import Surrogate
from bandpo.tensors.check import compute_dtype


def policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    region: AnyRegion,
    surrogate: Surrogate = "min-clip",
    dual_clip: float | None = None,
    ratio_level: RatioLevel = "token",
    loss_agg_mode: AggregationMode = "token-mean",
    rollout_is_weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: BackendName = "auto",
    exact: bool = False,
    dp_size: int = 1,
    batch_num_tokens: Count | None = None,
    global_batch_size: Count | None = None,
    loss_scale_factor: float | None = None,
    metrics_by_probability: bool = False,
) -> PolicyLossResult:
    """Returns the clipped loss of a batch, with its gradient to ``log_prob`` and its metrics.

    Let r be ``exp(log_prob - old_log_prob)``, its logarithm clamped to plus and minus 20, and lower
    and upper the region's bounds at the old probability. A token is *beyond* its bound where
    ``A > 0`` and ``r > upper``, or ``A < 0`` and ``r < lower``; at a bound it is not. sg() stops
    the gradient. The loss of a token, by surrogate:

    - min-clip: ``-A min(r, upper)`` for ``A > 0`` and ``min(-A max(r, lower), -A c)`` for
      ``A < 0`` (PPO; with a band: BandPO, arXiv 2603.04918; dual clip ``c``: Ye et al. 2020, arXiv
      1912.09729). Its gradient is ``-A r``, but 0 beyond, where ``A < 0`` and ``r >= c``, and where
      the clamp acts.
    - mask: ``-A sg(min(r, truncation)) log_prob``, and 0 beyond (DPPO, arXiv 2602.04879); see
      `bandpo.Mask`.
    - weight: ``-A sg(clip(r, lower, upper)) log_prob`` (CISPO, arXiv 2506.13585). Every token keeps
      a gradient, and both bounds hold for either sign of A.
    - gradient-preserving: ``-A r``, and beyond ``-A beta bound r/sg(r)`` (CE-GPPO, arXiv
      2509.20712); see `bandpo.GradientPreserving`.

    With ``ratio_level`` "sequence", r is ``exp`` of the mean log-ratio of a sequence's tokens, and
    the gradient passes to each of them as if it were its own (GSPO's token variant, arXiv
    2507.18071; with loss_agg_mode seq-mean-token-mean it is GSPO). Only a `Clip` bounds it: a band
    needs the probability of a token. With "geometric-mean" each token's log-ratio is clipped by the
    region on the side of its advantage, the loss of all tokens of a sequence is ``-A`` times
    ``exp`` of the mean, and tokens that were clipped have no gradient (GMPO, arXiv 2507.20673).

    The gradient flows to ``log_prob`` alone: ``old_log_prob``, ``advantages`` and
    ``rollout_is_weights`` get none, whether or not they require it. All is computed in float32, in
    float64 where one of the log-probs is.

    Masked tokens count nowhere, whatever they hold: NaN or inf in padding touches neither loss nor
    gradient nor metrics. A NaN in a token that counts makes the loss NaN. If no token counts, or
    there is none at all, the loss and its gradient are 0.

    Modes, of the tokens that count, as verl defines them (sequences without any do not count):

    - token-mean: sum / tokens in the batch
    - token-sum: sum
    - seq-mean-token-sum: sum / sequences in the batch
    - seq-mean-token-mean: sum of the mean of each sequence / sequences in the batch
    - seq-mean-token-sum-norm: sum / sequences in the batch / ``loss_scale_factor``

    All are multiplied by ``dp_size``. Given the counts of the global batch and, for -norm, the
    ``loss_scale_factor``, micro-batches add up, and data-parallel ranks average, to the loss and
    the gradient of the whole.

    Metrics, over the tokens that count (0, and 1 for ratios, where none does):

    - clip_fraction_low: fraction with ``A < 0`` and ``r < lower``; for weight of either sign
    - clip_fraction_high: fraction with ``A > 0`` and ``r > upper``; for weight of either sign
    - dual_clip_fraction (min-clip): fraction with ``A < 0`` and ``r >= c``
    - truncation_fraction (mask): fraction with ``r > truncation`` that is neither beyond nor in a
      sequence that was masked
    - masked_sequence_fraction (mask of whole sequences): fraction of the sequences that were masked
    - gradient_removed: what the rule takes from the gradient, as a share of what it would be
      without: sum of ``abs(A r - A' r')`` / sum of ``abs(A) r``, ``-A' r'`` being the gradient
    - all_ratios_one (bool): no ratio differs from 1, so that no rule can act: the first step on a
      batch, or a trainer that takes but one
    - entropy: mean of ``-old_log_prob``, an estimate of the entropy of the policy that drew them
    - approx_kl: mean of ``-ln r``, approx_kl_k3: mean of ``r - 1 - ln r``, both with the clamped r
    - ratio_min, ratio_max: extremes of the clamped r
    - valid_tokens, and nonfinite_tokens: those of them whose loss is inf or NaN (int64)
    - with ``metrics_by_probability``, over the bins of the old probability between
      `PROBABILITY_EDGES`: tokens_by_probability (int64), and clip_fraction_low_by_probability and
      clip_fraction_high_by_probability, as fractions of the bin's tokens

    They are detached tensors, computed when the first is looked at, and nothing waits for the
    device.

    Args:
        old_log_prob: Natural log-probabilities of the tokens under the policy in the denominator
            of the ratio, [B, T], [B, T, 1] or packed [N]; float32, float64, bfloat16 or float16.
        log_prob: The same under the policy being trained.
        advantages: One a token, or one a sequence as [B, 1] or [B]; same dtypes.
        response_mask: Which tokens count (0: not), bool, int or float.
        region: Where the bounds come from: `Band`, `Clip`, `BandTable` or another `Region`, or a
            `bandpo.schedule.RegionSource`, whose region is the one of its last step. A band
            with one radius is tabulated at its first use; one with an array of radii takes the
            exact solver, or for mask one evaluation of the divergence, and the array must broadcast
            to the shape of ``old_log_prob``.
        surrogate: What the loss of a token is: a name, `bandpo.Mask` or
            `bandpo.GradientPreserving`.
        dual_clip: Greatest ratio c for ``A < 0`` of min-clip, above 1; None for none.
        ratio_level: Whose ratio is bounded: "token", "sequence" or "geometric-mean".
        loss_agg_mode: How the tokens' losses become one number.
        rollout_is_weights: Weights at least 0 that correct for a rollout engine whose probabilities
            differ from ``old_log_prob``, shaped and typed like advantages: truncated importance
            sampling gives ``min(exp(old_log_prob - rollout_log_prob), C)``, masked importance
            sampling 0 where that ratio is out of range. They multiply the loss; a token of weight 0
            is not counted as clipped.
        cu_seqlens: Offsets of the sequences in packed tensors, int32 or int64 [S + 1], from 0 to N.
            Their values are checked on a CPU only, outside `torch.compile`.
        backend: ``"native"`` is compiled and runs on the CPU; ``"cuda"`` is a kernel for NVIDIA
            GPUs and needs the extra ``cuda12`` or ``cuda13``; ``"torch"`` is plain torch and runs
            on any device (CUDA, ROCm, MPS); ``"auto"`` is native for CPU tensors, cuda for CUDA
            tensors where the kernel can run (a `bandpo.error.BackendWarning` says once why not),
            else torch.
        exact: Take the bounds from the exact solver instead of a table. It runs on the CPU, but
            for CUDA tensors on the device where the kernels can run and the divergence has a name.
        dp_size: Number of data-parallel ranks whose gradients are averaged.
        batch_num_tokens: Tokens that count in the global batch, a number or a 0-dim tensor, for
            token-mean; this batch's if left out.
        global_batch_size: The same of sequences, for the seq-mean modes.
        loss_scale_factor: Divisor of seq-mean-token-sum-norm; T if left out, needed if packed.
        metrics_by_probability: Add the metrics by bin of the old probability.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype; the message says what it may.
        InvalidValueError: If shapes or devices do not match, a value is out of range or a name not
            known, region, surrogate and ratio level do not go together, ``cu_seqlens`` or a global
            count (for ``dp_size > 1``) is missing where it is needed, or the backend cannot run on
            the tensors' device.
        MissingExtraError: With backend "cuda", if CuPy is not installed.
        BrokenExtraError: With backend "cuda", if it is but cannot be used.
    """
    rule = Rule.of(region, surrogate, dual_clip, ratio_level)
    check_name("backend", backend, BACKENDS)
    reduction = Reduction(
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    check_reduction(reduction)
    shape, shape_of_advantages = check_tokens(
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights
    )
    check_sequences(rule, reduction, cu_seqlens, log_prob)
    chosen = select(backend, log_prob.device)

    dtype = compute_dtype(old_log_prob, log_prob)
    valid = shaped(response_mask, shape)
    valid = valid if valid.dtype == torch.bool else valid != 0
    cost = shaped(advantages.detach().to(dtype), shape_of_advantages)
    if rollout_is_weights is not None:
        # Every surrogate is homogeneous in the advantage, so a weight may go there.
        weights = rollout_is_weights.detach().to(dtype)
        cost = cost * weights.reshape(advantages_shape(rollout_is_weights, shape))
    # Half precision is read where it is, unless torch has to compute with it as well.
    narrow = (
        chosen.reads_half
        and log_prob.dtype == old_log_prob.dtype
        and ratio_level == "token"
        and rule.surrogate.needs_bounds
    )
    stored = log_prob.dtype if narrow else dtype
    tokens = Tokens(
        old_log_prob.detach().to(stored),
        shaped(log_prob.to(stored), shape),
        cost,
        valid,
        cu_seqlens,
    )
    if (
        chosen.weighted_sum is not None
        and not rule.changes_tokens
        and loss_agg_mode != "seq-mean-token-mean"
        and needs_no_dispatcher(log_prob)
    ):
        divisor = divisor_of(lambda: count_valid(valid), tokens, reduction)
        if isinstance(divisor, torch.Tensor):
            divisor = float(divisor.detach().cpu().double().numpy())  # which knows no bfloat16
        weight = dp_size / divisor
        inputs = inputs_of(rule, tokens, exact, metrics_by_probability)
        loss, totals = chosen.weighted_sum(weight, inputs)
        given = (old_log_prob, log_prob, advantages, response_mask, rollout_is_weights)
        return PolicyLossResult(
            loss,
            _per_token_later(rule, tokens, chosen, exact, log_prob.shape, given),
            Metrics(lambda: metrics_of(rule, totals(), dtype)),
        )
    losses, more = token_losses(rule, tokens, chosen, exact, metrics_by_probability)
    loss = aggregate(losses, tokens, reduction)

    def metrics() -> dict[str, torch.Tensor]:
        return {**metrics_of(rule, losses.totals(), dtype), **more}

    # A compiler computes them in one kernel; else few of those who train look at all of them.
    found = metrics() if torch.compiler.is_compiling() else Metrics(metrics)
    return PolicyLossResult(loss, shaped(losses.per_token, log_prob.shape), found)


class PolicyLoss(torch.nn.Module):
    """`policy_loss` as a module: the rule in the constructor, the batch in the call.

    Args:
        region: See `policy_loss`, as for every other argument.
        surrogate: What the loss of a token is.
        dual_clip: Greatest ratio for negative advantages.
        ratio_level: Whose ratio is bounded.
        loss_agg_mode: How the tokens' losses become one number.
        backend: What computes them.
        exact: Take the bounds from the exact solver.
        dp_size: Number of data-parallel ranks.
        loss_scale_factor: Divisor of seq-mean-token-sum-norm.
        metrics_by_probability: Add the metrics by bin of the old probability.

    Raises:
        InvalidTypeError: If an argument has the wrong type.
        InvalidValueError: If a value is out of range or a name not known.
    """

    def __init__(
        self,
        region: AnyRegion,
        *,
        surrogate: Surrogate = "min-clip",
        dual_clip: float | None = None,
        ratio_level: RatioLevel = "token",
        loss_agg_mode: AggregationMode = "token-mean",
        backend: BackendName = "auto",
        exact: bool = False,
        dp_size: int = 1,
        loss_scale_factor: float | None = None,
        metrics_by_probability: bool = False,
    ) -> None:
        super().__init__()
        Rule.of(region, surrogate, dual_clip, ratio_level)
        check_name("backend", backend, BACKENDS)
        check_reduction(Reduction(loss_agg_mode, dp_size, None, None, loss_scale_factor))
        self.region = region
        self.surrogate: Surrogate = surrogate
        self.dual_clip = dual_clip
        self.ratio_level: RatioLevel = ratio_level
        self.loss_agg_mode: AggregationMode = loss_agg_mode
        self.backend: BackendName = backend
        self.exact = exact
        self.dp_size = dp_size
        self.loss_scale_factor = loss_scale_factor
        self.metrics_by_probability = metrics_by_probability

    def forward(
        self,
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        *,
        rollout_is_weights: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        batch_num_tokens: Count | None = None,
        global_batch_size: Count | None = None,
    ) -> PolicyLossResult:
        """Returns `policy_loss` of a batch."""
        return policy_loss(
            old_log_prob,
            log_prob,
            advantages,
            response_mask,
            region=self.region,
            surrogate=self.surrogate,
            dual_clip=self.dual_clip,
            ratio_level=self.ratio_level,
            loss_agg_mode=self.loss_agg_mode,
            rollout_is_weights=rollout_is_weights,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
            exact=self.exact,
            dp_size=self.dp_size,
            batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size,
            loss_scale_factor=self.loss_scale_factor,
            metrics_by_probability=self.metrics_by_probability,
        )

    def extra_repr(self) -> str:
        """Returns the rule, for the module's repr."""
        return (
            f"{self.region!r}, surrogate={self.surrogate!r}, dual_clip={self.dual_clip}, "
            f"ratio_level={self.ratio_level!r}, loss_agg_mode={self.loss_agg_mode!r}, "
            f"backend={self.backend!r}"
        )


def _per_token_later(
    rule: Rule,
    tokens: Tokens,
    backend: Backend,
    exact: bool,
    shape: torch.Size,
    given: tuple[torch.Tensor | None, ...],
) -> torch.Tensor | Callable[[], torch.Tensor]:
    """Returns what computes the losses of the tokens, as of now, when it is called.

    Few look at them, and to write them costs as much as the gradient. If nobody could say whether
    what was given is still the same, it returns the losses.
    """
    # The region of a schedule may be another one by then.
    rule = rule._replace(region=current(rule.region))
    tensors = [tensor for tensor in given if tensor is not None]
    untracked = any(tensor.is_inference() for tensor in tensors)
    versions = [] if untracked else [tensor._version for tensor in tensors]
    with_gradient = torch.is_grad_enabled()
    inference = torch.is_inference_mode_enabled()

    def compute() -> torch.Tensor:
        if not untracked and [tensor._version for tensor in tensors] != versions:
            raise InvalidValueError(
                "per_token must be looked at before a tensor that was given to policy_loss is "
                "changed in place"
            )
        with torch.inference_mode(inference), torch.set_grad_enabled(with_gradient):
            losses, _ = token_losses(rule, tokens, backend, exact, False)
            return shaped(losses.per_token, shape)

    return compute() if untracked else compute
