"""Looking ahead: what tokens not yet taken in would attend to, and taking in those of them that turn out right.

A speculating decoder asks what follows several guessed tokens at once. Nothing is written for a guess, so nothing has
to be taken back: a cache of any strategy ends up as if only the right ones had ever come, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvjax.cache.attention import Mask, attend, by_head, merge
from kvjax.cache.base import Cache, Strategy
from kvjax.pytree import pytree, static


@pytree
class AheadLayer:
    """A layer that shows what it holds and takes nothing in; what it would have taken is kept for `settle`."""

    layer: Any
    new: Any = None
    mask: Mask | None = static(default=None)
    path: Int[Array, "batch width width"] | None = None

    @property
    def limit(self) -> int | None:
        return self.layer.limit

    def attend(self, q, k, v, positions, valid, mask: Mask):
        out, lse = self.layer.ahead(q, k, v, positions, valid, mask, self.path)
        return out, lse, replace(self, new=(q, k, v), mask=mask)


@pytree
class Sight:
    """What layers have in common, and the way to each new token where they are a tree, as `LayerCache.ahead` has it."""

    shared: Any
    path: Int[Array, "batch width width"] | None


@dataclass(frozen=True)
class Ahead(Strategy):
    """The strategy of a cache that is looked at: `inner` is what it is made by."""

    inner: Strategy

    def open(self, cache: Cache, lengths):
        """Every row has room, since none takes anything in."""
        sight = cache.shared
        held = replace(cache, strategy=self.inner, shared=sight.shared)
        opened, _ = self.inner.open(held, jnp.zeros_like(lengths))
        layers = tuple(AheadLayer(layer, path=sight.path) for layer in opened.layers)
        return replace(cache, layers=layers), jnp.zeros(cache.batch, bool)

    def positions(self, cache: Cache, width: int):
        path = cache.shared.path
        if path is None:
            return super().positions(cache, width)
        return cache.length[:, None] + (path >= 0).sum(2, dtype=jnp.int32) - 1

    def close(self, cache: Cache, layers, lengths) -> Cache:
        return replace(cache, layers=layers)


def ahead(cache: Cache, path: Int[Array, "batch width width"] | None = None) -> Cache:
    """The cache for a model to look at; what comes back from the model is for `settle`.

    Args:
        path: where new tokens are a tree, the way to each of them, as `LayerCache.ahead` has it.
    """
    return replace(cache, strategy=Ahead(cache.strategy), shared=Sight(cache.shared, path))


def settle(
    cache: Cache, seen: Cache, lengths: Int[Array, "batch"], way: Int[Array, "batch width"] | None = None
) -> tuple[Cache, Bool[Array, "batch"]]:
    """Take in the first `lengths` of the tokens that the model scored on `ahead(cache)`, giving `seen`.

    Args:
        way: where they are a tree, the way whose first tokens are taken in, in its order.
    Returns:
        The cache, as if they had come one at a time, and the rows that had no room and took in none.
    """
    opened, full = cache.opened(lengths)
    lengths = jnp.where(full, 0, lengths)
    layers = []
    for layer, other in zip(opened.layers, seen.layers, strict=True):
        q, k, v = other.new if way is None else (picked(x, way) for x in other.new)
        offset = jnp.arange(q.shape[1])[None]
        positions, valid = cache.length[:, None] + offset, offset < lengths[:, None]
        new = q, k, v, positions, valid, other.mask
        layers.append((one_by_one(layer, *new) if layer.by_token else layer.attend(*new))[2])
    return opened.closed(tuple(layers), lengths), full


def steady(cache: Cache) -> Int[Array, "batch"] | None:
    """How many tokens a row can look ahead, its next one included, for what it sees to be what it would see then.

    None where there is no bound.
    """
    bounds = [bound for layer in cache.layers if (bound := layer.steady()) is not None]
    return reduce(jnp.minimum, bounds) if bounds else None


class InOrder:
    """What layers have in common that take in tokens at once as one by one, and hold new ones, in full, in `k`."""

    def ahead(
        self: Any,
        q: Float[Array, "batch width heads head_dim"],
        k: Float[Array, "batch width kv_heads head_dim"],
        v: Float[Array, "batch width kv_heads head_dim"],
        positions: Int[Array, "batch width"],
        valid: Bool[Array, "batch width"],
        mask: Mask,
        path: Int[Array, "batch width width"] | None = None,
    ) -> tuple[Float[Array, "batch width heads head_dim"], Float[Array, "batch width heads"]]:
        """What is held, and the new tokens before each."""
        if path is None:
            k, v = (by_head(x).astype(self.k.dtype) for x in (k, v))
            fresh = attend(q, k, v, positions, jnp.where(valid, positions, -1), mask)
        else:
            fresh = _along(q, k.astype(self.k.dtype), v.astype(self.v.dtype), positions, valid, mask, path)
        return merge(self.look(q, positions, mask), fresh)

    def steady(self) -> Int[Array, "batch"] | None:
        return None

    @property
    def by_token(self) -> bool:
        return False


def picked(x: Shaped[Array, "batch width *rest"], way: Int[Array, "batch some"]) -> Shaped[Array, "batch some *rest"]:
    """Each row's tokens by their indices; -1 gives the first."""
    return jnp.take_along_axis(x, jnp.maximum(way, 0).reshape(*way.shape, *(1,) * (x.ndim - 2)), axis=1)


def _along(q, k, v, positions, valid, mask: Mask, path):
    """Attention of each new token to those on the way to it only: a row for each, of its own keys."""
    batch, width = positions.shape
    way = path.reshape(batch, -1)
    slots = jnp.where((way >= 0) & picked(valid, way), picked(positions, way), -1)
    k, v = (by_head(picked(x, way).reshape(batch * width, width, *x.shape[2:])) for x in (k, v))
    each = q.reshape(batch * width, 1, *q.shape[2:]), k, v, positions.reshape(-1, 1), slots.reshape(-1, width)
    out, lse = attend(*each, mask)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def one_by_one(layer: Any, q, k, v, positions, valid, mask: Mask):
    """`attend`, a token after the other: what a layer needs that chooses what it keeps with every token."""

    def step(layer, token):
        q, k, v, at, keep = (x[:, None] for x in token)
        out, lse, layer = layer.attend(q, k, v, at, keep, mask)
        return layer, (out[:, 0], lse[:, 0])

    by_time = tuple(x.swapaxes(0, 1) for x in (q, k, v, positions, valid))
    layer, seen = jax.lax.scan(step, layer, by_time)
    return *(x.swapaxes(0, 1) for x in seen), layer
