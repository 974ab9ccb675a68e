"""NaN and infinities at every argument: what masks or rules drop has no effect, the rest is said.

Where a token counts, both backends and both precisions agree in loss, gradient and metrics.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

import bandpo
from bandpo.loss import PolicyLossResult, policy_loss
from bandpo.surrogate import Mask
from conftest import BACKENDS
from support.batches import Batch, every_end
from support.formulas import FORMULAS, BoundedTokens, min_clip
from support.surrogates import SURROGATES as OF_EACH_KIND

SURROGATES = {**OF_EACH_KIND, "mask without truncation": Mask(truncation=None)}

BAND = bandpo.Band("kl", 0.05)
CLIP = bandpo.Clip(0.2, 0.28)

REGIONS: dict[str, bandpo.Region] = {
    "band": BAND,
    "capped": BAND.cap(10),
    "united": BAND | CLIP,
    "sided": bandpo.region.sides(lower=BAND, upper=CLIP),
    "clip": CLIP,
}

LEVELS = ("token", "sequence", "sequence-product", "geometric-mean")

ARGUMENTS = ("old_log_prob", "log_prob", "advantages", "rollout_is_weights", "anchor_log_prob")

VALUES = (-math.inf, math.inf, math.nan, -3e38, 3e38, -1e-45)

SHAPE = (4, 5)


def cases() -> list[tuple[str, str, str]]:
    found = []
    for surrogate in SURROGATES:
        for level in LEVELS:
            if level == "geometric-mean" and surrogate != "min-clip":
                continue
            regions = REGIONS if level in ("token", "geometric-mean") else ["clip"]
            found += [(surrogate, level, region) for region in regions]
    return found


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(SHAPE, generator=generator).to(dtype) * 3.0 - 0.1
    new = (old + 0.4 * torch.randn(SHAPE, generator=generator).to(dtype)).clamp(max=-0.01)
    made = {
        "old_log_prob": old,
        "log_prob": new,
        "advantages": torch.randn(SHAPE, generator=generator).to(dtype),
        "rollout_is_weights": torch.rand(SHAPE, generator=generator).to(dtype),
        "anchor_log_prob": old - 0.05,
        "response_mask": torch.ones(SHAPE, dtype=torch.bool),
    }
    made["response_mask"][1, 3] = False
    return made


def outcome(given: dict[str, Any], **options: Any) -> tuple[PolicyLossResult, Tensor]:
    leaf = given["log_prob"].detach().clone().requires_grad_()
    result = policy_loss(**{**given, "log_prob": leaf}, **options)
    return result, torch.autograd.grad(result.loss, leaf)[0]


def assert_same(
    found: tuple[PolicyLossResult, Tensor], wanted: tuple[PolicyLossResult, Tensor], rtol: float
) -> None:
    pairs = [(found[0].loss, wanted[0].loss), (found[1], wanted[1])]
    pairs += [(found[0].per_token, wanted[0].per_token)]
    pairs += [(found[0].metrics[name], metric) for name, metric in wanted[0].metrics.items()]
    for a, b in pairs:
        torch.testing.assert_close(
            a.double(), b.double(), rtol=rtol, atol=rtol * 1e-3, equal_nan=True
        )


@pytest.mark.filterwarnings("ignore::bandpo.error.MismatchWarning")
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(("surrogate", "level", "region"), cases())
def test_a_token_of_no_probability_under_both_policies_is_nan(
    surrogate: str, level: str, region: str, anchored: bool, backend: str
) -> None:
    for dtype in (torch.float32, torch.float64):
        given = batch(dtype)
        if not anchored:
            del given["anchor_log_prob"]
        given["old_log_prob"][2, 1] = given["log_prob"][2, 1] = -math.inf
        result, gradient = outcome(
            given, region=REGIONS[region], surrogate=SURROGATES[surrogate], ratio_level=level,
            backend=backend,
        )  # fmt: skip
        assert result.loss.isnan()
        assert result.metrics["nonfinite_tokens"] >= 1
        assert gradient[2, 1].isnan()


@pytest.mark.filterwarnings("ignore::bandpo.error.LogProbWarning")
@pytest.mark.filterwarnings("ignore::bandpo.error.MismatchWarning")
@pytest.mark.parametrize(("surrogate", "level", "region"), cases())
def test_backends_agree_where_a_token_counts(surrogate: str, level: str, region: str) -> None:
    for dtype, rtol in ((torch.float32, 2e-5), (torch.float64, 1e-9)):
        for argument in ARGUMENTS:
            for value in VALUES:
                given = batch(dtype)
                if argument != "anchor_log_prob":
                    del given["anchor_log_prob"]
                if argument == "rollout_is_weights" and value < 0.0:
                    continue
                given[argument][2, 1] = value
                options: dict[str, Any] = {
                    "region": REGIONS[region],
                    "surrogate": SURROGATES[surrogate],
                    "ratio_level": level,
                }
                found = outcome(given, **options, backend="native")
                wanted = outcome(given, **options, backend="torch")
                try:
                    assert_same(found, wanted, rtol)
                except AssertionError as error:
                    raise AssertionError(f"{argument} {value} {dtype}: {error}") from None
                if math.isnan(value) and argument != "rollout_is_weights":
                    assert found[0].loss.isnan(), argument


@pytest.mark.parametrize(("surrogate", "level", "region"), cases())
def test_a_masked_token_may_hold_anything(
    surrogate: str, level: str, region: str, backend: str
) -> None:
    options: dict[str, Any] = {
        "region": REGIONS[region],
        "surrogate": SURROGATES[surrogate],
        "ratio_level": level,
        "backend": backend,
    }
    given = batch(torch.float32)
    wanted = outcome(given, **options)
    assert wanted[0].loss.isfinite()
    for argument in ARGUMENTS:
        for value in VALUES:
            changed = {name: tensor.clone() for name, tensor in given.items()}
            changed[argument][1, 3] = value
            assert_same(outcome(changed, **options), wanted, 0.0)
            assert not outcome(changed, **options)[1][1, 3]


@pytest.mark.parametrize("region", [CLIP, BAND, BAND.cap(10)], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_infinite_log_prob_in_a_dropped_sequence_leaves_the_others(
    region: bandpo.Region, sign: float, backend: str
) -> None:
    old = torch.full((2, 3), -1.0)
    new = old.clone()
    new[0, 0] = -math.inf
    given = {
        "old_log_prob": old,
        "log_prob": new,
        "advantages": torch.tensor([sign, 1.0]),
        "response_mask": torch.ones(2, 3),
    }
    surrogate = Mask(whole_sequence=True)
    result, gradient = outcome(given, region=region, surrogate=surrogate, backend=backend)
    assert result.loss.item() == pytest.approx(0.5)  # -(-1) of three tokens in six
    assert result.metrics["masked_sequence_fraction"] == 0.5
    assert result.metrics["nonfinite_tokens"] == 0
    assert gradient.tolist() == [[0.0] * 3, [pytest.approx(-1.0 / 6.0)] * 3]


RTOL = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 2.0**-7}
"""Relative; a gradient of bfloat16 is one of float32 rounded, to either neighbour."""


@pytest.mark.filterwarnings("ignore::bandpo.error.LogProbWarning")
@pytest.mark.filterwarnings("ignore::bandpo.error.MismatchWarning")
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_backends_agree_at_every_end(
    surrogate: str, region: str, dtype: torch.dtype, anchored: bool
) -> None:
    tokens, anchor = every_end(dtype, anchored=anchored)
    for mode in ("token-sum", "none"):  # one pass without the operator, and with it
        options: dict[str, Any] = {
            "region": REGIONS[region], "surrogate": SURROGATES[surrogate],
            "anchor_log_prob": anchor, "loss_agg_mode": mode,
        }  # fmt: skip
        (losses, gradient), (their_losses, their_gradient) = (
            losses_and_gradient(tokens, **options, backend=backend) for backend in BACKENDS
        )
        rtol = RTOL[dtype]
        for a, b in ((losses, their_losses), (gradient, their_gradient)):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 1e-3, equal_nan=True)


def losses_and_gradient(tokens: Batch, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = tokens.log_prob.detach().clone().requires_grad_()
    result = tokens._replace(log_prob=leaf).loss(**options)
    return result.per_token.detach(), torch.autograd.grad(result.loss.sum(), leaf)[0]


@pytest.mark.filterwarnings("ignore::bandpo.error.LogProbWarning")
@pytest.mark.parametrize("region", ["band", "capped", "clip"])
@pytest.mark.parametrize("name", ["min-clip", *FORMULAS])
def test_the_ends_have_the_published_loss_and_gradient(
    name: str, region: str, backend: str
) -> None:
    surrogate, formula = FORMULAS.get(name, ("min-clip", min_clip))
    tokens, _ = every_end(torch.float64, anchored=False)
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = formula(BoundedTokens.of(tokens, REGIONS[region]))
    found = losses_and_gradient(
        tokens, region=REGIONS[region], surrogate=surrogate, exact=True, backend=backend,
        loss_agg_mode="token-sum",
    )  # fmt: skip
    finite = tokens.advantages.isfinite().numpy()
    for actual, formulas in zip(found, wanted, strict=True):
        # An infinite advantage times the 0 of a formula is NaN, and has no published loss.
        np.testing.assert_allclose(actual.numpy()[finite], formulas[finite], rtol=1e-9, atol=1e-16)


@pytest.mark.filterwarnings("ignore::bandpo.error.LogProbWarning")
@pytest.mark.filterwarnings("ignore::bandpo.error.MismatchWarning")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_gradient_at_an_infinity_is_the_limit_of_those_before_it(
    surrogate: str, level: str, backend: str
) -> None:
    if level == "geometric-mean" and surrogate != "min-clip":
        return
    for region in REGIONS if level in ("token", "geometric-mean") else ("clip",):
        for anchored in (False, True):
            given = batch(torch.float64)
            if not anchored:
                del given["anchor_log_prob"]
            options: dict[str, Any] = {
                "region": REGIONS[region], "surrogate": SURROGATES[surrogate],
                "ratio_level": level, "backend": backend,
            }  # fmt: skip
            for sign in (1.0, -1.0):
                gradients = []
                for value in (math.inf, 1e4):
                    given["log_prob"][0, ::2] = given["log_prob"][2, 1] = sign * value
                    gradients.append(outcome(given, **options)[1])
                torch.testing.assert_close(*gradients, rtol=0.0, atol=0.0)


def test_bounds_at_an_anchor_that_divides_zero_by_zero_are_unknown() -> None:
    """Anchor and old log-prob are -inf: 1 is far beyond the cap, whose place is 0/0."""
    never = torch.tensor([[-math.inf]])
    tokens = Batch(never, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    options: dict[str, Any] = {"region": REGIONS["capped"], "anchor_log_prob": never}
    for backend in reversed(BACKENDS):
        assert tokens.loss(**options, backend=backend).loss.isnan()
        _, gradient = losses_and_gradient(
            tokens, **options, surrogate="mask", backend=backend, loss_agg_mode="token-sum"
        )
        assert gradient.item() == 0.0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch, at its first import
@pytest.mark.parametrize("surrogate", ["gradient-preserving", "soft-gate", "quadratic"])
def test_a_compiled_loss_has_the_same_gradient_at_the_ends(surrogate: str) -> None:
    tokens, _ = every_end(torch.float32, anchored=False)

    def loss(log_prob: Tensor) -> Tensor:
        return policy_loss(
            tokens.old_log_prob, log_prob, *tokens[2:], region=REGIONS["capped"],
            surrogate=SURROGATES[surrogate], backend="torch",
        ).loss  # fmt: skip

    leaf = tokens.log_prob.clone().requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted, found = (torch.autograd.grad(f(leaf), leaf)[0] for f in (loss, compiled))
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0, equal_nan=True)
    torch.testing.assert_close(
        torch.func.grad(loss)(leaf.detach()), wanted, rtol=0.0, atol=0.0, equal_nan=True
    )
    assert wanted[tokens.log_prob.isinf()].isnan().any()
    infinite = tokens.log_prob.isinf() & tokens.old_log_prob.isfinite()
    assert bool(wanted[infinite].any()) is (surrogate == "gradient-preserving")


EDGES = {
    torch.float32: (-math.inf, -3e38, -(2.0**-149), -(2.0**-126), -128.0, -127.99999, -88.0, -0.0),
    torch.float64: (-math.inf, -1.7e308, -5e-324, -(2.0**-1022), -745.0, -128.0, -37.0, -0.0),
}
"""Old log-probs at the ends of each dtype, of a table and of exp."""


@pytest.mark.parametrize("dtype", EDGES, ids=str)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("surrogate", [name for name in SURROGATES if name != "gamma-weight"])
def test_fast_paths_are_the_slow_one_at_the_ends(
    surrogate: str, region: str, dtype: torch.dtype
) -> None:
    """A row that is longer than a vector, against plain torch, token by token and exact."""
    tiled = torch.tensor(EDGES[dtype], dtype=dtype).repeat(5)
    for new_value in (-1.0, -30.0, -0.0):
        for sign in (1.0, -1.0):
            given = {
                "old_log_prob": tiled[None],
                "log_prob": torch.full_like(tiled, new_value)[None],
                "advantages": torch.full_like(tiled, sign)[None],
                "response_mask": torch.ones(1, len(tiled)),
            }
            options: dict[str, Any] = {"region": REGIONS[region], "loss_agg_mode": "token-sum"}
            options["surrogate"] = SURROGATES[surrogate]
            fast = outcome(given, **options, backend="native")
            rtol = 2e-5 if dtype == torch.float32 else 1e-9
            assert_same(fast, outcome(given, **options, backend="torch"), rtol)
            if surrogate != "mask of sequences":
                ones = [
                    outcome({name: t[:, k : k + 1] for name, t in given.items()}, **options,
                            backend="native")[1]
                    for k in range(8)
                ]  # fmt: skip
                assert torch.equal(torch.cat(ones, 1), fast[1][:, :8])
