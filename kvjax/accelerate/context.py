"""One sequence's slots on several devices: pages are dealt by turns, and each device attends to its own.

What devices find is merged by its log-sum-exp, so that queries and results travel, and keys and values never.
Source: Yang et al. 2024, "Context Parallelism for Scalable Million-Token Inference" (arXiv:2411.01783), pass-Q.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.reference import EIGHT
from kvjax.cache.attention import Mask, append, attend, by_head, merge, write
from kvjax.cache.dense import DenseLayer
from kvjax.mesh import CONTEXT
from kvjax.pytree import pytree, static

PAGE = 64
"""Tokens dealt to a device at once, less where a sequence is short: enough for a kernel's tile."""


@pytree
class ContextLayer(DenseLayer):
    """A dense layer whose pages lie on `devices` by turns; inside `shard_map`, the slots of one of them.

    Slot `s` of device `c` is for the position `(s // page * devices + c) * page + s % page`, so that every device has
    its share of a sequence of any length, and only one writes a token.
    """

    k: Float[Array, "rows dealt head_dim"]
    v: Float[Array, "rows dealt head_dim"]
    devices: int = static()
    page: int = static()
    most: int = static()

    @property
    def limit(self) -> int:
        return self.most

    def place(self, positions, valid, mask: Mask):
        raise NotImplementedError("ContextLayer: a token's place is its device's alone; call `attend`")

    def attend(self, q, k, v, positions, valid, mask: Mask):
        start = positions[:, 0]
        layer = replace(self, length=jnp.minimum(start + valid.sum(1, dtype=jnp.int32), self.most))
        k, v = by_head(k), by_head(v)
        if q.shape[1] == 1:
            mine = (layer.length > start) & (start // self.page % self.devices == jax.lax.axis_index(CONTEXT))
            to = jnp.where(mine, self._first_from(start), -1)
            out, lse, k, v = append(q, k, v, self.k, self.v, positions, self._first(start), to, mask)
            return *merged(out, lse), replace(layer, k=k, v=v)
        at, nth, keep = layer._own(start, k.shape[1])
        k, v = (
            write(old, jnp.take_along_axis(new.astype(old.dtype), nth, axis=1), at, keep)
            for old, new in ((self.k, k), (self.v, v))
        )
        layer = replace(layer, k=k, v=v)
        return *layer.look(q, positions, mask), layer

    def look(self, q, positions, mask: Mask):
        return merged(*attend(q, self.k, self.v, positions, self._first(self.length), mask))

    def _positions(self, slot: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """The position that each of this device's slots is for."""
        device = jax.lax.axis_index(CONTEXT)
        return (slot // self.page * self.devices + device) * self.page + slot % self.page

    def _first(self, length: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        positions = self._positions(jnp.arange(self.k.shape[1], dtype=jnp.int32))[None]
        return jnp.where(positions < length[:, None], positions, -1)

    def _first_from(self, position: Int[Array, "batch"]) -> Int[Array, "batch"]:
        """This device's first slot that is for a position, or for a later one."""
        turn, owner = position // self.page // self.devices, position // self.page % self.devices
        device = jax.lax.axis_index(CONTEXT)
        within = jnp.where(owner == device, position % self.page, 0)
        return jnp.where(device < owner, turn + 1, turn) * self.page + within

    def _own(self, start: Int[Array, "batch"], width: int):
        """Of `width` tokens from `start` on, those of this device: first slot, places in the chunk, which are real.

        `length` is that of a row once it has taken them in.
        """
        around = self.devices * self.page
        most = width // around * self.page + min(self.page, width % around)
        at = self._first_from(start)
        positions = self._positions(at[:, None] + jnp.arange(most)[None])
        keep = positions < jnp.minimum(self.length, start + width)[:, None]
        nth = jnp.repeat(positions - start[:, None], self.k.shape[0] // start.shape[0], axis=0)
        return at, jnp.minimum(nth, width - 1)[..., None], keep


def merged(
    out: Float[Array, "batch width heads head_dim"], lse: Float[Array, "batch width heads"]
) -> tuple[Float[Array, "batch width heads head_dim"], Float[Array, "batch width heads"]]:
    """What the devices along `context` found, as one attention over the slots of all; inside `shard_map`.

    One collective, of a query's size a head and device, in float32.
    """
    packed = jnp.concatenate([out.astype(jnp.float32), lse[..., None]], axis=-1)
    parts = jax.lax.all_gather(packed, CONTEXT)
    out_all, lse_all = reduce(merge, [(part[..., :-1], part[..., -1]) for part in parts])
    return out_all.astype(out.dtype), lse_all


def deal(layer: DenseLayer, devices: int) -> ContextLayer:
    """A dense layer's slots, device after device; those that fill up the last pages are zeros."""
    rows, most, dim = layer.k.shape
    share = -(-most // devices)
    page = min(PAGE, -(-share // EIGHT) * EIGHT)
    turns = -(-most // (page * devices))

    def dealt(x):
        x = jnp.pad(x, ((0, 0), (0, turns * devices * page - most), (0, 0)))
        return x.reshape(rows, turns, devices, page, dim).swapaxes(1, 2).reshape(rows, -1, dim)

    return ContextLayer(dealt(layer.k), dealt(layer.v), layer.length, devices, page, most)


def collected(layer: ContextLayer) -> DenseLayer:
    """Undo `deal`: all slots in the order of their positions."""
    rows, _, dim = layer.k.shape

    def together(x):
        x = x.reshape(rows, layer.devices, -1, layer.page, dim).swapaxes(1, 2)
        return x.reshape(rows, -1, dim)[:, : layer.most]

    return DenseLayer(together(layer.k), together(layer.v), layer.length)
