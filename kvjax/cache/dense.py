"""Keep everything, in the cache's own dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.ahead import InOrder
from kvjax.cache.attention import Mask, append, attend, by_head, write
from kvjax.cache.base import Cache, LayerSpec, Strategy, check_dtype
from kvjax.cache.feed import feed
from kvjax.cache.slots import take_rows
from kvjax.pytree import pytree


@pytree
class DenseLayer(InOrder):
    """Slot `i` of a row holds its token `i`, of `length` tokens."""

    k: Float[Array, "rows slots head_dim"]
    v: Float[Array, "rows slots head_dim"]
    length: Int[Array, "batch"]

    @property
    def limit(self) -> int:
        return self.k.shape[1]

    def attend(self, q, k, v, positions, valid, mask: Mask):
        start = positions[:, 0]
        k, v = by_head(k), by_head(v)
        layer = replace(self, length=jnp.minimum(start + valid.sum(1, dtype=jnp.int32), self.limit))
        if q.shape[1] == 1:
            to = jnp.where(layer.length > start, start, -1)
            out, lse, k, v = append(q, k, v, self.k, self.v, positions, self._first(start), to, mask)
            return out, lse, replace(layer, k=k, v=v)
        k, v = (write(old, new.astype(old.dtype), start, valid) for old, new in ((self.k, k), (self.v, v)))
        layer = replace(layer, k=k, v=v)
        return *layer.look(q, positions, mask), layer

    def look(self, q, positions, mask: Mask):
        return attend(q, self.k, self.v, positions, self._first(self.length), mask)

    def held(self, length: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        return self._first(jnp.minimum(length, self.length))

    def fork(self, rows: Int[Array, "new_batch"]) -> DenseLayer:
        batch = self.length.shape[0]
        return jax.tree.map(lambda buffer: take_rows(buffer, rows, batch), self)

    @property
    def assured(self) -> tuple[None, int]:
        return None, 0

    def tokens(self) -> tuple[Float[Array, "rows slots head_dim"], Float[Array, "rows slots head_dim"]]:
        return self.k, self.v

    def _first(self, length: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        slots = jnp.arange(self.limit, dtype=jnp.int32)[None]
        return jnp.where(slots < length[:, None], slots, -1)

    def take(self, k, v, positions, mask: Mask, old):
        return feed(self, k, v, positions, self.limit, mask)


class WithDense(Strategy):
    """Strategies that make layers of this kind, some or all."""

    def open(self, cache: Cache, lengths):
        """Dense layers get the cache's own length, so that what follows from it is worked out once for all of them."""
        cache, full = super().open(cache, lengths)
        layers = (replace(x, length=cache.length) if isinstance(x, DenseLayer) else x for x in cache.layers)
        return replace(cache, layers=tuple(layers)), full


@dataclass(frozen=True)
class Dense(WithDense):
    """Every token's keys and values, unchanged; `dtype` overrides the model's cache dtype."""

    dtype: str | None = None

    def __post_init__(self):
        check_dtype(self, self.dtype)

    def layer(self, spec: LayerSpec) -> DenseLayer:
        if self.dtype is not None:
            spec = replace(spec, dtype=self.dtype)
        return DenseLayer(spec.zeros(spec.capacity), spec.zeros(spec.capacity), jnp.zeros(spec.batch, jnp.int32))
