"""The policy loss of verl against verl's own functions, its configuration and its processes."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("verl")

import cloudpickle
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.metric import Metric
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from bandpo import doctor, policy_loss, preset, region_from_spec
from bandpo.conform.batch import Loss, LossOf, MicroBatch
from bandpo.conform.compare import report
from bandpo.conform.frameworks import framework_report
from bandpo.conform.ours import KNOWN
from bandpo.conform.vectors import FILE, Vector, read_vectors
from bandpo.error import InvalidTypeError, InvalidValueError
from bandpo.integrations.epsilons import epsilons
from bandpo.integrations.verl import BandPOPolicyLossConfig
from bandpo.loss import GlobalBatch
from bandpo.presets import PRESETS
from bandpo.record import read_tokens
from bandpo.replay.report import configuration
from support.trainer_batch import REGION, TrainerBatch, assert_same, trainer_batch
from support.waits import Waits

ROOT = Path(__file__).parents[2]

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
NO_DUAL_CLIP = 1e30
"""A clip_ratio_c that nothing reaches; verl's vanilla loss needs one."""

COUNTS = {
    "dp_size": 2,
    "batch_num_tokens": 29,
    "global_batch_size": 7,
    "loss_scale_factor": 11,
}


def actor(policy: Any = None, counts: Mapping[str, Any] | None = None, **more: Any) -> ActorConfig:
    """verl's configuration of an actor, with a policy loss of ours."""
    given = {} if policy is None else {"policy_loss": policy}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        global_batch_info=dict(counts or {}),
        **given,
        **more,
    )


