"""Times of the replay of rules on a log."""

from __future__ import annotations

import numpy as np

from bandpo.record import LoggedTokens
from benchmarks.tokens import SIZE

RULES = ("ppo", "dapo", "kl@0.01", "kl@0.05", "reverse-kl@0.01", "tv@0.05", "dppo-tv", "ipo")

MORE_RULES = (
    *("bandpo-kl", "bandpo-chi2", "mask:kl@0.05", "hellinger@0.02"),
    *("cispo", "sapo", "jensen-shannon@0.01", "clip@0.1"),
)


def logged(count: int, seed: int = 0) -> LoggedTokens:
    """Returns tokens of sequences of 200, from rare to likely."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(1.0, 2.5, count)
    place = np.arange(count)
    old, new = (-np.logaddexp(0.0, -moved) for moved in (logit, logit + rng.normal(0, 0.2, count)))
    return LoggedTokens(
        place // 12_800,
        place // 200,
        place % 200,
        old,
        new,
        rng.normal(0.0, 1.0, count),
        None,
        None,
        np.ones(count),
    )


class Replay:
    """Times of a replay of a log in memory."""

    timeout = 300

    def setup(self) -> None:
        """Prepares the log."""
        self.log = logged(SIZE)

    def time_compare_8_rules(self) -> None:
        """Times the comparison of eight rules."""
        from bandpo.replay import compare

        compare([self.log], RULES)

    def time_compare_16_rules(self) -> None:
        """Times the comparison of sixteen rules."""
        from bandpo.replay import compare

        compare([self.log], RULES + MORE_RULES)

    def time_match_kl(self) -> None:
        """Times the radius of a KL band that acts as PPO's clip does."""
        from bandpo.replay import match

        match([self.log], "ppo", ["kl"])

    def time_complaints(self) -> None:
        """Times the search for faults of the log."""
        from bandpo.replay import complaints_of

        complaints_of([self.log])
