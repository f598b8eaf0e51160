"""The policy that lately hit most leads; all are played on the side, and none is known best beforehand.

Every policy plays the same prompts on a shadow, which holds block ids only. Where room is needed, blocks leave that the
leader's shadow does not hold, so that the store comes to hold what the leader would (Gramacy et al. 2002, "Adaptive
Caching by Refetching", NIPS, without the refetching). Few long prompts decide most hits, so a policy takes the lead
only when it is ahead by several standard deviations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from kvjax.cache.prefix.adaptive_lru import AdaptiveLru
from kvjax.cache.prefix.base import Access, Policy, check_capacity
from kvjax.cache.prefix.forest import Forest, fell, leaf, plant
from kvjax.cache.prefix.lru import Lru
from kvjax.cache.prefix.predictive import Predictive
from kvjax.cache.prefix.replay import Play, play


@dataclass
class WorkloadAdaptiveState:
    """The shadows, and the store.

    Args:
        leader: place of the shadow that is followed.
        ahead: discounted hits of each shadow more than the leader's, since it leads.
        spread: the same of their squares, prompt by prompt.
        forest: blocks of the store.
        extra: those that the leader's shadow does not hold, ends before what they continue.
    """

    shadows: list[Play]
    ahead: list[float]
    spread: list[float]
    leader: int = 0
    forest: Forest = field(default_factory=Forest)
    extra: OrderedDict[int, None] = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class WorkloadAdaptive:
    """Follow the best of some policies.

    Args:
        policies: the first leads until another does better; `MemoryAware` is left out, as it aims at another thing.
        half_life: blocks after which a hit counts half.
        deviations: standard deviations by which a policy must be ahead of the leader to take its place.
    """

    policies: tuple[Policy[Any], ...] = (Predictive(), AdaptiveLru(), Lru())
    half_life: float = 50_000.0
    deviations: float = 3.0

    def __post_init__(self):
        if not self.policies:
            raise ValueError("WorkloadAdaptive: `policies` must name at least one policy, got none")
        for name in ("half_life", "deviations"):
            if not getattr(self, name) > 0:
                raise ValueError(f"WorkloadAdaptive: `{name}` must be positive, got {getattr(self, name)}")

    def init(self, capacity: int) -> WorkloadAdaptiveState:
        check_capacity(capacity)
        shadows = [Play(policy, capacity) for policy in self.policies]
        return WorkloadAdaptiveState(shadows, [0.0] * len(shadows), [0.0] * len(shadows))

    def touch(self, state: WorkloadAdaptiveState, access: Access) -> WorkloadAdaptiveState:
        held, places = state.forest.parent, range(len(state.shadows))
        plant(state.forest, access.path)
        for block in access.path:
            state.extra.pop(block, None)
        hits = []
        for place, shadow in enumerate(state.shadows):
            matched, left = play(shadow, access)
            hits.append(matched)
            if place == state.leader:
                state.extra.update((block, None) for block in left if block in held)
        keep = 0.5 ** (len(access.path) / self.half_life)
        more = [matched - hits[state.leader] for matched in hits]
        state.ahead = [keep * ahead + m for ahead, m in zip(state.ahead, more, strict=True)]
        state.spread = [keep * keep * spread + m * m for spread, m in zip(state.spread, more, strict=True)]
        best = max(places, key=state.ahead.__getitem__)
        if state.ahead[best] > self.deviations * state.spread[best] ** 0.5:
            state.leader = best
            state.ahead, state.spread = [0.0 for _ in places], [0.0 for _ in places]
            followed = state.shadows[best].held
            state.extra = OrderedDict.fromkeys(block for block in reversed(held) if block not in followed)
        return state

    def victim(
        self, state: WorkloadAdaptiveState, pinned: Container[int] = frozenset()
    ) -> tuple[int, WorkloadAdaptiveState]:
        block = leaf(state.forest, chain(state.extra, state.forest.parent), pinned)
        fell(state.forest, block)
        state.extra.pop(block, None)
        return block, state
