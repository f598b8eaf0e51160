"""One prefix for the whole batch, held once, before what each row has of its own.

Source: Juravsky et al. 2024, "Hydragen" (arXiv:2402.05099), section 3: attention over the prefix is one product of
all rows' queries, and merges with the rest by its log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import Mask, merge
from kvjax.cache.base import Cache, LayerSpec, Strategy, check
from kvjax.cache.dense import Dense
from kvjax.pytree import pytree, static

if TYPE_CHECKING:
    from kvjax.model import Transformer


@pytree
class SharedLayer:
    """`prefix` is a layer of one row that is only looked at; `inner` holds the rows' own tokens.

    The inner layer counts positions from the prefix's end, so it needs no room for the prefix. `start` is where
    that is, in an opened cache only.
    """

    prefix: Any
    inner: Any
    most: int = static()
    start: Int[Array, ""] | None = None

    @property
    def limit(self) -> int | None:
        return None if self.inner.limit is None else self.most + self.inner.limit

    def attend(self, q, k, v, positions, valid, mask: Mask):
        *own, inner = self.inner.attend(q, k, v, positions - self.start, valid, mask)
        return *merge(self._before(q, positions, mask), tuple(own)), replace(self, inner=inner)

    def look(self, q, positions, mask: Mask):
        return merge(self._before(q, positions, mask), self.inner.look(q, positions - self.start, mask))

    def ahead(self, q, k, v, positions, valid, mask: Mask, path=None):
        own = self.inner.ahead(q, k, v, positions - self.start, valid, mask, path)
        return merge(self._before(q, positions, mask), own)

    def steady(self) -> Int[Array, "batch"] | None:
        return self.inner.steady()

    @property
    def by_token(self) -> bool:
        return self.inner.by_token

    def held(self, length: Int[Array, "batch"]) -> Int[Array, "rows slots"]:
        """The prefix's slots, which every row sees, before the row's own."""
        assert self.start is not None, "an open layer"
        before = self.prefix.held(self.start[None])
        own = self.inner.held(length - self.start)
        own = jnp.where(own < 0, -1, own + self.start)
        each = max(before.shape[0], own.shape[0] // length.shape[0])  # rows a batch row: one, or one a K/V head
        before, own = (jnp.repeat(x, each * n // x.shape[0], 0) for x, n in ((before, 1), (own, length.shape[0])))
        return jnp.concatenate([jnp.tile(before, (length.shape[0], 1)), own], axis=1)

    def _before(self, q, positions, mask: Mask):
        """All rows' queries as one row's: the prefix is read once for the batch."""
        batch, width, heads, dim = q.shape
        out, lse = self.prefix.look(q.reshape(1, batch * width, heads, dim), positions.reshape(1, -1), mask)
        return out.reshape(q.shape), lse.reshape(batch, width, heads)

    def fork(self, rows: Int[Array, "new_batch"]) -> SharedLayer:
        return replace(self, prefix=jax.tree.map(jnp.copy, self.prefix), inner=self.inner.fork(rows))

    @property
    def assured(self) -> tuple[int | None, int]:
        """All, if that is so of both parts."""
        return (None if (self.prefix.assured[0], self.inner.assured[0]) == (None, None) else 0), 0

    def tokens(self) -> tuple[Float[Array, "rows slots head_dim"], Float[Array, "rows slots head_dim"]]:
        """The prefix's, a copy for every row, before the row's own."""
        parts = zip(self.prefix.tokens(), self.inner.tokens(), strict=True)
        k, v = (jnp.concatenate([jnp.tile(a, (b.shape[0] // a.shape[0], 1, 1)), b], axis=1) for a, b in parts)
        return k, v

    def take(self, k, v, positions, mask: Mask, old):
        raise ValueError("compress: `strategy` must keep rows apart, got Shared: `share` makes one from its prefix")


@pytree
class Prefix:
    """Tokens in the shared prefix, and what the inner strategy's layers have in common."""

    length: Int[Array, ""]
    inner: Any


