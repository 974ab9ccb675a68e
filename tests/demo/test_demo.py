from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
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
from bandpo.demo.rule import BAND, CONSTANT, FIXED, NO_CLIP, band_table, regions
from bandpo.error import InvalidTypeError, InvalidValueError, OutputPathError
from bandpo.record import read_tokens
from bandpo.spec import spec_from_region

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import torch

from bandpo import plot
from bandpo.demo import experiment, grpo, task
from bandpo.demo.figure import demo_figure
from bandpo.loss import PROBABILITY_EDGES

RULES = (FIXED, BAND, NO_CLIP, CONSTANT)
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
    assert [(run.seed, run.rule) for run in small.runs] == [(s, r) for s in (0, 1) for r in RULES]
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


def test_rules_start_from_the_same_policy_and_the_first_batch_is_the_same(
    small: demo.Result,
) -> None:
    for seed in (0, 1):
        assert len({run.reward[0] for run in small.runs if run.seed == seed}) == 1
    assert small.runs[0].reward[0] != small.runs[len(RULES)].reward[0]


def test_no_token_is_clipped_without_clipping(small: demo.Result) -> None:
    for run in small.of_rule(NO_CLIP):
        assert sum(run.clipped_up) == sum(run.clipped_down) == 0


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
    assert document["runs"][0]["rule"] == FIXED
    assert set(document["clip_fraction_up"]) == set(RULES)
    assert len(document["clip_fraction_down"][BAND]) == len(document["probability_bins"])


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
    assert log.metadata.rule == {"region": "clip@0.2,0.28", "surrogate": "min-clip"}
    assert spec_from_region(regions(band_table(0.05))[FIXED]) == "clip@0.2,0.28"
    *_, sentence, command = report(result, 80).splitlines()
    assert sentence == "Other rules on these tokens:"
    program, *words = shlex.split(command)
    assert program == "bandpo"
    assert cli.main(words) == 0
    assert "dapo" in capsys.readouterr().out
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
    assert text.startswith(small.conclusion)
    for rule in RULES:
        assert rule in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_report_cuts_no_number(small: demo.Result, width: int) -> None:
    text = report(small, width)
    assert "…" not in text
    lines = [line for line in text.splitlines() if not line.startswith("Picture:")]
    assert max(map(len, lines)) <= width


def test_numbers_have_the_digits_that_show_a_difference() -> None:
    final = {FIXED: [0.0301], BAND: [0.0304], NO_CLIP: [0.0302], CONSTANT: [0.0301]}
    text = conclusion(made_up({rule: [None] for rule in RULES}, **final))
    assert "final reward (0.0304) was higher than fixed clip 0.2/0.28 (0.0301)" in text


def test_the_picture_shows_each_rule_with_its_last_values(small: demo.Result) -> None:
    figure = demo_figure(small, regions(band_table(0.05)))
    for axes, name in zip(figure.axes[:2], ("reward", "entropy"), strict=True):
        for rule, text in zip(RULES, axes.texts, strict=True):
            last = np.median([getattr(run, name)[-1] for run in small.of_rule(rule)])
            assert text.get_text() == f"{rule}\n{last:.3g}"
    assert {text.get_text() for text in figure.axes[3].texts} == {FIXED, BAND}
    assert figure.texts[0].get_text() == headline(small)


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
    assert last == {"pre-training": (10, 10), **dict.fromkeys(RULES, (2, 2))}


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
    ],
)
def test_a_bad_setting_is_refused(setting: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(setting))):
        demo.run(None, **{**SMALL, **setting})


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


def made_up(batches: dict[str, Sequence[int | None]], **final: Sequence[float]) -> demo.Result:
    """A result with these batches to half reward; the final reward is 0.8 unless given."""
    limit = 50
    seeds = len(batches[BAND])
    runs = []
    for seed in range(seeds):
        for rule in RULES:
            half = batches[rule][seed]
            last = final.get(rule, [0.8 if half is not None else 0.4] * seeds)[seed]
            curve = [0.6 if half is not None and batch >= half else 0.1 for batch in range(limit)]
            none = (0,) * 5
            runs.append(demo.Run(rule, seed, (*curve, last), (1.0,), none, none, none, none))
    settings = demo.Settings(seeds=seeds, batches=limit)
    return demo.Result(settings, 0, (0.0, 0.0), (0.005,) * seeds, tuple(runs))


