"""The specification of each kernel in plain XLA: what every backend is tested against.

Keys and values are `[rows, slots, head_dim]` with `rows = batch * kv_heads`: with heads folded into
the leading axis XLA keeps a cache in place where a separate head axis made it copy the whole buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.products import mix, scores
from kernels.slots import placed

TILE = 128
"""Queries scored at once, so that their logits stay in a core's cache."""

BLOCK = 512
"""Slots scored at once when many queries meet many slots, so that memory does not grow with both."""

FEW = TILE * 4 * BLOCK
"""Pairs of a query and a slot up to which all slots are scored at once."""

ROWS = 64
"""Queries that one matrix instruction of a Hopper GPU takes: up to as many there are few."""

EIGHT = 8
"""Rows of a tile as a Hopper GPU lays it in shared memory: slots come in eights."""

BACKENDS = ("mosaic", "xla")
"""`mosaic` is Pallas for Hopper GPUs, `xla` the reference as XLA compiles it."""

Partial = tuple[Float[Array, "batch width heads head_dim"], Float[Array, "batch width heads"]]


@dataclass(frozen=True)
class Mask:
    """How logits are scaled and which earlier positions a query sees; static, part of the program.

    Args:
        scale: multiplies `q @ k` (dimensionless).
        window: a query sees this many positions, its own included; None sees all before it.
        sinks: positions below it are seen whatever the window.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        backend: what runs it, as `kernels.attention` says; the reference does not ask.
    """

    scale: float
    window: int | None = None
    sinks: int = 0
    softcap: float | None = None
    backend: str | None = None


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
        bounded = TILE * k.shape[1] <= FEW  # else blocks are left out anyway
        tile = _bounded if bounded else attend
        return _tiles(lambda q, at: tile(q, k, v, at, slots, mask), q, positions)
    if width * k.shape[1] <= FEW:
        return finish(_piece(q, k, v, positions, slots, mask), q.dtype)
    size = min(BLOCK, k.shape[1])

    def load(first, _):
        return tuple(jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (k, v))

    return attend_blocks(q, slots, load, size, positions, mask)


def append(
    q: Float[Array, "batch 1 heads head_dim"],
    new_k: Float[Array, "rows 1 head_dim"],
    new_v: Float[Array, "rows 1 head_dim"],
    k: Float[Array, "rows slots head_dim"],
    v: Float[Array, "rows slots head_dim"],
    positions: Int[Array, "batch 1"],
    slots: Int[Array, "batch slots"],
    to: Int[Array, "batch"],
    mask: Mask,
) -> tuple[
    Float[Array, "batch 1 heads head_dim"],
    Float[Array, "batch 1 heads"],
    Float[Array, "rows slots head_dim"],
    Float[Array, "rows slots head_dim"],
]:
    """Write a token of each row into a slot, and attend its queries to all slots.

    Args:
        slots: the position that each slot holds before, -1 where it is empty.
        to: the slot that the new token is written to, -1 for none, as for one past the last.
    Returns:
        `attend`'s results, keys and values.
    """
    k, v = placed(k, new_k, to), placed(v, new_v, to)
    return *attend(q, k, v, positions, placed(slots, positions, to), mask), k, v


