"""The study of clip rules: results that resume, seeds, statistics and the bandit's closed form."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import mpmath
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pyarrow")
pytest.importorskip("scipy")

import torch

from bandpo import Band, policy_loss, region_from_spec
from bandpo.error import InvalidValueError
from bandpo.region.combined import Combined
from examples.rlvr import bandit, compare, runner
from examples.rlvr.__main__ import main, parser
from examples.rlvr.figure import FIGURES, write_figure
from examples.rlvr.grid import STUDIES, Chunk
from examples.rlvr.policy import SMALL, pretrain
from examples.rlvr.report import MATCHED, report
from examples.rlvr.rule import FAMILIES, MULTI_TOKEN_FAMILIES, Rule, rules_of
from examples.rlvr.task import PLUS, STOP, TASKS, Countdown
from examples.rlvr.train import Copy, Run, Setting, _scaled, pass_at, train

RULES = (Rule("kl", "(kl@0.005).cap(10)"), Rule("fixed clip", "clip@0.2"))
RESULTS = Path(runner.__file__).parent / "results"
COPIES = tuple(Copy(rule, 3) for rule in RULES)
SHORT = Setting(1e-3, batches=2, inner_steps=2, group=4, prompts_per_batch=8)
README = Path(runner.__file__).with_name("README.md")


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Final answers in two parts in place of four, and one thread, as the runner has it.

    Final answers take most of the time of a short run. Threads wait for each other on busy cores.
    """
    monkeypatch.setattr("examples.rlvr.train.FINAL_ANSWERS", 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def chunks() -> list[Chunk]:
    return [Chunk("test", task, SHORT, COPIES, pretrain_steps=2) for task in TASKS]


def numbers(folder: Path) -> list[dict[str, object]]:
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in runner.read(folder.parent, folder.name)
    ]


def test_a_run_that_was_cut_off_ends_with_the_numbers_of_a_whole_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runner.run(chunks(), whole, quiet=True) == 0
    assert runner.run(chunks(), parts, seconds=0.0, quiet=True) == len(TASKS)
    assert runner.run(chunks()[:1], parts, quiet=True) == 0
    kept = parts / chunks()[0].name
    written = kept.stat().st_mtime_ns
    assert runner.run(chunks(), parts, quiet=True) == 0
    assert kept.stat().st_mtime_ns == written
    assert numbers(parts) == numbers(whole)
    assert len(numbers(whole)) == len(TASKS) * len(RULES)


def test_the_commands_of_the_readme_are_accepted() -> None:
    lines = [line for line in README.read_text().splitlines() if line.startswith("python -m ")]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[:3] == ["python", "-m", "examples.rlvr"]
        parser().parse_args(words[3:])


