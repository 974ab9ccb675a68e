"""Every line of the table of methods, against the method's formula in loops over floats."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import bandpo.correction
from bandpo import Band, Clip
from bandpo.check import BoolArray, Float64Array
from bandpo.correction import Correction
from bandpo.presets import PRESETS

LINES = {
    name: " ".join(code.split())
    for name, code in re.findall(
        r"^(\w[^\n]*?) {2,}``(.*?)``", bandpo.correction.__doc__ or "", re.DOTALL | re.MULTILINE
    )
}

RTOL = 1e-12
"""Weights are products and exponentials of a few tens of float64 numbers."""


class Sequence(NamedTuple):
    """The tokens of a sequence that count."""

    rollout: list[float]  # ln mu
    old: list[float]  # ln pi
    advantage: float

    @property
    def ratios(self) -> list[float]:
        return [math.exp(o - r) for o, r in zip(self.old, self.rollout, strict=True)]


Weights: TypeAlias = "list[float]"


def if_kept(kept: bool, weights: Weights) -> Weights:
    return weights if kept else [0.0] * len(weights)


def ones(s: Sequence) -> Weights:
    return [1.0] * len(s.old)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def geometric_mean(s: Sequence) -> float:
    total = 0.0
    for old, rollout in zip(s.old, s.rollout, strict=True):
        total += old - rollout
    return math.exp(total / len(s.old))


def bernoulli_kl(log_a: float, log_b: float) -> float:
    a, b = math.exp(log_a), math.exp(log_b)
    return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))


def tis(s: Sequence) -> Weights:
    """Yao et al., fengyao.notion.site: min(pi/mu, C), C = 2."""
    return [min(r, 2.0) for r in s.ratios]


def sequence_tis(s: Sequence) -> Weights:
    return [min(math.prod(s.ratios), 2.0)] * len(s.old)


def mis(s: Sequence) -> Weights:
    return [r if r <= 3.0 else 0.0 for r in s.ratios]


def sequence_mis(s: Sequence) -> Weights:
    """TRL's default, vllm_importance_sampling_mode "sequence_mask", cap 3, no lower bound."""
    product = math.prod(s.ratios)
    return [product if product <= 3.0 else 0.0] * len(s.old)


def icepop(s: Sequence) -> Weights:
    """arXiv 2510.18855, with the ends of verl, NeMo-RL and OpenRLHF."""
    return [r if 0.5 <= r <= 5.0 else 0.0 for r in s.ratios]


def kpop(s: Sequence) -> Weights:
    """ringtech.notion.site/kpop: both Bernoulli KLs at most phi."""
    return [
        r if max(bernoulli_kl(mu, pi), bernoulli_kl(pi, mu)) <= 0.1 else 0.0
        for r, mu, pi in zip(s.ratios, s.rollout, s.old, strict=True)
    ]


def geometric_mask(s: Sequence) -> Weights:
    return if_kept(0.99 <= geometric_mean(s) <= 1.01, ones(s))


def seq_mask_tis(s: Sequence) -> Weights:
    """NeMo-RL: the geometric mean decides, weights are those of the tokens."""
    return if_kept(0.999 <= geometric_mean(s) <= 1.002, s.ratios)


def opsm(s: Sequence) -> Weights:
    """DeepSeek-V3.2, arXiv 2512.02556, Eq. 9."""
    drift = mean([mu - pi for mu, pi in zip(s.rollout, s.old, strict=True)])
    return if_kept(not (s.advantage < 0.0 and drift > 1e-4), ones(s))


def vaco(s: Sequence) -> Weights:
    """arXiv 2603.01365, as Open-Instruct filters: tokens that move back are kept."""
    if mean([abs(r - 1.0) for r in s.ratios]) <= 0.1:
        return ones(s)
    return [0.0 if s.advantage * math.log(r) > 0.0 else 1.0 for r in s.ratios]


def flash_reinforce(s: Sequence) -> Weights:
    divergences = [bernoulli_kl(mu, pi) for mu, pi in zip(s.rollout, s.old, strict=True)]
    return if_kept(mean(divergences) <= 3e-3, s.ratios)


def k2(ratio: float) -> float:
    return 0.5 * math.log(ratio) ** 2


def k3(ratio: float) -> float:
    return ratio - 1.0 - math.log(ratio)


def of_tokens(inside: Callable[[float], bool]) -> Callable[[Sequence], Weights]:
    return lambda s: [1.0 if inside(r) else 0.0 for r in s.ratios]


def of_sequences(
    reduce: Callable[[list[float]], float], k: Callable[[float], float], threshold: float
) -> Callable[[Sequence], Weights]:
    return lambda s: if_kept(reduce([k(r) for r in s.ratios]) <= threshold, ones(s))


