"""Turn a cache that is in use into one of fewer bytes, when memory presses: fewer bits, a window, or fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int

from kvjax.cache.attention import Mask
from kvjax.cache.base import Cache, LayerCache, Strategy, is_whole, layer_spec, nbytes


def compress(cache: Cache, strategy: Strategy, *, capacity: int | None = None) -> Cache:
    """The same rows, with the same lengths and positions, kept as `strategy` keeps them; decoding goes on.

    A layer at a time, so that the most memory is the old cache and one new layer. Inside a `jit` of your own it is both
    caches and what one layer needs, for XLA frees no argument before the program's end.

    Any cache can be the source. `Dense`, `Ring`, `Quantized` and `Evicting` can be the target, as far as the source
    still holds what they need: all tokens, those of a window, or none in particular. What `Evicting` keeps it chooses
    by keys (`key_norm`, `key_diff`, `random`), for the queries of what is held are gone; another score serves only
    where `cache` is `Evicting` by the same one, whose statistics then go on.

    Args:
        cache: donated: use the one returned. While JAX traces it is if you say so there, though its buffers fit none
            of the new ones.
        capacity: tokens a row may hold in all; the cache's own if None, or the model's if it has no bound.
    Raises:
        ValueError: if the new cache would not have fewer bytes, would need tokens that the old one may have dropped or
            a score that needs queries, or is `Paged` or `Shared`. The old one is then as it was.
    """
    if not isinstance(cache, Cache) or not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cache)):
        raise ValueError(
            "compress: `cache` must be what a strategy's `init` makes, and hold arrays; for sizes alone, take `nbytes` "
            "of the new strategy's `shapes`"
        )
    if not isinstance(strategy, Strategy):
        raise ValueError(f"compress: `strategy` must be a strategy, such as `Quantized(4)`, got {strategy!r}")
    if capacity is not None and not is_whole(capacity, 1):
        raise ValueError(f"compress: `capacity` must be at least 1, a whole number, got {capacity!r}")
    most = capacity or cache.capacity or cache.config.max_positions
    held = cache.opened(jnp.zeros(cache.batch, jnp.int32))[0].layers
    makers = _makers(cache, held, strategy, most)
    fill = [partial(_refill, mask=Mask(1.0, window=window)) for window in cache.config.windows]
    shapes = [
        jax.eval_shape(fill, jax.eval_shape(make), old, cache.length)
        for fill, make, old in zip(fill, makers, held, strict=True)
    ]
    before, after = nbytes(cache.layers), nbytes(shapes)
    if after >= before:
        raise ValueError(
            f"compress: `strategy` must need fewer bytes than the {before} there are, got {after} at a `capacity` of "
            f"{most} tokens a row"
        )
    layers = []
    for i, old in enumerate(held):
        layers.append(fill[i](makers[i](), old, cache.length))
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(layers[i])):  # or the program reads `old` later
            for leaf in jax.tree.leaves(cache.layers[i]):
                leaf.delete()
    return replace(cache, layers=tuple(layers), strategy=strategy, shared=None)


def _makers(
    cache: Cache, held: tuple[LayerCache, ...], strategy: Strategy, most: int
) -> list[Callable[[], LayerCache]]:
    """What makes each new layer, once it is sure that the old one has what it needs."""
    makers = []
    for i, old in enumerate(held):
        dtype = jax.eval_shape(old.tokens)[0].dtype.name
        make = partial(strategy.layer, layer_spec(cache.config, i, cache.batch, most, dtype))
        new = jax.eval_shape(make)
        if not _covers(old.assured, new.assured):
            raise ValueError(
                f"compress: `strategy` is {strategy}, which needs tokens that {cache.strategy} may have dropped"
            )
        if new.limit is not None and cache.capacity is not None and new.limit < cache.capacity:
            raise ValueError(f"compress: `capacity` must be at least the cache's {cache.capacity}, got {most}")
        makers.append(make)
    return makers


def _covers(held: tuple[int | None, int], wanted: tuple[int | None, int]) -> bool:
    """Whether the newest and first tokens that are held are all that are wanted."""
    if held[0] is None:
        return True
    return wanted[0] is not None and wanted[0] <= held[0] and wanted[1] <= held[1]


@partial(jax.jit, static_argnames="mask", donate_argnums=0)
def _refill(empty: LayerCache, old: LayerCache, length: Int[Array, "batch"], *, mask: Mask) -> LayerCache:
    """An empty layer with the tokens of another. A branch, or XLA would unpack all layers before it packs the first."""
    fill = lambda: empty.take(*old.tokens(), old.held(length), mask, old)  # noqa: E731
    return jax.lax.cond((length > 0).any(), fill, lambda: empty)
