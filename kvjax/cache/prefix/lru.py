"""The block untouched longest leaves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field

from kvjax.cache.prefix.base import Access, check_capacity, no_victim


@dataclass
class LruState:
    """Held blocks, the next to leave first. Ordered: a plain dict walks past all that left before its first key."""

    order: OrderedDict[int, None] = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class Lru:
    """Least recently used. Of one prompt's blocks the last leaves first, so that a prefix stays useful."""

    def init(self, capacity: int) -> LruState:
        check_capacity(capacity)
        return LruState()

    def touch(self, state: LruState, access: Access) -> LruState:
        order = state.order
        for block in reversed(access.path):
            order.pop(block, None)
            order[block] = None
        return state

    def victim(self, state: LruState, pinned: Container[int] = frozenset()) -> tuple[int, LruState]:
        for block in state.order:
            if block not in pinned:
                del state.order[block]
                return block, state
        raise no_victim()
