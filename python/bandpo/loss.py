"""The clipped policy loss of PPO and GRPO with the bounds of any region.

Every backend turns tokens into a loss of each token, first; one reducer turns those into a scalar.
"""

from __future__ import annotations

# First, because it reports a torch that is missing or broken.
from bandpo.tensors.check import (
    check_float,
    check_tensor,
    compute_dtype,
)

# isort: split
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
import torch

from bandpo.backends.contract import (
    PROBABILITY_BINS,
    PROBABILITY_EDGES,
    Backend,
    LossInputs,
    TokenLosses,
    Totals,
)
from bandpo.backends.internals import needs_no_dispatcher
from bandpo.backends.native import count_valid
from bandpo.backends.plain import probability_bin
from bandpo.backends.select import select
from bandpo.backends.sides import sides_of
from bandpo.check import check_name, real_number
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.region import Clip
from bandpo.rule import (
    AGGREGATION_MODES,
    BACKENDS,
    AggregationMode,
    AnyRegion,
    BackendName,
    RatioLevel,
    Rule,
    current,
)
from bandpo.surrogate import LOG_RATIO_LIMIT, Surrogate
from bandpo.tensors.bounds import bounds_of, membership_of

__all__ = [
    "LOG_RATIO_LIMIT",
    "PROBABILITY_EDGES",
    "Metrics",
    "PolicyLoss",
    "PolicyLossResult",
    "policy_loss",
]

Count: TypeAlias = "float | torch.Tensor"

_NO_CLIP = Clip(1.0, math.inf)


