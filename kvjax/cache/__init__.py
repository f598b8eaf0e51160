"""How keys and values are kept: strategies, and the pytrees they make."""

from kvjax.cache.base import Cache, LayerCache, LayerSpec, Strategy, fork, nbytes
from kvjax.cache.dense import Dense
from kvjax.cache.ring import Ring

STRATEGIES = {"dense": Dense, "ring": Ring}
"""Every strategy by name; the tests cross this table with every decoder."""

__all__ = ["STRATEGIES", "Cache", "Dense", "LayerCache", "LayerSpec", "Ring", "Strategy", "fork", "nbytes"]
