"""What a layer's attention of one new token a row needs, where it is part of the layer's kernel."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.reference import Mask, append, visible
from kernels.slots import placed

PIECE = 64
"""Slots that a worker sees at least, where a row has as many: each further partial result is one more to merge."""

WITHIN = 16
"""Slots that a warp scores at once."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cached:
    """A layer's keys and values, and where the new token of each row goes.

    Args:
        slots: the position that each slot holds before, -1 where it is empty.
        to: the slot that the new token is written to, -1 for none, as for one past the last.
        at: the position of the new token.
        cos, sin: of the angles by which its query and key are turned, by pairs `(i, i + head_dim / 2)`.
    """

    __no_type_check__ = True  # read by jaxtyping's import hook in the tests: inside JAX leaves may be placeholders
    k: Float[Array, "kept slots head_dim"]
    v: Float[Array, "kept slots head_dim"]
    slots: Int[Array, "rows slots"]
    to: Int[Array, "rows"]
    at: Int[Array, "rows"]
    cos: Float[Array, "rows half"]
    sin: Float[Array, "rows half"]


@dataclass(frozen=True)
class Sight:
    """Static sizes of the attention, and who does what of it.

    A row's K/V head is an item; `splits` workers share one, each a stretch of its slots.
    """

    rows: int
    heads: int
    kv_heads: int
    dim: int
    slots: int
    workers: int
    mask: Mask

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def items(self) -> int:
        return self.rows * self.kv_heads

    @property
    def splits(self) -> int:
        return self.workers // self.items

    @property
    def scratch(self) -> int:
        """Numbers that the eight warps of a worker leave each other: sums; and peaks, totals and shifts."""
        return 8 * (self.group * self.dim + 3 * 8)


def split_qkv(qkv: Float[Array, "rows outputs"], heads: int, kv_heads: int, dim: int):
    """Queries, keys and values, which lie side by side: `[rows, heads, head_dim]` each."""
    parts = jnp.split(qkv, (heads * dim, (heads + kv_heads) * dim), axis=-1)
    return [x.reshape(x.shape[0], -1, dim) for x in parts]


def turned(
    x: Float[Array, "rows heads head_dim"], cos: Float[Array, "rows half"], sin: Float[Array, "rows half"]
) -> Float[Array, "rows heads head_dim"]:
    """Rotary position embedding by given angles (arXiv:2104.09864), in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def appended(qkv: Float[Array, "rows outputs"], cached: Cached, mask: Mask):
    """`attended [rows, heads * head_dim]`, keys and values, in plain JAX."""
    rows, dim = qkv.shape[0], cached.k.shape[2]
    kv_heads = cached.k.shape[0] // rows
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q, new_k, new_v = split_qkv(qkv, heads, kv_heads, dim)
    q, new_k = (turned(x, cached.cos, cached.sin) for x in (q, new_k))
    new = [x.reshape(-1, 1, dim).astype(cached.k.dtype) for x in (new_k, new_v)]
    at = cached.at[:, None]
    out, _, k, v = append(q[:, None], *new, cached.k, cached.v, at, cached.slots, cached.to, mask)
    return out.reshape(rows, heads * dim), k, v


def reach(cached: Cached, mask: Mask) -> tuple[Int[Array, "rows slots"], Int[Array, "rows 2"]]:
    """What slots hold once the token is there, and from which to which one some are seen.

    Worked out in XLA once for all layers that have the same of these.
    """
    held = placed(cached.slots, cached.at[:, None], cached.to)
    seen = visible(cached.at[:, None], held, mask)[:, 0]
    nth = jnp.arange(held.shape[1], dtype=jnp.int32)[None]
    first = jnp.where(seen, nth, held.shape[1]).min(1) // WITHIN * WITHIN
    last = jnp.where(seen, nth + 1, 0).max(1)
    return held, jnp.stack([jnp.minimum(first, last), last], axis=1)


def stretch(first: Int[Array, "..."], stop: Int[Array, "..."], splits: int):
    """Slots that each worker of an item sees, and how many workers see some; one, where there are none."""
    size = splits * WITHIN
    piece = jnp.maximum(jax.lax.div(stop - first + (size - 1), jnp.full_like(first, size)) * WITHIN, PIECE)
    return piece, jnp.maximum(jax.lax.div(stop - first + piece - 1, piece), 1)


def refusal(qkv, cached: Cached, workers: int) -> str | None:
    """Why the kernel does not take these; None if it does."""
    rows, (kept, _, dim) = qkv.shape[0], cached.k.shape
    if other := sorted({str(x.dtype) for x in (qkv, cached.k, cached.v)} - {"bfloat16"}):
        return f"expected keys and values in bfloat16, got {', '.join(other)}"
    if other := sorted({str(x.dtype) for x in (cached.cos, cached.sin)} - {"float32"}):
        return f"expected angles in float32, got {', '.join(other)}"
    if dim not in (64, 128) or cached.cos.shape[1] != dim // 2:
        return f"expected a `head_dim` of 64 or 128, turned as a whole, got {dim} and {2 * cached.cos.shape[1]}"
    group = qkv.shape[1] // dim // max(kept // rows, 1) - 2
    if kept % rows or not 1 <= group <= 8 or kept > workers:
        return f"expected up to 8 queries a K/V head and {workers} heads in all, got {group} and {kept}"
    return None
