"""The specification of each kernel in plain XLA: what every backend is tested against.

Keys and values are `[rows, slots, head_dim]` with `rows = batch * kv_heads`: with heads folded into
the leading axis XLA keeps a cache in place where a separate head axis made it copy the whole buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TILE = 128
"""Queries scored at once, so that their logits stay in a core's cache."""

BLOCK = 512
"""Slots scored at once when many queries meet many slots, so that memory does not grow with both."""

FEW = TILE * 4 * BLOCK
"""Pairs of a query and a slot up to which all slots are scored at once."""

MANY = 256
"""Slots above which a CPU multiplies values by one query's weights at a time (4 ms a token at 1,089 slots)."""

Partial = tuple[Float[Array, "batch width heads head_dim"], Float[Array, "batch width heads"]]


@dataclass(frozen=True)
class Mask:
    """How logits are scaled and which earlier positions a query sees; static, part of the program.

    Args:
        scale: multiplies `q @ k` (dimensionless).
        window: a query sees this many positions, its own included; None sees all before it.
        sinks: positions below it are seen whatever the window.
        softcap: logits become `softcap * tanh(logits / softcap)`.
    """

    scale: float
    window: int | None = None
    sinks: int = 0
    softcap: float | None = None


def visible(
    positions: Int[Array, "batch width"], slots: Int[Array, "batch slots"], mask: Mask
) -> Bool[Array, "batch width slots"]:
    """Which slots each query may see: filled, not later than it, inside its window or a sink."""
    at, slot = positions[:, :, None], slots[:, None, :]
    seen = (slot >= 0) & (slot <= at)
    if mask.window is not None:
        seen &= (slot > at - mask.window) | (slot < mask.sinks)
    return seen


def attend(
    q: Float[Array, "batch width heads head_dim"],
    k: Float[Array, "rows slots head_dim"],
    v: Float[Array, "rows slots head_dim"],
    positions: Int[Array, "batch width"],
    slots: Int[Array, "batch slots"],
    mask: Mask,
) -> Partial:
    """Attend queries to slots by position, and return what makes the result mergeable.

    Args:
        positions: of each query.
        slots: the position each slot holds, -1 where it is empty. Empty slots need finite `v`.
    Returns:
        `out` in `q.dtype` and `lse` in float32 nats. A query that sees nothing gives zeros and -inf.
    Raises:
        ValueError: while tracing, if `heads` is not a multiple of the K/V heads in `rows`.
    Source: Dao et al. 2022 (arXiv:2205.14135), section 3.1; head groups of arXiv:2305.13245.
    """
    batch, width, heads, dim = q.shape
    kv_heads = k.shape[0] // batch
    if k.shape[0] != batch * kv_heads or heads % kv_heads:
        raise ValueError(
            f"attend: `q` has {batch} rows of {heads} heads, which `k` with {k.shape[0]} rows cannot serve"
        )
    if width > TILE:
        return _tiles(q, k, v, positions, slots, mask)
    group = heads // kv_heads
    folded = q.reshape(batch, width, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    folded = folded.reshape(k.shape[0], group * width, dim)

    def piece(k, v, slots) -> _State:
        logits = (_scores(folded, k) * mask.scale).reshape(batch, heads, width, -1)
        if mask.softcap is not None:
            logits = mask.softcap * jnp.tanh(logits / mask.softcap)
        seen = visible(positions, slots, mask)[:, None]
        logits = jnp.where(seen, logits, -jnp.inf)
        peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        weights = jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))
        total = weights.sum(-1, keepdims=True)
        packed = weights.reshape(k.shape[0], group * width, -1).astype(v.dtype)
        out = _mix(packed, v)
        return out.reshape(batch, heads, width, dim), peak, total

    out, peak, total = (
        piece(k, v, slots)
        if width * k.shape[1] <= FEW
        else _blocks(piece, k, v, slots, lambda cut: visible(positions, cut, mask).any())
    )
    out = out / jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)[..., 0]
    return out.swapaxes(1, 2).astype(q.dtype), lse.swapaxes(1, 2)


def merge(left: Partial, right: Partial) -> Partial:
    """Combine attention over two disjoint sets of slots into attention over both.

    `lse` is the logarithm of a partial's softmax denominator, so that each weighs its share of the
    sum: merging is associative, and a partial that saw nothing (`lse == -inf`) changes nothing.
    Source: Ye et al. 2024, "Cascade Inference" (FlashInfer).
    """
    (out_a, lse_a), (out_b, lse_b) = left, right
    lse = jnp.logaddexp(lse_a, lse_b)
    base = jnp.where(jnp.isfinite(lse), lse, 0.0)
    a, b = (jnp.exp(part - base)[..., None] for part in (lse_a, lse_b))
    out = out_a.astype(jnp.float32) * a + out_b.astype(jnp.float32) * b
    return out.astype(out_a.dtype), lse


