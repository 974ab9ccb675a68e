from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import bandpo
from bandpo import cli, demo
from bandpo.demo.report import conclusion, headline
from bandpo.demo.result import BIN_NAMES
from bandpo.demo.rule import FIXED, FIXED_SPEC, NO_CLIP, PAPER_DELTA, band_name, regions
from bandpo.error import InvalidTypeError, InvalidValueError, OutputPathError
from bandpo.record import read_tokens
from bandpo.spec import spec_from_region
from bandpo.table import TARGET

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import torch

from bandpo import plot
from bandpo.demo import experiment, grpo, task
from bandpo.demo.figure import demo_figure
from bandpo.loss import PROBABILITY_EDGES

BAND, PAPER = "KL band 0.01", "KL band 0.05"
RULES = (BAND, PAPER, FIXED, NO_CLIP)
NOISES = (0.0, 0.05)
SMALL: dict[str, Any] = {
    "seeds": 2,
    "batches": 3,
    "prompts": 8,
    "prompts_per_batch": 8,
    "inner_steps": 3,
    "pretrain_steps": 10,
    "quiet": True,
}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "demo.png"


@pytest.fixture(scope="module")
def small(picture: Path) -> demo.Result:
    return demo.run(picture, **SMALL)


def test_every_rule_runs_on_every_seed_with_finite_numbers(small: demo.Result) -> None:
    assert small.rules == RULES
    assert small.noises == NOISES
    assert [(run.seed, run.noise, run.rule) for run in small.runs] == [
        (seed, noise, rule) for seed in (0, 1) for noise in NOISES for rule in RULES
    ]
    for run in small.runs:
        assert len(run.reward) == len(run.entropy) == SMALL["batches"] + 1
        assert all(0.0 <= reward <= 1.0 for reward in run.reward)
        assert all(0.0 <= entropy <= math.log(300) for entropy in run.entropy)
        tokens = sum(run.positive_tokens) + sum(run.negative_tokens)
        assert tokens <= SMALL["batches"] * SMALL["prompts"] * small.settings.group
        for clipped, counted in (
            (run.clipped_up, run.positive_tokens),
            (run.clipped_down, run.negative_tokens),
        ):
            assert all(0 <= part <= whole for part, whole in zip(clipped, counted, strict=True))
    assert sum(sum(run.positive_tokens) for run in small.runs) > 0


def test_all_runs_of_a_seed_start_from_the_same_policy(small: demo.Result) -> None:
    for seed in (0, 1):
        assert len({run.reward[0] for run in small.runs if run.seed == seed}) == 1
    assert small.runs[0].reward[0] != small.runs[-1].reward[0]


