"""Play a trace of prompts through a policy and count what would have been reused."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvjax.cache.prefix.base import Access, Policy


@dataclass
class Play:
    """A policy with its state and the blocks it holds; no more than `capacity` at any moment."""

    policy: Policy[Any]
    capacity: int
    state: Any = field(default=None)
    held: set[int] = field(default_factory=set)

    def __post_init__(self):
        if self.state is None:
            self.state = self.policy.init(self.capacity)


def play(game: Play, access: Access) -> tuple[int, list[int]]:
    """Serve one prompt; room for its new blocks is made first, and its own blocks do not leave while it runs.

    Returns:
        how many of its blocks, from the root on without a gap, were held, and the blocks that left.

    Raises:
        ValueError: for a prompt that does not fit.
    """
    path, held = access.path, game.held
    matched = match(held, path)
    new = [block for block in path[matched:] if block not in held]
    excess = len(held) + len(new) - game.capacity
    if len(path) > game.capacity:
        raise ValueError(f"play: `capacity` must hold a prompt of {len(path)} blocks, got {game.capacity}")
    game.state = game.policy.touch(game.state, access)
    left = []
    if excess > 0:
        pinned = frozenset(path)
        for _ in range(excess):
            block, game.state = game.policy.victim(game.state, pinned)
            left.append(block)
        held.difference_update(left)
    held.update(new)
    return matched, left


def replay(policy: Policy[Any], capacity: int, accesses: Iterable[Access]) -> Iterator[int]:
    """How many leading blocks of each prompt were held, from an empty store on."""
    game = Play(policy, capacity)
    for access in accesses:
        yield play(game, access)[0]


def match(held: Container[int], path: tuple[int, ...]) -> int:
    """How many blocks of a path are held without a gap, from the root on."""
    for depth, block in enumerate(path):
        if block not in held:
            return depth
    return len(path)
