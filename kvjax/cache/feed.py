"""Giving tokens that are in no order to an empty layer, as prompts would bring them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import Mask

CHUNK = 512
"""Tokens given at once, so that what lies between the old buffers and the new ones is small."""


def feed(
    layer: Any,
    k: Float[Array, "rows tokens head_dim"],
    v: Float[Array, "rows tokens head_dim"],
    positions: Int[Array, "batch tokens"],
    most: int,
    mask: Mask,
) -> Any:
    """The layer once it has taken in these tokens; nobody asks what it attends to.

    Args:
        positions: of a row, consecutive in some order, -1 where there is no token.
        most: tokens that a row may have.
    """
    batch, width = positions.shape[0], min(CHUNK, most, positions.shape[1])
    order = jnp.argsort(jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions), axis=1)[:, :most]
    start = jnp.maximum(jnp.take_along_axis(positions, order[:, :1], axis=1), 0)
    count = (positions >= 0).sum(1, keepdims=True, dtype=jnp.int32)
    chunks = -(-order.shape[1] // width)
    order = jnp.pad(order, ((0, 0), (0, chunks * width - order.shape[1])))

    def step(i, layer):
        index = jax.lax.dynamic_slice_in_dim(order, i * width, width, axis=1)[:, None, :, None]
        split = (x.reshape(batch, -1, *x.shape[1:]) for x in (k, v))
        keys, values = (jnp.take_along_axis(x, index, axis=2).swapaxes(1, 2) for x in split)
        before, nth = jnp.minimum(i * width, count), jnp.arange(width)[None]
        valid = before + nth < count
        return layer.attend(jnp.zeros_like(keys), keys, values, start + before + nth, valid, mask)[2]

    return jax.lax.fori_loop(0, chunks, step, layer)
