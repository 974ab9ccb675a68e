"""The clipped policy loss of PPO and GRPO with the bounds of any region.

Every backend turns tokens into a loss of each token, first; one reducer turns those into a scalar.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.region import Region
from bandpo.torch import (
    COUNTS,
    LOG_RATIO_LIMIT,
    PROBABILITY_BINS,
    PROBABILITY_EDGES,
    MinClip,
    bounds_of,
    check_float,
    check_region,
    check_tensor,
    compute_dtype,
    default_backend,
    min_clip_native,
    min_clip_torch,
    torch,
)

__all__ = [
    "LOG_RATIO_LIMIT",
    "PROBABILITY_EDGES",
    "PolicyLoss",
    "PolicyLossResult",
    "policy_loss",
]

AggregationMode: TypeAlias = Literal[
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]
Backend: TypeAlias = Literal["auto", "native", "torch"]
Count: TypeAlias = "float | torch.Tensor"

_MODES: tuple[str, ...] = get_args(AggregationMode)
_BACKENDS: tuple[str, ...] = get_args(Backend)


class PolicyLossResult(NamedTuple):
    """What `policy_loss` returns.

    Attributes:
        loss: The aggregated loss, 0-dim, float32, or float64 where a log-prob is.
        per_token: The loss of each token before aggregation, in the shape of ``log_prob`` and the
            dtype of ``loss``, 0 for masked tokens. It carries the gradient as well.
        metrics: Detached tensors by name, on the device of the loss; see `policy_loss`.
    """

    loss: torch.Tensor
    per_token: torch.Tensor
    metrics: dict[str, torch.Tensor]


def policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    region: Region,
    dual_clip: float | None = None,
    loss_agg_mode: AggregationMode = "token-mean",
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
    exact: bool = False,
    dp_size: int = 1,
    batch_num_tokens: Count | None = None,
    global_batch_size: Count | None = None,
    loss_scale_factor: float | None = None,
    metrics_by_probability: bool = False,
) -> PolicyLossResult:
    """Returns the min-clip loss of a batch, with its gradient to ``log_prob`` and its metrics.

    With ``r = exp(log_prob - old_log_prob)``, its logarithm clamped to plus and minus 20, and the
    region's bounds at the old probability, the loss of a token is ``-A min(r, upper)`` for
    ``A > 0`` and ``min(-A max(r, lower), -A c)`` for ``A < 0`` (PPO; with a band: BandPO, arXiv
    2603.04918; dual clip ``c``: Ye et al. 2020, arXiv 1912.09729). Its gradient is ``-A r``, except
    0 where r is beyond the bound on the side that the sign of A selects, where ``A < 0`` and
    ``r >= c``, and where the clamp acts. Where r is at a bound the gradient passes.

    The gradient flows to ``log_prob`` alone: ``old_log_prob`` and ``advantages`` get none, whether
    or not they require it. All is computed in float32, in float64 where one of the log-probs is.

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

    - clip_fraction_low: fraction with ``A < 0`` and ``r < lower``
    - clip_fraction_high: fraction with ``A > 0`` and ``r > upper``
    - dual_clip_fraction: fraction with ``A < 0`` and ``r >= c``
    - approx_kl: mean of ``-ln r``, approx_kl_k3: mean of ``r - 1 - ln r``, both with the clamped r
    - ratio_min, ratio_max: extremes of the clamped r
    - valid_tokens, and nonfinite_tokens: those of them whose loss is inf or NaN (int64)
    - with ``metrics_by_probability``, over the bins of the old probability between
      `PROBABILITY_EDGES`: tokens_by_probability (int64), and clip_fraction_low_by_probability and
      clip_fraction_high_by_probability, as fractions of the bin's tokens

    They are detached tensors and nothing waits for the device.

    Args:
        old_log_prob: Natural log-probabilities of the tokens under the policy in the denominator
            of the ratio, [B, T], [B, T, 1] or packed [N]; float32, float64, bfloat16 or float16.
        log_prob: The same under the policy being trained.
        advantages: One a token, or one a sequence as [B, 1] or [B]; same dtypes.
        response_mask: Which tokens count (0: not), bool, int or float.
        region: Where the bounds come from: `Band`, `Clip`, `BandTable` or another `Region`. A band
            with one radius is tabulated at its first use; one with an array of radii takes the
            exact solver, and the array must broadcast to the shape of ``old_log_prob``.
        dual_clip: Greatest ratio c for ``A < 0``, above 1; None for none.
        loss_agg_mode: How the tokens' losses become one number.
        cu_seqlens: Offsets of the sequences in packed tensors, int32 or int64 [S + 1], from 0 to N.
            Their values are checked on a CPU only, outside `torch.compile`.
        backend: ``"native"`` is compiled and runs on the CPU; ``"torch"`` is plain torch and runs
            on any device; ``"auto"`` is native for CPU tensors and torch for others.
        exact: Take the bounds from the exact solver, which runs on the CPU, instead of a table.
        dp_size: Number of data-parallel ranks whose gradients are averaged.
        batch_num_tokens: Tokens that count in the global batch, a number or a 0-dim tensor, for
            token-mean; this batch's if left out.
        global_batch_size: The same of sequences, for the seq-mean modes.
        loss_scale_factor: Divisor of seq-mean-token-sum-norm; T if left out, needed if packed.
        metrics_by_probability: Add the metrics by bin of the old probability.

    Raises:
        InvalidTypeError: If an argument has the wrong type or dtype; the message says what it may.
        InvalidValueError: If shapes or devices do not match, a value is out of range or a name not
            known, ``cu_seqlens`` or a global count (for ``dp_size > 1``) is missing where the mode
            needs it, or the backend cannot run on the tensors' device.
    """
    _check_rule(region, dual_clip, backend)
    reduction = _Reduction(
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    _check_reduction(reduction)
    shape, advantages_shape = _check_tokens(old_log_prob, log_prob, advantages, response_mask)
    _check_sequences(reduction, cu_seqlens, log_prob)
    min_clip = _backend(backend, log_prob.device)

    dtype = compute_dtype(old_log_prob, log_prob)
    valid = response_mask.reshape(shape)
    valid = valid if valid.dtype == torch.bool else valid != 0
    old_log_prob = old_log_prob.detach().to(dtype)
    bounds = bounds_of(region, old_log_prob, valid=valid.reshape(old_log_prob.shape), exact=exact)
    per_token, counts, sums = min_clip(
        old_log_prob.reshape(shape),
        log_prob.to(dtype).reshape(shape),
        advantages.detach().to(dtype).reshape(advantages_shape),
        valid,
        bounds if bounds.ndim == 1 else bounds.reshape(2, *shape),
        dual_clip,
        metrics_by_probability,
    )
    loss = _aggregate(per_token, valid, counts[0], cu_seqlens, reduction)
    return PolicyLossResult(loss, per_token.reshape(log_prob.shape), _metrics(counts, sums, dtype))


class PolicyLoss(torch.nn.Module):
    """`policy_loss` as a module: the rule in the constructor, the batch in the call.

    Args:
        region: See `policy_loss`, as for every other argument.
        dual_clip: Greatest ratio for negative advantages.
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
        region: Region,
        *,
        dual_clip: float | None = None,
        loss_agg_mode: AggregationMode = "token-mean",
        backend: Backend = "auto",
        exact: bool = False,
        dp_size: int = 1,
        loss_scale_factor: float | None = None,
        metrics_by_probability: bool = False,
    ) -> None:
        super().__init__()
        _check_rule(region, dual_clip, backend)
        _check_reduction(_Reduction(loss_agg_mode, dp_size, None, None, loss_scale_factor))
        self.region = region
        self.dual_clip = dual_clip
        self.loss_agg_mode: AggregationMode = loss_agg_mode
        self.backend: Backend = backend
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
            dual_clip=self.dual_clip,
            loss_agg_mode=self.loss_agg_mode,
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
            f"{self.region!r}, dual_clip={self.dual_clip}, loss_agg_mode={self.loss_agg_mode!r}, "
            f"backend={self.backend!r}"
        )