def test_conclusion_when_the_band_beats_all() -> None:
    text = conclusion(
        made_up({FIXED: [30, 31, 32], BAND: [10, 11, 12], NO_CLIP: [20] * 3, CONSTANT: [21] * 3})
    )
    assert text == (
        "Half reward came first under KL band (median 11 batches). The KL band (11) was faster "
        "than fixed clip 0.2/0.28 (31), no clipping (20) and constant [0.1, 10] (21) on every "
        "seed. So in speed it beat the fixed clip and both baselines. The KL band's final reward "
        "(0.80) was within the seed spread of fixed clip 0.2/0.28 (0.80; higher on 0 of 3, lower "
        "on 0), no clipping (0.80; higher on 0 of 3, lower on 0) and constant [0.1, 10] (0.80; "
        "higher on 0 of 3, lower on 0)."
    )


def test_conclusion_when_the_band_beats_the_fixed_clip_alone() -> None:
    text = conclusion(
        made_up(
            {FIXED: [30, 31, 32], BAND: [10, 20, 12], NO_CLIP: [11, 19, 12], CONSTANT: [9, 9, 9]}
        )
    )
    assert text.startswith("Half reward came first under constant [0.1, 10] (median 9 batches).")
    assert (
        "The KL band (12) was faster than fixed clip 0.2/0.28 (31) on every seed; "
        "slower than constant [0.1, 10] (9) on every seed; "
        "within the seed spread of no clipping (12; faster on 1 of 3, slower on 1)." in text
    )
    assert "beat the fixed clip but neither baseline" in text


def test_conclusion_when_the_band_beats_one_baseline() -> None:
    text = conclusion(
        made_up({FIXED: [30] * 3, BAND: [10] * 3, NO_CLIP: [10] * 3, CONSTANT: [15] * 3})
    )
    assert text.startswith("Half reward came first under KL band and no clipping (median 10")
    assert "it beat fixed clip 0.2/0.28 and constant [0.1, 10] but not no clipping." in text


def test_conclusion_when_the_band_loses() -> None:
    text = conclusion(
        made_up({FIXED: [30] * 3, BAND: [40] * 3, NO_CLIP: [35] * 3, CONSTANT: [36] * 3})
    )
    assert "slower than fixed clip 0.2/0.28 (30), no clipping (35) and constant" in text
    assert "it beat none of them" in text


def test_conclusion_when_some_seeds_do_not_reach_half() -> None:
    text = conclusion(
        made_up(
            {
                FIXED: [None, None, 45],
                BAND: [40, 41, None],
                NO_CLIP: [30, 30, 30],
                CONSTANT: [None] * 3,
            }
        )
    )
    assert "The KL band (41) was slower than no clipping (30) on every seed" in text
    assert "fixed clip 0.2/0.28 (more than 50; faster on 2 of 3, slower on 1)" in text
    assert "constant [0.1, 10] (more than 50; faster on 2 of 3, slower on 0)" in text


def test_conclusion_when_no_run_reaches_half() -> None:
    text = conclusion(made_up(dict.fromkeys(RULES, [None] * 3)))
    assert text.startswith("No rule reached half reward within 50 batches")
    assert "faster" not in text
    assert "beat" not in text


def test_conclusion_of_few_seeds_states_how_few() -> None:
    text = conclusion(made_up({FIXED: [30], BAND: [10], NO_CLIP: [20], CONSTANT: [20]}))
    assert text.endswith("So few seeds (1) do not show how far they spread.")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plot.band_figure({"clip": bandpo.Clip(0.2)})

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OutputPathError, match="No space left"):
        plot.save(figure, tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []
