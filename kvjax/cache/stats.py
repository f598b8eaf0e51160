"""What a cache holds, by layer and row: arrays for a monitor to read, inside a program or outside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.backend import backends
from kvjax.cache.base import Cache, nbytes
from kvjax.cache.pages import Pages
from kvjax.cache.shared import Prefix
from kvjax.pytree import pytree, static

if TYPE_CHECKING:
    from kvjax.model import Transformer


@pytree
class Stats:
    """Where slots belong to K/V heads, a row's figure is the mean of its heads'.

    Args:
        hits, misses: tokens of the row's prompt that were found in a prefix store, and that were not.
        evictions: tokens taken in and no longer held.
        bytes: of the layer's arrays, in equal shares for its rows.
        fill: share of the row's slots in use, 0 to 1.
        age: tokens taken in since a held one was, in the mean; 0 where none is held.
        backend: of each layer, what runs the attention of a decode step on the device at hand, `"mosaic"` (a kernel
            of ours) or `"xla"`; static, for it is part of the program.
    """

    hits: Int[Array, "batch"]
    misses: Int[Array, "batch"]
    evictions: Float[Array, "layers batch"]
    bytes: Float[Array, "layers batch"]
    fill: Float[Array, "layers batch"]
    age: Float[Array, "layers batch"]
    backend: tuple[str, ...] = static()


def stats(cache: Cache, model: Transformer | None = None) -> Stats:
    """Works inside jit, and costs no more than a look at the positions of slots.

    All but hits and misses follow from what the slots hold now, so no counter can be wrong after a fork, a restore or
    an eviction.

    Args:
        model: whose cache it is, for `backend`; None for one that computes in the cache's dtype.
    """
    layers = cache.opened(jnp.zeros(cache.batch, jnp.int32))[0].layers
    evictions, fill, age = [], [], []
    for layer in layers:
        slots = layer.held(cache.length)
        slots = slots.reshape(cache.batch, -1, slots.shape[-1])
        used = (slots >= 0).sum(-1).astype(jnp.float32)
        ages = jnp.where(slots >= 0, cache.length[:, None, None] - 1 - slots, 0).sum(-1).astype(jnp.float32)
        evictions.append(cache.length.astype(jnp.float32) - used.mean(1))
        fill.append(used.mean(1) / slots.shape[-1])
        age.append((ages / jnp.maximum(used, 1.0)).mean(1))
    share = [jnp.full(cache.batch, nbytes(layer) / cache.batch, jnp.float32) for layer in cache.layers]
    pages = _pages(cache)
    nothing = jnp.zeros(cache.batch, jnp.int32)
    hits, misses = (nothing, nothing) if pages is None else (pages.hits, pages.misses)
    return Stats(hits, misses, *(jnp.stack(rows) for rows in (evictions, share, fill, age)), backends(cache, model))


def _pages(cache: Cache) -> Pages | None:
    """The page table, if there is one."""
    shared = cache.shared
    while isinstance(shared, Prefix):
        shared = shared.inner
    return shared if isinstance(shared, Pages) else None