def attend_blocks(
    q: Float[Array, "batch width heads head_dim"],
    slots: Int[Array, "batch slots"],
    load: Callable[[Int[Array, ""], int], tuple[Array, Array]],
    size: int,
    positions: Int[Array, "batch width"],
    mask: Mask,
    counts: Sequence[int] = (),
) -> Partial:
    """`attend` to slots that come `size` at a time, so that memory does not grow with them.

    Args:
        load: keys and values `[count * kv_heads, size, head_dim]` of the first `count` rows' `size` slots from the
            given one on; on a CPU not called for those that no query sees.
        size: at most the number of slots. The last block reaches back to be as large, and counts no slot twice.
        counts: fewer rows than all that a block may be loaded for, where the others see nothing in it; worth it if
            rows are in order of how much they hold, the longest first.
    Source: Milakov & Gimelshein 2018 (arXiv:1805.02867), Alg. 3.
    """
    if q.shape[1] > TILE:
        return _tiles(lambda q, at: attend_blocks(q, slots, load, size, at, mask, counts), q, positions)

    def step(state: _State, i) -> tuple[_State, None]:
        first = jnp.minimum(i * size, slots.shape[1] - size)
        held = jax.lax.dynamic_slice_in_dim(slots, first, size, axis=1)
        held = jnp.where(first + jnp.arange(size)[None] >= i * size, held, -1)

        def fold(state: _State, count: int) -> _State:
            out, peak, total = (x[:count] for x in state)
            new_out, new_peak, new_total = _piece(q[:count], *load(first, count), positions[:count], held[:count], mask)
            top = jnp.maximum(peak, new_peak)
            base = jnp.where(jnp.isfinite(top), top, 0.0)
            old, new = jnp.exp(peak - base), jnp.exp(new_peak - base)
            folded: _State = out * old + new_out * new, top, total * old + new_total * new
            return folded if count == batch else jax.tree.map(lambda x, new: x.at[:count].set(new), state, folded)

        def fold_seen(state: _State) -> _State:
            sees = visible(positions, held, mask).any((1, 2))
            need = jnp.where(sees, jnp.arange(1, batch + 1), 0).max()
            enough = jnp.searchsorted(jnp.array((0, *several)), need)
            return jax.lax.switch(enough, [lambda state: state, *(partial(fold, count=n) for n in several)], state)

        # a branch would have a GPU wait for the host
        return jax.lax.platform_dependent(state, cpu=fold_seen, default=partial(fold, count=batch)), None

    batch, width, heads, dim = q.shape
    several = sorted({*counts, batch})
    empty: _State = (
        jnp.zeros((batch, heads, width, dim)),
        jnp.full((batch, heads, width, 1), -jnp.inf),
        jnp.zeros((batch, heads, width, 1)),
    )  # a scan with a `switch`, not a loop of dynamic length, so that it can be differentiated
    return finish(jax.lax.scan(step, empty, jnp.arange(-(-slots.shape[1] // size)))[0], q.dtype)


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


_State = tuple[
    Float[Array, "batch heads width head_dim"], Float[Array, "batch heads width 1"], Float[Array, "batch heads width 1"]
]
"""Weighted values, the largest logit, and the sum of the weights."""


def _piece(q, k, v, positions, slots, mask: Mask) -> _State:
    """Attention over some slots, before its division by the sum."""
    batch, width, heads, dim = q.shape
    kv_heads = k.shape[0] // batch
    folded = q.reshape(batch, width, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4).reshape(k.shape[0], -1, dim)
    weights, peak, total = weigh(scores(folded, k).reshape(batch, heads, width, -1), positions, slots, mask)
    out = mix(weights.reshape(*folded.shape[:2], -1).astype(v.dtype), v)
    return out.reshape(batch, heads, width, dim), peak, total


def logits(products: Float[Array, "*shape"], mask: Mask) -> Float[Array, "*shape"]:
    """Products of queries and keys, scaled and capped."""
    scaled = products * mask.scale
    return scaled if mask.softcap is None else mask.softcap * jnp.tanh(scaled / mask.softcap)


def weigh(
    products: Float[Array, "batch heads width slots"],
    positions: Int[Array, "batch width"],
    slots: Int[Array, "batch slots"],
    mask: Mask,
) -> tuple[
    Float[Array, "batch heads width slots"], Float[Array, "batch heads width 1"], Float[Array, "batch heads width 1"]
]:
    """Softmax over the slots that are seen, before its division: weights, the largest logit, the weights' sum."""
    seen = jnp.where(visible(positions, slots, mask)[:, None], logits(products, mask), -jnp.inf)
    peak = jax.lax.stop_gradient(seen.max(-1, keepdims=True))
    weights = jnp.exp(seen - jnp.where(jnp.isfinite(peak), peak, 0.0))
    return weights, peak, weights.sum(-1, keepdims=True)


def finish(state: _State, dtype) -> Partial:
    """Divide the weighted values by the sum of their weights.

    Args:
        state: weighted values `[batch, heads, width, head_dim]`, and `weigh`'s peak and total.
        dtype: of `out`.
    """
    out, peak, total = state
    out = out / jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)[..., 0]
    return out.swapaxes(1, 2).astype(dtype), lse.swapaxes(1, 2)


def _tiles(attend_tile, q, positions) -> Partial:
    """A tile of queries after the other; those that fill up the last tile see nothing."""
    batch, width = positions.shape
    pad = -width % TILE
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, pad)), constant_values=-1)
    tiles = [x.reshape(batch, -1, TILE, *x.shape[2:]).swapaxes(0, 1) for x in (q, positions)]
    parts = jax.lax.map(lambda tile: attend_tile(*tile), tuple(tiles))
    out, lse = (x.swapaxes(0, 1).reshape(batch, width + pad, *x.shape[3:])[:, :width] for x in parts)
    return out, lse


def _bounded(q, k, v, positions, slots, mask: Mask) -> Partial:
    """`attend` up to the last slot that any query may see, rounded up to an eighth of the slots.

    In a prompt's first chunk that is half of the work.
    """
    held = k.shape[1]
    step = -(-held // (8 * TILE)) * TILE
    seen = (slots >= 0) & (slots <= positions.max(1, keepdims=True))
    last = jnp.where(seen, jnp.arange(held), 0).max()
    ends = [*range(step, held, step), held]
    upto = [partial(lambda q, at, n: attend(q, k[:, :n], v[:, :n], at, slots[:, :n], mask), n=n) for n in ends]
    return jax.lax.platform_dependent(
        q, positions, cpu=lambda q, at: jax.lax.switch(last // step, upto, q, at), default=upto[-1]
    )  # a branch would have a GPU wait for the host
