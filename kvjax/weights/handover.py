"""Hand a cache from one process or device to another: prompts are taken in here, and decoded on there.

What is handed over is a folder with keys and values by position, as long as what is held and not as the capacity, so
that whoever takes them may keep them in another way, precision or size, and on another device.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache.attention import Mask
from kvjax.cache.base import Cache, LayerSpec, Strategy, layer_spec
from kvjax.cache.dense import Dense
from kvjax.cache.shared import Shared
from kvjax.config import differing
from kvjax.decode.widths import power_of_two
from kvjax.model import Transformer
from kvjax.weights.checkpoint import new_folder, restore, save
from kvjax.weights.safetensors_file import read_json

_FORMAT = "kvjax-handover-1"
_MARK = "handover.json"


def export_cache(path: str | os.PathLike[str], cache: Cache) -> None:
    """Write what a cache holds to the folder `path`, whole or not at all; the cache stays valid.

    Args:
        path: on a disk that the other process sees, or in memory (`/dev/shm`); an earlier hand-over there is replaced.
        cache: one that holds all of its rows' tokens, in whatever way: codes are written as what they stand for.
    Raises:
        ValueError: for a cache that has dropped tokens: `kvjax.save` writes it as it is.
        FileExistsError: if `path` is something other than a hand-over.
    """
    if not isinstance(cache, Cache):
        raise ValueError(f"export_cache: `cache` must be what a strategy's `init` makes, got {type(cache).__name__}")
    opened = cache.opened(jnp.zeros(cache.batch, jnp.int32))[0]
    lengths = np.asarray(cache.length)
    held = [np.asarray((layer.held(cache.length) >= 0).sum(1)).reshape(len(lengths), -1) for layer in opened.layers]
    if any((count != lengths[:, None]).any() for count in held):
        raise ValueError(
            f"export_cache: `cache` must hold all tokens, but {cache.strategy} has dropped some: write it as it "
            "is with `kvjax.save`, and read it with `kvjax.restore` into a cache of the same strategy"
        )
    width = power_of_two(int(lengths.max(initial=1)))
    layers = [_by_position(layer, cache.length, width=width) for layer in opened.layers]
    about = {
        "format": _FORMAT,
        "config": asdict(cache.config),
        "lengths": lengths.tolist(),
        "width": width,
        "dtypes": [k.dtype.name for k, _ in layers],
    }
    with new_folder(Path(path), _MARK) as folder:
        save(folder / "layers", layers)
        (folder / _MARK).write_text(json.dumps(about))


def import_cache(
    path: str | os.PathLike[str],
    model: Transformer,
    strategy: Strategy | None = None,
    *,
    capacity: int,
    device: jax.Device | None = None,
) -> Cache:
    """A new cache with what another process handed over, to go on from with its rows' next tokens.

    Args:
        model: of the same config; its precision may be another, and says the new cache's dtype.
        strategy: how keys and values are kept from now on; `Dense()` if None.
        capacity: tokens a row can hold in all.
        device: where the cache is to be; JAX's default if None.
    Raises:
        FileNotFoundError: if there is no hand-over at `path`.
        ValueError: for one of another model or one that is corrupt, a capacity that is too small, or a strategy that
            cannot be filled with tokens whose queries are gone.
    """
    path = Path(path)
    if not (path / _MARK).exists():
        raise FileNotFoundError(f"import_cache: no hand-over at {path} (a folder with {_MARK}, as export_cache writes)")
    about = read_json(path / _MARK)
    whole = {"lengths", "width", "config", "dtypes"} <= about.keys() and isinstance(about["config"], dict)
    if about.get("format") != _FORMAT or not whole:
        raise ValueError(f"import_cache: {path / _MARK} is not of format {_FORMAT}, or not whole")
    strategy = Dense() if strategy is None else strategy
    if not isinstance(strategy, Strategy) or isinstance(strategy, Shared):
        raise ValueError(
            f"import_cache: `strategy` must be one that keeps rows apart, such as `Dense()`, got {strategy!r}"
        )
    lengths, width = np.array(about["lengths"], np.int32), about["width"]
    with jax.default_device(device):
        cache = strategy.init(model, batch=len(lengths), capacity=capacity)
        if how := differing(model.config, about["config"]):
            raise ValueError(f"import_cache: {path} was written for another model: {how}")
        if why := strategy.need(cache, lengths):
            raise ValueError(f"import_cache: rows {why}: make `capacity` larger")
        c = model.config
        row = jax.ShapeDtypeStruct((len(lengths) * c.kv_heads, width, c.head_dim), jnp.float32)
        like = [(_typed(row, dtype), _typed(row, dtype)) for dtype in about["dtypes"]]
        held = restore(path / "layers", like)
        if device is not None:
            held = jax.device_put(held, device)
        opened, full = cache.opened(jnp.asarray(lengths))
        assert not bool(full.any()), "`need` has said that there is room"
        layers = [
            _filled(layer, *pair, jnp.asarray(lengths), spec=layer_spec(c, i, len(lengths), width, pair[0].dtype.name))
            for i, (layer, pair) in enumerate(zip(opened.layers, held, strict=True))
        ]
        return opened.closed(tuple(layers), jnp.asarray(lengths))


@partial(jax.jit, static_argnames="width")
def _by_position(layer: Any, length: Int[Array, "batch"], *, width: int):
    """A layer's keys and values, position `i` in slot `i`; zeros past a row's length."""
    k, v = layer.tokens()
    held = layer.held(length)
    at = jnp.repeat(jnp.where(held < 0, width, held), k.shape[0] // held.shape[0], axis=0)
    rows = jnp.arange(k.shape[0])[:, None]
    return tuple(jnp.zeros((x.shape[0], width, x.shape[2]), x.dtype).at[rows, at].set(x, mode="drop") for x in (k, v))


@partial(jax.jit, static_argnames="spec")
def _filled(layer: Any, k, v, length: Int[Array, "batch"], *, spec: LayerSpec):
    """An empty open layer that takes in the first `length` positions."""
    nth = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), (spec.batch, k.shape[1]))
    positions = jnp.where(nth < length[:, None], nth, -1)
    old = replace(Dense().layer(spec), k=k, v=v, length=length)
    return layer.take(k, v, positions, Mask(1.0, window=spec.window), old)


def _typed(row: jax.ShapeDtypeStruct, dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(row.shape, jnp.dtype(dtype))
