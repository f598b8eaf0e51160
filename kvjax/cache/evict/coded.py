"""An evicting layer that holds all but its sinks and its recent tokens in codes, one token a slot.

A token is coded once, when it leaves the recent window, and only if it is worth more than what it replaces. Codes lie
a slot after the other, so that one is overwritten in place; keys and values are `rotated` (see
`kvjax.cache.quantize`), which needs no other token's scale.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from kvjax.cache.attention import Mask, attend, attend_blocks, merge, write
from kvjax.cache.evict.knobs import ranked, vacant
from kvjax.cache.evict.layer import ByHead, EvictingLayer, blend, placed
from kvjax.cache.evict.scores import Attention
from kvjax.cache.packing import pack, unpack
from kvjax.cache.quantize import byte_scale, level, normal_codes, rotation
from kvjax.pytree import pytree, static

BLOCK = 256
"""Slots decoded at once, so that they stay in a core's cache."""


@pytree
class Codes:
    """Tokens as codes along their channels, and a scale in a byte each."""

    codes: UInt8[Array, "rows slots bytes"]
    scales: UInt8[Array, "rows slots"]
    bits: int = static()

    def written(self, slot: Int[Array, "rows"], x: Float[Array, "rows 1 head_dim"], keep: Bool[Array, "rows 1"]):
        """With one token a row in `slot`, where `keep`."""
        new = encoded(x, self.bits)
        return replace(
            self, codes=write(self.codes, new.codes, slot, keep), scales=write(self.scales, new.scales, slot, keep)
        )

    def cut(self, first: Int[Array, ""] | int, size: int) -> Float[Array, "rows size head_dim"]:
        """Tokens from slot `first` on, turned, in float32."""
        codes, scales = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (self.codes, self.scales))
        split = unpack(codes.reshape(-1, codes.shape[2]), self.bits).reshape(*codes.shape[:2], -1)
        centred = split.astype(jnp.float32) - (2**self.bits - 1) / 2
        return level(centred, self.bits) * byte_scale(scales)[..., None]


def encoded(x: Float[Array, "rows slots head_dim"], bits: int) -> Codes:
    """Tokens in codes. Gradients stop here."""
    wide = jax.lax.stop_gradient(x).astype(jnp.float32)
    codes, scales = normal_codes((wide @ rotation(x.shape[-1]))[:, :, None], bits)
    packed = pack(codes.reshape(-1, x.shape[-1]), bits)
    return Codes(packed.reshape(*x.shape[:2], -1), scales[..., 0, 0], bits)


