"""What the prefix store's policies are compared with: by frequency, by queues, and with the future known."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvjax.cache.prefix.base import Access, check_capacity, no_victim
from kvjax.cache.prefix.forest import Forest, fell, leaf, plant

Entry = tuple[float, int, int]


@dataclass
class Ranked:
    """Held blocks with what each is worth; `heap` also has entries that are out of date."""

    forest: Forest = field(default_factory=Forest)
    worth: dict[int, Entry] = field(default_factory=dict)
    heap: list[Entry] = field(default_factory=list)
    count: dict[int, int] = field(default_factory=dict)
    clock: int = 0
    age: float = 0.0


@dataclass(frozen=True)
class Lfu:
    """Least frequently used while held, the longest untouched of those; with `aging` it is LFU-DA.

    Source: Arlitt et al. 2000, "Evaluating content management techniques for web proxy caches" (dynamic aging).
    """

    aging: bool = False

    def init(self, capacity: int) -> Ranked:
        check_capacity(capacity)
        return Ranked()

    def touch(self, state: Ranked, access: Access) -> Ranked:
        for block in reversed(access.path):
            state.clock += 1
            state.count[block] = state.count.get(block, 0) + 1
            _rank(state, block, (state.count[block] + state.age, state.clock, block))
        plant(state.forest, access.path)
        return state

    def victim(self, state: Ranked, pinned: Container[int] = frozenset()) -> tuple[int, Ranked]:
        block, worth = _least(state, pinned)
        del state.count[block]
        if self.aging:
            state.age = worth
        return block, state


@dataclass(frozen=True)
class Belady:
    """Evict what is used again last, which no policy can know and none can beat.

    Args:
        uses: for each access of the trace that will be replayed, when each of its blocks is used next.

    Source: Belady 1966, "A study of replacement algorithms for a virtual-storage computer" (IBM Systems J. 5).
    """

    uses: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, accesses: Sequence[Access]) -> Belady:
        """With the future of a trace."""
        after: dict[int, float] = {}
        uses = []
        for place in range(len(accesses) - 1, -1, -1):
            path = accesses[place].path
            uses.append(tuple(after.get(block, float("inf")) for block in path))
            after.update(dict.fromkeys(path, float(place)))
        return cls(tuple(reversed(uses)))

    def init(self, capacity: int) -> Ranked:
        check_capacity(capacity)
        return Ranked()

    def touch(self, state: Ranked, access: Access) -> Ranked:
        for depth, (block, use) in enumerate(zip(access.path, self.uses[state.clock], strict=True)):
            _rank(state, block, (-use, -depth, block))
        plant(state.forest, access.path)
        state.clock += 1
        return state

    def victim(self, state: Ranked, pinned: Container[int] = frozenset()) -> tuple[int, Ranked]:
        return _least(state, pinned)[0], state


@dataclass
class QueuesState:
    """The three queues of S3-FIFO, each with the oldest first, and how often held blocks were hit, up to 3."""

    capacity: int
    forest: Forest = field(default_factory=Forest)
    small: dict[int, None] = field(default_factory=dict)
    main: dict[int, None] = field(default_factory=dict)
    ghost: dict[int, None] = field(default_factory=dict)
    hits: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class S3Fifo:
    """A small queue for what is new, a main one for what was hit in it.

    Source: Yang et al. 2023, "FIFO queues are all you need for cache eviction" (SOSP), a tenth for the small queue.
    """

    def init(self, capacity: int) -> QueuesState:
        check_capacity(capacity)
        return QueuesState(capacity)

    def touch(self, state: QueuesState, access: Access) -> QueuesState:
        for block in reversed(access.path):
            if block in state.hits:
                state.hits[block] = min(state.hits[block] + 1, 3)
                continue
            state.hits[block] = 0
            queue = state.main if block in state.ghost else state.small
            state.ghost.pop(block, None)
            queue[block] = None
        plant(state.forest, access.path)
        return state

    def victim(self, state: QueuesState, pinned: Container[int] = frozenset()) -> tuple[int, QueuesState]:
        block = leaf(state.forest, self._candidates(state, pinned), pinned)
        fell(state.forest, block)
        if block in state.small:
            del state.small[block]
            state.ghost[block] = None
            if len(state.ghost) > state.capacity:
                del state.ghost[next(iter(state.ghost))]
        else:
            del state.main[block]
        del state.hits[block]
        return block, state

    def _candidates(self, state: QueuesState, pinned: Container[int]) -> Iterator[int]:
        in_use = 0
        for _ in range(5 * len(state.hits)):  # a block is passed over at most four times, unless it is in use
            full = len(state.small) > state.capacity // 10 or not state.main
            queue, enough = (state.small, 2) if full and in_use < len(state.small) else (state.main, 1)
            if not queue:
                return
            block = next(iter(queue))
            if block not in pinned and state.hits[block] < enough:
                yield block
            del queue[block]
            if block in pinned:
                in_use += enough == 2
            elif enough == 2:
                state.hits[block], queue = 0, state.main
            else:
                state.hits[block] -= 1
            queue[block] = None


def _rank(state: Ranked, block: int, entry: Entry) -> None:
    state.worth[block] = entry
    heapq.heappush(state.heap, entry)


def _least(state: Ranked, pinned: Container[int]) -> tuple[int, float]:
    """Let go of the block that is worth least, and say what it was worth."""
    aside: list[Entry] = []

    def candidates() -> Iterable[int]:
        while state.heap:
            entry = heapq.heappop(state.heap)
            if state.worth.get(entry[2]) == entry:
                aside.append(entry)
                yield entry[2]
        raise no_victim()

    block = leaf(state.forest, candidates(), pinned)
    fell(state.forest, block)
    worth = state.worth.pop(block)
    for entry in aside:
        if entry is not worth:
            heapq.heappush(state.heap, entry)
    return block, abs(worth[0])
