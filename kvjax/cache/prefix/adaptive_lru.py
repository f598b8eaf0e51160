"""Recency and frequency, balanced by what lately left too early.

Source: Megiddo & Modha 2003, "ARC: A Self-Tuning, Low Overhead Replacement Cache" (FAST), its four lists and target.
Two things differ. Blocks come by the path, so that turns of one conversation, not single blocks, move the target; and
a block that is continued by another held one stays, and the end of that continuation leaves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field
from itertools import chain

from kvjax.cache.prefix.base import Access, check_capacity
from kvjax.cache.prefix.forest import Forest, fell, leaf, plant


@dataclass
class AdaptiveLruState:
    """Four lists, each with the longest untouched first.

    Args:
        target: blocks that the first list should have.
        once, often: held blocks touched once, and more often.
        once_left, often_left: blocks that left either list lately.
    """

    capacity: int
    target: float = 0.0
    once: OrderedDict[int, None] = field(default_factory=OrderedDict)
    often: OrderedDict[int, None] = field(default_factory=OrderedDict)
    once_left: OrderedDict[int, None] = field(default_factory=OrderedDict)
    often_left: OrderedDict[int, None] = field(default_factory=OrderedDict)
    forest: Forest = field(default_factory=Forest)


@dataclass(frozen=True)
class AdaptiveLru:
    """Least recently used of the blocks touched once or of those touched more often, whichever has too much room."""

    def init(self, capacity: int) -> AdaptiveLruState:
        check_capacity(capacity)
        return AdaptiveLruState(capacity)

    def touch(self, state: AdaptiveLruState, access: Access) -> AdaptiveLruState:
        once, often = state.once, state.often
        for block in reversed(access.path):
            if block in often:
                del often[block]
            elif block in once:
                del once[block]
            elif block in state.once_left:
                step = max(1.0, len(state.often_left) / len(state.once_left))
                state.target = min(state.target + step, state.capacity)
                del state.once_left[block]
            elif block in state.often_left:
                step = max(1.0, len(state.once_left) / len(state.often_left))
                state.target = max(state.target - step, 0.0)
                del state.often_left[block]
            else:
                once[block] = None
                continue
            often[block] = None
        plant(state.forest, access.path)
        return state

    def victim(self, state: AdaptiveLruState, pinned: Container[int] = frozenset()) -> tuple[int, AdaptiveLruState]:
        once, often = state.once, state.often
        lists = (once, often) if len(once) > state.target else (often, once)
        block = leaf(state.forest, chain(*lists), pinned)
        fell(state.forest, block)
        held, left = (once, state.once_left) if block in once else (often, state.often_left)
        del held[block]
        left[block] = None
        if len(left) > state.capacity:
            del left[next(iter(left))]
        return block, state