def called(
    name: str, config: ActorConfig, batch: TrainerBatch, mode: str, weights: bool = False
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """Loss and gradient of a loss in verl's registry, called as verl does, and its metrics."""
    metrics: dict[str, Any] = {}

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor
        value, found = get_policy_loss_fn(name)(
            old_log_prob=batch.old_log_prob,
            log_prob=log_prob,
            advantages=batch.advantages,
            response_mask=batch.response_mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=batch.weights if weights else None,
        )
        metrics.update(found)
        return value

    return batch.of(loss), metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", [{}, COUNTS], ids=["local", "global"])
@pytest.mark.parametrize("dual_clip", [None, 2.0])
@pytest.mark.parametrize("weights", [False, True])
def test_verls_own_loss_with_the_bands_epsilons_is_the_loss_bandpo(
    mode: str, counts: dict[str, Any], dual_clip: float | None, weights: bool
) -> None:
    batch = trainer_batch()
    low, high = epsilons(region_from_spec(REGION), batch.old_log_prob)
    verls = actor(
        counts=counts,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual_clip or NO_DUAL_CLIP,
    )
    ours = actor(BandPOPolicyLossConfig(region=REGION, dual_clip=dual_clip), counts)
    expected, verls_metrics = called("vanilla", verls, batch, mode, weights)
    found, metrics = called("bandpo", ours, batch, mode, weights)
    assert_same(found, expected)
    assert set(verls_metrics) <= set(metrics)
    for name, value in verls_metrics.items():
        if not (weights and "clipfrac" in name):  # of a token of weight 0 nothing is clipped
            assert metrics[name] == pytest.approx(value, rel=1e-6), name
    assert metrics["actor/pg_clipfrac"] > 0
    assert (metrics["actor/pg_clipfrac_lower"] > 0) == (dual_clip is not None)
    assert all(name.startswith("actor/") for name in metrics)
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_policy_loss_with_verls_counts(mode: str) -> None:
    batch = trainer_batch()
    for name in ("bandpo-kl", "dppo-kl", "cispo", "sapo", "ce-gppo", "topr", "cppo"):
        config = BandPOPolicyLossConfig(preset=name)
        wanted = batch.wanted(
            **preset(name).arguments(loss_agg_mode=mode),
            global_batch=GlobalBatch(29, 7, 2, 11),
        )
        assert_same(called("bandpo", actor(config, COUNTS), batch, mode)[0], wanted)
    others: dict[str, dict[str, Any]] = {
        "gspo": {"region": "clip@0.9,9"}, "gmpo": {}, "vespo": {}
    }  # fmt: skip
    for name, changes in others.items():
        config = BandPOPolicyLossConfig(preset=name, **changes)
        wanted = batch.wanted(**preset(name).arguments(loss_agg_mode=mode, **changes))
        assert_same(called("bandpo", actor(config), batch, mode)[0], wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [(1, 3), (2, 2), (1, 1, 1, 1)])
def test_micro_batches_of_two_ranks_add_up_to_the_whole(mode: str, split: tuple[int, ...]) -> None:
    batch = trainer_batch()
    counts = {"batch_num_tokens": 13, "global_batch_size": 3, "loss_scale_factor": 6}
    config = BandPOPolicyLossConfig(region=REGION)
    whole, _ = called("bandpo", actor(config, {**counts, "dp_size": 1}), batch, mode)
    names = ("old_log_prob", "log_prob", "advantages", "response_mask", "rollout_log_prob")
    pieces = zip(*(getattr(batch, name).split(split) for name in (*names, "weights")), strict=True)
    parts = [
        called("bandpo", actor(config, {**counts, "dp_size": 2}), TrainerBatch(*piece), mode)[0]
        for piece in pieces
    ]
    loss = sum(part[0] for part in parts) / 2  # the mean over ranks that DDP takes
    gradient = torch.cat([part[1] for part in parts]) / 2
    assert_same((torch.as_tensor(loss), gradient), whole)


def test_without_fields_of_ours_the_rule_is_the_papers_at_the_radius_of_the_study() -> None:
    batch = trainer_batch()
    wanted = batch.wanted(**{**preset("bandpo-kl").arguments(), "region": "(kl@0.01).cap(10)"})
    for config in (actor(PolicyLossConfig(loss_mode="bandpo")), actor(BandPOPolicyLossConfig())):
        assert_same(called("bandpo", config, batch, "token-mean")[0], wanted)
    loss, _ = get_policy_loss_fn("bandpo")(
        batch.old_log_prob, batch.log_prob, batch.advantages, batch.response_mask
    )
    torch.testing.assert_close(loss, wanted[0])


def test_padding_and_autocast_change_nothing() -> None:
    batch = trainer_batch()
    config = actor(BandPOPolicyLossConfig(region=REGION))
    expected, _ = called("bandpo", config, batch, "token-mean")
    found, metrics = called("bandpo", config, batch.with_padding(float("nan")), "token-mean")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert metrics["actor/band/nonfinite_tokens"] == 0
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = called("bandpo", config, batch, "token-mean")
    assert torch.equal(inside[0], expected[0])
    assert torch.equal(inside[1], expected[1])


def test_verls_ppo_loss_takes_loss_and_metrics() -> None:
    batch = trainer_batch()
    lengths = [6, 3, 1, 4]  # verl has no empty response; the token of the third does not count
    prompts = torch.ones(4, 1, dtype=torch.int64)
    nested = {
        "prompts": [*prompts],
        "responses": [torch.ones(n, dtype=torch.int64) for n in lengths],
    }
    for name, values in (
        ("response_mask", batch.response_mask),
        ("old_log_probs", batch.old_log_prob),
        ("advantages", batch.advantages),
        ("rollout_is_weights", batch.weights),
    ):
        nested[name] = [row[:n] for row, n in zip(values, lengths, strict=True)]
    data = TensorDict(
        {
            name: torch.nested.as_nested_tensor(rows, layout=torch.jagged)
            for name, rows in nested.items()
        },
        batch_size=4,
    )
    tensordict_utils.assign_non_tensor(
        data, dp_size=1, batch_num_tokens=13, global_batch_size=4, max_response_len=6
    )
    config = actor(BandPOPolicyLossConfig(region=REGION), loss_agg_mode="seq-mean-token-mean")

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        rows = [
            torch.nn.functional.pad(row[:n], (0, 1))  # left-shifted by the prompt's one token
            for row, n in zip(log_prob, lengths, strict=True)
        ]
        output = {"log_probs": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}
        value: torch.Tensor
        value, metrics = ppo_loss(config, output, data)
        assert all(isinstance(metric, Metric) for metric in metrics.values())
        assert metrics["actor/pg_loss"].aggregate() == pytest.approx(value.item())
        assert metrics["actor/band/valid_tokens"].aggregate() == 13
        assert metrics["actor/pg_clipfrac"].aggregate() > 0
        return value

    wanted = batch.wanted(
        region=REGION,
        rollout_is_weights=batch.weights,
        loss_agg_mode="seq-mean-token-mean",
        global_batch_size=4,
    )
    assert_same(batch.of(loss), wanted)


def composed(*overrides: str, config: str = "ppo_trainer") -> Any:
    """The actor's configuration as verl's trainer has it, checked as its driver and workers do."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        found = compose(
            config,
            [
                "actor_rollout_ref.actor.use_dynamic_bsz=True",
                *(
                    re.sub(r"^\+?", r"\g<0>actor_rollout_ref.actor.", override)
                    for override in overrides
                ),
            ],
        )
    return omega_conf_to_dataclass(found.actor_rollout_ref.actor)


TARGET = "policy_loss._target_=bandpo.integrations.verl.BandPOPolicyLossConfig"


def test_the_configuration_of_the_trainer_reaches_the_loss() -> None:
    batch = trainer_batch()
    found = composed("policy_loss.loss_mode=bandpo")
    assert type(found.policy_loss) is PolicyLossConfig
    wanted = batch.wanted(**{**preset("bandpo-kl").arguments(), "region": "(kl@0.01).cap(10)"})
    assert_same(called("bandpo", found, batch, "token-mean")[0], wanted)

    found = composed(
        "policy_loss.loss_mode=bandpo",
        TARGET,
        "+policy_loss.region='(kl@0.01).cap(10)|clip@0.2,0.28'",
        "+policy_loss.surrogate={name:mask,truncation:3.0}",
        "+policy_loss.log_ratio_penalty=0.01",
        "loss_agg_mode=seq-mean-token-sum",
    )
    rule = found.policy_loss.band.settings.arguments()
    assert rule["region"] == region_from_spec("(kl@0.01).cap(10)|clip@0.2,0.28")
    wanted = batch.wanted(**rule, loss_agg_mode="seq-mean-token-sum")
    assert_same(called("bandpo", found, batch, found.loss_agg_mode)[0], wanted)
    # As Ray and rLLM send it to a worker.
    for module in (pickle, cloudpickle):
        sent = module.loads(module.dumps(found.policy_loss))
        assert_same(called("bandpo", actor(sent), batch, "seq-mean-token-sum")[0], wanted)
        assert len(module.dumps(found.policy_loss)) < 4000


def words(text: str) -> list[str]:
    """The words that a shell makes of the lines about the policy loss."""
    lines = [line for line in text.splitlines() if "policy_loss" in line and line[0] != "#"]
    return [word.replace("actor_rollout_ref.actor.", "") for word in shlex.split("\n".join(lines))]


def test_the_lines_of_the_page_can_be_copied_into_a_command() -> None:
    page = (ROOT / "docs/integrations/verl.md").read_text(encoding="utf-8")
    one, rule = [
        words(block)
        for block in re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        if "policy_loss" in block
    ]
    assert type(composed(*one).policy_loss) is PolicyLossConfig
    found = composed(*rule).policy_loss
    assert found.region == "(kl@0.01).cap(10)|clip@0.2,0.28"
    assert found.schedule == "cosine(0.05, 0.005, 1000)"
    (surrogate,) = words(re.search(r'`("\+.*surrogate=.*")`', page)[1])  # type: ignore[index]
    assert composed(*rule, surrogate).policy_loss.surrogate == {"name": "mask", "truncation": 3.0}


def test_the_lines_of_a_report_can_be_copied_into_a_command() -> None:
    spec = "(kl@0.0123).cap(10)"
    assert composed(*words(configuration(spec))).policy_loss.region == spec


def test_a_record_has_the_tokens_of_losses_with_a_gradient(tmp_path: Path) -> None:
    batch = trainer_batch()
    rule = OmegaConf.create({"name": "mask", "truncation": 3.0})
    policy = BandPOPolicyLossConfig(
        region=REGION,
        surrogate=rule,
        ratio_level="token",
        log_ratio_penalty=0.01,
        record=str(tmp_path / "tokens"),
    )
    sent = pickle.loads(pickle.dumps(policy))  # noqa: S301 -- our own bytes
    for _ in range(10):
        called("bandpo", actor(sent), batch, "token-mean")
    with torch.no_grad():
        get_policy_loss_fn("bandpo")(
            *(batch.old_log_prob, batch.log_prob, batch.advantages, batch.response_mask),
            config=actor(sent),
        )
    del sent  # which writes the rest
    logs = read_tokens(tmp_path / "tokens")
    assert logs.metadata.rule == {
        "region": REGION,
        "surrogate": {"name": "mask", "truncation": 3.0},
        "ratio_level": "token",
        "log_ratio_penalty": 0.01,
    }
    (log,) = logs
    mask = batch.response_mask
    wanted = torch.stack([batch.old_log_prob[mask], batch.log_prob[mask]])
    found = torch.stack([torch.as_tensor(log.old_log_prob), torch.as_tensor(log.log_prob)])
    assert torch.equal(found.float(), wanted)


def test_a_micro_batch_is_turned_to_numbers_by_one_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = trainer_batch()
    copies: list[torch.Tensor] = []
    plain = torch.Tensor.tolist

    def counted(row: torch.Tensor) -> Any:
        copies.append(row)
        return plain(row)

    config = actor(BandPOPolicyLossConfig(region=REGION, record=str(tmp_path / "tokens")))
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    for _ in range(11):  # of which one is recorded
        copies.clear()
        with Waits() as waits:
            get_policy_loss_fn("bandpo")(
                batch.old_log_prob,
                batch.log_prob.requires_grad_(),
                batch.advantages,
                batch.response_mask,
                config=config,
                rollout_is_weights=batch.weights,
            )
    assert waits.names == []
    assert len(copies) == 1


@pytest.mark.parametrize("record", ["", 3, True])
def test_a_record_that_is_no_folder_is_refused(record: Any) -> None:
    with pytest.raises(InvalidTypeError, match="record must be the path of a folder, got"):
        BandPOPolicyLossConfig(record=record)


def test_the_launch_script_has_a_configuration_that_verl_accepts(tmp_path: Path) -> None:
    # Instead of verl, the script starts a program that writes its arguments down.
    python, arguments = tmp_path / "python", tmp_path / "arguments"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@" > {arguments}\n')
    python.chmod(0o755)
    subprocess.run(
        [str(ROOT / "examples" / "verl" / "train.sh"), "trainer.total_epochs=1"],
        check=True,
        env={**os.environ, "PYTHON": str(python), "GPUS": "4"},
    )
    module, *overrides = arguments.read_text().splitlines()[1:]
    assert module == "verl.trainer.main_ppo"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides)
    assert (config.trainer.n_gpus_per_node, config.trainer.total_epochs) == (4, 1)
    validate_config(config, use_reference_policy=False, use_critic=False)
    found = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    settings = found.policy_loss.band.settings
    assert (settings.preset, settings.schedule) == ("bandpo-kl", "linear(0.05, 0.01, 400)")
    assert (found.strategy, found.loss_agg_mode) == ("fsdp2", "token-mean")


def test_verls_worker_trains_with_a_band_whose_delta_follows_its_updates() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "verl" / "update_on_cpu.py"), "3", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = re.findall(
        r"^batch .* reward (.*), clipped in the 4 updates (.*), delta (.*)$",
        done.stdout,
        re.MULTILINE,
    )
    assert [delta for *_, delta in rows] == ["0.050", "0.037", "0.023"], done.stderr
    shares = [[float(share.rstrip("%")) for share in row[1].split(", ")] for row in rows]
    assert [first for first, *_ in shares] == [0.0] * 3  # where all ratios are 1
    assert shares[-1][-1] > 0.0
    assert float(rows[-1][0]) > float(rows[0][0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+policy_loss.region=kl@"], 'region "kl@", column 4'),
        (["+policy_loss.preset=bandpo"], "preset must be one of .* did you mean"),
        (["+policy_loss.dual_clip=0.5"], "dual_clip must be above 1"),
        (["+policy_loss.ratio_level=sequence"], "region must be a Clip with ratio_level"),
        (["+policy_loss.anchor=rollout"], "anchor must be 'old'.*rollout_is=token"),
        (["+policy_loss.correction=tis"], "correction be left out.*rollout_is=token"),
        (["+policy_loss.preset=icepop"], "correction be left out.*rollout_is=token"),
        (["+policy_loss.preset=bapo"], "region must not be learnt from batches with verl"),
        (
            [
                "+policy_loss.schedule='entropy(0.05, target=0.3, rate=0.1, min_value=0.01, "
                "max_value=0.2)'"
            ],
            "schedule must be over steps with verl",
        ),
        (["policy_loss.loss_mode=vanilla"], "loss_mode must be 'bandpo'.*got 'vanilla'"),
        (["policy_loss.loss_mode=bypass_mode"], "loss_mode must be 'bandpo'.*bypass_mode is True"),
        (["+policy_loss.region=0.2"], "region must be a spec, such as .* got 0.2"),
        (
            ["policy_loss.clip_cov_ub=3.0"],
            "clip_cov_ub must be left out with loss_mode 'bandpo'.* got 3.0; .* region, preset",
        ),
        (["policy_loss.ppo_kl_coef=0.2"], "ppo_kl_coef must be left out .* got 0.2"),
        (["policy_loss.kl_cov_ratio=0.1"], "kl_cov_ratio must be left out .* got 0.1"),
        (["policy_loss.dro_beta=0.1"], "dro_beta must be left out .* got 0.1"),
        (["+policy_loss.regoin=kl@0.05"], "unexpected keyword argument 'regoin'"),
    ],
)
def test_a_configuration_that_the_loss_cannot_have_is_refused_before_a_run(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        composed("policy_loss.loss_mode=bandpo", TARGET, *overrides)


def test_fields_that_no_class_reads_are_refused() -> None:
    batch = trainer_batch()
    config = OmegaConf.create({"policy_loss": {"loss_mode": "bandpo", "region": "kl@0.01"}})
    with pytest.raises(InvalidTypeError, match=r"to have region, got DictConfig; set .*_target_="):
        called("bandpo", config, batch, "token-mean")
    with pytest.raises(InvalidTypeError, match=r"verl \d.* gives its policy loss rollout_log_prob"):
        get_policy_loss_fn("bandpo")(
            batch.old_log_prob, batch.log_prob, batch.advantages, batch.response_mask,
            rollout_log_prob=batch.rollout_log_prob,
        )  # fmt: skip
    with pytest.raises(InvalidValueError, match="batch_num_tokens must be given"):
        called("bandpo", actor(counts={"dp_size": 2}), batch, "token-mean")
    # verl's own losses take the width of a micro-batch, and depend on the split.
    counts = {**COUNTS, "loss_scale_factor": None}
    with pytest.raises(InvalidValueError, match="loss_scale_factor must be given"):
        called("bandpo", actor(counts=counts), batch, "seq-mean-token-sum-norm")


def test_a_schedule_follows_the_optimiser_of_the_actor_alone() -> None:
    batch = trainer_batch()
    config = actor(BandPOPolicyLossConfig(region="kl@1", schedule="linear(0.5, 0.25, 2)"))
    weight = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.AdamW([weight], lr=1e-3)
    critic = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    given = batch.old_log_prob, batch.advantages, batch.response_mask

    def loss(log_prob: torch.Tensor) -> tuple[torch.Tensor, float]:
        old, advantages, mask = given
        value, metrics = get_policy_loss_fn("bandpo")(
            old, log_prob, advantages, mask, config=config
        )
        delta = metrics["actor/band/delta"]
        expected = policy_loss(old, log_prob, advantages, mask, region=f"kl@{delta}")
        assert value.item() == pytest.approx(expected.loss.item(), rel=1e-6)
        return value, delta

    seen = []
    for _ in range(4):
        critic.step()
        for _ in range(2):  # micro-batches
            value, delta = loss(batch.log_prob + weight)
            value.backward()  # type: ignore[no-untyped-call]
        seen.append(delta)
        optimiser.step()
        critic.step()
        loss(batch.log_prob)  # of an evaluation, without gradient, which no step follows
        critic.step()
    assert seen == [0.5, 0.375, 0.25, 0.25]


def test_verls_losses_agree_with_as_many_vectors_as_documented() -> None:
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    documented = re.search(
        r"with verl ([0-9.]+) shows [a-z ]+: (\d+) of\s(\d+) vectors agree", text
    )
    assert documented
    found = framework_report("verl", read_vectors(FILE))
    agreeing = sum(verdict.agrees for verdict in found.verdicts)
    numbers = (metadata.version("verl"), str(agreeing), str(len(found.verdicts)))
    assert documented.groups() == numbers


def test_every_rule_that_verl_can_have_agrees_with_the_vectors() -> None:
    def loss_of(vector: Vector) -> LossOf | None:
        try:
            config = BandPOPolicyLossConfig(preset=vector.preset)
        except InvalidValueError:
            return None

        def loss(batch: MicroBatch) -> Loss:
            counts = {
                "dp_size": 1,
                "batch_num_tokens": batch.tokens,
                "global_batch_size": batch.sequences,
                "loss_scale_factor": batch.width,
            }
            value, metrics = get_policy_loss_fn("bandpo")(
                old_log_prob=batch.old_log_prob,
                log_prob=batch.log_prob,
                advantages=batch.advantages,
                response_mask=batch.response_mask,
                loss_agg_mode=batch.mode,
                config=actor(config, counts),
            )
            shares = [metrics[f"actor/band/clip_fraction_{side}"] for side in ("low", "high")]
            tokens = metrics["actor/band/valid_tokens"]
            return Loss(value, torch.tensor([round(share * tokens) for share in shares]))

        return loss

    found = report("verl bandpo", read_vectors(FILE), loss_of, known=KNOWN)
    assert [verdict for verdict in found.verdicts if not verdict.agrees and not verdict.known] == []
    presets = {verdict.preset for verdict in found.verdicts}
    refused = {name for name in PRESETS if PRESETS[name].correction is not None}
    assert presets == {vector.preset for vector in read_vectors(FILE)} - refused - {"m2po", "bapo"}


@pytest.mark.parametrize(
    "code",
    ["import verl", "import bandpo.integrations.verl"],
    ids=["verl first", "the adapter first"],
)
def test_a_process_with_the_variable_has_the_loss(code: str) -> None:
    code += """
from verl.trainer.ppo.core_algos import get_policy_loss_fn
print(get_policy_loss_fn("bandpo").__module__)
"""
    variables = {
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "VERL_USE_EXTERNAL_MODULES": "bandpo.integrations.verl",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.stdout.strip() == "bandpo.integrations.verl", done.stderr


def test_a_ray_worker_has_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

    @ray.remote  # type: ignore[untyped-decorator]
    def loss_in_a_worker(config: Any, batch: tuple[torch.Tensor, ...]) -> tuple[int, float]:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn

        return os.getpid(), float(get_policy_loss_fn("bandpo")(*batch, config=config)[0])

    batch = trainer_batch()
    tensors = batch.old_log_prob, batch.log_prob, batch.advantages, batch.response_mask
    try:
        config = actor(BandPOPolicyLossConfig(region=REGION))
        worker, loss = ray.get(loss_in_a_worker.remote(config, tensors))
    finally:
        ray.shutdown()
    assert worker != os.getpid()
    assert loss == pytest.approx(policy_loss(*tensors, region=REGION).loss.item(), rel=1e-6)


def test_a_process_finds_the_loss_by_the_entry_point() -> None:
    assert metadata.entry_points(group="verl.plugins", name="bandpo")
    found = doctor.report(verl=True)
    assert (found["verl_loss"], found["problems"]) == (True, [])
