"""Save and restore a prefix store: its index, its policy's state, and the pages of the pool that it keeps.

A saved store is a folder: `store.json` is what the host knows, `pages/` a checkpoint of keys and values by Orbax.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped

from kvjax.cache.base import Cache
from kvjax.cache.prefix import Policy, PrefixStore
from kvjax.cache.prefix.codec import decode, encode
from kvjax.cache.prefix.index import Block, Tally, Turns
from kvjax.cache.prefix.store import pages_of, paired, settled
from kvjax.config import differing
from kvjax.model import Params
from kvjax.weights.checkpoint import new_folder, restore, save
from kvjax.weights.safetensors_file import read_json

_FORMAT = "kvjax-store-1"
_POLICIES = "kvjax.cache.prefix"
_SAMPLED = 64


def save_store(path: str | os.PathLike[str], store: PrefixStore, cache: Cache, params: Params) -> None:
    """Write a store and the pages that it keeps to the folder `path`, whole or not at all.

    Args:
        path: the folder to make; an earlier store there is replaced.
        cache: the one that was returned with `store`. What rows hold besides is not saved.
        params: of the model, whose keys and values these are; a few numbers of each array are remembered.
    Raises:
        FileExistsError: if `path` is something other than a saved store.
        ValueError: if `cache` is not the store's.
        TypeError: for a policy whose state is not plain data.
    """
    paired(store, cache, "save_store")
    arrays: list[np.ndarray] = []
    policy, state = encode(store.policy, arrays), encode(store.turns.state, arrays)
    pages = np.array([block.page for block in store.blocks.values()], np.int32)
    kept = [np.asarray(pool[pages]) for pool in jax.tree.leaves(cache.layers)]
    about = {
        "config": asdict(store.config),
        "weights": _sampled(params),
        "page": store.page,
        "most": store.most,
        "time": store.time,
        "tally": asdict(store.tally),
        "blocks": [[name, block.parent, list(block.tokens)] for name, block in store.blocks.items()],
        "policy": policy,
        "state": state,
        "arrays": [[list(array.shape), str(array.dtype)] for array in arrays],
        "digests": [_digest(array.tobytes()) for array in (*kept, *arrays)],
    }
    whole = {"format": _FORMAT, "digest": _digest(json.dumps(about).encode()), "store": about}
    with new_folder(Path(path), "store.json") as folder:
        save(folder / "pages", {"kept": kept, "arrays": arrays})
        (folder / "store.json").write_text(json.dumps(whole))


def restore_store(
    path: str | os.PathLike[str], cache: Cache, params: Params, policy: Policy[Any] | None = None
) -> tuple[PrefixStore, Cache]:
    """Read a store that `save_store` wrote into free pages of `cache`.

    Args:
        path: the folder.
        cache: donated, if all is well: a `Paged` one of the same model, page and dtype; its batch, capacity and pool
            may be others.
        params: of the model.
        policy: only for a policy that is not kvjax's own: any of its kind; the saved one is what comes back.
    Returns:
        The store, which goes on as the saved one would have, and the cache that has its pages.
    Raises:
        FileNotFoundError: if there is no store at `path`.
        ValueError: for a store of another model, other weights or another version of kvjax, a corrupted one, or a pool
            without room for it. The cache is then as it was.
    """
    path = Path(path)
    if not (path / "store.json").exists():
        raise FileNotFoundError(f"restore_store: no store at {path} (a folder with store.json, as save_store writes)")
    outer = read_json(path / "store.json")
    if outer.get("format") != _FORMAT:
        raise ValueError(f"restore_store: {path} is of another version: {outer.get('format')!r}, not {_FORMAT!r}")
    about = outer.get("store")
    if not isinstance(about, dict) or _digest(json.dumps(about).encode()) != outer.get("digest"):
        raise ValueError(f"restore_store: {path / 'store.json'} is corrupted: its digest is another")
    _compare(path, about, cache, params)
    blocks, pools = about["blocks"], jax.tree.leaves(cache.layers)
    like = {
        "kept": [np.empty((len(blocks), *pool.shape[1:]), pool.dtype) for pool in pools],
        "arrays": [np.empty(shape, dtype) for shape, dtype in about["arrays"]],
    }
    stored = restore(path / "pages", like)
    found = [_digest(array.tobytes()) for array in (*stored["kept"], *stored["arrays"])]
    if found != about["digests"]:
        raise ValueError(f"restore_store: {path / 'pages'} is corrupted: digests differ")
    modules = {_POLICIES} | (set() if policy is None else {type(policy).__module__})
    free = np.flatnonzero(np.asarray(cache.shared.refs) == 0)[: len(blocks)]
    store = PrefixStore(
        cache.config,
        about["page"],
        about["most"],
        decode(about["policy"], stored["arrays"], modules),
        Turns(decode(about["state"], stored["arrays"], modules)),
        {
            name: Block(parent, tuple(tokens), page)
            for (name, parent, tokens), page in zip(blocks, free.tolist(), strict=True)
        },
        Tally(**about["tally"]),
        about["time"],
    )
    if blocks:
        filled = [_put(pool, free, rows) for pool, rows in zip(pools, stored["kept"], strict=True)]
        cache = replace(cache, layers=jax.tree.unflatten(jax.tree.structure(cache.layers), filled))
    return store, settled(store, cache)


def _compare(path: Path, about: dict[str, Any], cache: Cache, params: Params) -> None:
    """Refuse a store that this cache, or a model with these parameters, cannot serve."""
    if np.asarray(pages_of(cache, "restore_store").kept).any():
        raise ValueError("restore_store: `cache` already holds pages of a store")
    if how := differing(cache.config, about["config"]):
        raise ValueError(f"restore_store: {path} was written for another model: {how}")
    if _sampled(params) != about["weights"]:
        raise ValueError(f"restore_store: {path} is of other weights than `params`, though of a model like it")
    if about["page"] != (page := cache.layers[0].k.shape[1]):
        raise ValueError(f"restore_store: {path} has pages of {about['page']} tokens, but `cache` has pages of {page}")
    free, pool, need = int(cache.shared.free), cache.shared.refs.shape[0], len(about["blocks"])
    if free < need:
        raise ValueError(f"restore_store: {path} has {need} pages, but {free} of the pool's {pool} are free")


@partial(jax.jit, donate_argnums=0)
def _put(
    pool: Shaped[Array, "pages *rest"], at: Int[Array, "blocks"], rows: Shaped[Array, "blocks *rest"]
) -> Shaped[Array, "pages *rest"]:
    return pool.at[at].set(rows)


def _sampled(params: Params) -> str:
    """A digest of evenly spaced numbers of every array."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf.reshape(-1)[:: max(leaf.size // _SAMPLED, 1)]).tobytes())
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
