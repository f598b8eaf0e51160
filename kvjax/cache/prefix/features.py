"""What is known of a prompt when its blocks are stored, as levels of a few features."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import log2

TURN_STARTS = (1, 2, 3, 4, 5, 6, 9, 14)
TOKENS, GROWTHS, GAPS, ANSWERS = 24, 7, 14, 14
SIZES = (len(TURN_STARTS), 2 * TOKENS, GROWTHS, GAPS, 2 * ANSWERS)
"""Levels of each feature: turn, tokens of the prompt, blocks added by this turn, seconds since the turn before, and
tokens of the answer. Turns are levels from `TURN_STARTS` on; the others are logarithms to the base 2, tokens of the
prompt in half steps from 64 on.

Prompts and answers have levels of their own on a first turn, where they say how a conversation begins, and on later
ones, where they say how it goes on.
"""
OFFSETS = tuple(sum(SIZES[:i]) for i in range(len(SIZES)))
WEIGHTS = sum(SIZES)
TIMED = slice(3, 5)
"""The features whose effect depends on age: a long answer is read for longer, and a quick conversation goes on so."""


@dataclass(frozen=True)
class Turn:
    """A prompt within its conversation.

    Args:
        number: 1 for a conversation's first.
        tokens: of the prompt.
        answer: tokens generated after it, None if not known.
        gap: seconds since the turn before, None on the first.
        growth: blocks more than the turn before; below 1 if the conversation was cut or edited.
    """

    number: int
    tokens: int
    answer: int | None
    gap: float | None = None
    growth: int = 0


def levels(turn: Turn) -> tuple[int, ...]:
    """The row of weights that each feature of a turn chooses."""
    later = turn.number > 1
    chosen = (
        bisect_right(TURN_STARTS, turn.number) - 1,
        _log(turn.tokens / 64, TOKENS - 1, 2) + TOKENS * later,
        1 + _log(turn.growth, GROWTHS - 2) if later else 0,
        0 if turn.gap is None else 1 + _log(turn.gap, GAPS - 2),
        (0 if turn.answer is None else 1 + _log(turn.answer, ANSWERS - 2)) + ANSWERS * later,
    )
    return tuple(offset + level for offset, level in zip(OFFSETS, chosen, strict=True))


def _log(value: float | int, most: int, steps: int = 1) -> int:
    return min(int(steps * log2(max(value, 1))), most)
