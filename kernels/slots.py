"""Writing tokens into slots, in place."""

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
    land past the last slot are dropped. XLA does it in place on a donated buffer: on a CPU where each row's
    slots are read, blended and written back as one window; on a GPU it would copy a buffer that a loop reads
    and then writes (16 rows of 8 heads and 2,048 slots: 166 µs a layer and step), and is given a scatter.
    """
    return jax.lax.platform_dependent(buffer, new, start, keep, cpu=_windows, default=_scattered)


def placed(
    buffer: Shaped[Array, "rows slots *rest"], new: Shaped[Array, "rows 1 *rest"], to: Int[Array, "batch"]
) -> Shaped[Array, "rows slots *rest"]:
    """`write` of one token a row to a slot of its own, -1 for none."""
    return write(buffer, new.astype(buffer.dtype), jnp.maximum(to, 0), (to >= 0)[:, None])


def _scattered(buffer, new, start, keep):
    rows, slots = buffer.shape[:2]
    at = jnp.where(keep, start[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None], slots)
    at = jnp.repeat(at, rows // start.shape[0], axis=0)
    return buffer.at[jnp.arange(rows)[:, None], at].set(new, mode="drop")


def _windows(buffer, new, start, keep):
    batch, slots, width = start.shape[0], buffer.shape[1], min(new.shape[1], buffer.shape[1])
    rest = buffer.shape[2:]

    def one(buffer: Shaped[Array, "heads slots *rest"], new: Shaped[Array, "heads width *rest"], start, keep):
        first = jnp.minimum(start, slots - width)
        shift = start - first  # the window was moved back by this much to fit
        source = jnp.arange(width) - shift
        wanted = jnp.take(keep, source, mode="fill", fill_value=False) & (source >= 0)
        fresh = new[:, :width]
        if width > 1:
            fresh = jnp.roll(fresh, shift, axis=1)
        at = (0, first, *(0,) * len(rest))
        old = jax.lax.dynamic_slice(buffer, at, (buffer.shape[0], width, *rest))
        blend = jnp.where(wanted.reshape(1, width, *(1,) * len(rest)), fresh, old)
        return jax.lax.dynamic_update_slice(buffer, blend, at)

    split = [x.reshape(batch, -1, *x.shape[1:]) for x in (buffer, new)]
    return jax.vmap(one)(*split, start, keep).reshape(buffer.shape)