@pytree
class CodedLayer(ByHead):
    """The first slots are in full, in `k` and `v`: sinks, then a ring of the newest; those after them are in codes.

    `positions` and `worth` are of all slots.
    """

    k_codes: Codes
    v_codes: Codes
    sinks: int = static()

    @property
    def front(self) -> int:
        return self.k.shape[1]

    @property
    def recent(self) -> int:
        return self.front - self.sinks

    def _take_one(self, q, k, v, positions, valid, mask: Mask):
        """The new token takes a slot of the ring; what was there takes the coded slot worth least, if worth more."""
        at = positions[:, 0]
        slot = jnp.where(at < self.sinks, at, self.sinks + (at - self.sinks) % self.recent)
        k_left, v_left = (jnp.take_along_axis(x, slot[:, None, None], axis=1) for x in (self.k, self.v))
        held, worth = (jnp.take_along_axis(x, slot[:, None], axis=1) for x in (self.positions, self.worth))
        body = self.positions[:, self.front :]
        rank = ranked(self.knobs, self.worth[:, self.front :], body, at[:, None], mask)
        rank = jnp.where(body < 0, vacant(self.knobs, body, self.front), rank)
        to = jnp.argmin(rank, axis=1)
        own = ranked(self.knobs, worth, held, at[:, None], mask)
        coded = valid & (held >= 0) & (rank.min(1, keepdims=True) < own)
        rate = self.score.rate(self.state, k, v, positions)
        layer = replace(
            self,
            k=write(self.k, k, slot, valid),
            v=write(self.v, v, slot, valid),
            k_codes=self.k_codes.written(to, k_left, coded),
            v_codes=self.v_codes.written(to, v_left, coded),
            positions=write(write(self.positions, held, self.front + to, coded), positions, slot, valid),
            worth=write(write(self.worth, worth, self.front + to, coded), rate, slot, valid),
        )
        return layer._seen(q, positions, valid, mask)

    def _take_chunk(self, q, k, v, positions, valid, mask: Mask):
        """As in full, by what one layer's codes decode to."""
        out, lse, old, new = self._decoded().compared(q, k, v, positions, valid, mask)
        return out, lse, self._cut(k, v, jnp.where(valid, positions, -1), old, new, mask)

    def _cut(self, k, v, fresh, old, new, mask: Mask):
        """Tokens that stay keep their codes."""
        kept = self.best(old, new, fresh, mask)
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(self.tokens(), (k, v), strict=True))
        both, worth = (jnp.concatenate(pair, axis=1) for pair in ((self.positions, fresh), (old, new)))
        wanted = self._newest(both.max(1, keepdims=True))
        here = (both[:, None] == wanted[..., None]) & (wanted >= 0)[..., None]
        found, index = here.any(2), here.argmax(2)
        coded, inside = kept & ~here.any(1), jnp.arange(both.shape[1]) >= self.front
        inside &= jnp.arange(both.shape[1]) < self.positions.shape[1]
        stays = (coded & inside[None])[:, self.front : self.positions.shape[1]]
        taken, source = placed(stays, coded & ~inside[None])
        empty = jnp.where(stays, self.positions[:, self.front :], -1)

        def codes(held: Codes, x) -> Codes:
            new = encoded(jnp.take_along_axis(x, source[..., None], axis=1), held.bits)
            scales = jnp.where(taken, new.scales, held.scales)
            return replace(held, codes=jnp.where(taken[..., None], new.codes, held.codes), scales=scales)

        slots = jnp.concatenate([jnp.where(found, wanted, -1), blend(empty, both, taken, source)], axis=1)
        body = blend(old[:, self.front :], worth, taken, source)
        return replace(
            self,
            k=blend(self.k, k, found, index),
            v=blend(self.v, v, found, index),
            k_codes=codes(self.k_codes, k),
            v_codes=codes(self.v_codes, v),
            positions=slots,
            worth=jnp.concatenate([jnp.take_along_axis(worth, index, axis=1), body], axis=1),
        )

    def _look(self, q, positions, mask: Mask):
        """Full slots and coded ones, a block of these at a time."""
        body = self.positions[:, self.front :]
        size = min(BLOCK, body.shape[1])
        turned = q.astype(jnp.float32) @ rotation(q.shape[-1])

        def load(first, _):
            return self.k_codes.cut(first, size), self.v_codes.cut(first, size)

        out, lse = attend_blocks(turned, body, load, size, positions, mask)
        out = (out @ rotation(q.shape[-1]).T).astype(q.dtype)
        return merge(attend(q, self.k, self.v, positions, self.positions[:, : self.front], mask), (out, lse))

    def _received(self, score: Attention, q, positions, lse, weight, mask: Mask) -> Float[Array, "rows slots"]:
        front, body = self.positions[:, : self.front], self.positions[:, self.front :]
        turned, size = q.astype(jnp.float32) @ rotation(q.shape[-1]), min(BLOCK, body.shape[1])

        def step(i, more):
            first = jnp.minimum(i * size, body.shape[1] - size)
            held = jax.lax.dynamic_slice_in_dim(body, first, size, axis=1)
            k, v = self.k_codes.cut(first, size), self.v_codes.cut(first, size)
            part = score.received(turned, k, v, positions, held, lse, weight, mask)
            return jax.lax.dynamic_update_slice_in_dim(more, part, first, axis=1)

        coded = jax.lax.fori_loop(0, -(-body.shape[1] // size), step, jnp.zeros(body.shape, jnp.float32))
        full = score.received(q, self.k, self.v, positions, front, lse, weight, mask)
        return jnp.concatenate([full, coded], axis=1)

    def _newest(self, last: Int[Array, "rows 1"]) -> Int[Array, "rows front"]:
        """The position that belongs into each full slot once `last` is the newest, negative where none does."""
        slot = jnp.arange(self.front)[None]
        ring = last - (last - slot) % self.recent
        return jnp.where(slot < self.sinks, jnp.where(slot <= last, slot, -1), jnp.where(ring < self.sinks, -1, ring))

    def tokens(self) -> tuple[Float[Array, "rows slots head_dim"], Float[Array, "rows slots head_dim"]]:
        def whole(full, codes: Codes):
            body = codes.cut(0, codes.scales.shape[1]) @ rotation(full.shape[-1]).T
            return jnp.concatenate([full, body.astype(full.dtype)], axis=1)

        return whole(self.k, self.k_codes), whole(self.v, self.v_codes)

    def _decoded(self) -> EvictingLayer:
        return EvictingLayer(*self.tokens(), self.positions, self.worth, self.state, self.knobs, self.score, False)
