"""Keep a recent window and the first few tokens, in a ring that never shifts.

Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks"
(arXiv:2309.17453); positions stay absolute here, so a windowed model is served exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import Mask, attend, by_head, merge, placed
from kvjax.cache.base import LayerSpec, check_dtype
from kvjax.cache.dense import Dense, DenseLayer, WithDense
from kvjax.cache.feed import feed
from kvjax.cache.placing import Place, Placing
from kvjax.cache.slots import take_rows
from kvjax.pytree import pytree, static


@pytree
class RingLayer(Placing):
    """Slots `0 … sinks - 1` hold the first tokens, the other `window` slots the newest, by turns."""

    positions: Int[Array, "batch slots"]
    sinks: int = static()

    @property
    def limit(self) -> None:
        return None

    @property
    def window(self) -> int:
        return self.positions.shape[1] - self.sinks

    def attend(self, q, k, v, positions, valid, mask: Mask):
        if q.shape[1] == 1:  # the slot that is overwritten has just left the window
            return self.attend_one(q, k, v, positions, valid, mask)
        k, v = by_head(k).astype(self.k.dtype), by_head(v).astype(self.v.dtype)
        fresh = attend(q, k, v, positions, jnp.where(valid, positions, -1), self._narrowed(mask))
        return *merge(self.look(q, positions, mask), fresh), self._append(k, v, positions, valid)

    def place(self, positions, valid, mask: Mask) -> Place:
        at = positions[:, 0]
        slot = jnp.where(at < self.sinks, at, self.sinks + (at - self.sinks) % self.window)
        to = jnp.where(valid[:, 0], slot, -1)
        after = replace(self, positions=placed(self.positions, positions, to))
        return Place(self.positions, to, self._narrowed(mask), after)

    def look(self, q, positions, mask: Mask):
        return attend(q, self.k, self.v, positions, self.positions, self._narrowed(mask))

    def _narrowed(self, mask: Mask) -> Mask:
        window = self.window if mask.window is None else min(mask.window, self.window)
        return replace(mask, window=window, sinks=self.sinks)

    def ahead(self, q, k, v, positions, valid, mask: Mask, path=None):
        return super().ahead(q, k, v, positions, valid, self._narrowed(mask), path)

    def held(self, length: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        return jnp.where(self.positions < length[:, None], self.positions, -1)

    def fork(self, rows: Int[Array, "new_batch"]) -> RingLayer:
        batch = self.positions.shape[0]
        return jax.tree.map(lambda buffer: take_rows(buffer, rows, batch), self)

    @property
    def assured(self) -> tuple[int, int]:
        return self.window, self.sinks

    def tokens(self) -> tuple[Float[Array, "rows slots head_dim"], Float[Array, "rows slots head_dim"]]:
        return self.k, self.v

    def take(self, k, v, positions, mask: Mask, old):
        sink = (positions >= 0) & (positions < self.sinks)
        newest = ~sink & (positions > positions.max(1, keepdims=True) - self.window)
        layer = self
        for part, most in ((sink, self.sinks), (newest, self.window)):  # a gap may lie between
            if most:
                layer = feed(layer, k, v, jnp.where(part, positions, -1), most, mask)
        return layer

    def _append(self, k, v, positions, valid: Bool[Array, "batch width"]) -> RingLayer:
        """Give each slot the newest of the chunk's tokens that falls to it, if one does."""
        start, width = positions[:, :1], positions.shape[1]
        end = start + valid.sum(1, keepdims=True)
        slot = jnp.arange(self.positions.shape[1])[None]
        newest = end - 1 - (end - 1 - slot) % self.window
        source = jnp.where(slot < self.sinks, slot, newest)
        taken = (source >= start) & (source < end) & ((slot < self.sinks) | (source >= self.sinks))
        index = jnp.clip(source - start, 0, width - 1)

        def blend(old, new):
            each = old.shape[0] // index.shape[0]
            where, at = (jnp.repeat(x, each, axis=0)[..., None] for x in (taken, index))
            return jnp.where(where, jnp.take_along_axis(new, at, axis=1), old)

        return replace(self, k=blend(self.k, k), v=blend(self.v, v), positions=jnp.where(taken, source, self.positions))


@dataclass(frozen=True)
class Ring(WithDense):
    """The last `window` tokens and the first `sinks`; rows may grow without end.

    With `window=None` each layer keeps its model's own sliding window, and a layer without one keeps
    everything up to the capacity: nothing is lost. A window larger than the capacity needs no ring.
    """

    window: int | None = None
    sinks: int = 0
    dtype: str | None = None

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"Ring: `window` must be at least 1 token, got {self.window}")
        if self.sinks < 0:
            raise ValueError(f"Ring: `sinks` must not be negative, got {self.sinks}")
        check_dtype(self, self.dtype)

    def layer(self, spec: LayerSpec) -> RingLayer | DenseLayer:
        window = spec.window if self.window is None else self.window
        if window is None or window + self.sinks >= spec.capacity:
            return Dense(self.dtype).layer(spec)
        spec = replace(spec, dtype=self.dtype or spec.dtype)
        slots = self.sinks + window
        empty = jnp.full((spec.batch, slots), -1, jnp.int32)
        return RingLayer(spec.zeros(slots), spec.zeros(slots), empty, self.sinks)