@dataclass(frozen=True)
class Shared(Strategy):
    """A prefix that all rows see, and `inner` for what follows it in each.

    `share` makes one from a cache that holds the prefix; `init` makes one whose prefix is empty.
    """

    inner: Strategy = Dense()

    def __post_init__(self):
        if isinstance(self.inner, Shared) or not isinstance(self.inner, Strategy):
            raise ValueError(
                f"Shared: `inner` must be a strategy that keeps rows apart, such as `Dense()`, got {self.inner!r}"
            )

    def layer(self, spec: LayerSpec) -> SharedLayer:
        return SharedLayer(Dense().layer(replace(spec, batch=1, capacity=1)), self.inner.layer(spec), most=0)

    def init(self, model: Transformer, *, batch: int, capacity: int) -> Cache:
        return share(model, Dense().init(model, batch=1, capacity=1), batch=batch, capacity=capacity, inner=self.inner)

    def open(self, cache: Cache, lengths):
        inner, full = self.inner.open(_own(cache), lengths)
        if cache.config.rope is None:
            full |= cache.length + lengths > cache.config.max_positions
        start = cache.shared.length
        layers = [replace(at, inner=own, start=start) for at, own in zip(cache.layers, inner.layers, strict=True)]
        return replace(cache, layers=tuple(layers), shared=replace(cache.shared, inner=inner.shared)), full

    def close(self, cache: Cache, layers, lengths) -> Cache:
        own = _own(replace(cache, layers=layers))
        return _with(cache, self.inner.close(own, own.layers, lengths))

    def fork(self, cache: Cache, rows) -> Cache:
        prefixes = jax.tree.map(jnp.copy, [layer.prefix for layer in cache.layers])
        layers = [replace(layer, prefix=own) for layer, own in zip(cache.layers, prefixes, strict=True)]
        shared = replace(cache.shared, length=jnp.copy(cache.shared.length))
        return _with(replace(cache, layers=tuple(layers), shared=shared), self.inner.fork(_own(cache), rows))

    def release(self, cache: Cache, rows) -> Cache:
        return _with(cache, self.inner.release(_own(cache), rows))

    def need(self, cache: Cache, lengths: np.ndarray) -> str | None:
        return self.inner.need(_own(cache), lengths)


def share(model: Transformer, prefix: Cache, *, batch: int, capacity: int, inner: Strategy | None = None) -> Cache:
    """A cache of `batch` rows that all go on from what `prefix`, a cache of one row, holds.

    The prefix is copied once, as it was kept, whatever its strategy; `prefix` itself stays valid.

    Args:
        capacity: tokens a row may take in after the prefix.
        inner: how those are kept; `Dense()` if None.
    Raises:
        ValueError: if `prefix` has more than one row or is of another model, or a size is below 1.
    """
    check(prefix, model, None, "share", "prefix")
    if prefix.batch != 1:
        raise ValueError(f"share: `prefix` must hold one row, got {prefix.batch}")
    inner = Dense() if inner is None else inner
    own = inner.init(model, batch=batch, capacity=capacity)
    strategy = Shared(own.strategy)  # which is more than `inner` on a mesh
    held = prefix.opened(jnp.zeros(1, jnp.int32))[0].layers
    most = prefix.capacity or 0
    layers = [
        SharedLayer(jax.tree.map(jnp.copy, before), after, most) for before, after in zip(held, own.layers, strict=True)
    ]
    length = jnp.copy(jnp.broadcast_to(prefix.length, (batch,)))
    shared = Prefix(jnp.copy(prefix.length[0]), own.shared)
    return Cache(tuple(layers), length, model.config, strategy, shared)


def _own(cache: Cache) -> Cache:
    """What the rows have of their own, as a cache of the inner strategy."""
    assert isinstance(cache.strategy, Shared)
    layers = tuple(layer.inner for layer in cache.layers)
    return Cache(layers, cache.length - cache.shared.length, cache.config, cache.strategy.inner, cache.shared.inner)


def _with(cache: Cache, own: Cache) -> Cache:
    """`cache` with `own` in place of what the rows had."""
    layers = [replace(at, inner=new, start=None) for at, new in zip(cache.layers, own.layers, strict=True)]
    shared = replace(cache.shared, inner=own.shared)
    return replace(cache, layers=tuple(layers), length=own.length + cache.shared.length, shared=shared)
