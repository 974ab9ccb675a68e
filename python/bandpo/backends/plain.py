"""The loss in plain torch, for any device; a compiler can fuse it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

from bandpo.backends.contract import PROBABILITY_BINS, LossInputs, TokenLosses, Totals
from bandpo.check import MAX_LOG_PROB
from bandpo.surrogate import BY_NAME, LOG_RATIO_LIMIT, MIN_WIDTH, PROBABILITY_EDGES
from bandpo.tensors.lookup import read_table

_CLOSED = 40.0
"""Argument from which a soft gate counts as closed; as in ``rust/loss/surrogate.rs``."""


def token_losses(inputs: LossInputs) -> TokenLosses:
    """Returns the losses, with their gradient to ``log_prob`` by autograd."""
    old_log_prob, log_prob, log_ratio, advantages, valid, bounds, *_ = inputs
    surrogate = BY_NAME[inputs.surrogate]
    old_log_prob = torch.where(valid, old_log_prob, 0.0)
    log_prob = torch.where(valid, log_prob, 0.0)
    cost = torch.where(valid, -advantages, 0.0)
    if log_ratio is None:
        unclamped = log_prob - old_log_prob
    else:
        unclamped = torch.where(valid, log_ratio, 0.0) + _gradient_of(log_prob)
    x = _clamped(unclamped)
    ratio = x.exp()
    clamped = unclamped.detach().abs() > LOG_RATIO_LIMIT
    x, r = x.detach(), ratio.detach()

    # Ratios are clamped, but what the bounds limit is compared with them as it is. With an anchor
    # the bounds stand at it, and limit the ratio to it.
    compared, shift = unclamped.detach(), None
    log_prob_of_bounds = old_log_prob
    if inputs.anchor_log_prob is not None:
        log_prob_of_bounds = torch.where(valid, inputs.anchor_log_prob, 0.0)
        shift = log_prob_of_bounds - old_log_prob
        of_anchor = log_prob.detach() - log_prob_of_bounds
        compared = of_anchor if log_ratio is None else compared - shift
        shift = _clamped(shift)
        # A NaN compares false, so it must reach the loss another way.
        cost = torch.where(compared.isnan(), compared, torch.where(x.isnan(), x, cost))
    limited_x = x if shift is None else _clamped(compared)

    if surrogate.by_log_ratio(inputs.parameters):
        up, down = compared > 0.0, compared < 0.0
    else:
        up, down = cost < 0.0, cost > 0.0
    bound, bound_is_ratio = _bound(bounds, log_prob_of_bounds, down)
    width: torch.Tensor | None = None
    excess: torch.Tensor | None = None
    if surrogate.needs_width:
        width = _width(bound, bound_is_ratio, down)
        excess = limited_x.expm1()
        clipped_low, clipped_high = down & (-excess > width), up & (excess > width)
    else:
        below = compared.exp() < bound if bound_is_ratio else compared < bound
        clipped_low, clipped_high = down & below, up & (compared > bound)

    tokens = _Tokens(
        log_prob=log_prob,
        cost=cost,
        ratio=ratio,
        r=r,
        x=x,
        clamped=clamped,
        down=down,
        beyond=clipped_low | clipped_high,
        edge=_edge(bound, bound_is_ratio, down, shift),
        width=width,
        excess=excess,
        loss_scale=None if shift is None else r / limited_x.exp(),
    )
    per_token, slope, limited = _RULES[inputs.surrogate](tokens, inputs.parameters)

    by_probability = None
    if inputs.by_probability:
        index = probability_bin(old_log_prob)
        bins = [index == k for k in range(PROBABILITY_BINS)]
        flags = [flag & one for flag in (valid, clipped_low, clipped_high) for one in bins]
        by_probability = torch.stack([flag.sum() for flag in flags])
        by_probability = by_probability.reshape(3, PROBABILITY_BINS)
    # A masked token has x = 0 and cost = 0 and adds nothing.
    unclipped = cost * r
    is_empty = x.numel() == 0  # and has no extremes
    totals = Totals(
        valid=valid.sum(),
        nonfinite=(~per_token.isfinite()).sum(),
        clipped_low=clipped_low.sum(),
        clipped_high=clipped_high.sum(),
        limited=torch.zeros_like(clipped_low).sum() if limited is None else limited.sum(),
        positive=((log_prob.detach() > MAX_LOG_PROB) | (old_log_prob > MAX_LOG_PROB)).sum(),
        kl=(-x).sum(),
        kl_k3=_gap(x).sum(),
        entropy=(-old_log_prob).sum(),
        gradient_unclipped=unclipped.abs().sum(),
        gradient_removed=(unclipped - slope).abs().sum(),
        log_ratio_min=x.sum() if is_empty else torch.where(valid, x, math.inf).amin(),
        log_ratio_max=x.sum() if is_empty else torch.where(valid, x, -math.inf).amax(),
        by_probability=by_probability,
    )
    return TokenLosses(per_token, per_token.sum(), lambda: totals)


def probability_bin(old_log_prob: torch.Tensor) -> torch.Tensor:
    """Returns the bin of `PROBABILITY_EDGES` that each token is in, int64."""
    first, *others = (math.log(edge) for edge in PROBABILITY_EDGES[1:-1])
    found = (old_log_prob >= first).to(torch.int64)
    for edge in others:
        found = found + (old_log_prob >= edge)
    return found


class _Tokens(NamedTuple):
    """The tokens as rules read them, each [B, T]."""

    log_prob: torch.Tensor  # with gradient
    cost: torch.Tensor  # minus the advantage
    ratio: torch.Tensor  # clamped, with gradient
    r: torch.Tensor  # the ratio without gradient
    x: torch.Tensor  # its logarithm
    clamped: torch.Tensor  # whether the clamp acts
    down: torch.Tensor  # whether the lower bound is the one that holds
    beyond: torch.Tensor  # whether the ratio is beyond its bound
    edge: torch.Tensor  # the bound as a ratio new/old
    width: torch.Tensor | None  # of the region, for rules that need it
    excess: torch.Tensor | None  # v - 1, where v is the ratio that the bounds limit; likewise
    loss_scale: torch.Tensor | None  # r / v; None without an anchor


_Loss: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Losses, their gradients without gradient, and the tokens that the surrogate's limit stops."""


