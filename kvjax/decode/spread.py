"""From one row to many: prompts that are held once, in memory that stays where it is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache.base import Cache, Strategy, fork
from kvjax.cache.paged import Paged
from kvjax.cache.shared import share
from kvjax.decode.prompts import traced
from kvjax.model import Transformer


def check_room(model, cache: Cache, lengths, limit, inner: Strategy | None, capacity: int, where: str) -> None:
    """Raise ValueError if rows that go on from a cache once it holds its prompts would not find the room to.

    Args:
        limit: new tokens a row; all but the last are held.
        inner: how rows keep those after a shared prompt, up to `capacity` of them; None if a `Paged` cache is forked.
    """
    if traced(cache.length, lengths, limit):
        return
    n = limit.shape[0] // cache.batch
    more, before = np.asarray(limit) - 1, np.repeat(np.asarray(cache.length) + lengths, n)
    why = None
    if inner is not None:
        own = inner.shapes(model, batch=n, capacity=capacity)
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (own.length, own.shared))
        why = own.strategy.need(replace(own, length=empty[0], shared=empty[1]), more)
        most = model.config.max_positions
        if model.config.rope is None and (before + more).max() > most:
            why = f"need {(before + more).max()} positions, but the model has learned {most}"
    elif isinstance(cache.strategy, Paged):
        why = cache.strategy.need_forked(cache, np.asarray(lengths), more)
    if why:
        raise ValueError(f"{where}: prompt and new tokens {why}: make it larger, or `n` or `max_new` smaller")


def spread(model: Transformer, prompt: Cache, rows: int, capacity: int, inner: Strategy) -> Cache:
    """`share` of a donated prompt, which stays where it is in memory."""
    return _spread(model, prompt.layers, replace(prompt, layers=()), rows=rows, capacity=capacity, inner=inner)


@partial(jax.jit, static_argnames=("model", "rows", "capacity", "inner"), donate_argnames="layers")
def _spread(model, layers, rest: Cache, *, rows: int, capacity: int, inner: Strategy) -> Cache:
    return share(model, replace(rest, layers=layers), batch=rows, capacity=capacity, inner=inner)


def regroup(cache: Cache, rows: Int[Array, "new_batch"]) -> Cache:
    """`fork` of a donated cache: what no row owns alone, such as a pool or a prefix, stays where it is in memory."""
    leaves, tree = jax.tree.flatten(cache)
    after = jax.tree.leaves(jax.eval_shape(fork, cache, rows))
    stays = [(a.shape, a.dtype) == (b.shape, b.dtype) for a, b in zip(leaves, after, strict=True)]
    kept = [x if stay else None for x, stay in zip(leaves, stays, strict=True)]
    moved = [None if stay else x for x, stay in zip(leaves, stays, strict=True)]
    return _regroup(kept, moved, rows, tree=tree)


@partial(jax.jit, static_argnames="tree", donate_argnames="kept")
def _regroup(kept, moved, rows, *, tree) -> Cache:
    leaves = [a if b is None else b for a, b in zip(kept, moved, strict=True)]
    return fork(jax.tree.unflatten(tree, leaves), rows)