def test_runs_of_a_seed_draw_the_same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch is the same, and later ones have the same prompts and uniform numbers."""
    rewarded: list[tuple[torch.Tensor, torch.Tensor]] = []
    uniforms: list[torch.Tensor] = []
    noises: list[float] = []
    reward, flipped = task.reward, grpo.flipped

    def seen_reward(answers: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        rewarded.append((answers, right))
        return reward(answers, right)

    def seen_flipped(rewards: torch.Tensor, uniform: torch.Tensor, noise: float) -> torch.Tensor:
        uniforms.append(uniform)
        noises.append(noise)
        return flipped(rewards, uniform, noise)

    monkeypatch.setattr(grpo, "reward", seen_reward)
    monkeypatch.setattr(grpo, "flipped", seen_flipped)
    demo.run(None, **{**SMALL, "seeds": 1})
    batches, runs = SMALL["batches"], len(NOISES) * len(RULES)
    assert noises == [noise for noise in NOISES for _ in range(len(RULES) * batches)]
    for run in range(1, runs):
        for batch in range(batches):
            ours, first = run * batches + batch, batch
            assert torch.equal(rewarded[ours][1], rewarded[first][1])
            assert torch.equal(uniforms[ours], uniforms[first])
        assert torch.equal(rewarded[run * batches][0], rewarded[0][0])
    assert not torch.equal(uniforms[0], uniforms[1])


def test_only_the_flips_differ_between_clean_and_noisy_runs() -> None:
    """A noise below every uniform number but 0, of which float32 has 2^24, flips nothing."""
    rare = demo.run(None, **{**SMALL, "noise": 1e-12})
    for rule in RULES:
        for clean, noisy in zip(rare.of(rule, 0.0), rare.of(rule, 1e-12), strict=True):
            assert replace(noisy, noise=0.0) == clean


def test_noise_changes_runs(small: demo.Result) -> None:
    for rule in RULES:
        for clean, noisy in zip(small.of(rule, 0.0), small.of(rule, 0.05), strict=True):
            assert clean.reward[1] != noisy.reward[1]


@pytest.mark.parametrize("noise", [0.0, 0.125, 0.5])
def test_a_flip_shrinks_what_a_reward_carries(noise: float) -> None:
    """The mean over uniform numbers is noise + (1 - 2*noise)*reward, so at 1/2 it is constant."""
    rewards = torch.tensor([[0.0], [1.0]]).expand(2, 1024)
    uniform = (torch.arange(1024) / 1024).expand(2, 1024)  # exact in float32
    means = grpo.flipped(rewards, uniform, noise).mean(1)
    assert means.tolist() == [noise, 1.0 - noise]


def test_no_token_is_clipped_without_clipping(small: demo.Result) -> None:
    for noise in NOISES:
        for run in small.of(NO_CLIP, noise):
            assert sum(run.clipped_up) == sum(run.clipped_down) == 0


def test_rules_are_those_of_their_names() -> None:
    rules = regions(0.01)
    assert tuple(rules) == RULES
    old = np.log([1e-3, 0.01, 0.3, 0.9])
    for name, delta in ((BAND, 0.01), (PAPER, PAPER_DELTA)):
        log_lower, log_upper = rules[name].log_bounds(old)
        exact_lower, exact_upper = bandpo.Band("kl", delta).cap(10.0).log_bounds(old)
        # The target of a table is in log_upper and in the lower bound itself.
        np.testing.assert_allclose(log_upper, exact_upper, rtol=0, atol=TARGET)
        np.testing.assert_allclose(np.exp(log_lower), np.exp(exact_lower), rtol=0, atol=TARGET)
    lower, upper = rules[FIXED].bounds(old)
    assert (lower.tolist(), upper.tolist()) == ([0.5] * 4, [2.0] * 4)
    lower, upper = rules[NO_CLIP].bounds(old)
    assert (lower.tolist(), upper.tolist()) == ([0.0] * 4, [math.inf] * 4)


def test_a_band_of_the_published_radius_is_run_once() -> None:
    assert tuple(regions(PAPER_DELTA)) == (band_name(PAPER_DELTA), FIXED, NO_CLIP)
    result = demo.run(None, **{**SMALL, "seeds": 1, "batches": 1, "delta": PAPER_DELTA})
    assert result.rules == (PAPER, FIXED, NO_CLIP)
    assert f"the final reward of {PAPER}" in result.conclusion


def test_the_same_seeds_give_the_same_result(small: demo.Result) -> None:
    again = demo.run(None, **SMALL)
    assert (again.runs, again.conclusion) == (small.runs, small.conclusion)


def test_the_picture_is_a_png(small: demo.Result, picture: Path) -> None:
    assert small.picture == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]


def test_the_result_is_json(small: demo.Result) -> None:
    document = json.loads(json.dumps(small.as_dict(), allow_nan=False))
    assert document["settings"]["seeds"] == 2
    assert document["settings"]["noise"] == 0.05
    run = document["runs"][-1]
    assert (run["rule"], run["noise"]) == (NO_CLIP, 0.05)
    assert run["mean_reward"] == pytest.approx(np.mean(run["reward"]), rel=1e-12)
    for word in ("clean", "noisy"):
        assert set(document[f"clip_fraction_up_{word}"]) == set(RULES)
        fractions = document[f"clip_fraction_down_{word}"][BAND]
        assert len(fractions) == len(document["probability_bins"])


def report(result: demo.Result, width: int) -> str:
    written = StringIO()
    demo.print_report(result, Console(file=written, width=width))
    return written.getvalue()


def test_a_demo_records_its_first_run_and_offers_its_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    result = demo.run(None, tokens="a demo-tokens", **SMALL)
    log = read_tokens("a demo-tokens")
    [tokens] = log
    # One inner step of each batch, in which only later ones have other ratios than 1.
    assert len(tokens.step) == 3 * 8 * 16
    assert len(set(tokens.step.tolist())) == 3
    assert (tokens.weight == 1.0).all()
    assert log.metadata.rule == {"region": FIXED_SPEC, "surrogate": "min-clip"}
    assert spec_from_region(regions(0.01)[FIXED]) == FIXED_SPEC
    *_, sentence, command = report(result, 80).splitlines()
    assert sentence == "Other rules on these tokens:"
    program, *words = shlex.split(command)
    assert program == "bandpo"
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    for rule in ("dapo", "bandpo-kl", "(kl@0.01).cap(10)"):
        assert rule in printed
    assert Path("a demo.html").exists()


def test_a_demo_replaces_the_tokens_of_another_and_gives_the_same_numbers(
    small: demo.Result, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "notes.txt").touch()
    for _ in range(2):
        result = demo.run(None, tokens=tmp_path, **SMALL)
    assert sum(len(part.step) for part in read_tokens(tmp_path)) == 3 * 8 * 16
    assert (tmp_path / "notes.txt").exists()
    assert result.runs == small.runs


def test_the_report_begins_with_the_conclusion(small: demo.Result) -> None:
    text = " ".join(report(small, 80).split())
    assert text.startswith(" ".join(small.conclusion.split()))
    for rule in RULES:
        assert rule in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_report_cuts_no_number(small: demo.Result, width: int) -> None:
    text = report(small, width)
    assert "…" not in text
    lines = [line for line in text.splitlines() if not line.startswith("Picture:")]
    assert max(map(len, lines)) <= width


def test_numbers_have_the_digits_that_show_a_difference() -> None:
    clean = {BAND: [0.0304], PAPER: [0.0301], FIXED: [0.0302], NO_CLIP: [0.0301]}
    text = conclusion(made_up(clean, clean))
    assert "KL band 0.01 (0.0304) was higher than KL band 0.05 (0.0301), clip [0.5, 2]" in text


def test_the_picture_shows_each_rule_with_its_last_values(small: demo.Result) -> None:
    figure = demo_figure(small, regions(0.01))
    clean, noisy, entropy, rules = figure.axes
    for axes, name, noise in (
        (clean, "reward", 0.0),
        (noisy, "reward", 0.05),
        (entropy, "entropy", 0.05),
    ):
        for rule, text in zip(RULES, axes.texts, strict=True):
            last = np.median([getattr(run, name)[-1] for run in small.of(rule, noise)])
            assert text.get_text() == f"{rule}\n{last:.3g}"
    assert clean.get_ylim() == noisy.get_ylim()
    assert {text.get_text() for text in rules.texts} == {BAND, PAPER, FIXED}
    assert " ".join(figure.texts[0].get_text().split()) == headline(small)


def test_nothing_is_printed_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    demo.run(None, **{**SMALL, "seeds": 1, "batches": 1})
    assert capsys.readouterr() == ("", "")


def test_progress_counts_every_stage_to_its_end() -> None:
    last: dict[str, tuple[int, int]] = {}
    demo.run(
        None,
        progress=lambda stage, done, total: last.update({stage: (done, total)}),
        **{**SMALL, "seeds": 1, "batches": 2},
    )
    assert last == {"pre-training": (10, 10), **dict.fromkeys(RULES, (4, 4))}


def test_torch_is_left_as_it_was() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        threads, state = torch.get_num_threads(), torch.get_rng_state()

        def interrupt(stage: str, done: int, total: int) -> None:
            if stage == BAND and done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            demo.run(None, progress=interrupt, **SMALL)
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["missing/demo.png", "folder.png", "file/demo.png", "demo.txt"])
def test_an_unwritable_output_is_refused_before_training(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(experiment, "run_all", lambda *_: pytest.fail("training began"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputPathError, match="cannot write"):
        demo.run(tmp_path / name, **SMALL)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no devices in folders")
def test_a_device_is_not_replaced_by_a_picture(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("/dev/null")
    with pytest.raises(OutputPathError, match=r"cannot write .*link\.png"):
        plot.check_output(tmp_path / "link.png")


@pytest.mark.parametrize(
    ("module", "output"), [("torch", "None"), ("matplotlib", "'bandpo-demo.png'")]
)
def test_a_missing_extra_is_named(tmp_path: Path, module: str, output: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; from bandpo import demo; demo.run({output})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.stderr.splitlines()[-1] == (
        "bandpo.error.MissingExtraError: "
        f"{module} is not installed; run: pip install '.[demo]' in a checkout of bandpo, "
        "which is not on PyPI yet"
    )


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"seeds": 0}, InvalidValueError),
        ({"seeds": (1, 2)}, InvalidTypeError),
        ({"batches": 0}, InvalidValueError),
        ({"group": 1}, InvalidValueError),
        ({"prompts": 301}, InvalidValueError),
        ({"prompts_per_batch": 9}, InvalidValueError),
        ({"learning_rate": math.nan}, InvalidValueError),
        ({"delta": 0.0}, InvalidValueError),
        ({"noise": 0.0}, InvalidValueError),
        ({"noise": 0.5}, InvalidValueError),
        ({"noise": math.nan}, InvalidValueError),
        ({"noise": "0.1"}, InvalidTypeError),
    ],
)
def test_a_bad_setting_is_refused(setting: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(setting))):
        demo.run(None, **{**SMALL, **setting})


def test_the_command_passes_the_noise_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--noise", "0.7", "-o", str(tmp_path / "demo.png")]) == 2
    assert "noise must be above 0 and below 0.5, got 0.7" in capsys.readouterr().err


def test_right_answers_are_rare_and_differ_between_prompts() -> None:
    made = task.make_task(128, seed=3)
    assert len(set(made.right.tolist())) == len(set(map(tuple, made.prompts.tolist()))) == 128
    torch.testing.assert_close(made.corpus.sum(1), torch.ones(128))
    share = made.corpus.gather(1, made.right[:, None])
    torch.testing.assert_close(share, torch.full_like(share, 0.005), atol=1e-4, rtol=0)
    answers = torch.stack([made.right, (made.right + 1) % 300], 1)
    assert task.reward(answers, made.right).tolist() == [[1.0, 0.0]] * 128


def test_advantages_are_group_normalised() -> None:
    advantages = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0] * 4]))
    torch.testing.assert_close(advantages[0], torch.tensor([1.5, -0.5, -0.5, -0.5]))
    assert advantages[1].tolist() == [0.0] * 4


def test_clip_counts_are_by_side_and_bin_of_unmasked_tokens() -> None:
    nan = math.nan
    p = torch.tensor([[5e-4, 5e-3, 0.05], [0.3, 0.9, nan]])
    ratio = torch.tensor([[2.0, 1.2, 0.5], [0.5, 2.0, nan]])
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, nan]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    counts = grpo.clip_counts(
        p.log(), p.log() + ratio.log(), advantages, mask, region=bandpo.Clip(0.2, 0.28)
    )
    assert counts.tolist() == [
        [1, 1, 1, 0, 0],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 0],
    ]


def test_bins_are_those_of_the_metrics() -> None:
    first, *edges = PROBABILITY_EDGES[1:-1]
    between = [f"{low:g}-{high:g}" for low, high in zip([first, *edges], edges, strict=False)]
    assert (f"< {first:g}", *between, f">= {edges[-1]:g}") == BIN_NAMES


def made_up(
    clean: Mapping[str, Sequence[float]],
    noisy: Mapping[str, Sequence[float]],
    entropy: Mapping[str, Sequence[float]] | None = None,
) -> demo.Result:
    """A result of these final rewards by rule and seed, whose curves begin at 0; entropy is 1."""
    seeds = len(clean[BAND])
    none = (0,) * 5
    runs = [
        demo.Run(
            rule,
            seed,
            noise,
            (0.0, final[rule][seed]),
            (5.0, 1.0 if entropy is None else entropy[rule][seed]),
            none,
            none,
            none,
            none,
        )
        for seed in range(seeds)
        for noise, final in zip(NOISES, (clean, noisy), strict=True)
        for rule in RULES
    ]
    return demo.Result(demo.Settings(seeds=seeds, batches=1), (0.005,) * seeds, tuple(runs))


def test_conclusion_compares_the_band_seed_by_seed() -> None:
    clean = {BAND: [0.5, 0.6, 0.7], PAPER: [0.5] * 3, FIXED: [0.6] * 3, NO_CLIP: [0.8] * 3}
    noisy = {BAND: [0.4, 0.5, 0.6], PAPER: [0.3] * 3, FIXED: [0.2] * 3, NO_CLIP: [0.1] * 3}
    entropy = {BAND: [2.0] * 3, PAPER: [2.0] * 3, FIXED: [1.5] * 3, NO_CLIP: [1.9, 2.1, 1.9]}
    assert conclusion(made_up(clean, noisy, entropy)).splitlines() == [
        "Final reward with clean rewards 0.50 (KL band 0.05) to 0.80 (no clipping); with 5 % of "
        "rewards flipped 0.10 (no clipping) to 0.50 (KL band 0.01).",
        "With clean rewards, the final reward of KL band 0.01 (0.60) was lower than no clipping "
        "(0.80) on every seed; within the seed spread of KL band 0.05 (0.50; higher on 2 of 3, "
        "lower on 0) and clip [0.5, 2] (0.60; higher on 1 of 3, lower on 1). Its mean reward over "
        "all batches (0.30) was lower than no clipping (0.40) on every seed; within the seed "
        "spread of KL band 0.05 (0.25; higher on 2 of 3, lower on 0) and clip [0.5, 2] (0.30; "
        "higher on 1 of 3, lower on 1). Its final entropy (2.00) was higher than clip [0.5, 2] "
        "(1.50) on every seed; within the seed spread of KL band 0.05 (2.00; higher on 0 of 3, "
        "lower on 0) and no clipping (1.90; higher on 2 of 3, lower on 1).",
        "With 5 % of rewards flipped, the final reward of KL band 0.01 (0.50) was higher than KL "
        "band 0.05 (0.30), clip [0.5, 2] (0.20) and no clipping (0.10) on every seed. Its mean "
        "reward over all batches (0.25) was higher than KL band 0.05 (0.15), clip [0.5, 2] (0.10) "
        "and no clipping (0.05) on every seed. Its final entropy (2.00) was higher than clip "
        "[0.5, 2] (1.50) on every seed; within the seed spread of KL band 0.05 (2.00; higher on 0 "
        "of 3, lower on 0) and no clipping (1.90; higher on 2 of 3, lower on 1).",
        "The study in docs/evidence.md has 8 seeds, and more tasks, rules and rates of noise.",
    ]


def test_conclusion_of_few_seeds_states_how_few() -> None:
    final = {rule: [0.5, 0.6] for rule in RULES}
    *_, last = conclusion(made_up(final, final)).splitlines()
    assert last.startswith("So few seeds (2) do not show how far they spread.")
    assert "docs/evidence.md" in last


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plot.band_figure({"clip": bandpo.Clip(0.2)})

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OutputPathError, match="No space left"):
        plot.save(figure, tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []
