"""Keep everything, in the cache's own dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import Mask, attend, by_head, write
from kvjax.cache.base import Cache, LayerSpec, Strategy, check_dtype
from kvjax.cache.feed import feed
from kvjax.cache.placing import Place, Placing
from kvjax.cache.slots import take_rows
from kvjax.pytree import pytree


@pytree
class DenseLayer(Placing):
    """Slot `i` of a row holds its token `i`, of `length` tokens."""

    length: Int[Array, "batch"]

    @property
    def limit(self) -> int:
        return self.k.shape[1]

    def attend(self, q, k, v, positions, valid, mask: Mask):
        if q.shape[1] == 1:
            return self.attend_one(q, k, v, positions, valid, mask)
        start, layer = positions[:, 0], self._longer(positions, valid)
        k, v = (write(old, by_head(new).astype(old.dtype), start, valid) for old, new in ((self.k, k), (self.v, v)))
        layer = replace(layer, k=k, v=v)
        return *layer.look(q, positions, mask), layer

    def place(self, positions, valid, mask: Mask) -> Place:
        start, layer = positions[:, 0], self._longer(positions, valid)
        return Place(self._first(start), jnp.where(layer.length > start, start, -1), mask, layer)

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

    def _longer(self, positions, valid) -> DenseLayer:
        return replace(self, length=jnp.minimum(positions[:, 0] + valid.sum(1, dtype=jnp.int32), self.limit))

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
