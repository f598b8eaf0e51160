"""Prompts chained into conversations, and their blocks: what a predicting policy knows of the store.

A prompt that continues the path of an earlier one is its next turn. A block belongs to the last prompt that touched
it; what is left to an earlier prompt is what the later one cut off.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvjax.cache.prefix.base import Access
from kvjax.cache.prefix.features import Turn
from kvjax.cache.prefix.forest import Forest, fell, plant
from kvjax.cache.prefix.reuse import Reuse, followed, note, refit

SHARED = 6
"""A block after which more continuations began is a prefix that conversations share, not a turn of one."""


@dataclass
class Chain:
    """The blocks of one prompt.

    Args:
        turn: its number in the conversation, from 1.
        held: blocks, from the root, that are held, later prompts' included.
        over: the conversation went on, so what is still its own was cut off.
    """

    path: tuple[int, ...]
    time: float
    turn: int
    held: int
    block_bytes: float
    over: bool = False


@dataclass
class Conversations:
    """Held and lately left blocks, and what was learned of reuse.

    Args:
        chains: prompts by number, oldest first.
        owner: number of the last prompt that touched a block, for blocks held or lately left.
        forks: continuations ever begun after a block.
        live: numbers of the prompts that may have own blocks held, oldest first.
        queue: number of a prompt, and how many blocks to leave it: what leaves next is last.
        ranked: how many prompts had been seen when `queue` was made.
        swept: how many were forgotten when forgotten prompts were last let go.
        ends: prompts that were continued, and those of which the last block was reused too.
        cuts: rests that were cut off, and those that were reused all the same.
    """

    reuse: Reuse
    chains: dict[int, Chain] = field(default_factory=dict)
    owner: dict[int, int] = field(default_factory=dict)
    forest: Forest = field(default_factory=Forest)
    forks: dict[int, int] = field(default_factory=dict)
    live: dict[int, None] = field(default_factory=dict)
    queue: list[tuple[int, int]] = field(default_factory=list)
    ranked: int = 0
    swept: int = 0
    ends: tuple[float, float] = (2.0, 1.0)
    cuts: tuple[float, float] = (10.0, 1.0)


def attend(state: Conversations, access: Access) -> None:
    """Take in a prompt: whose turn it is, that its blocks are held, and what that says of reuse."""
    path, owner = access.path, state.owner
    known = 0
    while known < len(path) and path[known] in owner:
        known += 1
    turn = _turn(state, access, known)
    number = note(state.reuse, turn, access.time)
    if 0 < known < len(path):
        state.forks[path[known - 1]] = state.forks.get(path[known - 1], 0) + 1
    owner.update(dict.fromkeys(path, number))
    plant(state.forest, path)
    state.chains[number] = Chain(path, access.time, turn.number, len(path), access.block_bytes)
    state.live[number] = None
    _sweep(state)
    refit(state.reuse, access.time)


def own(state: Conversations, number: int) -> int | None:
    """The last held block that is a prompt's own, if there is one."""
    chain = state.chains[number]
    block = chain.path[chain.held - 1] if chain.held else None
    return block if block is not None and state.owner[block] == number else None


def leave(state: Conversations, number: int) -> int:
    """Let go of the last held block of a prompt."""
    chain = state.chains[number]
    chain.held -= 1
    block = chain.path[chain.held]
    fell(state.forest, block)
    return block


def _turn(state: Conversations, access: Access, known: int) -> Turn:
    path = access.path
    if not known or state.forks.get(path[known - 1], 0) > SHARED:
        return Turn(1, access.tokens, access.answer)
    number = state.owner[path[known - 1]]
    chain = state.chains[number]
    if chain.over:
        state.cuts = (state.cuts[0], state.cuts[1] + 1)
    else:
        chain.over = True
        length = len(chain.path)
        followed(state.reuse, number, access.time, min(1.0, known / max(length - 1, 1)))
        state.ends = (state.ends[0] + 1, state.ends[1] + (known == length))
        state.cuts = (state.cuts[0] + (known < length), state.cuts[1])
    gap, growth = access.time - chain.time, len(path) - len(chain.path)
    return Turn(chain.turn + 1, access.tokens, access.answer, gap, growth)


def _sweep(state: Conversations) -> None:
    """Let go of prompts that the model has forgotten, but for those with held blocks."""
    if state.swept == state.reuse.forgotten:
        return
    state.swept = state.reuse.forgotten
    for number in [n for n in state.chains if n < state.swept and own(state, n) is None]:
        for block in state.chains.pop(number).path:
            if state.owner.get(block) == number and block not in state.forest.parent:
                del state.owner[block]
                state.forks.pop(block, None)
        state.live.pop(number, None)
