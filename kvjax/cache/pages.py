"""Which row holds which pages of a pool: allocation, sharing and release, all inside jit.

Source: Kwon et al. 2023, "PagedAttention" (arXiv:2309.06180), sections 4.3 and 4.4 (copy on write).
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from kvjax.pytree import pytree


@pytree
class Pages:
    """The page table of a batch.

    `table` names the pool's page behind each page of a row, -1 where there is none yet; `kept` marks pages that a
    prefix store holds; `refs` counts a page's holders, rows and store; `starved` marks rows that found no page, or
    no room in their table, when they last asked. Of each row's prompt `hits` tokens were found in a prefix store and
    `misses` were not; both are 0 for a row that asked none. `stamp` is that of the store (`PrefixStore.stamp`).
    """

    table: Int[Array, "batch row_pages"]
    refs: Int[Array, "pages"]
    starved: Bool[Array, "batch"]
    kept: Bool[Array, "pages"]
    hits: Int[Array, "batch"]
    misses: Int[Array, "batch"]
    stamp: UInt32[Array, ""]

    @property
    def free(self) -> Int[Array, ""]:
        """Pages that nobody holds."""
        return (self.refs == 0).sum()


@pytree
class Copies:
    """Pages to copy before a row writes: one a row at most. `target` is past the pool where there is nothing to do."""

    source: Int[Array, "batch"]
    target: Int[Array, "batch"]


def no_pages(batch: int, row_pages: int, pool: int) -> Pages:
    """A table of rows that hold nothing."""
    table = jnp.full((batch, row_pages), -1, jnp.int32)
    refs, kept, starved = jnp.zeros(pool, jnp.int32), jnp.zeros(pool, bool), jnp.zeros(batch, bool)
    hits, misses = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32)
    return Pages(table, refs, starved, kept, hits, misses, stamp=jnp.zeros((), jnp.uint32))


def wanted(length: Int[Array, "batch"], lengths: Int[Array, "batch"], page: int):
    """How many pages each row's tokens fill now, and with `lengths` more."""
    return -(-length // page), -(-(length + lengths) // page)


def allocate(
    pages: Pages, length: Int[Array, "batch"], lengths: Int[Array, "batch"], page: int
) -> tuple[Pages, Copies]:
    """Give each row the pages that `lengths` tokens after its `length` need.

    A row whose newest page is part full and held by others too gets one of its own, to copy that page to. Rows are
    served in order; the first that cannot be, and all after it that ask for something, get nothing and are
    `starved`.
    """
    columns, pool = jnp.arange(pages.table.shape[1])[None], pages.refs.shape[0]
    have, want = wanted(length, lengths, page)
    newest = jnp.minimum(length // page, columns.shape[1] - 1)
    source = jnp.maximum(jnp.take_along_axis(pages.table, newest[:, None], axis=1)[:, 0], 0)
    copied = (length % page > 0) & (lengths > 0) & (pages.refs[source] > 1)
    demand = jnp.where(lengths > 0, want - have, 0) + copied.astype(jnp.int32)
    free = jnp.cumsum(pages.refs == 0)
    granted = ((jnp.cumsum(demand) <= free[-1]) & (want <= columns.shape[1])) | (demand == 0)
    demand = jnp.where(granted, demand, 0)
    copied &= granted
    first = jnp.cumsum(demand) - demand  # each row's share of the free pages, in order

    nth = first[:, None] + jnp.maximum(columns - have[:, None], 0) + copied[:, None].astype(jnp.int32)
    new = (columns >= have[:, None]) & (columns < want[:, None]) & granted[:, None]
    picked = jnp.where(new, _nth_free(free, nth), -1)
    target = jnp.where(copied, _nth_free(free, first), pool)
    table = jnp.where(new, picked, pages.table)
    table = jnp.where(copied[:, None] & (columns == newest[:, None]), target[:, None], table)
    refs = pages.refs.at[jnp.where(new, picked, pool).reshape(-1)].add(1, mode="drop")
    refs = refs.at[target].add(1, mode="drop").at[jnp.where(copied, source, pool)].add(-1, mode="drop")
    return replace(pages, table=table, refs=refs, starved=~granted), Copies(source, target)


def counted(pages: Pages) -> Pages:
    """The same table with `refs` counted anew."""
    pool = pages.refs.shape[0]
    held = jnp.where(pages.table >= 0, pages.table, pool).reshape(-1)
    return replace(pages, refs=pages.kept.astype(jnp.int32).at[held].add(1, mode="drop"))


def _nth_free(free: Int[Array, "pages"], nth: Int[Array, "..."]) -> Int[Array, "..."]:
    """The free page of this number, counted from 0, from the running count of free pages."""
    return jnp.searchsorted(free, nth + 1).astype(jnp.int32)