def _min_clip(tokens: _Tokens, parameters: list[float]) -> _Loss:
    cost, r, down, stopped, stop = tokens.cost, tokens.r, tokens.down, tokens.beyond, tokens.edge
    limited = None
    if parameters:
        [dual_clip] = parameters
        limited = down & (tokens.x >= math.log(dual_clip))
        stopped, stop = stopped | limited, torch.where(limited, dual_clip, stop)
    # Not minimum and maximum, which halve the gradient where r is at the bound.
    per_token = cost * torch.where(stopped, stop, tokens.ratio)
    return per_token, torch.where(stopped | tokens.clamped, 0.0, cost * r), limited


def _mask(tokens: _Tokens, parameters: list[float]) -> _Loss:
    weight, beyond, limited = tokens.r, tokens.beyond, None
    [truncation, symmetric] = [*parameters, math.inf, 0.0][:2]
    if symmetric:
        # Only here a NaN advantage can be that of a token beyond; it must not be dropped.
        beyond = beyond & ~tokens.cost.isnan()
    if truncation < math.inf:
        limited = ~beyond & (tokens.r > truncation)
        weight = torch.where(limited, truncation, tokens.r)
    slope = torch.where(beyond, 0.0, tokens.cost * weight)
    # Beyond, an infinite cost must not meet the 0.
    return slope * torch.where(beyond, 0.0, tokens.log_prob), slope, limited


def _weight(tokens: _Tokens, parameters: list[float]) -> _Loss:
    # CISPO's
    slope = tokens.cost * torch.where(tokens.beyond, tokens.edge, tokens.r)
    return slope * tokens.log_prob, slope, None


def _gradient_preserving(tokens: _Tokens, parameters: list[float]) -> _Loss:
    down, beyond = tokens.down, tokens.beyond
    # An infinite edge, which nothing is beyond, would make the gradient of all 0 * inf.
    kept = torch.where(beyond, _either(down, parameters, tokens.edge) * tokens.edge, 0.0)
    bounded = kept * _gradient_of(tokens.log_prob).exp()
    per_token = tokens.cost * torch.where(beyond, bounded, tokens.ratio)
    return per_token, torch.where(tokens.clamped & ~beyond, 0.0, per_token.detach()), None


def _soft_gate(tokens: _Tokens, parameters: list[float]) -> _Loss:
    width, excess = _measured(tokens)
    tau = _either(tokens.cost < 0.0, parameters, tokens.cost)
    z = tau * excess / width
    # tanh and sech^2 of half of z, without cancellation.
    falling = -z.abs()
    e = falling.exp()
    tanh = (-falling.expm1() / (1.0 + e)).copysign(z)
    gate = torch.where(falling < -_CLOSED, 0.0, 4.0 * e / (1.0 + e).square())
    value = 2.0 / tau + 2.0 * width * tanh / tau
    slope = tokens.r * gate
    bend = slope * (1.0 - tau * (1.0 + excess) / width * tanh)
    return _with_derivatives(tokens, _scaled(value, tokens), slope, bend)


