"""Published methods by name: arguments of the loss, and the source of their numbers.

>>> from bandpo.presets import preset
>>> preset("dapo").region
Clip(0.2, 0.28)

``policy_loss(..., **preset("dppo-tv").arguments())`` trains by the rule of a method. A preset holds
the rule for the ratios and no more: not the advantages, the sampling, or a penalty on a divergence
from a reference model. An aggregation that a paper does not state is left at the default. The KL3
clip (arXiv 2602.05494) has no preset, because no published delta was found: ``Clip.kl3(delta)``.

Rules that are one argument of the loss have no preset either:

- decoupled PPO (AReaL): ``old_log_prob`` of the proximal policy, and ``correction=Correction(
  Clip.between(0, 5))`` with the ``rollout_log_prob`` of the behaviour policy
- TRL's ``delta``, where no upper bound is above it: ``dual_clip=delta``
- clip-cov (arXiv 2505.22617): ``rollout_is_weights`` that are 0 for the tokens that it draws
- DRPO (arXiv 2606.09821): ``Band("tv", delta)`` with surrogate "quadratic", as long as the
  band stays inside the simplex; the scale of its published delta is not settled
- DISPO (arXiv 2602.00983): `bandpo.by_sign` of two clips with surrogate "weight"; its four numbers
  were not found
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from bandpo.check import check_name
from bandpo.error import InvalidValueError, UnknownNameError
from bandpo.notebook import html_table
from bandpo.region import Band, Clip, Dcpo, PrefixBudget, by_sign
from bandpo.rule import AggregationMode, RatioLevel, RuleRegion
from bandpo.schedule import Bapo, RegionSource, SecondMoment
from bandpo.surrogate import GammaWeight, GradientPreserving, Mask, SoftGate, Surrogate


@dataclass(frozen=True)
class Preset:
    """A method as the arguments of `bandpo.loss.policy_loss`."""

    name: str
    region: RuleRegion
    surrogate: Surrogate = "min-clip"
    dual_clip: float | None = None
    ratio_level: RatioLevel = "token"
    loss_agg_mode: AggregationMode = "token-mean"
    log_ratio_penalty: float = 0.0
    correction: Mapping[str, Any] | None = field(default=None, hash=False)
    """Arguments of `bandpo.correction.Correction`; a loss with one needs a rollout_log_prob."""
    source: str = field(kw_only=True)
    """The paper, and the place of the numbers in it or in its code."""

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Returns keyword arguments for `bandpo.loss.policy_loss` and `bandpo.loss.PolicyLoss`.

        >>> preset("dapo").arguments(loss_agg_mode="seq-mean-token-mean")["loss_agg_mode"]
        'seq-mean-token-mean'

        Args:
            changes: Arguments to take in place of the preset's, such as a trainer's own
                ``loss_agg_mode``.

        Raises:
            InvalidValueError: If the preset has no argument of that name.
        """
        for name in changes:
            check_name("argument of a preset", name, _ARGUMENTS)
        return {name: getattr(self, name) for name in _ARGUMENTS} | changes


_ARGUMENTS = (
    "region",
    "surrogate",
    "dual_clip",
    "ratio_level",
    "loss_agg_mode",
    "log_ratio_penalty",
    "correction",
)


_BANDPO = (
    "BandPO, ICML 2026, arXiv 2603.04918; the numbers of its training scripts: radius 0.05, upper "
    "bounds capped at 10, not relaxed, dual clip 10"
)

_IPO = Preset(
    "ipo",
    Band("tv", 0.1),
    Mask(truncation=None, symmetric=True),
    log_ratio_penalty=1e-3,
    source="IPO of PrimeIntellect-ai/prime-rl, trainer/rl/loss.py, its default from 2026-08-27 "
    "(#3418) to 2026-09-18: ipo_threshold 0.1 on either side whatever the sign of A, kl_tau 1e-3 "
    "times (ln r)^2 on all tokens. The old policy is the rollout policy",
)

