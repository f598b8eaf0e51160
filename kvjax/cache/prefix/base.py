"""What a policy of the prefix store is: which block of keys and values leaves when room is needed.

A block is a run of tokens of fixed size whose keys and values are kept together; its id stands for those tokens and
all before them, so the blocks of a prompt are a path from a root and all prompts are a forest. A block serves only
if every block before it does, so a policy names leaves: blocks of which no held block is a continuation.

A policy is a frozen dataclass of settings with three functions over a state. The state is a value: it can be copied
(`copy.deepcopy`), saved (`pickle`) and replayed, and equal states given equal accesses stay equal. Like a cache that
is donated to a jitted step, a state that was passed in must not be used again: use the returned one, or copy first.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

State = TypeVar("State")


@dataclass(frozen=True)
class Access:
    """One prompt, as the store sees it.

    Args:
        path: block ids, root first, none twice; a block's id always comes after the same ids.
        time: seconds since any fixed moment, never decreasing from one access to the next.
        tokens: of the prompt, the partly filled last block included.
        answer: tokens generated after it, if that is known when its pages are handed over.
        block_bytes: what a block of this prompt takes, in any one unit.
    """

    path: tuple[int, ...]
    time: float
    tokens: int
    answer: int | None = None
    block_bytes: float = 1.0

    def __post_init__(self):
        if not self.path:
            raise ValueError("Access: `path` must name at least one block, got none")
        if not self.block_bytes > 0:
            raise ValueError(f"Access: `block_bytes` must be positive, got {self.block_bytes}")


@runtime_checkable
class Policy(Protocol, Generic[State]):
    """Decides what leaves; what is held is exactly what was touched and not yet named a victim."""

    def init(self, capacity: int) -> State:
        """The state of an empty store.

        Args:
            capacity: blocks that fit, at least 1.
        """
        ...

    def touch(self, state: State, access: Access) -> State:
        """Note that a prompt's blocks are read or, where not held, written: after it all of them are held."""
        ...

    def victim(self, state: State, pinned: Container[int] = frozenset()) -> tuple[int, State]:
        """Name one held block that leaves, and forget that it was held.

        Args:
            pinned: blocks in use, never named. They contain every block before one of theirs.

        Raises:
            ValueError: if no block may leave.
        """
        ...


def check_capacity(capacity: int) -> None:
    """Refuse a store without room.

    Raises:
        ValueError: if `capacity` is below 1.
    """
    if capacity < 1:
        raise ValueError(f"init: `capacity` must be at least 1 block, got {capacity}")


def no_victim() -> ValueError:
    """The error of a store in which every block is in use."""
    return ValueError("victim: expected a held block that is not `pinned`, got none")
