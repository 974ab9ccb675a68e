"""A small experiment: the same policy trained under several clip rules.

A transformer of 0.12 M parameters is fitted to a made-up corpus in which the right answer to every
prompt is rare, then trained by GRPO on a verifiable reward, with several optimiser steps on each
rollout batch so that clipping acts. The same seeds are run under the KL band at two radii, a fixed
clip and no clipping, once with clean rewards and once with some of them flipped.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from bandpo.demo.progress import Progress, bars
from bandpo.demo.report import conclusion, print_report
from bandpo.demo.result import Result, Run
from bandpo.demo.rule import FIXED_SPEC, regions
from bandpo.demo.settings import Settings
from bandpo.error import MissingExtraError
from bandpo.record import Recorder

__all__ = ["Progress", "Result", "Run", "Settings", "print_report", "run"]


def run(
    output: str | os.PathLike[str] | None = "bandpo-demo.png",
    *,
    tokens: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Trains every rule on every seed, draws a picture and returns all numbers.

    On one machine and one version of torch the numbers depend on the settings alone. The state of
    torch (threads, random numbers, default dtype) is afterwards as it was, also after Ctrl-C.

    Args:
        output: The picture to write, .png, .svg or .pdf; None for none. That it can be written is
            checked before any training.
        tokens: The folder that a `bandpo.record.Recorder` writes tokens of the fixed clip into, on
            the first seed with clean rewards; None for none. Those of an earlier demo are replaced.
        quiet: True leaves out the progress bars on stderr.
        progress: Called with a stage, its steps done and its steps in all; replaces the bars.
        **settings: Any field of `Settings`.

    Raises:
        InvalidValueError: If a setting is out of range.
        MissingExtraError: If torch, matplotlib for a picture, or pyarrow for tokens is not
            installed.
        OutputPathError: If the picture or the folder cannot be written; nothing half-written is
            left.
    """
    chosen = Settings(**settings)
    rules = regions(chosen.delta)
    try:
        if output is not None:
            from bandpo import plot
            from bandpo.demo.figure import demo_figure

            plot.check_output(output)
        import bandpo.tensors  # noqa: F401  # reports a missing torch
        from bandpo.demo import experiment

        recorder = None if tokens is None else _recorder(tokens, chosen)
    except MissingExtraError as missing:
        raise MissingExtraError(missing.module, "demo") from None

    with (
        recorder or nullcontext() as record,
        bars(quiet=quiet) if progress is None else nullcontext(progress) as report,
    ):
        result = experiment.run_all(chosen, rules, report, record)
    result = replace(result, conclusion=conclusion(result))
    if tokens is not None:
        result = replace(result, tokens=os.fspath(tokens))
    if output is not None:
        result = replace(result, picture=os.fspath(output))
        plot.save(demo_figure(result, rules), output)
    return result


def _recorder(folder: str | os.PathLike[str], settings: Settings) -> Recorder:
    """A recorder of all tokens of one inner step of each batch."""
    # A folder of an earlier demo would make two runs of one.
    for part in Path(folder).glob("rank-00000-*.parquet"):
        part.unlink()
    return Recorder(
        folder,
        every=settings.inner_steps,
        tokens_per_step=max(4096, settings.prompts_per_batch * settings.group),
        temperature=1.0,
        old_policy="trainer",
        rule={"region": FIXED_SPEC, "surrogate": "min-clip"},
        rank=0,
        world_size=1,
    )
