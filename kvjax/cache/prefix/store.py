"""Pages that outlive their request: a prompt that starts as an earlier one did takes in only its rest.

Pages are shared, never copied: a row that comes to write into one that is not its own alone gets a copy first, inside
the compiled step (`kvjax.cache.pages`). What is here runs on the host, between steps, on the page table.
"""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kvjax.cache.base import Cache
from kvjax.cache.paged import demand
from kvjax.cache.pages import Pages
from kvjax.cache.prefix.base import Policy
from kvjax.cache.prefix.index import PrefixStore, Turns, above, find, grow, shrink

Texts = Sequence[Sequence[int]]


def open_store(cache: Cache, policy: Policy[Any], most: int | None = None) -> PrefixStore:
    """An empty store for the pages of `cache`, a `Paged` one that serves no store yet.

    Args:
        policy: what leaves when room is needed, such as `POLICIES["workload_adaptive"]`.
        most: pages it may keep; all of the pool's if None. Rows get kept pages back whenever they need them.
    Raises:
        ValueError: if `cache` has no pages or serves a store, `policy` is none, or `most` is not between 1 and the
            pool's pages.
    """
    if isinstance(policy, type) or not isinstance(policy, Policy):
        raise ValueError(
            f'open_store: `policy` must be a policy, such as `POLICIES["lru"]` of `kvjax.cache.prefix`, got {policy!r}'
        )
    pages = pages_of(cache, "open_store")
    pool = pages.refs.shape[0]
    most = pool if most is None else most
    if not 1 <= most <= pool:
        raise ValueError(f"open_store: `most` must be in [1, {pool}], the pool's pages, got {most}")
    if np.asarray(pages.kept).any():
        raise ValueError("open_store: `cache` already holds pages of a store")
    return PrefixStore(cache.config, cache.layers[0].k.shape[1], most, policy, Turns(policy.init(most)))


def reuse(
    store: PrefixStore, cache: Cache, prompts: Texts, room: int | Int[np.ndarray, "batch"] = 0
) -> tuple[PrefixStore, Cache, list[list[int]]]:
    """Give each row what the store has of its prompt, and make room for the rest.

    Args:
        store: donated.
        cache: its buffers go on in the one returned.
        prompts: whole prompts, for rows that hold nothing; an empty one leaves its row as it is.
        room: tokens that each of these rows is to take in after its prompt.
    Returns:
        The store, the cache, and what is left of each prompt to take in, its last token at least.
    Raises:
        ValueError: for a cache that is not the store's, a row that holds something, or too little room. The store and
            the cache are then as they were.
    """
    pages = paired(store, cache, "reuse")
    if len(prompts) != cache.batch:
        raise ValueError(f"reuse: `prompts` must be {cache.batch} lists of tokens, one a row, got {len(prompts)}")
    asked = np.array([len(prompt) for prompt in prompts])
    found, table = np.zeros(cache.batch, np.int64), np.array(pages.table)
    held = np.asarray(cache.length)
    if (busy := np.flatnonzero((asked > 0) & (held > 0))).size:
        raise ValueError(f"reuse: rows {busy.tolist()} hold tokens: `release` them, or leave them out by empty prompts")
    need = np.where(asked > 0, asked + room, 0)
    if cache.capacity is not None and need.max(initial=0) > cache.capacity:
        raise ValueError(
            f"reuse: `prompts` need {need.max()} slots a row, but the cache's capacity is {cache.capacity}"
        )
    for row in np.flatnonzero(asked):
        path, found[row] = find(store, prompts[row])
        table[row, : len(path)] = [store.blocks[name].page for name in path]
    new = asked > 0
    by_row = {"hits": np.where(new, found, pages.hits), "misses": np.where(new, asked - found, pages.misses)}
    length = jnp.asarray(np.where(new, found, held), jnp.int32)
    shared = replace(pages, **{name: jnp.asarray(x, jnp.int32) for name, x in (by_row | {"table": table}).items()})
    store, cache = make_room(store, settled(store, replace(cache, length=length, shared=shared)), need - found)
    tally = replace(store.tally, asked=store.tally.asked + int(asked.sum()), found=store.tally.found + int(found.sum()))
    return replace(store, tally=tally), cache, [list(p[start:]) for p, start in zip(prompts, found, strict=True)]