_PRESETS: Final = (
    Preset("ppo", Clip(0.2), source="PPO, arXiv 1707.06347, Eq. 7; section 6.1, Table 1"),
    Preset("dapo", Clip(0.2, 0.28), source="DAPO, arXiv 2503.14476, Eq. 8-12; section 4.1"),
    Preset(
        "dual-clip",
        Clip(0.2),
        dual_clip=3.0,
        source="dual-clip PPO, arXiv 1912.09729, Eq. 5; experiments, system setup",
    ),
    Preset("bandpo-kl", Band("kl", 0.05).cap(10.0), dual_clip=10.0, source=_BANDPO),
    Preset("bandpo-tv", Band("tv", 0.05).cap(10.0), dual_clip=10.0, source=_BANDPO),
    Preset("bandpo-chi2", Band("pearson-chi2", 0.05).cap(10.0), dual_clip=10.0, source=_BANDPO),
    Preset(
        "trgppo",
        Band("kl", 0.001).at_least(0.1),
        source="TRGPPO, NeurIPS 2019, arXiv 1901.10314: the band, but never narrower than PPO's "
        "clip; defaults for discrete actions in its code (wangyuhuix/TRGPPO, "
        "baselines/TRPPO/run_atari.py: delta_kl 0.001, cliprange 0.1), which anneals both to zero "
        "width over training and, for discrete actions, leaves the minimum width out",
    ),
    Preset(
        "dppo-tv",
        Band("tv", 0.15),
        Mask(truncation=None),
        source="DPPO, arXiv 2602.04879, Eq. 12-13; appendix C.1 (threshold 0.15, C infinite; "
        "appendix E truncates at 5; verl's shipped configuration at 3)",
    ),
    Preset(
        "dppo-kl",
        Band("kl", 0.05),
        Mask(truncation=None),
        source="DPPO, arXiv 2602.04879, Eq. 12 and 14; appendix C.1 (threshold 0.05, C infinite; "
        "appendix E truncates at 5; verl's shipped configuration at 3)",
    ),
    replace(_IPO, name="prime-rl"),
    Preset(
        "prime-rl-2026-04",
        Band("tv", 0.2),
        Mask(truncation=None),
        source="PrimeIntellect-ai/prime-rl from 2026-04-02 (#2187) to 2026-08-27 (#3418), "
        "default_loss_fn: dppo_mask_low and dppo_mask_high 0.2 (0.1 for some days of August); "
        "without its penalty kl_tau (ln r)^2. The old policy is the rollout policy",
    ),
    Preset(
        "prime-rl-2026-09",
        Band("tv", 0.3),
        Mask(truncation=None, symmetric=True),
        source="PrimeIntellect-ai/prime-rl since 2026-09-18 (#3586, read as its description): ipo "
        "with eps 0.3 and kl_tau 0. The old policy is the rollout policy",
    ),
    _IPO,
    Preset(
        "kpop",
        Band("kl", 0.1) & Band("reverse-kl", 0.1),
        Mask(truncation=None, symmetric=True),
        source="KPop (ringtech.notion.site/kpop, 2026-05): both Bernoulli divergences at most "
        "phi; 0.1 is what prime-rl #3283 cites from it, the post's own number was not read. The "
        "old policy is the rollout policy",
    ),
    Preset(
        "icepop",
        Clip(0.2),
        correction={"region": Clip.between(0.5, 5.0)},
        source="IcePop, Ring-1T, arXiv 2510.18855: old/rollout outside [alpha, beta] drops a "
        "token; 0.5 and 5 in verl (decoupled_token_icepop), NeMo-RL and OpenRLHF, as of 2026-08, "
        "the paper's own numbers were not read; with the clip of PPO",
    ),
    Preset(
        "prime-rl-icepop",
        Clip.between(0.2, 5.0),
        Mask(truncation=None, symmetric=True),
        source="PrimeIntellect-ai/prime-rl #3526, 2026-09-10: type icepop, ratio_low 0.2, "
        "ratio_high 5. The old policy is the rollout policy",
    ),
    Preset(
        "tis",
        Clip(0.2),
        correction={"region": Clip.between(0.0, 2.0), "action": "truncate"},
        source="truncated importance sampling (fengyao.notion.site, 2025-08): min(old/rollout, "
        "C); C = 2 in verl, slime, ms-swift and Open-Instruct, as of 2026-08; with the clip of PPO",
    ),
    Preset(
        "mis",
        Clip(0.2),
        correction={"region": Clip.between(0.0, 3.0), "level": "sequence-product"},
        source="masked importance sampling of sequences: TRL 1.16.0, its default sequence_mask "
        "with clip_max 3 and no lower bound; ms-swift's option of that name is a geometric mean; "
        "with the clip of PPO",
    ),
    Preset(
        "geo-mask",
        Clip(0.2),
        correction={
            "region": Clip.between(0.99, 1.01),
            "level": "geometric-mean",
            "action": "mask-only",
        },
        source="geometric sequence mask (richardli.xyz, part 3): SkyRL 0.3.0, geo_mask_low 0.99 "
        "and geo_mask_high 1.01; verl's presets take 0.999 and 1.001; with the clip of PPO",
    ),
    Preset(
        "seq-mask-tis",
        Clip(0.2),
        correction={"region": Clip.between(0.999, 1.002), "level": "geometric-mean"},
        source="NeMo-RL (prorlv2_1_moe.v2.yaml, 2026-08): the geometric mean of old/rollout drops "
        "a sequence, the others keep their tokens' own weights; with the clip of PPO",
    ),
    Preset(
        "opsm",
        Clip(0.2),
        correction={
            "statistic": "k1",
            "threshold": 1e-4,
            "level": "sequence-mean",
            "action": "mask-only",
            "negative_only": True,
        },
        source="off-policy sequence masking, DeepSeek-V3.2, arXiv 2512.02556, Eq. 9, which gives "
        "no delta; 1e-4 is the default of slime and miles (2026-08), and TRL's example is 0.5; of "
        "old against rollout, where TRL takes the current policy; with the clip of PPO",
    ),
    Preset(
        "flash-reinforce",
        Clip(0.2),
        loss_agg_mode="seq-mean-token-mean",
        correction={
            "statistic": "bernoulli-kl",
            "threshold": 3e-3,
            "level": "sequence-mean",
        },
        source="FlashREINFORCE, OpenRLHF #1339, 2026-09-14: a mean Bernoulli KL(rollout || old) "
        "above 3e-3 drops a sequence, the others keep the weight old/rollout without a bound; "
        "with the clip of PPO",
    ),
    Preset(
        "sapo",
        Clip(1.0, 1.0),
        SoftGate(tau_positive=1.0, tau_negative=1.05),
        loss_agg_mode="seq-mean-token-mean",
        source="SAPO, arXiv 2511.20347; tau 1.0 and 1.05 in its text and in verl 0.9.1 and TRL "
        "1.16.0",
    ),
    Preset(
        "spo",
        Clip(0.2),
        "quadratic",
        source="SPO, arXiv 2401.16025, Eq. 16; 0.2 as in PPO, its own table was not read",
    ),
    Preset(
        "cppo",
        PrefixBudget(delta=0.15, weight_min=0.8, allowance=(0.02, 0.04)),
        Mask(truncation=None),
        source="CPPO, arXiv 2606.10968, as its authors coded it (UniRL, cppo.py, 2026-06, and "
        "verl #6731): delta 0.15 (0.2 for a mixture of experts), w_min 0.8, delta_b the 0.9 "
        "quantile of D in [0.02, 0.04]. The old policy is the rollout policy",
    ),
    Preset(
        "m2po",
        SecondMoment(0.04),
        source="M2PO, arXiv 2510.01161: tau 0.04 in its scripts (Infini-AI-Lab/M2PO, M2_budget), "
        "which set no min width; see bandpo.schedule.SecondMoment",
    ),
    Preset(
        "topr",
        by_sign(positive=Clip(0.0), negative=Clip(1.0, 0.0)),
        "weight",
        source="TOPR, arXiv 2503.14286, Eq. 8, with the token's ratio as in ROLL and Trinity "
        "(2026-08) in place of the trajectory's: weight 1 for A > 0, min(r, 1) otherwise",
    ),
    Preset(
        "gpg",
        Clip(0.0),
        "weight",
        source="GPG, arXiv 2504.02546, and REINFORCE: -A log pi, no ratio; verl's loss gpg",
    ),
    Preset(
        "dcpo",
        Dcpo(0.16, 0.20).cap(10.0),
        dual_clip=10.0,
        loss_agg_mode="seq-mean-token-mean",
        source="DCPO, arXiv 2509.02333, Eq. 4 and 8; appendices A.6 and A.9 (max ratio 10 for "
        "both signs). Its loss is the sum over the sequences, not their mean",
    ),
    Preset(
        "cispo",
        Clip(1.0, 4.0),
        "weight",
        source="CISPO, MiniMax-M1, arXiv 2506.13585, Eq. 4-5, which has no lower bound and gives "
        "no number for the upper one; 5 is what DPPO (arXiv 2602.04879, appendix E) and TRL's "
        "recipe for ScaleRL (arXiv 2510.13786) take",
    ),
    Preset(
        "ce-gppo",
        Clip(0.2),
        GradientPreserving(beta_low=0.75, beta_high=1.0),
        source="CE-GPPO, arXiv 2509.20712, Eq. 8-10; section 4.1 (epsilon), Table 1 (the betas of "
        "the better 7B run; 0.5 and 1 are the others)",
    ),
    Preset(
        "gmpo",
        Clip.from_log_ratio(0.4),
        ratio_level="geometric-mean",
        loss_agg_mode="seq-mean-token-mean",
        source="GMPO, arXiv 2507.20673, Eq. 4 and Algorithm 1; section 3, clipping wider",
    ),
    Preset(
        "gspo",
        Clip(3e-4, 4e-4),
        ratio_level="sequence",
        loss_agg_mode="seq-mean-token-mean",
        source="GSPO, arXiv 2507.18071, Eq. 5-7; section 5.1",
    ),
    Preset(
        "luspo",
        Clip(2e-3, 2.5e-3),
        ratio_level="sequence",
        loss_agg_mode="seq-mean-token-sum",
        source="LUSPO, arXiv 2602.05261: GSPO with the sum over a sequence in place of its mean; "
        "widths of section 5.1 as TRL's documentation cites them (2026-07)",
    ),
    Preset(
        "vespo",
        Clip(1.0, math.inf),
        GammaWeight(2.0, 3.0, 3.0, 2.0),
        ratio_level="sequence-product",
        source="VESPO, arXiv 2602.10693: k and lambda 2 and 3 for A >= 0, 3 and 2 for A < 0, as "
        "its authors' code and TRL 1.16.0 have them; of new/old, times no rollout weights",
    ),
    Preset(
        "bapo",
        Bapo(),
        source="BAPO, arXiv 2510.18927, Eq. 8 and Algorithm 1; section 5.1 (the code released "
        "with it differs, see bandpo.schedule.Bapo)",
    ),
)


