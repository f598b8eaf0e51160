"""Blocks that a model, learned from the trace as it goes, expects to be reused least for their time leave first."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np

from kvjax.cache.prefix.base import Access, check_capacity, no_victim
from kvjax.cache.prefix.beliefs import beliefs, check_prior
from kvjax.cache.prefix.conversations import Chain, Conversations, attend, leave, own
from kvjax.cache.prefix.reuse import Reuse, indices


@dataclass(frozen=True)
class Predictive:
    """Evict from the end of the prompt whose blocks are worth least to keep.

    All blocks of a prompt live and die together, but for its last, partly filled one, which seldom returns.

    Args:
        prior: what is believed before anything is seen, a name that `beliefs` knows.
        remembered: prompts that the model is fitted to, and about as many whose left blocks are still recognised.
    """

    prior: str = "chat"
    remembered: int = 8192

    def __post_init__(self):
        check_prior(self.prior)
        if self.remembered < 64:
            raise ValueError(f"Predictive: `remembered` must be at least 64 prompts, got {self.remembered}")

    def init(self, capacity: int) -> Conversations:
        check_capacity(capacity)
        return Conversations(Reuse(self.remembered, beliefs(self.prior)))

    def touch(self, state: Conversations, access: Access) -> Conversations:
        attend(state, access)
        return state

    def victim(self, state: Conversations, pinned: Container[int] = frozenset()) -> tuple[int, Conversations]:
        return cheapest(state, pinned, None), state


def cheapest(state: Conversations, pinned: Container[int], price: Callable[[Chain], float] | None) -> int:
    """Let go of the block that is worth least: the chance of reuse for its time, times a price of the prompt.

    Worth changes slowly, so prompts are ranked again only when a thirty-second of them is new.
    """
    if state.reuse.total - state.ranked <= len(state.live) // 32:
        block = _next(state, pinned)
        if block is not None:
            return block
    _rank(state, price)
    block = _next(state, pinned)
    if block is None:
        raise no_victim()
    return block


def _next(state: Conversations, pinned: Container[int]) -> int | None:
    """Follow the queue; what is in use or continued goes from it until the next ranking."""
    while state.queue:
        number, least = state.queue[-1]
        block = own(state, number)
        if block is None or block in pinned or block in state.forest.children or state.chains[number].held <= least:
            state.queue.pop()
        else:
            return leave(state, number)
    return None


def _rank(state: Conversations, price: Callable[[Chain], float] | None) -> None:
    """Put every prompt with own blocks into the queue, and its last block apart."""
    state.live = {number: None for number in state.live if own(state, number) is not None}
    chains = [state.chains[number] for number in state.live]
    time = next(reversed(state.chains.values())).time
    worth = indices(state.reuse, np.fromiter(state.live, np.int64, len(chains)), time)
    worth[[chain.over for chain in chains]] *= state.cuts[1] / state.cuts[0]
    if price is not None:
        worth *= [price(chain) for chain in chains]
    end = state.ends[1] / state.ends[0]
    entries = [(w, number, 0) for w, number in zip(worth.round(12).tolist(), state.live, strict=True)]
    entries += [
        (w * end, number, chain.held - 1)
        for (w, number, _), chain in zip(entries, chains, strict=True)
        if chain.held == len(chain.path)
    ]
    entries.sort(key=lambda entry: (-entry[0], -entry[1]))  # of equals the oldest goes first
    state.queue = [entry[1:] for entry in entries]
    state.ranked = state.reuse.total