class Metrics(Mapping[str, torch.Tensor]):
    """Metrics by name, computed when the first of them is looked at."""

    def __init__(self, compute: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._compute: Callable[[], dict[str, torch.Tensor]] | None = compute
        self._computed: dict[str, torch.Tensor] = {}

    def _all(self) -> dict[str, torch.Tensor]:
        if self._compute is not None:
            self._computed, self._compute = self._compute(), None
        return self._computed

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(self._all())

    def __reduce__(self) -> tuple[object, tuple[dict[str, torch.Tensor]]]:
        return dict, (self._all(),)


class PolicyLossResult(Sequence[Any]):
    """What `policy_loss` returns: also a sequence of its attributes, in this order.

    Attributes:
        loss: The aggregated loss, 0-dim, float32, or float64 where a log-prob is.
        per_token: The loss of each token before aggregation, in the shape of ``log_prob`` and the
            dtype of ``loss``, 0 for masked tokens. It carries the gradient as well. On a CPU it is
            computed when it is looked at, for which the inputs must not have been changed in place;
            at once for tensors of `torch.inference_mode`, which do not tell.
        metrics: Detached tensors by name, on the device of the loss; see `policy_loss`.
    """

    def __init__(
        self,
        loss: torch.Tensor,
        per_token: torch.Tensor | Callable[[], torch.Tensor],
        metrics: Mapping[str, torch.Tensor],
    ) -> None:
        self.loss = loss
        self.metrics = metrics
        self._per_token = per_token

    @property
    def per_token(self) -> torch.Tensor:
        """See the class.

        Raises:
            InvalidValueError: If it was not computed yet and an input has been changed in place.
        """
        if not isinstance(self._per_token, torch.Tensor):
            self._per_token = self._per_token()
        return self._per_token

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        names = ("loss", "per_token", "metrics")[index]
        if isinstance(names, str):  # and per_token is left alone unless it is meant
            return getattr(self, names)
        return tuple(getattr(self, name) for name in names)

    def __len__(self) -> int:
        return 3

    def __reduce__(self) -> tuple[object, tuple[Any, ...]]:
        return PolicyLossResult, tuple(self)

    def __repr__(self) -> str:
        return f"PolicyLossResult(loss={self.loss!r}, metrics={self.metrics!r})"


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
    reduction = _Reduction(
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    _check_reduction(reduction)
    shape, advantages_shape = _check_tokens(
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights
    )
    _check_sequences(rule, reduction, cu_seqlens, log_prob)
    chosen = select(backend, log_prob.device)

    dtype = compute_dtype(old_log_prob, log_prob)
    valid = _shaped(response_mask, shape)
    valid = valid if valid.dtype == torch.bool else valid != 0
    cost = _shaped(advantages.detach().to(dtype), advantages_shape)
    if rollout_is_weights is not None:
        # Every surrogate is homogeneous in the advantage, so a weight may go there.
        weights = rollout_is_weights.detach().to(dtype)
        cost = cost * weights.reshape(_advantages_shape(rollout_is_weights, shape))
    # Half precision is read where it is, unless torch has to compute with it as well.
    narrow = (
        chosen.reads_half
        and log_prob.dtype == old_log_prob.dtype
        and ratio_level == "token"
        and rule.surrogate.needs_bounds
    )
    stored = log_prob.dtype if narrow else dtype
    tokens = _Tokens(
        old_log_prob.detach().to(stored),
        _shaped(log_prob.to(stored), shape),
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
        divisor = _divisor(lambda: count_valid(valid), tokens, reduction)
        if isinstance(divisor, torch.Tensor):
            divisor = float(divisor.detach().cpu().double().numpy())  # which knows no bfloat16
        weight = dp_size / divisor
        inputs = _inputs(rule, tokens, exact, metrics_by_probability)
        loss, totals = chosen.weighted_sum(weight, inputs)
        given = (old_log_prob, log_prob, advantages, response_mask, rollout_is_weights)
        return PolicyLossResult(
            loss,
            _per_token_later(rule, tokens, chosen, exact, log_prob.shape, given),
            Metrics(lambda: _metrics(rule, totals(), dtype)),
        )
    losses, more = _token_losses(rule, tokens, chosen, exact, metrics_by_probability)
    loss = _aggregate(losses, tokens, reduction)

    def metrics() -> dict[str, torch.Tensor]:
        return {**_metrics(rule, losses.totals(), dtype), **more}

    # A compiler computes them in one kernel; else few of those who train look at all of them.
    found = metrics() if torch.compiler.is_compiling() else Metrics(metrics)
    return PolicyLossResult(loss, _shaped(losses.per_token, log_prob.shape), found)


def _shaped(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor in a shape; itself, and not a view, where it has it."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


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
        _check_reduction(_Reduction(loss_agg_mode, dp_size, None, None, loss_scale_factor))
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


class _Sequences(NamedTuple):
    """The sequences of a batch of shape [B, T], or [1, N] where they are packed."""

    lengths: torch.Tensor  # tokens that count, int64 [S]
    of_token: torch.Tensor | None  # the sequence of each packed token, int64 [N]

    @classmethod
    def of(cls, valid: torch.Tensor, cu_seqlens: torch.Tensor | None) -> _Sequences:
        if cu_seqlens is None:
            return cls(valid.sum(-1), None)
        offsets = cu_seqlens.to(torch.int64)
        lengths = torch.nn.functional.pad(valid[0].cumsum(0), (1, 0))[offsets].diff()
        position = torch.arange(valid.shape[1], device=valid.device)
        return cls(lengths, torch.searchsorted(offsets[1:], position, right=True))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the tokens of each sequence, [S]."""
        if self.of_token is None:
            return values.sum(-1)
        return values.new_zeros(self.lengths.shape).index_add(0, self.of_token, values[0])

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """A value of each sequence at its tokens: [B, 1] or [1, N]."""
        return values[:, None] if self.of_token is None else values[self.of_token][None]


class _Tokens(NamedTuple):
    old_log_prob: torch.Tensor  # as it was given, but for its dtype, which may be a wider one
    log_prob: torch.Tensor  # [B, T], with its gradient, of the same dtype
    advantages: torch.Tensor  # [B, T] or [B, 1]
    valid: torch.Tensor  # bool [B, T]
    cu_seqlens: torch.Tensor | None

    def sequences(self) -> _Sequences:
        """Computed anew by each of the few who need them."""
        return _Sequences.of(self.valid, self.cu_seqlens)

    def log_ratio(self) -> torch.Tensor:
        """That of each token, clamped, 0 where masked; NaN stays. Without gradient."""
        log_prob = self.log_prob.detach()
        log_ratio = log_prob - self.old_log_prob.reshape(log_prob.shape)
        return torch.where(self.valid, log_ratio, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _inputs(
    rule: Rule,
    tokens: _Tokens,
    exact: bool,
    by_probability: bool,
) -> LossInputs:
    """The arguments of a `TokenLoss` for a rule that leaves the tokens as they are."""
    old_log_prob, log_prob, advantages, valid, _ = tokens
    of_sequence = rule.ratio_level == "sequence"
    log_ratio = _sequence_mean(tokens.log_ratio(), tokens) if of_sequence else None
    valid_tokens = _shaped(valid, old_log_prob.shape)
    if rule.surrogate.needs_bounds:
        bounds = bounds_of(rule.region, old_log_prob, valid=valid_tokens, exact=exact)
    else:

        def ratio_of_tokens() -> torch.Tensor:
            ratio = tokens.log_ratio() if log_ratio is None else log_ratio
            return ratio.reshape(old_log_prob.shape)

        bounds = membership_of(
            rule.region, old_log_prob, ratio_of_tokens, valid_tokens, exact=exact
        )
    return LossInputs(
        _shaped(old_log_prob, log_prob.shape),
        log_prob,
        log_ratio,
        advantages,
        valid,
        bounds if bounds.ndim == 1 else bounds.reshape(2, *log_prob.shape),
        rule.surrogate.name,
        rule.surrogate.parameters,
        by_probability,
    )


def _token_losses(
    rule: Rule, tokens: _Tokens, backend: Backend, exact: bool, by_probability: bool
) -> tuple[TokenLosses, dict[str, torch.Tensor]]:
    """The losses, and the metrics that only some rules have."""
    old_log_prob, log_prob, advantages, valid, _ = tokens
    shape = log_prob.shape
    if rule.ratio_level == "geometric-mean":
        own = tokens.log_ratio()
        lower, upper = sides_of(rule.region, old_log_prob, exact=exact)
        low = valid & (advantages < 0.0) & (own < lower.reshape(shape))
        high = valid & (advantages > 0.0) & (own > upper.reshape(shape))
        clipped = low | high
        bound = torch.where(low, lower.reshape(shape), upper.reshape(shape))
        mean = _sequence_mean(torch.where(clipped, bound, own), tokens)
        inputs = LossInputs(
            _shaped(old_log_prob, shape),
            torch.where(clipped, log_prob.detach(), log_prob),
            mean,
            advantages,
            valid,
            bounds_of(_NO_CLIP, old_log_prob),  # clipped already
            rule.surrogate.name,
            rule.surrogate.parameters,
            by_probability,
        )
        losses = backend.token_losses(inputs)
        removed = torch.where(clipped, losses.per_token.detach(), 0.0).abs().sum()
        totals = _with_clipped(losses.totals(), low, high, removed, inputs)
        return losses._replace(totals=lambda: totals), {}

    inputs = _inputs(rule, tokens, exact, by_probability)
    if not rule.surrogate.whole_sequence:
        return backend.token_losses(inputs), {}

    ratio = tokens.log_ratio() if inputs.log_ratio is None else inputs.log_ratio
    bounds = inputs.bounds
    bounds = bounds if bounds.ndim == 1 else bounds.reshape(2, *old_log_prob.shape)
    lower, upper = sides_of(rule.region, old_log_prob, bounds=bounds)
    below = valid & (ratio < lower.reshape(shape))
    above = valid & (ratio > upper.reshape(shape))
    sequences = tokens.sequences()
    dropped = sequences.sum((below | above).to(torch.int64)) > 0
    # A NaN is not outside, and is not to be hidden by a neighbour that is.
    masked = sequences.spread(dropped) & valid & ~(ratio.isnan() | advantages.isnan())
    advantages = advantages.expand(shape)
    kept = inputs._replace(advantages=torch.where(masked, 0.0, advantages))
    losses = backend.token_losses(kept)
    removed = torch.where(masked, advantages.abs() * ratio.exp(), 0.0).sum()
    low, high = below & (advantages < 0.0), above & (advantages > 0.0)
    totals = _with_clipped(losses.totals(), low, high, removed, inputs)
    # What is masked has no advantage, so the backend misses its gradient.
    totals = totals._replace(gradient_unclipped=totals.gradient_unclipped + removed)
    if inputs.parameters:
        [truncation] = inputs.parameters
        limited = valid & ~masked & (ratio.exp() > truncation)
        totals = totals._replace(limited=limited.sum())
    nonempty = (sequences.lengths > 0).sum().clamp(min=1)
    share = dropped.sum().to(log_prob.dtype) / nonempty
    return losses._replace(totals=lambda: totals), {"masked_sequence_fraction": share}


def _per_token_later(
    rule: Rule,
    tokens: _Tokens,
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
            losses, _ = _token_losses(rule, tokens, backend, exact, False)
            return _shaped(losses.per_token, shape)

    return compute() if untracked else compute


def _sequence_mean(values: torch.Tensor, tokens: _Tokens) -> torch.Tensor:
    """The mean over each sequence's tokens that count, at each of its tokens, [B, T]."""
    sequences = tokens.sequences()
    mean = sequences.sum(values) / sequences.lengths.clamp(min=1)
    return sequences.spread(mean).expand(values.shape)


def _with_clipped(
    totals: Totals,
    low: torch.Tensor,
    high: torch.Tensor,
    removed: torch.Tensor,
    inputs: LossInputs,
) -> Totals:
    """The totals of a loss whose tokens were clipped or masked before it."""
    by_probability = totals.by_probability
    if by_probability is not None:
        index = probability_bin(inputs.old_log_prob)
        bins = [index == k for k in range(PROBABILITY_BINS)]
        clipped = [torch.stack([(flag & one).sum() for one in bins]) for flag in (low, high)]
        by_probability = torch.stack([by_probability[0], *clipped])
    return totals._replace(
        clipped_low=low.sum(),
        clipped_high=high.sum(),
        gradient_removed=totals.gradient_removed + removed,
        by_probability=by_probability,
    )


def _metrics(rule: Rule, totals: Totals, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    valid, free = totals.valid, totals.gradient_unclipped
    some = valid.clamp(min=1)

    def mean(total: torch.Tensor) -> torch.Tensor:
        return total.to(dtype) / some

    log_ratio_min, log_ratio_max = (
        torch.where(valid > 0, extreme, 0.0)
        for extreme in (totals.log_ratio_min, totals.log_ratio_max)
    )
    metrics = {
        "clip_fraction_low": mean(totals.clipped_low),
        "clip_fraction_high": mean(totals.clipped_high),
        "gradient_removed": torch.where(free == 0.0, free, totals.gradient_removed / free).to(
            dtype
        ),
        "all_ratios_one": (log_ratio_min == 0.0) & (log_ratio_max == 0.0),
        "entropy": mean(totals.entropy),
        "approx_kl": mean(totals.negative_log_ratio),
        "approx_kl_k3": mean(totals.excess),
        "ratio_min": log_ratio_min.exp().to(dtype),
        "ratio_max": log_ratio_max.exp().to(dtype),
        "nonfinite_tokens": totals.nonfinite,
        "valid_tokens": valid,
    }
    if rule.surrogate.limited_metric is not None:
        metrics[rule.surrogate.limited_metric] = mean(totals.limited)
    if totals.by_probability is not None:
        tokens, low, high = totals.by_probability.unbind()
        metrics["tokens_by_probability"] = tokens
        metrics["clip_fraction_low_by_probability"] = low.to(dtype) / tokens.clamp(min=1)
        metrics["clip_fraction_high_by_probability"] = high.to(dtype) / tokens.clamp(min=1)
    return metrics


class _Reduction(NamedTuple):
    mode: AggregationMode
    dp_size: int
    batch_num_tokens: Count | None
    global_batch_size: Count | None
    loss_scale_factor: float | None


def _aggregate(losses: TokenLosses, batch: _Tokens, reduction: _Reduction) -> torch.Tensor:
    """Every mode is a sum over tokens, 0 where masked, with one weight for each sequence."""
    per_token, total, totals = losses
    if reduction.mode == "seq-mean-token-mean":
        of_batch = batch.sequences()
        total = (per_token / of_batch.spread(of_batch.lengths).clamp(min=1)).sum()
    total = total if reduction.dp_size == 1 else total * reduction.dp_size
    loss = total / _divisor(lambda: totals().valid, batch, reduction)
    return loss.to(total.dtype)  # a count in float64 has no say in it


def _divisor(valid_tokens: Callable[[], Count], batch: _Tokens, reduction: _Reduction) -> Count:
    """What the sum is divided by, before ranks are taken into account."""
    mode, _, tokens, sequences, scale = reduction
    if mode == "token-sum":
        return 1
    if mode == "token-mean":
        return _at_least_one(valid_tokens() if tokens is None else tokens)
    if sequences is None:
        sequences = (batch.sequences().lengths > 0).sum()
    divisor = _at_least_one(sequences)
    if mode == "seq-mean-token-sum-norm":
        divisor = divisor * (max(batch.valid.shape[1], 1) if scale is None else scale)
    return divisor


def _at_least_one(count: Count) -> Count:
    """A batch without any token has a loss of 0, not 0/0."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


def _check_reduction(reduction: _Reduction) -> None:
    mode, dp_size, tokens, sequences, scale = reduction
    check_name("loss_agg_mode", mode, AGGREGATION_MODES)
    real_number("dp_size", dp_size)
    if not 1 <= dp_size < math.inf or dp_size != int(dp_size):
        raise InvalidValueError(f"dp_size must be a whole number above 0, got {dp_size}")
    if scale is not None:
        real_number("loss_scale_factor", scale)
        if not 0.0 < scale < math.inf:
            raise InvalidValueError(f"loss_scale_factor must be finite and above 0, got {scale}")
    for argument, count in (("batch_num_tokens", tokens), ("global_batch_size", sequences)):
        if isinstance(count, torch.Tensor):
            if count.ndim > 0:
                raise InvalidValueError(
                    f"{argument} must be a number or a 0-dim tensor, got shape {tuple(count.shape)}"
                )
        elif count is not None:
            real_number(argument, count)
            if not 0 <= count < math.inf:
                raise InvalidValueError(f"{argument} must be finite and at least 0, got {count}")


def _check_tokens(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    rollout_is_weights: torch.Tensor | None,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of tokens and advantages as backends take them: [B, T], packed being one row."""
    check_float("old_log_prob", old_log_prob)
    check_float("log_prob", log_prob)
    check_float("advantages", advantages)
    check_tensor("response_mask", response_mask)
    weights = []
    if rollout_is_weights is not None:
        check_float("rollout_is_weights", rollout_is_weights)
        weights = [("rollout_is_weights", rollout_is_weights)]
    if response_mask.is_complex():
        raise InvalidTypeError(
            f"response_mask must be bool, int or float, got {response_mask.dtype}"
        )
    shape = _without_last_1(log_prob)
    if not 1 <= len(shape) <= 2:
        raise InvalidValueError(
            f"log_prob must have shape [B, T], [B, T, 1] or, packed, [N], "
            f"got {tuple(log_prob.shape)}"
        )
    per_row = ((shape[0], 1), shape[:1]) if len(shape) == 2 else ()
    for argument, tensor, shapes in (
        ("old_log_prob", old_log_prob, (shape,)),
        ("response_mask", response_mask, (shape,)),
        *(
            (argument, of, (shape, *per_row))
            for argument, of in [("advantages", advantages), *weights]
        ),
    ):
        if _without_last_1(tensor) not in shapes:
            raise InvalidValueError(
                f"{argument} must have shape {' or '.join(map(str, shapes))} "
                f"like log_prob's {tuple(log_prob.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != log_prob.device:
            raise InvalidValueError(
                f"{argument} must be on log_prob's device {log_prob.device}, got {tensor.device}"
            )
    rows, width = shape if len(shape) == 2 else (1, shape[0])
    return (rows, width), _advantages_shape(advantages, (rows, width))


def _advantages_shape(advantages: torch.Tensor, shape: tuple[int, int]) -> tuple[int, int]:
    """[B, T], or [B, 1] where there is one a sequence."""
    return shape if advantages.numel() == math.prod(shape) else (shape[0], 1)


def _without_last_1(tensor: torch.Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape


def _check_sequences(
    rule: Rule,
    reduction: _Reduction,
    cu_seqlens: torch.Tensor | None,
    log_prob: torch.Tensor,
) -> None:
    """What the mode needs to know of sequences and of the global batch must be there."""
    mode, dp_size, tokens, sequences, scale = reduction
    packed = log_prob.ndim == 1
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, log_prob)
    if packed and cu_seqlens is None:
        for needs, what in (
            (rule.ratio_level != "token", f"ratio_level {rule.ratio_level!r}"),
            (rule.surrogate.whole_sequence, "a mask of whole sequences"),
        ):
            if needs:
                raise InvalidValueError(
                    f"cu_seqlens must be given for {what} with packed tensors: "
                    f"offsets of the sequences, int32 or int64 [S + 1]"
                )
    if mode == "token-sum":
        return
    argument, count = (
        ("batch_num_tokens", tokens) if mode == "token-mean" else ("global_batch_size", sequences)
    )
    if dp_size > 1 and count is None:
        raise InvalidValueError(
            f"{argument} must be given for loss_agg_mode {mode!r} with dp_size {dp_size}"
        )
    if packed and mode != "token-mean" and cu_seqlens is None:
        raise InvalidValueError(
            f"cu_seqlens must be given for loss_agg_mode {mode!r} with packed tensors: "
            f"offsets of the sequences, int32 or int64 [S + 1]"
        )
    if packed and mode == "seq-mean-token-sum-norm" and scale is None:
        raise InvalidValueError(
            f"loss_scale_factor must be given for loss_agg_mode {mode!r} with packed tensors, "
            f"which have no width"
        )


def _check_cu_seqlens(cu_seqlens: torch.Tensor, log_prob: torch.Tensor) -> None:
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InvalidTypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if log_prob.ndim != 1:
        raise InvalidValueError(
            f"cu_seqlens must be left out unless tensors are packed, [N]: "
            f"log_prob has shape {tuple(log_prob.shape)}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise InvalidValueError(
            f"cu_seqlens must have shape [S + 1], got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != log_prob.device:
        raise InvalidValueError(
            f"cu_seqlens must be on log_prob's device {log_prob.device}, got {cu_seqlens.device}"
        )
    # Elsewhere, to look at the values would make the host wait.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets, tokens = cu_seqlens.numpy(), log_prob.shape[0]
        if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
            raise InvalidValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, "
                f"got {np.array2string(offsets, threshold=8)}"
            )