class _Presets(Mapping[str, Preset]):
    """Presets by name; each look-up copies a region source, because it has a state."""

    def __init__(self) -> None:
        self._by_name = {preset.name: preset for preset in _PRESETS}

    def __getitem__(self, name: str) -> Preset:
        try:
            check_name("preset", name, self._by_name)
        except InvalidValueError as error:
            raise UnknownNameError(str(error)) from None
        found = self._by_name[name]
        if isinstance(found.region, RegionSource):
            return replace(found, region=copy.deepcopy(found.region))
        if found.correction is not None:  # a copy, because a caller may change it
            return replace(found, correction=dict(found.correction))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return f"<presets: {', '.join(self)}>"

    def _repr_html_(self) -> str:
        fields = (
            "name", "region", "surrogate", "dual_clip", "ratio_level", "log_ratio_penalty",
            "correction", "source",
        )  # fmt: skip
        rows = ([getattr(preset, field) for field in fields] for preset in _PRESETS)
        return html_table(fields, rows)


PRESETS: Final[Mapping[str, Preset]] = _Presets()
"""All presets by name, to go through; `preset` returns one."""


def preset(name: str) -> Preset:
    """Returns the preset of a method; a region that changes is a new one at each call.

    ``"bandpo-kl"`` is BandPO's rule: the band of KL(old || new) with delta 0.05, and no ratio above
    10. The cap matters: without it the upper bound grows without limit as p falls (48 782 at
    p = 1e-6), so that one rare token may take almost the whole gradient of a batch. As to delta,
    0.05 is the paper's. In this project's study of small tasks, docs/evidence.md, 0.001 to 0.005
    did better on two of three where some rewards were wrong, and no difference was significant
    otherwise.

    Args:
        name: The name of a method, one of `PRESETS`.

    Raises:
        UnknownNameError: If there is none of that name; the message lists those there are.
    """
    return PRESETS[name]


def __dir__() -> list[str]:
    return ["PRESETS", "Preset", "preset"]
