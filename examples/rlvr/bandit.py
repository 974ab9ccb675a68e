"""A bandit with one rare right arm: batches until it has half the mass, in closed form."""

from __future__ import annotations

import math

import numpy as np
from scipy import integrate

from bandpo import Band


def steps_to_half(p: float, delta: float) -> float:
    """Returns the updates from probability p to 1/2 if each ends at the bound of a kl band.

    Close to p, ``KL(p, q) = (q - p)^2/(2 p (1 - p))`` to second order. In the angle
    ``phi = 2 arcsin(sqrt(p))``, whose differential is ``dp/sqrt(p (1 - p))``, each update is thus a
    step of ``sqrt(2 delta)``, and p = 1/2 is at pi/2. It is too small where a cap acts first, and
    too large by up to one step where radii are not small.
    """
    return (math.pi / 2.0 - 2.0 * math.asin(math.sqrt(p))) / math.sqrt(2.0 * delta)


def batches_to_half(p: float, delta: float, *, group: int, noise: float = 0.0) -> float:
    """Returns the expected batches to 1/2 with sampled groups and flipped rewards.

    A group moves p only if it holds right and wrong answers, with probability
    ``s = 1 - (1 - p)^group - p^group``. A right answer that is alone in its group has a flipped
    reward with probability eta, and the step then goes back, so that the mean step is shorter by
    ``1 - 2 eta``. The sum over steps becomes an integral:

        ``(I/sqrt(2 delta) + (1/s(p) - 1/s(1/2))/2)/(1 - 2 eta)``,
        ``I = integral of d(phi)/s from phi(p) to pi/2``

    The second term is the first one of Euler and Maclaurin: the wait for a step is that of the
    rarer arm before it. Rounding up to a whole step adds up to one more, and is left out.
    Groups with several right answers find the direction more often, so it is too large there. Wrong
    arms that take mass by false rewards are left out, and so is a cap.
    """

    def wait(phi: float) -> float:
        right = math.sin(phi / 2.0) ** 2
        return 1.0 / -(math.expm1(group * math.log1p(-right)) + right**group)

    start = 2.0 * math.asin(math.sqrt(p))
    angle, _ = integrate.quad(wait, start, math.pi / 2.0)
    waits = angle / math.sqrt(2.0 * delta) + (wait(start) - wait(math.pi / 2.0)) / 2.0
    return float(waits / (1.0 - 2.0 * noise))


def simulate(
    p: float,
    delta: float,
    *,
    group: int,
    noise: float,
    runs: int,
    seed: int,
    limit: int = 100_000,
) -> np.ndarray:
    """Returns the batches until p >= 1/2 in each run, int64 [runs]; ``limit`` if it never is.

    Each group moves p to the bound of the exact band, up if the mean reward of its right answers is
    above that of its wrong ones, and down if below.
    """
    generator = np.random.default_rng(seed)
    band = Band("kl", delta)
    now, taken = np.full(runs, p), np.full(runs, limit)
    for batch in range(1, limit + 1):
        going = now < 0.5
        if not going.any():
            break
        right = generator.binomial(group, now)
        rewarded_right = generator.binomial(right, 1.0 - noise)
        rewarded_wrong = generator.binomial(group - right, noise)
        # Means of both kinds, multiplied by both counts; 0 if a group has one kind alone.
        gain = rewarded_right * (group - right) - rewarded_wrong * right
        lower, upper = band.bounds(np.log(now))
        ratio = np.where(gain > 0, upper, np.where(gain < 0, lower, 1.0))
        # An arm that a false reward took to 0 waits for ever, as one at the smallest number does.
        now = np.where(going, np.maximum(now * ratio, np.finfo(np.float64).tiny), now)
        taken[going & (now >= 0.5)] = batch
    return taken