def _scores(
    q: Float[Array, "rows queries head_dim"], k: Float[Array, "rows slots head_dim"]
) -> Float[Array, "rows queries slots"]:
    """`q @ k.T` a row, in float32. On a CPU a few queries go one at a time: XLA is faster at matrix times vector."""

    def together(q, k):
        return jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)

    def one_by_one(q, k):
        each = [
            jax.lax.dot_general(k, q[:, i], (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
            for i in range(q.shape[1])
        ]
        return jnp.stack(each, axis=1)

    if q.shape[1] > 8:
        return together(q, k)
    return jax.lax.platform_dependent(q, k, cpu=one_by_one, default=together)


def _mix(
    weights: Float[Array, "rows queries slots"], v: Float[Array, "rows slots head_dim"]
) -> Float[Array, "rows queries head_dim"]:
    """`weights @ v` a row, in float32. On a CPU a few queries go one at a time once there are many slots."""

    def together(weights, v):
        return jax.lax.dot_general(weights, v, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)

    def one_by_one(weights, v):
        each = [
            jax.lax.dot_general(v, weights[:, i], (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
            for i in range(weights.shape[1])
        ]
        return jnp.stack(each, axis=1)

    if weights.shape[1] > 8 or weights.shape[2] <= MANY:
        return together(weights, v)
    return jax.lax.platform_dependent(weights, v, cpu=one_by_one, default=together)


_State = tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]


def _tiles(q, k, v, positions, slots, mask: Mask) -> Partial:
    """`attend`, a tile of queries after the other; those that fill up the last tile see nothing.

    A tile stops at the last slot that any of its queries may see, rounded up to an eighth of the slots: in a
    prompt's first chunk that is half of the work.
    """
    batch, width, held = *positions.shape, k.shape[1]
    step = -(-held // (8 * TILE)) * TILE
    ends = [*range(step, held, step), held]
    if TILE * held > FEW:
        ends = [held]  # `_blocks` skips what nobody sees
    pad = -width % TILE
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, pad)), constant_values=-1)
    tiles = [x.reshape(batch, -1, TILE, *x.shape[2:]).swapaxes(0, 1) for x in (q, positions)]

    def tile(q, positions):
        seen = (slots >= 0) & (slots <= positions.max(1, keepdims=True))
        last = jnp.where(seen, jnp.arange(held), 0).max()
        upto = [partial(lambda q, at, n: attend(q, k[:, :n], v[:, :n], at, slots[:, :n], mask), n=n) for n in ends]
        return jax.lax.switch(last // step, upto, q, positions)

    parts = jax.lax.map(lambda both: tile(*both), tuple(tiles))
    out, lse = (x.swapaxes(0, 1).reshape(batch, width + pad, *x.shape[3:])[:, :width] for x in parts)
    return out, lse


def _blocks(piece, k, v, slots, some) -> _State:
    """Online softmax over blocks of slots; a block of which the queries see not `some` slot costs nothing.

    A scan with a `cond`, not a loop of dynamic length, so that it can be differentiated.
    Source: Milakov & Gimelshein 2018 (arXiv:1805.02867), Alg. 3.
    """
    size = min(BLOCK, k.shape[1])

    def block(i):
        start = jnp.minimum(i * size, k.shape[1] - size)  # the last block reaches back, and counts no slot twice
        cut_k, cut_v, cut = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (k, v, slots))
        return cut_k, cut_v, jnp.where(start + jnp.arange(size)[None] >= i * size, cut, -1)

    def step(state: _State, i) -> tuple[_State, None]:
        cut = block(i)

        def fold(state: _State) -> _State:
            out, peak, total = state
            new_out, new_peak, new_total = piece(*cut)
            top = jnp.maximum(peak, new_peak)
            base = jnp.where(jnp.isfinite(top), top, 0.0)
            old, new = jnp.exp(peak - base), jnp.exp(new_peak - base)
            return out * old + new_out * new, top, total * old + new_total * new

        return jax.lax.cond(some(cut[2]), fold, lambda state: state, state), None

    shapes = jax.eval_shape(lambda: piece(*block(0)))
    out, peak, total = (jnp.zeros(x.shape, x.dtype) for x in shapes)
    empty: _State = (out, jnp.full_like(peak, -jnp.inf), total)
    return jax.lax.scan(step, empty, jnp.arange(-(-k.shape[1] // size)))[0]
