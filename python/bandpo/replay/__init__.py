"""Choosing a rule from a run: what each rule would have done to the tokens of a log.

`compare` replays rules, `match` calibrates a radius on the tokens, `complaints_of` lists what is
wrong with a log, and `report` writes a page. The command is ``bandpo replay``.
"""

from bandpo.replay.cloud import cloud_of
from bandpo.replay.compare import Comparison, compare
from bandpo.replay.complaints import Complaint, complaints_of
from bandpo.replay.matching import Match, match
from bandpo.replay.table import rows_of

__all__ = [
    "Comparison",
    "Complaint",
    "Match",
    "cloud_of",
    "compare",
    "complaints_of",
    "match",
    "rows_of",
]


def __dir__() -> list[str]:
    return __all__
