"""A layer whose tokens wait in full until newer ones are there, and are then packed a group at a time.

Attention sees both parts at once, and no dense copy of the codes ever exists (KIVI, Liu et al. 2024, arXiv:2402.02750,
Alg. 1, packs by groups as well).
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from kvjax.cache.ahead import InOrder
from kvjax.cache.attention import Mask, attend, attend_blocks, by_head, merge, write
from kvjax.cache.feed import feed
from kvjax.cache.folded import attend_folded
from kvjax.cache.quantize import Codec
from kvjax.cache.slots import take_rows
from kvjax.pytree import pytree, static

BLOCK = 256
"""Slots unpacked at once for many queries, so that they stay in a core's cache."""

FEW = 8
"""Queries up to which a CPU sums codes without unpacking; a GPU's compiler takes minutes over these sums."""


@pytree
class QuantizedLayer(InOrder):
    """A row's first `sinks` tokens lie in as many slots of `k` and `v`, the next `packed` in groups, others in a ring.

    The ring is the other `residual + group` slots, taken by turns. A row's length may be set back by up to `residual`
    tokens, since none of those is packed yet.

    A span's centre in `k_centres` is the mean of its first tokens, as many as are in full when its first group is
    packed: the same ones, however a prompt is cut into chunks.
    """

    k_codes: UInt8[Array, "rows k_bytes head_dim groups"]
    k_scales: Shaped[Array, "rows k_sharing groups"]
    v_codes: UInt8[Array, "rows v_bytes groups head_dim"]
    v_scales: Shaped[Array, "rows v_sharing groups"]
    k: Float[Array, "rows slots head_dim"]
    v: Float[Array, "rows slots head_dim"]
    length: Int[Array, "batch"]
    packed: Int[Array, "batch"]
    k_codec: Codec = static()
    v_codec: Codec = static()
    residual: int = static()
    capacity: int = static()
    k_centres: Shaped[Array, "rows head_dim spans"] | None = None

    @property
    def limit(self) -> int:
        return self.capacity

    @property
    def window(self) -> int:
        return self.residual + self.k_codec.group

    @property
    def sinks(self) -> int:
        return self.k.shape[1] - self.window

    def attend(self, q, k, v, positions, valid, mask: Mask):
        valid &= positions < self.capacity
        start = positions[:, 0]
        end = start + valid.sum(1, dtype=jnp.int32)
        k, v = by_head(k).astype(self.k.dtype), by_head(v).astype(self.v.dtype)
        if q.shape[1] == 1:  # the slot that is overwritten held a packed token
            at = self._slot(start)
            layer = replace(self, k=write(self.k, k, at, valid), v=write(self.v, v, at, valid), length=end)
            layer = layer._pack((layer.k, layer.v), end, 1)
            return *replace(layer, packed=self.packed).look(q, positions, mask), layer  # as for more: packed after
        pool = tuple(jnp.concatenate(pair, axis=1) for pair in ((self.k, k), (self.v, v)))
        ring = self._refreshed(pool, start, end)
        layer = replace(self, k=ring[0], v=ring[1], length=end)._pack(pool, start, q.shape[1])
        slots = jnp.concatenate([self._ring(start), jnp.where(valid, positions, -1)], axis=1)
        seen = layer._see(q, (*pool, slots), positions, self.packed, mask)  # of `layer`, or XLA copies what it writes
        return *seen, layer

    def look(self, q, positions, mask: Mask):
        return self._see(q, (self.k, self.v, self._ring(self.length)), positions, self.packed, mask)

    def steady(self) -> Int[Array, "batch"]:
        """Up to the token that completes a group, which it still sees in full."""
        return self.k_codec.group - (self.length - self.sinks - self.residual - self.packed)

    def held(self, length: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        """The slots are those of sinks and ring, then those that are packed, a group after the other."""
        ring = self._ring(self.length)
        return jnp.concatenate([jnp.where(ring < length[:, None], ring, -1), self._coded(self.packed)], axis=1)

    def tokens(self) -> tuple[Float[Array, "rows slots head_dim"], Float[Array, "rows slots head_dim"]]:
        """Keys and values in the slots that `held` speaks of."""

        def both(full, codec: Codec, codes, scales, centres=None):
            unpacked = codec.turn_back(codec.decode(codes, scales, centres)).astype(full.dtype)
            return jnp.concatenate([full, unpacked], axis=1)

        k = both(self.k, self.k_codec, self.k_codes, self.k_scales, self._centres(0, self.k_codes.shape[3]))
        return k, both(self.v, self.v_codec, self.v_codes, self.v_scales)

    def fork(self, rows: Int[Array, "new_batch"]) -> QuantizedLayer:
        batch = self.packed.shape[0]
        return jax.tree.map(lambda buffer: take_rows(buffer, rows, batch), self)

    @property
    def assured(self) -> tuple[None, int]:
        return None, 0

    def take(self, k, v, positions, mask: Mask, old):
        return feed(self, k, v, positions, self.capacity, mask)

    def _slot(self, index: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return jnp.where(index < self.sinks, index, self.sinks + (index - self.sinks) % self.window)

    def _newest(self, end: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        """The index of the newest of a row's `end` tokens that falls to each slot, or an index not held."""
        slot, last = jnp.arange(self.k.shape[1])[None], end[:, None] - 1
        return jnp.where(slot < self.sinks, slot, last - (last - slot) % self.window)

    def _ring(self, end: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        """The position that each slot of sinks and ring holds, -1 where it is packed or empty."""
        newest, slot = self._newest(end), jnp.arange(self.k.shape[1])[None]
        here = jnp.where(slot < self.sinks, newest < end[:, None], newest >= self.sinks + self.packed[:, None])
        return jnp.where(here, newest, -1)

    def _coded(self, packed: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        """The position that each slot of the groups holds when `packed` tokens are in them, -1 where none."""
        nth = jnp.arange(self.k_codes.shape[3] * self.k_codec.group)[None]
        return jnp.where(nth < packed[:, None], self.sinks + nth, -1)

    def _pick(self, pool, inside: Int[Array, "batch"], index: Int[Array, "batch tokens"]):
        """Tokens of a row by index: those below `inside` from the slots, others from behind them."""
        inside = inside[:, None]
        return self._at(pool, jnp.where(index < inside, self._slot(index), self.k.shape[1] + index - inside))

    def _refreshed(self, pool, start: Int[Array, "batch"], end: Int[Array, "batch"]):
        """The slots once the tokens from `start` to `end`, behind them in the pool, are in them."""
        newest, slot = self._newest(end), jnp.arange(self.k.shape[1])[None]
        fresh = (newest >= start[:, None]) & (newest < end[:, None]) & (self._slot(newest) == slot)
        return self._at(pool, jnp.where(fresh, slot.size + newest - start[:, None], slot))

    def _at(self, pool, at: Int[Array, "batch tokens"]):
        """Tokens of a row by where they lie in the pool."""
        at = jnp.repeat(at, self.k.shape[0] // at.shape[0], axis=0)[..., None]
        return tuple(jnp.take_along_axis(x, at, axis=1, mode="clip") for x in pool)

    def _pack(self, pool, inside: Int[Array, "batch"], width: int) -> QuantizedLayer:
        """Encode the groups that have `residual` tokens after them, as many at once as `width` new tokens complete.

        A loop, which most steps leave at once: XLA writes in place inside it, and would not inside a branch.
        """
        group, groups = self.k_codec.group, self.k_codes.shape[3]
        count = min(-(-width // group), groups)
        due = jnp.maximum((self.length - self.sinks - self.residual) // group * group, self.packed)
        pool = jax.lax.stop_gradient(pool)

        def more(packed: dict[str, Array]) -> dict[str, Array]:
            layer = replace(self, **packed)
            done = layer.packed // group
            first = jnp.minimum(done, groups - count)
            nth = first[:, None] + jnp.arange(count)[None]
            keep = (nth >= done[:, None]) & (nth < due[:, None] // group)
            layer = layer._centre(pool, inside, done, due // group, count)
            index = self.sinks + first[:, None] * group + jnp.arange(count * group)[None]
            k, v = (x.reshape(x.shape[0], count, group, -1) for x in self._pick(pool, inside, index))
            fresh = *self.k_codec.encode(k, layer._centres(first, count)), *self.v_codec.encode(v)
            for (name, axis), new in zip(_PACKED, fresh, strict=True):
                written = _write_groups(getattr(layer, name), new, first, keep, axis)
                layer = replace(layer, **{name: written})
            layer = replace(layer, packed=jnp.minimum(layer.packed + count * group, due))
            return {name: getattr(layer, name) for name in packed}

        names = *(name for name, _ in _PACKED), *(() if self.k_centres is None else ("k_centres",)), "packed"
        held = jax.lax.stop_gradient({name: getattr(self, name) for name in names})
        return replace(self, **jax.lax.while_loop(lambda held: (held["packed"] < due).any(), more, held))

    def _centre(self, pool, inside, done: Int[Array, "batch"], due: Int[Array, "batch"], count: int) -> QuantizedLayer:
        """With the centres of spans whose first group is among those from `done` to `due`, at most `count`."""
        if self.k_centres is None:
            return self
        codec, (rows, dim, spans) = self.k_codec, self.k_centres.shape
        each, reach = codec.span // codec.group, min(codec.span, self.window)
        some = min((count + each - 2) // each + 1, spans)
        first = jnp.minimum(done // each, spans - some)
        begin = (first[:, None] + jnp.arange(some)[None]) * each
        index = self.sinks + begin[..., None] * codec.group + jnp.arange(reach)[None, None]
        k = self._pick(pool, inside, index.reshape(-1, some * reach))[0].astype(jnp.float32)
        mean = codec.turn(k.reshape(rows, some, reach, dim).mean(2)).swapaxes(1, 2).astype(self.k_centres.dtype)
        keep = (begin >= done[:, None]) & (begin < due[:, None])
        return replace(self, k_centres=_write_groups(self.k_centres, mean, first, keep, 2))

    def _centres(self, first: Int[Array, "batch"] | Int[Array, ""] | int, count: int):
        """The centres of `count` groups from group `first` on, which a row of the batch may have for itself."""
        if self.k_centres is None:
            return None
        each = self.k_codec.span // self.k_codec.group
        nth = (jnp.asarray(first).reshape(-1, 1) + jnp.arange(count)[None]) // each
        nth = jnp.repeat(nth, self.k.shape[0] // nth.shape[0], axis=0)
        return jnp.take_along_axis(self.k_centres, nth[:, None], axis=2, mode="clip")

    def _see(self, q, full, positions, packed: Int[Array, "batch"], mask: Mask):
        """Attend to keys, values and positions in full, and to the first `packed` tokens after the sinks."""
        slots = self._coded(packed)

        def folded(q, full, positions, slots):
            k = self.k_codec, self.k_codes, self.k_scales, self.k_centres
            return attend_folded(k, (self.v_codec, self.v_codes, self.v_scales), full, q, positions, slots, mask)

        def in_blocks(q, full, positions, slots):
            k, v, held = full
            return merge(attend(q, k, v, positions, held, mask), self._in_blocks(q, positions, slots, mask))

        if q.shape[1] > FEW:
            return in_blocks(q, full, positions, slots)
        return jax.lax.platform_dependent(q, full, positions, slots, cpu=folded, default=in_blocks)  # see FEW

    def _in_blocks(self, q, positions, slots, mask: Mask):
        turned = self.k_codec.turn(q.astype(jnp.float32))
        group, groups = self.k_codec.group, self.k_codes.shape[3]
        size = max(1, min(BLOCK // group, groups))

        def load(first: Int[Array, ""], _):
            def cut(x, axis: int):
                return jax.lax.dynamic_slice_in_dim(x, first // group, size, axis=axis)

            keys = self.k_codec.decode(cut(self.k_codes, 3), cut(self.k_scales, 2), self._centres(first // group, size))
            return keys, self.v_codec.decode(cut(self.v_codes, 2), cut(self.v_scales, 2))

        out, lse = attend_blocks(turned, slots, load, size * group, positions, mask)
        return self.v_codec.turn_back(out).astype(q.dtype), lse


_PACKED = ("k_codes", 3), ("k_scales", 2), ("v_codes", 2), ("v_scales", 2)
"""Buffers of groups, as codecs encode them for keys and for values, and the axis of their groups."""


def _write_groups(
    buffer: Shaped[Array, "rows ..."],
    new: Shaped[Array, "rows ..."],
    first: Int[Array, "batch"],
    keep: Bool[Array, "batch count"],
    axis: int,
) -> Shaped[Array, "rows ..."]:
    """Put those of row `b`'s new groups with `keep` along `axis`, from `first[b]` on; others stay as they are."""
    batch, count = keep.shape

    def one(buffer, new, first, keep):
        old = jax.lax.dynamic_slice_in_dim(buffer, first, count, axis=axis)
        kept = jax.lax.broadcast_in_dim(keep, new.shape, (axis,))
        return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.where(kept, new, old), first, axis=axis)

    if batch == 1:  # with an axis for it, XLA copies
        return one(buffer, new, first[0], keep[0])
    split = [x.reshape(batch, -1, *x.shape[1:]) for x in (buffer, new)]
    return jax.vmap(one)(*split, first, keep).reshape(buffer.shape)