def _quadratic(tokens: _Tokens, parameters: list[float]) -> _Loss:
    width, excess = _measured(tokens)
    sign = torch.where(tokens.cost < 0.0, 1.0, -1.0)
    share = sign * (excess / width)
    value = tokens.r - 0.5 * _scaled(excess, tokens) * share
    slope = tokens.r * (1.0 - share)
    bend = slope - tokens.r * sign * (1.0 + excess) / width
    return _with_derivatives(tokens, value, slope, bend)


def _either(first: torch.Tensor, parameters: list[float], like: torch.Tensor) -> torch.Tensor:
    """One of two parameters; of two numbers alone torch.where would make float32."""
    one, other = parameters
    return torch.where(first, torch.full_like(like, one), other)


def _measured(tokens: _Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The width and the excess of a rule that needs them."""
    if tokens.width is None or tokens.excess is None:
        raise ValueError("the rule does not state that it needs a width")
    return tokens.width, tokens.excess


def _scaled(value: torch.Tensor, tokens: _Tokens) -> torch.Tensor:
    return value if tokens.loss_scale is None else value * tokens.loss_scale


def _with_derivatives(
    tokens: _Tokens, value: torch.Tensor, slope: torch.Tensor, bend: torch.Tensor
) -> _Loss:
    """The loss of a factor of the cost with its first and second derivatives.

    Autograd would round them more. The cost stays outside, because it may be infinite.
    """
    # Where the clamp acts, even a cost that is infinite or NaN has no gradient, as in min-clip.
    step = torch.where(tokens.clamped, 0.0, _gradient_of(tokens.log_prob))
    first, second = step * slope, step * (slope + 0.5 * bend * step)
    # The derivative of the second would take an infinite cost times the step, which is 0.
    factor = value + torch.where(tokens.cost.isinf(), first, second)
    gradient = torch.where(tokens.clamped, 0.0, tokens.cost * slope)
    return tokens.cost * factor, gradient, None


_RULES: dict[str, Callable[[_Tokens, list[float]], _Loss]] = {
    "min-clip": _min_clip,
    "mask": _mask,
    "weight": _weight,
    "gradient-preserving": _gradient_preserving,
    "soft-gate": _soft_gate,
    "quadratic": _quadratic,
}


def _clamped(log_ratio: torch.Tensor) -> torch.Tensor:
    # Not clamp, which gives a NaN no gradient and so hides it.
    log_ratio = torch.where(log_ratio > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, log_ratio)
    return torch.where(log_ratio < -LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, log_ratio)


def _bound(
    bounds: torch.Tensor, log_prob_of_bounds: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """One bound a token, and True if the lower ones are ratios; all others are logarithms."""
    if bounds.dtype == torch.int32:
        return read_table(bounds, log_prob_of_bounds, down), True
    # As views of one element: a compiler takes a 0-dim float64 tensor of a CPU for a number.
    lower, upper = (bounds[:1], bounds[1:]) if bounds.ndim == 1 else (bounds[0], bounds[1])
    return torch.where(down, lower, upper), False


def _edge(
    bound: torch.Tensor, bound_is_ratio: bool, down: torch.Tensor, shift: torch.Tensor | None
) -> torch.Tensor:
    """The bounds as ratios new/old, which end where the clamp of ratios does.

    They are further by the shift, which is ln(anchor/old).
    """
    shifted = _clamped(bound if shift is None else bound + shift).exp()
    if not bound_is_ratio:
        return shifted
    lower = bound.clamp(min=math.exp(-LOG_RATIO_LIMIT))
    return torch.where(down, lower if shift is None else lower * shift.exp(), shifted)


def _width(bound: torch.Tensor, bound_is_ratio: bool, down: torch.Tensor) -> torch.Tensor:
    """Distance from 1 to the bound, which counts up to the ratios that the clamp leaves."""
    log_bound = torch.where(down, 0.0, bound) if bound_is_ratio else bound
    rise = log_bound.clamp(max=LOG_RATIO_LIMIT).expm1()
    fall = 1.0 - bound if bound_is_ratio else -rise
    return torch.where(down, fall, rise).clamp(min=MIN_WIDTH)


def _gradient_of(log_prob: torch.Tensor) -> torch.Tensor:
    """Zero, with the gradient of the log-prob, of an infinite one as well; a NaN stays."""
    step = log_prob - log_prob.detach()
    # In place and unrecorded, because torch.where would drop the gradient with the value.
    with torch.no_grad():
        step.masked_fill_(log_prob.isinf(), 0.0)
    return step


def _gap(x: torch.Tensor) -> torch.Tensor:
    """``e^x - 1 - x``, by its series near 0, because the difference cancels there."""
    near = x.abs() < 0.1
    z = torch.where(near, x, 0.0)
    series = z / 5040 + 1 / 720
    for factorial in (120, 24, 6, 2):
        series = series * z + 1 / factorial
    return torch.where(near, z * z * series, x.expm1() - x)