def keep(
    store: PrefixStore,
    cache: Cache,
    texts: Texts,
    *,
    prompts: Sequence[int] | None = None,
    time: float | None = None,
) -> tuple[PrefixStore, Cache]:
    """Keep the full pages of rows, so that they outlive them, and evict what is then too much.

    Args:
        store: donated.
        cache: its buffers go on in the one returned.
        texts: all tokens that each row has taken in, prompt and answer; an empty list leaves a row out.
        prompts: how many tokens of each were the prompt; the policies learn from the lengths of answers.
        time: seconds, for the policies; the system's clock if None. It never runs back.
    Raises:
        ValueError: for a cache that is not the store's, or a text of another length than its row.
    """
    pages = paired(store, cache, "keep")
    length, table = np.asarray(cache.length), np.asarray(pages.table)
    if len(texts) != cache.batch:
        raise ValueError(f"keep: `texts` must be {cache.batch} lists of tokens, one a row, got {len(texts)}")
    if wrong := [row for row, text in enumerate(texts) if len(text) not in (0, length[row])]:
        row = wrong[0]
        raise ValueError(f"keep: `texts` has {len(texts[row])} tokens for row {row}, which holds {length[row]}")
    time = clock.time() if time is None else time
    for row, text in enumerate(texts):
        if len(text) == 0:
            continue
        asked = len(text) if prompts is None else prompts[row]
        answer = None if prompts is None else len(text) - asked
        store = grow(store, [int(token) for token in text], table[row].tolist(), time, asked, answer)
    return store, settled(store, cache)


def make_room(store: PrefixStore, cache: Cache, lengths: Int[np.ndarray, "batch"]) -> tuple[PrefixStore, Cache]:
    """Evict until rows find the pages that `lengths` more tokens need; pages that rows hold stay theirs.

    Raises:
        ValueError: if even an empty store would not do. The store and the cache are then as they were.
    """
    paired(store, cache, "make_room")
    if (short := _short(cache, lengths)) <= 0:
        return store, cache
    length, page = np.asarray(cache.length), store.page
    for ends in (-(-length // page), length // page, 0 * length):
        pinned = _in_use(store, cache, ends)
        least = settled(replace(store, blocks={name: store.blocks[name] for name in pinned}), cache)
        if _short(least, lengths) <= 0:
            while short > 0:
                store = shrink(store, min(short, len(store.blocks) - len(pinned)), pinned)
                cache = settled(store, cache)
                short = _short(cache, lengths)
            return store, cache
    raise ValueError(f"make_room: rows, even with nothing kept, {cache.strategy.need(least, lengths)}")


def _in_use(store: PrefixStore, cache: Cache, ends: Int[np.ndarray, "batch"]) -> frozenset[int]:
    """The blocks whose pages are among the first `ends` of a row, and those before them.

    Evicting them makes no room, but for a page that a row holds in part: what is no longer kept need not be copied
    before the row writes to it.
    """
    table = np.asarray(cache.shared.table)
    return above(store, set(table[np.arange(table.shape[1])[None] < ends[:, None]].tolist()))


def _short(cache: Cache, lengths: Int[np.ndarray, "batch"]) -> int:
    """Pages that are missing for `lengths` more tokens a row."""
    return demand(cache, lengths) - int((np.asarray(cache.shared.refs) == 0).sum())


def settled(store: PrefixStore, cache: Cache) -> Cache:
    """The cache whose pages are kept as this store's index says; holders are counted anew."""
    pages: Pages = cache.shared
    pool, table = pages.refs.shape[0], np.asarray(pages.table)
    kept = np.zeros(pool, bool)
    kept[[block.page for block in store.blocks.values()]] = True
    refs = kept + np.bincount(table[table >= 0], minlength=pool)
    shared = replace(
        pages, kept=jnp.asarray(kept), refs=jnp.asarray(refs, jnp.int32), stamp=jnp.asarray(np.uint32(store.stamp))
    )
    return replace(cache, shared=shared)


def paired(store: PrefixStore, cache: Cache, where: str) -> Pages:
    """The page table of a cache that goes with this store; a ValueError, begun with `where`, for another."""
    if not isinstance(store, PrefixStore):
        raise ValueError(f"{where}: `store` must be what `open_store` makes, got {type(store).__name__}")
    pages = pages_of(cache, where)
    if cache.config != store.config or cache.layers[0].k.shape[1] != store.page:
        raise ValueError(f"{where}: `store` keeps pages of {store.page} tokens of another model or cache")
    if int(pages.stamp) != store.stamp:
        raise ValueError(
            f"{where}: `cache` does not hold the pages that `store` keeps: give the two that were returned together"
        )
    return pages


def pages_of(cache: Cache, where: str) -> Pages:
    """The page table of a `Paged` cache; a ValueError, begun with `where`, for another."""
    if not isinstance(cache.shared, Pages):
        raise ValueError(f"{where}: `cache` must be a Paged one, got {type(cache.strategy).__name__}")
    return cache.shared