FORMULAS: dict[str, Callable[[Sequence], Weights]] = {
    "TIS": tis,
    "sequence TIS": sequence_tis,
    "MIS": mis,
    "sequence MIS": sequence_mis,
    "IcePop": icepop,
    "KPop": kpop,
    "geometric mask": geometric_mask,
    "seq-mask-TIS": seq_mask_tis,
    "OPSM": opsm,
    "VACO, filter": vaco,
    "FlashREINFORCE": flash_reinforce,
    "verl token_k1": of_tokens(lambda r: math.log(0.5) <= -math.log(r) <= math.log(2.0)),
    "verl token_k2": of_tokens(lambda r: k2(r) <= 0.01),
    "verl token_k3": of_tokens(lambda r: k3(r) <= 0.01),
    "verl seq_sum_k1": lambda s: if_kept(
        abs(sum(math.log(r) for r in s.ratios)) <= math.log(2.0), ones(s)
    ),
    "verl seq_sum_k2": of_sequences(sum, k2, 0.1),
    "verl seq_sum_k3": of_sequences(sum, k3, 0.1),
    "verl seq_mean_k1": lambda s: if_kept(0.999 <= geometric_mean(s) <= 1.001, ones(s)),
    "verl seq_mean_k2": of_sequences(mean, k2, 0.01),
    "verl seq_mean_k3": of_sequences(mean, k3, 0.01),
    "verl seq_max_k2": of_sequences(max, k2, 0.05),
    "verl seq_max_k3": of_sequences(max, k3, 0.05),
}


def correction_of(name: str) -> Correction:
    names = {"Correction": Correction, "Clip": Clip, "Band": Band}
    found = eval(LINES[name], names)  # noqa: S307 -- our own text
    assert isinstance(found, Correction)
    return found


class Engine(NamedTuple):
    """What a rollout engine and a trainer report of a batch."""

    rollout: Float64Array
    old: Float64Array
    advantages: Float64Array
    mask: BoolArray


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Sequences with mismatches from 1e-4 to 1.5, so that every rule keeps some and drops some."""
    rng = np.random.default_rng(0)
    rollout = -rng.exponential(1.5, (200, 12))
    spread = 10.0 ** rng.uniform(-4.0, 0.2, (200, 1))
    old = np.minimum(rollout + spread * rng.normal(size=rollout.shape), -1e-9)
    return Engine(rollout, old, rng.normal(size=200), rng.random(rollout.shape) < 0.8)


def by_formula(engine: Engine, formula: Callable[[Sequence], Weights]) -> Float64Array:
    weights = np.zeros(engine.mask.shape)
    for row, advantage in enumerate(engine.advantages):
        counted = np.flatnonzero(engine.mask[row])
        rollout, old = engine.rollout[row, counted], engine.old[row, counted]
        weights[row, counted] = formula(Sequence(rollout.tolist(), old.tolist(), float(advantage)))
    return weights


def test_the_table_has_every_formula() -> None:
    assert LINES.keys() == FORMULAS.keys()


def test_options_of_trainers_lead_to_lines_and_presets() -> None:
    text = (Path(__file__).parents[2] / "docs" / "mismatch.md").read_text()
    section = text.split("## By the option of a trainer")[1].split("\n## ")[0]
    methods = [row.split("|")[3].strip() for row in section.splitlines() if row.startswith("| ")]
    assert len(methods) > 10
    for method in methods[1:]:  # after the head
        if method != "none":
            quoted = re.findall(r'"(.+?)"', method)
            named = [] if quoted else method.split(" to ")
            assert set(quoted) <= set(PRESETS)
            assert set(named) <= LINES.keys()


@pytest.mark.parametrize("name", LINES)
def test_a_line_is_the_published_formula(name: str, engine: Engine) -> None:
    rollout, old, advantages, mask = map(torch.from_numpy, engine)
    found = correction_of(name)(old, rollout, mask, advantages=advantages)
    wanted = by_formula(engine, FORMULAS[name])
    np.testing.assert_allclose(found.weights.numpy(), wanted, rtol=RTOL)
    assert np.array_equal(found.kept.numpy(), (wanted != 0.0))
    if "TIS" not in name.split() or name == "seq-mask-TIS":
        assert 0 < found.kept.sum() < mask.sum()
    assert 0.0 < found.metrics["outside_fraction"] < 1.0


@pytest.mark.parametrize("name", LINES)
def test_a_line_is_the_same_on_packed_tensors(name: str, engine: Engine) -> None:
    rollout, old, advantages, mask = map(torch.from_numpy, engine)
    rule = correction_of(name)
    want = rule(old, rollout, mask, advantages=advantages)
    each = advantages[:, None].expand(mask.shape)
    found = rule(
        *(tensor.reshape(-1) for tensor in (old, rollout, mask)),
        advantages=each.reshape(-1),
        cu_seqlens=torch.arange(0, 12 * 201, 12),
    )
    torch.testing.assert_close(found.weights.reshape(mask.shape), want.weights)
    assert torch.equal(found.kept.reshape(mask.shape), want.kept)
