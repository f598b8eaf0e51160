"""Keep everything, in the cache's own dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.ahead import InOrder
from kvjax.cache.attention import Mask, attend, by_head
from kvjax.cache.base import LayerSpec, Strategy, check_dtype
from kvjax.cache.feed import feed
from kvjax.cache.slots import take_rows, write
from kvjax.pytree import pytree


@pytree
class DenseLayer(InOrder):
    """Slot `i` of a row holds its token `i`; `positions` is -1 where nothing is held yet."""

    k: Float[Array, "rows slots head_dim"]
    v: Float[Array, "rows slots head_dim"]
    positions: Int[Array, "batch slots"]

    @property
    def limit(self) -> int:
        return self.positions.shape[1]

    def attend(self, q, k, v, positions, valid, mask: Mask):
        start = positions[:, 0]
        layer = replace(
            self,
            k=write(self.k, by_head(k).astype(self.k.dtype), start, valid),
            v=write(self.v, by_head(v).astype(self.v.dtype), start, valid),
            positions=write(self.positions, positions, start, valid),
        )
        return *layer.look(q, positions, mask), layer

    def look(self, q, positions, mask: Mask):
        return attend(q, self.k, self.v, positions, self.positions, mask)

    def held(self, length: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        return jnp.where(self.positions < length[:, None], self.positions, -1)

    def fork(self, rows: Int[Array, "new_batch"]) -> DenseLayer:
        batch = self.positions.shape[0]
        return jax.tree.map(lambda buffer: take_rows(buffer, rows, batch), self)

    @property
    def assured(self) -> tuple[None, int]:
        return None, 0

    def tokens(self) -> tuple[Float[Array, "rows slots head_dim"], Float[Array, "rows slots head_dim"]]:
        return self.k, self.v

    def take(self, k, v, positions, mask: Mask, old):
        return feed(self, k, v, positions, self.limit, mask)


@dataclass(frozen=True)
class Dense(Strategy):
    """Every token's keys and values, unchanged; `dtype` overrides the model's cache dtype."""

    dtype: str | None = None

    def __post_init__(self):
        check_dtype(self, self.dtype)

    def layer(self, spec: LayerSpec) -> DenseLayer:
        if self.dtype is not None:
            spec = replace(spec, dtype=self.dtype)
        empty = jnp.full((spec.batch, spec.capacity), -1, jnp.int32)
        return DenseLayer(spec.zeros(spec.capacity), spec.zeros(spec.capacity), empty)
