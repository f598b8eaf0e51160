"""Keys and values that outlive their request, and the policies that say which block leaves when room is needed."""

from kvjax.cache.prefix.adaptive_lru import AdaptiveLru
from kvjax.cache.prefix.base import Access, Policy
from kvjax.cache.prefix.index import PrefixStore, Tally, find
from kvjax.cache.prefix.lru import Lru
from kvjax.cache.prefix.memory_aware import MemoryAware
from kvjax.cache.prefix.predictive import Predictive
from kvjax.cache.prefix.replay import Play, match, play, replay
from kvjax.cache.prefix.store import keep, make_room, open_store, reuse
from kvjax.cache.prefix.workload_adaptive import WorkloadAdaptive

POLICIES = {
    "lru": Lru(),
    "adaptive_lru": AdaptiveLru(),
    "predictive": Predictive(),
    "memory_aware": MemoryAware(),
    "workload_adaptive": WorkloadAdaptive(),
}
"""Every policy by name, as it is unless told otherwise; the tests cross this table with every trace."""

__all__ = [
    "POLICIES",
    "Access",
    "AdaptiveLru",
    "Lru",
    "MemoryAware",
    "Play",
    "Policy",
    "Predictive",
    "PrefixStore",
    "Tally",
    "WorkloadAdaptive",
    "find",
    "keep",
    "make_room",
    "match",
    "open_store",
    "play",
    "replay",
    "reuse",
]
