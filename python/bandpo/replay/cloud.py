"""A random part of a log's tokens, to draw."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from bandpo.check import Float64Array
from bandpo.record import LoggedTokens
from bandpo.replay.chunk import known_tokens

SIZE = 8000


class Cloud:
    """Old log-probs, log-ratios and advantages of up to `SIZE` tokens, each as likely as any.

    A token of weight w is as likely as w tokens of weight 1, so that the picture is that of the run
    (Efraimidis and Spirakis 2006, algorithm A-ES).
    """

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._keys = np.empty(0)
        self._columns = np.empty((3, 0))

    def add(self, part: LoggedTokens) -> None:
        """Adds the tokens of a part of a log."""
        with np.errstate(divide="ignore"):
            keys = np.log(self._random.random(len(part.weight))) / part.weight
        known = known_tokens(part)
        with np.errstate(invalid="ignore"):
            log_ratio = part.log_prob - part.old_log_prob
        columns = np.stack([part.old_log_prob, log_ratio, part.advantages])
        self._keys = np.concatenate([self._keys, keys[known]])
        self._columns = np.concatenate([self._columns, columns[:, known]], axis=1)
        if len(self._keys) > SIZE:
            chosen = np.argpartition(-self._keys, SIZE)[:SIZE]
            self._keys, self._columns = self._keys[chosen], self._columns[:, chosen]

    @property
    def columns(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Old log-probs, log-ratios and advantages."""
        old, log_ratio, advantages = self._columns
        return old, log_ratio, advantages


def cloud_of(logged: Iterable[LoggedTokens]) -> Cloud:
    """Returns a random part of a log."""
    cloud = Cloud()
    for part in logged:
        cloud.add(part)
    return cloud
