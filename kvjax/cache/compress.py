"""Turn a cache that is in use into one of fewer bytes, when memory presses: fewer bits, or a window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import Mask
from kvjax.cache.base import Cache, Strategy, layer_spec, nbytes
from kvjax.cache.dense import DenseLayer
from kvjax.cache.quantized_layer import QuantizedLayer
from kvjax.cache.ring import RingLayer

Heads = Float[Array, "rows slots head_dim"]


def compress(cache: Cache, strategy: Strategy, *, capacity: int | None = None) -> Cache:
    """The same rows, with the same lengths and positions, kept as `strategy` keeps them; decoding goes on.

    A layer at a time, so that the most memory is the old cache and one new layer. Inside a `jit` of your own, too.

    Sources are `Dense`, `Ring` and `Quantized`, and any layer with `tokens()`, the keys and values in the slots that
    `held` speaks of. Targets are the same, and any layer with `take(k, v, positions)`, which fills it, when it is
    empty, with tokens in any order, `positions` being -1 where there is none.

    Args:
        cache: donated: use the one returned. Inside `jit` it is donated if you say so there.
        capacity: tokens a row may hold in all; the cache's own if None, or the model's if it has no bound.
    Raises:
        ValueError: if the new cache would not have fewer bytes, would need tokens that the old one has dropped, or one
            of the two has no such layers.
    """
    empty = _empty(cache, strategy, capacity)
    before, after = nbytes(cache.layers), nbytes(jax.eval_shape(lambda: [make() for make in empty]))
    if after >= before:
        raise ValueError(f"compress: `strategy` must need fewer bytes than the {before} there are, got {after}")
    layers = []
    for old, make in zip(cache.layers, empty, strict=True):
        layers.append(_refill(make(), old, cache.length))
        for leaf in jax.tree.leaves(old):
            if not isinstance(leaf, Tracer):
                leaf.delete()
    return replace(cache, layers=tuple(layers), strategy=strategy)


def _empty(cache: Cache, strategy: Strategy, capacity: int | None) -> list[Callable[[], Any]]:
    """What makes each new layer, once it is sure that it can be filled."""
    most = capacity or cache.capacity or cache.config.max_positions
    if cache.shared is not None or not all(isinstance(x, _PLAIN) or hasattr(x, "tokens") for x in cache.layers):
        raise ValueError(f"compress: `cache` is kept as {cache.strategy}, whose layers do not tell their tokens")
    makers = []
    for i, old in enumerate(cache.layers):
        spec = layer_spec(cache.config, i, cache.batch, most, old.k.dtype.name)
        new = jax.eval_shape(partial(strategy.layer, spec))
        if not isinstance(new, _PLAIN) and not hasattr(new, "take"):
            raise ValueError(f"compress: `strategy` is {strategy}, whose layers do not take tokens in")
        if old.limit is None and not hasattr(new, "take") and not _narrows(old, new):
            raise ValueError(
                f"compress: `strategy` is {strategy}, which needs tokens that {cache.strategy} has dropped"
            )
        if new.limit is not None and cache.capacity is not None and new.limit < cache.capacity:
            raise ValueError(f"compress: `capacity` must be at least the cache's {cache.capacity}, got {capacity}")
        makers.append(partial(strategy.layer, spec))
    return makers


_PLAIN = (DenseLayer, RingLayer, QuantizedLayer)


def _narrows(old: Any, new: Any) -> bool:
    """Whether a ring holds all that another would."""
    rings = isinstance(old, RingLayer) and isinstance(new, RingLayer)
    return rings and new.window <= old.window and new.sinks <= old.sinks


@partial(jax.jit, donate_argnums=0)
def _refill(empty: Any, old: Any, length: Int[Array, "batch"]) -> Any:
    """An empty layer with the tokens of another."""
    held = old.held(length)
    k, v = old.tokens() if hasattr(old, "tokens") else (old.k, old.v)
    if hasattr(empty, "take"):
        return empty.take(k, v, held)
    sinks = getattr(old, "sinks", 0) if isinstance(old, RingLayer) else 0
    if sinks:  # before a gap
        empty = _take_in_order(empty, k, v, jnp.where(held < sinks, held, -1))
        held = jnp.where(held < sinks, -1, held)
    return _take_in_order(empty, k, v, held)


def _take_in_order(layer: Any, k: Heads, v: Heads, held: Int[Array, "batch slots"]) -> Any:
    """Let a layer take in tokens of consecutive positions, as if a prompt brought them; nobody asks what it attends."""
    batch, width = held.shape
    order = jnp.argsort(jnp.where(held < 0, jnp.iinfo(jnp.int32).max, held), axis=1)
    first = jnp.take_along_axis(held, order[:, :1], axis=1)
    positions, valid = first + jnp.arange(width)[None], jnp.arange(width)[None] < (held >= 0).sum(1, keepdims=True)

    def ordered(x: Heads) -> Float[Array, "batch slots kv_heads head_dim"]:
        x = x.reshape(batch, -1, width, x.shape[-1]).swapaxes(1, 2)
        return jnp.take_along_axis(x, order[:, :, None, None], axis=1)

    k, v = ordered(k), ordered(v)
    return layer.attend(jnp.zeros_like(k), k, v, jnp.maximum(positions, 0), valid, Mask(1.0))[2]
