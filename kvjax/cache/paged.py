"""Keep everything, in pages of one pool that rows take when they need them.

Source: Kwon et al. 2023, "PagedAttention" (arXiv:2309.06180).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.ahead import InOrder
from kvjax.cache.attention import Mask, attend_blocks
from kvjax.cache.base import Cache, LayerSpec, Strategy, check_dtype, is_whole
from kvjax.cache.pages import Copies, Pages, allocate, counted, no_pages
from kvjax.pytree import pytree, static

BLOCK = 512
"""Slots gathered from the pool at once, in tokens a row."""


@pytree
class PagedLayer(InOrder):
    """Slot `s` of a row's page `j` holds its position `j * page + s`.

    `table`, `copies` and `filled`, the tokens a row has with those it takes in, are there while the cache is open.
    """

    k: Float[Array, "pages page kv_size"]
    v: Float[Array, "pages page kv_size"]
    kv_heads: int = static()
    most: int = static()
    table: Int[Array, "batch row_pages"] | None = None
    copies: Copies | None = None
    filled: Int[Array, "batch"] | None = None

    @property
    def limit(self) -> int:
        return self.most

    def attend(self, q, k, v, positions, valid, mask: Mask):
        layer = replace(self, k=self._write(self.k, k, positions, valid), v=self._write(self.v, v, positions, valid))
        return *layer.look(q, positions, mask), layer

    def look(self, q, positions, mask: Mask):
        assert self.table is not None and self.filled is not None, "an open layer"
        page, batch = self.k.shape[1], q.shape[0]
        order = jnp.argsort(-self.filled)  # longest first, so that their last pages are gathered for them alone
        q, positions, table, filled = (jnp.take(x, order, axis=0) for x in (q, positions, self.table, self.filled))
        taken = min(max(BLOCK // page, 1), table.shape[1])
        slots = jnp.arange(table.shape[1] * page)[None]

        def load(first, count):
            cut = jax.lax.dynamic_slice_in_dim(table[:count], first // page, taken, axis=1)
            k, v = (self._gathered(pool, cut) for pool in (self.k, self.v))
            mine = jnp.repeat(first + jnp.arange(v.shape[1])[None] < filled[:count, None], self.kv_heads, axis=0)
            return k, jnp.where(mine[..., None], v, 0)  # another row's NaN would pass a weight of zero

        held = jnp.where(slots < filled[:, None], slots, -1)
        counts = [batch // 4**i for i in range(1, 4) if batch // 4**i]
        parts = attend_blocks(q, held, load, taken * page, positions, mask, counts)
        back = jnp.argsort(order)
        return tuple(jnp.take(x, back, axis=0) for x in parts)

    def held(self, length: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        """Slots are those of a row's own pages, in its order; no page is needed to say what they hold."""
        slots = jnp.arange(self.most, dtype=jnp.int32)[None]
        return jnp.where(slots < length[:, None], slots, -1)

    def _gathered(self, pool, table):
        """Pages of the pool as `[batch * kv_heads, slots, head_dim]`; what is no page reads page 0, unseen."""
        batch, heads = table.shape[0], self.kv_heads
        pages = jnp.take(pool, jnp.maximum(table, 0), axis=0).reshape(batch, -1, heads, pool.shape[2] // heads)
        return pages.swapaxes(1, 2).reshape(batch * heads, -1, pages.shape[3])

    def _write(self, pool, new, positions, valid: Bool[Array, "batch width"]):
        assert self.table is not None and self.copies is not None, "an open layer"
        pages, page, size = pool.shape
        pool = pool.at[self.copies.target].set(jnp.take(pool, self.copies.source, axis=0), mode="drop")
        at = jnp.take_along_axis(self.table, jnp.minimum(positions // page, self.table.shape[1] - 1), axis=1)
        slot = jnp.where(valid, at * page + positions % page, pages * page).reshape(-1)
        flat = pool.reshape(pages * page, size)
        return flat.at[slot].set(new.reshape(-1, size).astype(pool.dtype), mode="drop").reshape(pool.shape)

    def fork(self, rows: Int[Array, "new_batch"]) -> PagedLayer:
        return replace(self, k=jnp.copy(self.k), v=jnp.copy(self.v))  # rows share pages, caches share no buffer

    @property
    def assured(self) -> tuple[None, int]:
        return None, 0

    def tokens(self) -> tuple[Float[Array, "rows slots head_dim"], Float[Array, "rows slots head_dim"]]:
        assert self.table is not None, "an open layer"
        return self._gathered(self.k, self.table)[:, : self.most], self._gathered(self.v, self.table)[:, : self.most]

    def take(self, k, v, positions, mask: Mask, old):
        if self.table is None:
            raise ValueError(
                "compress: `strategy` must make layers that can be filled one by one, but Paged ones share pages"
            )
        k, v = (x.reshape(-1, self.kv_heads, *x.shape[1:]).swapaxes(1, 2) for x in (k, v))
        positions, valid = jnp.maximum(positions, 0), positions >= 0
        return replace(self, k=self._write(self.k, k, positions, valid), v=self._write(self.v, v, positions, valid))


@dataclass(frozen=True)
class Paged(Strategy):
    """Everything, in pages of `page` tokens from a pool of `pool` pages that all rows share.

    With `pool=None` there is a page for every token that could come; a fork to more rows may still need more. A
    row that finds no page takes nothing in: its logits are NaN, `cache.shared.starved` marks it, and it can go on
    once others have made room (`release`). A fork shares pages until one of its rows writes to them.
    """

    page: int = 64
    pool: int | None = None
    dtype: str | None = None

    def __post_init__(self):
        for name, value in (("page", self.page), ("pool", self.pool)):
            if not is_whole(value, 1) and (name, value) != ("pool", None):
                raise ValueError(f"Paged: `{name}` must be at least 1, a whole number, got {value!r}")
        check_dtype(self, self.dtype)

    def layer(self, spec: LayerSpec) -> PagedLayer:
        shape = (self._pool(spec.batch, spec.capacity), self.page, spec.kv_heads * spec.head_dim)
        buffer = jnp.zeros(shape, self.dtype or spec.dtype)
        return PagedLayer(buffer, jnp.zeros_like(buffer), spec.kv_heads, spec.capacity)

    def init(self, model, *, batch: int, capacity: int) -> Cache:
        cache = super().init(model, batch=batch, capacity=capacity)
        return replace(cache, shared=no_pages(batch, -(-capacity // self.page), self._pool(batch, capacity)))

    def open(self, cache: Cache, lengths):
        cache, full = super().open(cache, lengths)
        pages, copies = allocate(cache.shared, cache.length, jnp.where(full, 0, lengths), self.page)
        full |= pages.starved
        filled = cache.length + jnp.where(full, 0, lengths)
        layers = tuple(replace(layer, table=pages.table, copies=copies, filled=filled) for layer in cache.layers)
        starved = jnp.where(lengths > 0, full, cache.shared.starved)  # of rows that ask for nothing, as they last asked
        return replace(cache, layers=layers, shared=replace(pages, starved=starved)), full

    def close(self, cache: Cache, layers, lengths) -> Cache:
        layers = tuple(replace(layer, table=None, copies=None, filled=None) for layer in layers)
        return super().close(cache, layers, lengths)

    def fork(self, cache: Cache, rows) -> Cache:
        pages: Pages = cache.shared
        by_row = {
            name: jnp.take(getattr(pages, name), rows, axis=0, mode="clip")
            for name in ("table", "starved", "hits", "misses")
        }
        same = {name: jnp.copy(getattr(pages, name)) for name in ("kept", "stamp")}
        return replace(super().fork(cache, rows), shared=counted(replace(pages, **same, **by_row)))

    def release(self, cache: Cache, rows: Bool[Array, "batch"]) -> Cache:
        pages: Pages = cache.shared
        table = jnp.where(rows[:, None], -1, pages.table)
        length, hits, misses = (jnp.where(rows, 0, x) for x in (cache.length, pages.hits, pages.misses))
        shared = counted(replace(pages, table=table, starved=pages.starved & ~rows, hits=hits, misses=misses))
        return replace(cache, length=length, shared=shared)

    def need(self, cache: Cache, lengths: np.ndarray) -> str | None:
        return super().need(cache, lengths) or self._lacking(cache, demand(cache, lengths))

    def need_forked(self, cache: Cache, lengths: np.ndarray, more: np.ndarray) -> str | None:
        """`need` of `lengths` tokens a row and then, once rows are forked to as many as `more` has, of `more` a row."""
        n = more.shape[0] // cache.batch
        pages = cache.shared
        table = np.zeros((more.shape[0], pages.table.shape[1]), np.int32)
        shared = replace(pages, table=table, refs=np.full(pages.refs.shape, n))  # every page has its row's `n` holders
        forked = replace(cache, length=np.repeat(np.asarray(cache.length) + lengths, n), shared=shared)
        return super().need(forked, more) or self._lacking(cache, demand(cache, lengths) + demand(forked, more))

    def _lacking(self, cache: Cache, need: int) -> str | None:
        refs = np.asarray(cache.shared.refs)
        free = int((refs == 0).sum())
        if need <= free:
            return None
        return f"need {need} pages of {self.page} tokens, but {free} of the pool's {refs.size} are free"

    def _pool(self, batch: int, capacity: int) -> int:
        return batch * -(-capacity // self.page) if self.pool is None else self.pool


def demand(cache: Cache, lengths: np.ndarray) -> int:
    """Pages that `lengths` more tokens a row take from the pool of a `Paged` cache: new ones, and copies to write to.

    On the host; `allocate` comes to the same inside the program.
    """
    length, page, pages = np.asarray(cache.length), cache.layers[0].k.shape[1], cache.shared
    columns = np.minimum(length // page, pages.table.shape[1] - 1)[:, None]
    newest = np.take_along_axis(np.asarray(pages.table), columns, 1)[:, 0]
    copies = (length % page > 0) & (lengths > 0) & (np.asarray(pages.refs)[np.maximum(newest, 0)] > 1)
    return int((-(-(length + lengths) // page) - -(-length // page) + copies).sum())


def release(cache: Cache, rows: Bool[Array, "batch"] | None = None) -> Cache:
    """Empty some rows of a `Paged` cache, all if None, so that others can have their pages. Works inside jit.

    Rows of a `Shared` cache that are `Paged` within go back to the prefix's end.

    Raises:
        ValueError: for a cache without pages.
    """
    return cache.strategy.release(cache, jnp.ones(cache.batch, bool) if rows is None else jnp.asarray(rows))
