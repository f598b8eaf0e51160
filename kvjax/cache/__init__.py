"""How keys and values are kept: strategies, and the pytrees they make."""

from kvjax.cache import prefix
from kvjax.cache.base import Cache, LayerCache, LayerSpec, Strategy, fork, nbytes
from kvjax.cache.compress import compress
from kvjax.cache.dense import Dense
from kvjax.cache.evict import Evicting
from kvjax.cache.paged import Paged, release
from kvjax.cache.quantized import Quantized
from kvjax.cache.ring import Ring
from kvjax.cache.sensitivity import allocate_bits, bit_problem
from kvjax.cache.shared import Shared, share
from kvjax.cache.stats import Stats, stats

STRATEGIES = {
    "dense": Dense,
    "evicting": Evicting,
    "paged": Paged,
    "quantized": Quantized,
    "ring": Ring,
    "shared": Shared,
}
"""Every strategy by name; the tests cross this table with every decoder."""

__all__ = [
    "STRATEGIES",
    "Cache",
    "Dense",
    "Evicting",
    "LayerCache",
    "LayerSpec",
    "Paged",
    "Quantized",
    "Ring",
    "Shared",
    "Stats",
    "Strategy",
    "allocate_bits",
    "bit_problem",
    "compress",
    "fork",
    "nbytes",
    "prefix",
    "release",
    "share",
    "stats",
]
