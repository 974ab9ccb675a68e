"""Pieces of a log whose sequences are whole, for rules that decide by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bandpo.error import InvalidValueError
from bandpo.record import LoggedTokens
from bandpo.record.layout import LONGEST_ROW, concatenate, select
from bandpo.record.tokens import Int64Array
from bandpo.replay.chunk import SIZE, Piece, pieces_of
from bandpo.replay.rule import ReplayedRule


def pieces_for(rules: Sequence[ReplayedRule], logged: Iterable[LoggedTokens]) -> Iterator[Piece]:
    """Returns the tokens of a log in pieces, with whole sequences if a rule takes them."""
    takers = [rule.name for rule in rules if rule.takes_sequences]
    return pieces_of_sequences(logged, takers[0]) if takers else pieces_of(logged)


def pieces_of_sequences(logged: Iterable[LoggedTokens], rule: str) -> Iterator[Piece]:
    """Yields the tokens of a log in pieces of whole sequences, of about `SIZE` tokens.

    Args:
        logged: Parts of a log.
        rule: Name of the rule that needs them, for messages.

    Raises:
        InvalidValueError: If the log has no sequences, or not all tokens of each.
    """
    place = 0
    rest: LoggedTokens | None = None
    for part in logged:
        if not len(part.step):
            continue
        _check(part, rule)
        tokens = part if rest is None else concatenate([rest, part])
        starts = _starts(tokens)
        _check_order(tokens, starts, rule)
        # The last sequence may go on in the next part.
        yield from _cut(tokens, starts, place)
        place += int(starts[-1])
        rest = select(tokens, slice(int(starts[-1]), None))
        if len(rest.step) > LONGEST_ROW:
            raise _refused(rule, f"a sequence of the log has more than {LONGEST_ROW} tokens")
    if rest is not None:
        yield Piece(rest, place, np.zeros(1, np.int64))


def _starts(tokens: LoggedTokens) -> Int64Array:
    """Returns the first token of each sequence, where steps and sequences change."""
    changes = np.ones(len(tokens.step), np.bool_)
    changes[1:] = (np.diff(tokens.step) != 0) | (np.diff(tokens.sequence) != 0)
    # The same sequence may be logged twice, one time after the other.
    changes[1:] |= (tokens.position[1:] >= 0) & (np.diff(tokens.position) <= 0)
    return np.flatnonzero(changes)


def _cut(tokens: LoggedTokens, starts: Int64Array, place: int) -> Iterator[Piece]:
    """Yields all sequences but the last."""
    first = 0
    while first < len(starts) - 1:
        limit = np.searchsorted(starts, starts[first] + SIZE, side="right") - 1
        end = min(max(int(limit), first + 1), len(starts) - 1)
        start = int(starts[first])
        own = starts[first:end] - start
        yield Piece(select(tokens, slice(start, int(starts[end]))), place + start, own)
        first = end


def _check(part: LoggedTokens, rule: str) -> None:
    if (part.sequence < 0).any():
        raise _refused(
            rule,
            "the log has tokens without one. Record batches as [B, T], or packed ones with "
            "cu_seqlens; in other logs, a column gives the sequence",
        )
    sampled = float((part.weight != 1.0).mean())
    if sampled:
        raise _refused(
            rule,
            f"the log is a sample of single tokens: {sampled:.1%} of them have a weight other than "
            f"1. A ratio of a whole sequence does not follow from some of its tokens, and a clip "
            f"of an estimate is biased. Record with tokens_per_step of at least the tokens of a "
            f"step",
        )


def _check_order(tokens: LoggedTokens, starts: Int64Array, rule: str) -> None:
    order = np.lexsort((tokens.sequence[starts], tokens.step[starts]))
    ordered = starts[order]
    step, sequence = tokens.step[ordered], tokens.sequence[ordered]
    twice = np.flatnonzero((np.diff(step) == 0) & (np.diff(sequence) == 0))
    if len(twice):
        raise _refused(
            rule,
            f"sequence {sequence[twice[0]]} of step {step[twice[0]]} is in the log at more than "
            f"one place. Give each optimiser step a number of its own, and sort by step, sequence "
            f"and position",
        )


def _refused(rule: str, reason: str) -> InvalidValueError:
    return InvalidValueError(f"rule {rule!r} takes whole sequences, and {reason}")