_MIN_CLIP = {"native": min_clip_native, "torch": min_clip_torch}


def _backend(backend: Backend, device: torch.device) -> MinClip:
    if backend == "native" and device.type != "cpu":
        raise InvalidValueError(
            f"backend 'native' runs on CPU tensors, log_prob is on {device}; use 'torch' or 'auto'"
        )
    return _MIN_CLIP[default_backend(device.type) if backend == "auto" else backend]


def _metrics(
    counts: torch.Tensor, sums: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    valid, nonfinite = counts[:2].unbind()
    some = valid.clamp(min=1)
    low, high, dual = (counts[2:COUNTS].to(dtype) / some).unbind()
    kl, kl_k3 = (sums[:2].to(dtype) / some).unbind()
    ratio_min, ratio_max = torch.where(valid > 0, sums[2:].to(dtype), 1.0).unbind()
    metrics = {
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "dual_clip_fraction": dual,
        "approx_kl": kl,
        "approx_kl_k3": kl_k3,
        "ratio_min": ratio_min,
        "ratio_max": ratio_max,
        "nonfinite_tokens": nonfinite,
        "valid_tokens": valid,
    }
    if counts.shape[0] > COUNTS:
        tokens, low, high = counts[COUNTS:].reshape(3, PROBABILITY_BINS).unbind()
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


def _aggregate(
    per_token: torch.Tensor,
    valid: torch.Tensor,
    valid_tokens: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    reduction: _Reduction,
) -> torch.Tensor:
    """Every mode is a sum over tokens, 0 where masked, with one weight for each sequence."""
    mode, dp_size, tokens, sequences, scale = reduction
    if mode == "token-sum":
        return per_token.sum() * dp_size
    if mode == "token-mean":
        tokens = valid_tokens if tokens is None else tokens
        return per_token.sum() * dp_size / _at_least_one(tokens)

    if cu_seqlens is None:
        lengths = valid.sum(-1)
        length_of_token = lengths[:, None]
    else:
        offsets = cu_seqlens.to(torch.int64)
        lengths = torch.nn.functional.pad(valid[0].cumsum(0), (1, 0))[offsets].diff()
        position = torch.arange(per_token.shape[1], device=per_token.device)
        length_of_token = lengths[torch.searchsorted(offsets[1:], position, right=True)]
    if mode == "seq-mean-token-mean":
        per_token = per_token / length_of_token.clamp(min=1)
    sequences = (lengths > 0).sum() if sequences is None else sequences
    loss = per_token.sum() * dp_size / _at_least_one(sequences)
    if mode == "seq-mean-token-sum-norm":
        loss = loss / (max(per_token.shape[1], 1) if scale is None else scale)
    return loss


def _at_least_one(count: Count) -> Count:
    """A batch without any token has a loss of 0, not 0/0."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


def _check_rule(region: Region, dual_clip: float | None, backend: Backend) -> None:
    check_region(region)
    _check_name("backend", backend, _BACKENDS)
    if dual_clip is not None:
        _check_number("dual_clip", dual_clip)
        if not dual_clip > 1.0:
            raise InvalidValueError(f"dual_clip must be above 1, got {dual_clip}")


def _check_reduction(reduction: _Reduction) -> None:
    mode, dp_size, tokens, sequences, scale = reduction
    _check_name("loss_agg_mode", mode, _MODES)
    _check_number("dp_size", dp_size)
    if not 1 <= dp_size < math.inf or dp_size != int(dp_size):
        raise InvalidValueError(f"dp_size must be a whole number above 0, got {dp_size}")
    if scale is not None:
        _check_number("loss_scale_factor", scale)
        if not 0.0 < scale < math.inf:
            raise InvalidValueError(f"loss_scale_factor must be finite and above 0, got {scale}")
    for argument, count in (("batch_num_tokens", tokens), ("global_batch_size", sequences)):
        if isinstance(count, torch.Tensor):
            if count.ndim > 0:
                raise InvalidValueError(
                    f"{argument} must be a number or a 0-dim tensor, got shape {tuple(count.shape)}"
                )
        elif count is not None:
            _check_number(argument, count)
            if not 0 <= count < math.inf:
                raise InvalidValueError(f"{argument} must be finite and at least 0, got {count}")


def _check_name(argument: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise InvalidValueError(f"{argument} must be one of {', '.join(names)}, got {name!r}")


def _check_number(argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{argument} must be a real number, got {type(value).__name__}")


def _check_tokens(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of tokens and advantages as backends take them: [B, T], packed being one row."""
    check_float("old_log_prob", old_log_prob)
    check_float("log_prob", log_prob)
    check_float("advantages", advantages)
    check_tensor("response_mask", response_mask)
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
        ("advantages", advantages, (shape, *per_row)),
        ("response_mask", response_mask, (shape,)),
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
    return (rows, width), (rows, width if _without_last_1(advantages) == shape else 1)


def _without_last_1(tensor: torch.Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape


def _check_sequences(
    reduction: _Reduction, cu_seqlens: torch.Tensor | None, log_prob: torch.Tensor
) -> None:
    """What the mode needs to know of sequences and of the global batch must be there."""
    mode, dp_size, tokens, sequences, scale = reduction
    packed = log_prob.ndim == 1
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, log_prob)
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
