"""Every rule on every seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product

import torch

from bandpo import Region
from bandpo.demo.grpo import train
from bandpo.demo.policy import Policy, pretrain
from bandpo.demo.progress import Progress
from bandpo.demo.result import Result, Run
from bandpo.demo.rule import FIXED
from bandpo.demo.settings import Settings
from bandpo.demo.task import Task, make_task
from bandpo.record import Recorder


def run_all(
    settings: Settings,
    rules: Mapping[str, Region],
    progress: Progress,
    record: Recorder | None = None,
) -> Result:
    """Pre-trains a policy for every seed, then trains a copy of it for every noise and rule.

    The recorder gets the tokens of the fixed clip on the first seed, with clean rewards.
    """
    noises = (0.0, settings.noise)
    totals = {
        "pre-training": settings.seeds * settings.pretrain_steps,
        **dict.fromkeys(rules, settings.seeds * len(noises) * settings.batches),
    }
    done = Counter[str]()

    def step_of(stage: str) -> Callable[[], None]:
        def step() -> None:
            done[stage] += 1
            progress(stage, done[stage], totals[stage])

        return step

    for stage, total in totals.items():
        progress(stage, 0, total)

    runs: list[Run] = []
    base_probability: list[float] = []
    with _torch_state_kept():
        for seed in range(settings.seeds):
            task = make_task(settings.prompts, seed)
            policy = pretrain(
                task, seed=seed, steps=settings.pretrain_steps, on_step=step_of("pre-training")
            )
            base_probability.append(_right_probability(policy, task))
            for noise, (rule, region) in product(noises, rules.items()):
                run = train(
                    policy,
                    task,
                    rule,
                    region,
                    seed=seed,
                    noise=noise,
                    settings=settings,
                    record=record if (seed, noise, rule) == (0, 0.0, FIXED) else None,
                    on_batch=step_of(rule),
                )
                runs.append(run)

    return Result(
        settings=settings,
        base_probability=tuple(base_probability),
        runs=tuple(runs),
    )


def _right_probability(policy: Policy, task: Task) -> float:
    with torch.no_grad():
        log_probs = policy(task.prompts)
    return float(log_probs.gather(1, task.right[:, None]).exp().median())


@contextmanager
def _torch_state_kept() -> Iterator[None]:
    """Runs on one thread, in float32, with random numbers of its own; then restores them.

    The matrices are too small to share: on two busy cores a second thread made a run many times
    slower.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            torch.set_num_threads(1)
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