@pytest.mark.parametrize(
    "words", ["report", "figure radius", "best tuning", "pack axes", "count finals"]
)
def test_missing_results_are_named(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rlvr", *words.split(), "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    study = "axes" if words == "pack axes" else "tuning"
    assert f"argument --results: {tmp_path} has no results of {study}" in capsys.readouterr().err


def test_an_unknown_mismatch_is_named() -> None:
    with pytest.raises(InvalidValueError, match="mismatch"):
        Setting(1e-3, mismatch="fp8")


def runs_of(name: str, copies: list[Copy], setting: Setting = SHORT) -> list[Run]:
    """Runs of policies that are hardly pre-trained."""
    tasks = {copy.seed: TASKS[name](copy.seed) for copy in copies}
    starts = {seed: pretrain(task, seed=seed, size=SMALL, steps=2) for seed, task in tasks.items()}
    return train(starts, tasks, copies, setting, size=SMALL, device="cpu")


def test_runs_depend_on_the_seed_and_the_stream() -> None:
    first, again, stream, seed = (
        runs_of("many", [Copy(RULES[0], *of)]) for of in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again
    assert first not in (stream, seed)


@pytest.mark.parametrize("task", ["rare", "countdown"])
def test_a_run_is_the_same_among_others(task: str) -> None:
    """Of another rule, seed, stream and noise, with one inner step, so that no answer changes."""
    once = replace(SHORT, inner_steps=1)
    others = [Copy(RULES[0], 1), Copy(RULES[0], 0, 1), Copy(RULES[1], 0, 0, 0.5)]
    together = runs_of(task, others, once)
    for copy, run in zip(others[1:], together[1:], strict=True):
        (alone,) = runs_of(task, [copy], once)
        np.testing.assert_allclose(run.reward, alone.reward, rtol=1e-4)
        np.testing.assert_allclose(run.entropy, alone.entropy, rtol=1e-4)
        assert run.distinct == pytest.approx(alone.distinct, rel=0.02)


def test_rules_are_equal_with_one_inner_step_on_fresh_answers() -> None:
    once = replace(SHORT, inner_steps=1)
    kl, clip = runs_of("rare", [Copy(rule, 0) for rule in RULES], once)
    np.testing.assert_allclose(kl.reward, clip.reward, rtol=1e-5)


def test_every_rule_of_a_study_has_its_runs_on_every_seed() -> None:
    for task in TASKS:
        for study in STUDIES.values():
            for _, copies in study(task):
                every = list(copies)
                names = {copy.rule for copy in every}
                places = {(copy.seed, copy.stream, copy.noise) for copy in every}
                assert len(set(every)) == len(every) == len(names) * len(places)


@pytest.mark.parametrize(
    ("families", "family"),
    [(table, family) for table in (FAMILIES, MULTI_TOKEN_FAMILIES) for family in table],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_strength_is_a_rule_of_the_loss(families: dict[str, list[str]], family: str) -> None:
    make = torch.Generator().manual_seed(0)
    old = -4.0 * torch.rand(6, 5, generator=make)
    new = torch.clamp(old + 0.3 * torch.randn(6, 5, generator=make), max=0.0).requires_grad_()
    advantages, mask = torch.randn(6, generator=make), torch.ones(6, 5)
    rules = rules_of(families, family)
    assert len({rule.name for rule in rules}) == len(rules)
    for rule in rules[:: max(1, len(rules) - 1)]:  # the first and the last
        given = rule.arguments()
        if rule.scaled:
            given["region"] = _scaled(given["region"], advantages[:, None].expand(6, 5))
        loss = policy_loss(old, new, advantages, mask, exact=True, **given).loss
        assert torch.autograd.grad(loss, new)[0].isfinite().all()


def test_the_demonstrations_of_countdown_are_right_as_often_as_stated() -> None:
    task = Countdown(0)
    answers = task.demonstrations(torch.Generator().manual_seed(0), 400)
    rewards = task.reward(torch.arange(64), answers[None])[0]

    def is_right(row: int, tokens: list[int]) -> bool:
        text = "".join({PLUS: "+", STOP: ";"}.get(token, str(token)) for token in tokens)
        terms = text.partition(";")[0].split("+")
        first, tens, ones = task.prompts[row].tolist()
        digits = [int(term) for term in terms if len(term) == 1 and term.isdigit()]
        whole = len(digits) == len(terms) and ";" in text
        return whole and digits[0] == first and sum(digits) == 10 * tens + ones

    for row in range(64):
        for drawn in range(5):
            assert rewards[row, drawn] == is_right(row, answers[row, drawn].tolist())
    assert 0.1 < rewards.mean() < 0.25  # a tenth on purpose, and others by chance


def test_pass_at_k_is_the_share_of_the_subsets_that_hold_a_right_answer() -> None:
    right = np.array([0, 1, 3, 6])
    subsets = list(combinations(range(6), 2))
    shares = [np.mean([min(chosen) < count for chosen in subsets]) for count in right]
    assert pass_at(right, 6, 2) == pytest.approx(np.mean(shares), rel=1e-12)


def test_paired_differences_have_the_interval_and_p_value_of_students_t() -> None:
    generator = np.random.default_rng(0)
    first, second = (dict(enumerate(generator.normal(size=8))) for _ in range(2))
    found = compare.paired(first, second)
    values = [mpmath.mpf(first[seed]) - second[seed] for seed in range(8)]
    mean = mpmath.fsum(values) / 8
    error = mpmath.sqrt(mpmath.fsum((value - mean) ** 2 for value in values) / 7 / 8)

    def tail(t: mpmath.mpf) -> mpmath.mpf:
        return mpmath.betainc(3.5, 0.5, 0, 7 / (7 + t * t), regularized=True)

    assert found.p_value == pytest.approx(float(tail(mean / error)), rel=1e-12)
    assert tail((found.high - mean) / error) == pytest.approx(0.05, rel=1e-9)
    assert found.low + found.high == pytest.approx(2 * found.mean, rel=1e-12)


def test_holms_correction_is_that_of_closed_testing_with_bonferroni() -> None:
    p_values = [0.04, 0.01, 0.03, 0.5, 0.012]
    places = range(len(p_values))
    for place, corrected in zip(places, compare.holm(p_values), strict=True):
        others = [other for other in places if other != place]
        families = [
            (place, *chosen)
            for size in range(len(p_values))
            for chosen in combinations(others, size)
        ]
        closed = max(min(1.0, len(f) * min(p_values[k] for k in f)) for f in families)
        assert corrected == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize("delta", [0.001, 0.005, 0.01, 0.05])
@pytest.mark.parametrize("p", [1e-4, 1e-3, 1e-2, 0.1])
def test_steps_to_half_are_those_of_the_exact_band_to_one(p: float, delta: float) -> None:
    band, now, steps = Band("kl", delta), p, 0
    while now < 0.5:
        now, steps = now * float(band.bounds(np.log(now))[1]), steps + 1
    assert abs(steps - bandit.steps_to_half(p, delta)) <= 1.0


def test_batches_to_half_are_those_of_a_simulated_bandit_without_noise() -> None:
    taken = bandit.simulate(0.01, 0.001, group=16, noise=0.0, runs=2000, seed=0)
    expected = bandit.batches_to_half(0.01, 0.001, group=16)
    # One step of rounding up, and the spread of the mean.
    assert abs(taken.mean() - expected) < 1.0 + 4.0 * taken.std() / np.sqrt(len(taken))


def test_matched_strengths_have_equal_radii_over_second_derivatives() -> None:
    def width(region: str) -> float:
        capped = region_from_spec(region)
        assert isinstance(capped, Combined)
        band = capped.parts[0]
        assert isinstance(band, Band)
        assert band.divergence.curvature is not None
        return float(band.delta_low) / band.divergence.curvature

    for family in MATCHED:
        for region, kl in zip(FAMILIES[family], FAMILIES["kl"], strict=True):
            assert width(region) == pytest.approx(width(kl), rel=1e-12)


def test_the_report_is_that_of_the_committed_results() -> None:
    assert report(RESULTS) == (RESULTS / "report.md").read_text()


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_for_both_pages(name: str, tmp_path: Path) -> None:
    for path in RESULTS.glob("*.parquet"):
        (tmp_path / path.name).symlink_to(path)
    write_figure(name, tmp_path)
    light, dark = (tmp_path / f"{name}-{page}.svg" for page in ("light", "dark"))
    assert light.read_text().startswith("<?xml")
    assert light.read_bytes() != dark.read_bytes()
