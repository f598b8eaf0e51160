"""Which prompts' keys are kept: a radix tree over blocks of tokens, on the host, and the policy that trims it.

Source: Zheng et al. 2023, "SGLang" (arXiv:2312.07104), section 3 (RadixAttention).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from kvjax.cache.prefix.base import Access, Policy
from kvjax.config import ModelConfig

ROOT = 0
"""The parent of every first block."""


@dataclass(frozen=True)
class Block:
    """A page's worth of tokens after those of its `parent`, and the page of the pool that has their keys."""

    parent: int
    tokens: tuple[int, ...]
    page: int


@dataclass(frozen=True)
class Tally:
    """Since the store was opened: prompts' tokens asked for and found, blocks kept and evicted."""

    asked: int = 0
    found: int = 0
    kept: int = 0
    evicted: int = 0

    @property
    def hit_rate(self) -> float:
        return self.found / max(1, self.asked)


@dataclass
class Turns:
    """A policy's state, which its functions may change in place, and the number of the store that may use it."""

    state: Any
    newest: int = 0


@dataclass(frozen=True)
class PrefixStore:
    """An index of kept pages; `open_store` makes one.

    Like a cache it is donated to what changes it: use the store that is returned, or `copy.deepcopy` it first.

    Args:
        page: tokens a block.
        most: blocks that may be kept.
        time: seconds, of the last prompt that was kept.
        turn: the store's number in its line; only the newest has the policy's state.
    """

    config: ModelConfig
    page: int
    most: int
    policy: Policy[Any]
    turns: Turns
    blocks: Mapping[int, Block] = field(default_factory=dict)
    tally: Tally = Tally()
    time: float = 0.0
    turn: int = 0

    @cached_property
    def children(self) -> Mapping[int, tuple[int, ...]]:
        """The blocks that follow each block."""
        found: dict[int, list[int]] = {}
        for name, block in self.blocks.items():
            found.setdefault(block.parent, []).append(name)
        return {parent: tuple(names) for parent, names in found.items()}

    @cached_property
    def stamp(self) -> int:
        """32 bits that tell which block is in which page; 0 if none is kept."""
        rows = np.array(sorted((name, block.page) for name, block in self.blocks.items()), np.int64)
        return int.from_bytes(hashlib.blake2b(rows.tobytes(), digest_size=4).digest(), "big") if rows.size else 0


def find(store: PrefixStore, tokens: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The kept blocks that a prompt starts with, root first, and how many of its tokens they cover.

    The last block may count in part: as far as its tokens are the prompt's. The prompt's last token is never
    covered, because something must be taken in to score what follows.
    """
    path: list[int] = []
    parent, most = ROOT, len(tokens) - 1
    while len(path) * store.page < most:
        start = len(path) * store.page
        here = tuple(tokens[start : start + store.page])
        name = block_name(parent, here)
        if not _is(store, name, parent, here):
            length, name = _longest(store, parent, here)
            return (*path, *([name] if length else [])), min(start + length, most)
        path.append(name)
        parent = name
    return tuple(path), max(most, 0) if path else 0


def grow(
    store: PrefixStore, text: Sequence[int], pages: Sequence[int], time: float, prompt: int, answer: int | None
) -> PrefixStore:
    """Keep the full blocks of a text, whose keys are in `pages`, and evict by policy what is then too much.

    Args:
        prompt: tokens of the text that were asked.
        answer: tokens generated after them, if that is known.
    """
    blocks, path, parent = dict(store.blocks), [], ROOT
    for column in range(min(len(text) // store.page, store.most)):
        tokens = tuple(text[column * store.page : (column + 1) * store.page])
        name = block_name(parent, tokens)
        if name in blocks and not _is(store, name, parent, tokens):
            break  # another block has this name, by a chance of one in 2**56
        blocks.setdefault(name, Block(parent, tokens, pages[column]))
        path.append(name)
        parent = name
    if not path:
        return store
    time = max(time, store.time)
    state = store.policy.touch(_state(store), Access(tuple(path), time, prompt, answer))
    tally = replace(store.tally, kept=store.tally.kept + len(blocks) - len(store.blocks))
    return shrink(_next(store, state, blocks=blocks, tally=tally, time=time), len(blocks) - store.most, frozenset(path))


def shrink(store: PrefixStore, count: int, pinned: frozenset[int]) -> PrefixStore:
    """Evict `count` blocks, by policy, none of them `pinned`."""
    if count <= 0:
        return store
    blocks, state = dict(store.blocks), _state(store)
    for _ in range(count):
        name, state = store.policy.victim(state, pinned)
        del blocks[name]
    return _next(store, state, blocks=blocks, tally=replace(store.tally, evicted=store.tally.evicted + count))


def above(store: PrefixStore, pages: Set[int]) -> frozenset[int]:
    """The blocks in these pages, and all before one of them."""
    found: set[int] = set()
    for name, block in store.blocks.items():
        if block.page in pages:
            while name != ROOT and name not in found:
                found.add(name)
                name = store.blocks[name].parent
    return frozenset(found)


def block_name(parent: int, tokens: tuple[int, ...]) -> int:
    """A number for these tokens after those of `parent`, the same whenever they come again; never `ROOT`."""
    text = np.array([parent, *tokens], np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big") or 1


def _is(store: PrefixStore, name: int, parent: int, tokens: tuple[int, ...]) -> bool:
    block = store.blocks.get(name)
    return block is not None and (block.parent, block.tokens) == (parent, tokens)


def _longest(store: PrefixStore, parent: int, tokens: tuple[int, ...]) -> tuple[int, int]:
    """How far a block after `parent` starts as `tokens` do, and its name."""
    same = ((_common(store.blocks[name].tokens, tokens), name) for name in store.children.get(parent, ()))
    return max(same, default=(0, ROOT))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _state(store: PrefixStore) -> Any:
    if store.turn != store.turns.newest:
        raise ValueError(
            f"PrefixStore: `store` was donated to a later one (turn {store.turn} of {store.turns.newest}): "
            "use the store that was returned, or copy.deepcopy it first"
        )
    return store.turns.state


def _next(store: PrefixStore, state: Any, **changes) -> PrefixStore:
    """The next store of the line."""
    store.turns.state, store.turns.newest = state, store.turn + 1
    return replace(store, turn=store.turn + 1, **changes)
