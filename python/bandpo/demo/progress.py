"""Progress bars on stderr, one for each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich import progress
from rich.console import Console

# Called with the name of a stage, the steps of it that are done and all of its steps.
Progress: TypeAlias = Callable[[str, int, int], object]


@contextmanager
def bars(*, quiet: bool = False) -> Iterator[Progress]:
    """Gives a `Progress` that draws a bar for each stage, or nothing if quiet."""
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, disable=quiet) as drawn:
        tasks: dict[str, progress.TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = drawn.add_task(stage, total=total)
            drawn.update(tasks[stage], completed=done)

        yield report
