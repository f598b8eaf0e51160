"""The attention that each slot receives: what `attend` summed over slots, summed over queries instead."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.products import scores
from kernels.reference import TILE, Mask, logits, visible


def received(
    q: Float[Array, "rows width heads head_dim"],
    k: Float[Array, "rows slots head_dim"],
    positions: Int[Array, "rows width"],
    slots: Int[Array, "rows slots"],
    lse: Float[Array, "rows width heads"],
    weight: Float[Array, "rows width"],
    mask: Mask,
    *,
    near: int = 0,
    peak: bool = False,
) -> Float[Array, "rows slots"]:
    """Each slot's attention probability, summed over heads and over queries times their `weight`.

    Queries less than `near` positions after a slot do not count for it. With `peak` the largest instead of the sum.

    Rows are K/V heads, with the query heads that share each. The probabilities are recomputed as
    `exp(q @ k * scale - lse)`, a tile of queries at a time, so nothing of `width * slots` is kept; `lse` may be
    of an attention over more slots than these. A query of weight 0 adds nothing, whatever its values.
    """
    rows, width, heads, dim = q.shape

    def tile(q, positions, lse, weight):
        folded = q.swapaxes(1, 2).reshape(rows, -1, dim)
        each = logits(scores(folded, k).reshape(rows, heads, -1, k.shape[1]), mask)
        counted = visible(positions, slots, mask) & (weight != 0)[..., None]
        counted &= positions[..., None] - slots[:, None] >= near
        base = jnp.where(jnp.isfinite(lse), lse, 0.0).swapaxes(1, 2)[..., None]
        chance = jnp.exp(jnp.where(counted[:, None], each - base, -jnp.inf))
        chance *= weight[:, None, :, None]
        return chance.max((1, 2)) if peak else chance.sum((1, 2))

    if width <= TILE:
        return tile(q, positions, lse, weight)
    pad = -width % TILE
    tiles = [
        jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2))).reshape(rows, -1, TILE, *x.shape[2:]).swapaxes(0, 1)
        for x in (q, positions, lse, weight)
    ]
    none = jnp.zeros((rows, k.shape[1]), jnp.float32)
    join = jnp.maximum if peak else jnp.add
    return jax.lax.scan(lambda total, each: (join(total, tile(*each)), None), none, tuple(tiles))[0]
