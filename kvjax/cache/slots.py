"""Writing tokens into slots, in place, and moving rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def write(
    buffer: Shaped[Array, "rows slots *rest"],
    new: Shaped[Array, "rows width *rest"],
    start: Int[Array, "batch"],
    keep: Bool[Array, "batch width"],
) -> Shaped[Array, "rows slots *rest"]:
    """Put row `b`'s tokens with `keep` into slots `start[b], start[b] + 1, …`; others stay as they are.

    A buffer has one or more rows for each of the batch (`rows = batch * kv_heads`). Tokens that would
    land past the last slot are dropped. Each row's slots are read, blended and written back as one
    window, which XLA does in place on a donated buffer, where a scatter may copy all of it.
    """
    batch, (rows, slots), width = start.shape[0], buffer.shape[:2], min(new.shape[1], buffer.shape[1])
    each, ones = rows // batch, (1,) * (buffer.ndim - 2)
    for row in range(batch):
        window = jnp.minimum(start[row], slots - width)
        shift = start[row] - window  # the window was moved back by this much to fit
        source = jnp.arange(width) - shift
        wanted = jnp.take(keep[row], source, mode="fill", fill_value=False) & (source >= 0)
        fresh = new[row * each : (row + 1) * each, :width]
        if width > 1:
            fresh = jnp.roll(fresh, shift, axis=1)
        at = (jnp.int32(row * each), window, *(jnp.int32(0),) * len(ones))
        old = jax.lax.dynamic_slice(buffer, at, (each, width, *buffer.shape[2:]))
        blend = jnp.where(wanted.reshape(1, width, *ones), fresh, old)
        buffer = jax.lax.dynamic_update_slice(buffer, blend, at)
    return buffer


def take_rows(
    buffer: Shaped[Array, "rows slots *rest"], rows: Int[Array, "new_batch"], batch: int
) -> Shaped[Array, "new_rows slots *rest"]:
    """Choose batch rows of a buffer that has one or more rows for each."""
    split = buffer.reshape(batch, -1, *buffer.shape[1:])
    return jnp.take(split, rows, axis=0, mode="clip").reshape(-1, *buffer.shape[1:])
