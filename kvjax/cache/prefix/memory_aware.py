"""Blocks that save the least computing for their bytes leave first.

The greedy-dual idea of weighing a miss by its cost a byte (Cao & Irani 1997, "Cost-Aware WWW Proxy Caching
Algorithms", USITS) with the learned chance of reuse in place of an ageing clock.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from kvjax.cache.prefix.base import Access, check_capacity
from kvjax.cache.prefix.beliefs import beliefs, check_prior
from kvjax.cache.prefix.conversations import Chain, Conversations, attend
from kvjax.cache.prefix.predictive import cheapest
from kvjax.cache.prefix.reuse import Reuse


@dataclass(frozen=True)
class MemoryAware:
    """`Predictive`, with worth times the cost of computing a block again and divided by its bytes.

    Args:
        level: depth, in blocks, at which attending to all before a block costs as much as the rest of the model on
            it. With P parameters, L layers, H heads of dimension D and blocks of n tokens: P / (2·L·H·D·n).
        prior, remembered: as in `Predictive`.
    """

    level: float = 64.0
    prior: str = "chat"
    remembered: int = 8192

    def __post_init__(self):
        check_prior(self.prior)
        if self.remembered < 64:
            raise ValueError(f"MemoryAware: `remembered` must be at least 64 prompts, got {self.remembered}")
        if not self.level > 0:
            raise ValueError(f"MemoryAware: `level` must be positive, got {self.level}")

    def init(self, capacity: int) -> Conversations:
        check_capacity(capacity)
        return Conversations(Reuse(self.remembered, beliefs(self.prior)))

    def touch(self, state: Conversations, access: Access) -> Conversations:
        attend(state, access)
        return state

    def victim(self, state: Conversations, pinned: Container[int] = frozenset()) -> tuple[int, Conversations]:
        return cheapest(state, pinned, self._price), state

    def _price(self, chain: Chain) -> float:
        return cost(chain.held - 1, self.level) / chain.block_bytes


def cost(depth: int, level: float) -> float:
    """What computing the block at a depth costs, in costs of a root's block."""
    return 1.0 + depth / level
