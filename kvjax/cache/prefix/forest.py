"""Which held block continues which: what keeps a policy from leaving a block without those before it."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from kvjax.cache.prefix.base import no_victim


@dataclass
class Forest:
    """Held blocks.

    Args:
        parent: the block before each, -1 at a root.
        children: held continuations of each block that has any.
    """

    parent: dict[int, int] = field(default_factory=dict)
    children: dict[int, dict[int, None]] = field(default_factory=dict)


def plant(forest: Forest, path: Iterable[int]) -> None:
    """Hold a path; blocks that are held already stay."""
    parent, children, before = forest.parent, forest.children, -1
    for block in path:
        if block not in parent:
            parent[block] = before
            if before != -1:
                children.setdefault(before, {})[block] = None
        before = block


def fell(forest: Forest, block: int) -> None:
    """Let go of a held block without held continuations."""
    before = forest.parent.pop(block)
    if before != -1:
        siblings = forest.children[before]
        del siblings[block]
        if not siblings:
            del forest.children[before]


def leaf(forest: Forest, candidates: Iterable[int], pinned: Container[int]) -> int:
    """The first candidate that is not pinned; if it is continued, the end of its oldest continuation.

    Raises:
        ValueError: if all are pinned.
    """
    for block in candidates:
        if block not in pinned:
            while block in forest.children:
                block = next(iter(forest.children[block]))
            return block
    raise no_victim()
