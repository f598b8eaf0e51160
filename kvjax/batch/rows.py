"""One row of any cache, as a cache of its own, and back: what rows share, such as a pool of pages, is passed along."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.cache.base import Cache, fork
from kvjax.model import Transformer


def row_of(cache: Cache, row: Int[Array, ""]) -> Cache:
    """The row as a cache of batch 1. Inside `jit`, of a donated cache, what is shared is not copied."""
    leaves, tree = jax.tree.flatten(cache)
    cut = [
        leaf if at is None else jax.lax.dynamic_slice_in_dim(leaf, row * at[1], at[1], at[0])
        for leaf, at in zip(leaves, _places(cache), strict=True)
    ]
    return jax.tree.unflatten(tree, cut)


def put_row(cache: Cache, row: Int[Array, ""], one: Cache) -> Cache:
    """The cache with what `one`, made by `row_of`, has become in place of its row, and of what rows share."""
    leaves, tree = jax.tree.flatten(cache)
    put = [
        new if at is None else jax.lax.dynamic_update_slice_in_dim(leaf, new, row * at[1], at[0])
        for leaf, new, at in zip(leaves, jax.tree.leaves(one), _places(cache), strict=True)
    ]
    return jax.tree.unflatten(tree, put)


def blank_row(model: Transformer, cache: Cache, capacity: int) -> Cache:
    """A row as `row_of` gives it that holds nothing, as its strategy's `init` makes it for `capacity` tokens."""
    leaves, tree = jax.tree.flatten(cache)
    empty = jax.tree.leaves(cache.strategy.init(model, batch=1, capacity=capacity))
    own = [leaf if at is None else new for leaf, new, at in zip(leaves, empty, _places(cache), strict=True)]
    return jax.tree.unflatten(tree, own)


def _places(cache: Cache) -> list[tuple[int, int] | None]:
    """For each leaf its axis of rows and how many entries a row has there; None for one that all rows share.

    It is where the shapes differ if the cache is forked to one row more.
    """
    rows = jnp.zeros(cache.batch + 1, jnp.int32)
    more = jax.tree.leaves(jax.eval_shape(fork, cache, rows))
    return [_differing(a.shape, b.shape) for a, b in zip(jax.tree.leaves(cache), more, strict=True)]


def _differing(shape: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, int] | None:
    return next(((axis, b - a) for axis, (a, b) in enumerate(zip(shape, more, strict=True)) if a != b), None)
