"""A request that leaves its row for a while: recomputed when it comes back, or kept on the host, or in fewer bits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.batch.rows import row_of
from kvjax.batch.seating import retire, vacant
from kvjax.batch.slots import Made, Slots, look, put_row_of_slots, row_of_slots, watch, with_cache
from kvjax.cache.attention import Mask
from kvjax.cache.base import Cache, nbytes
from kvjax.cache.dense import DenseLayer
from kvjax.cache.paged import PagedLayer
from kvjax.cache.quantize import affine
from kvjax.decode.widths import power_of_two
from kvjax.draft.base import Draft
from kvjax.model import Transformer
from kvjax.pytree import pytree, static

WAYS = ("recompute", "offload", "compress")
"""What can become of a row's keys and values: dropped, held on the host, or held on the device in 8 bits."""


@pytree
class Parked:
    """A request without a row.

    `made` is what it has made; `row` its arrays but for the cache's; `held` its keys and values, of `length` tokens: by
    layer if they were in pages or are compressed, or else the row's part of each of the cache's arrays. Both are None
    for one that will be recomputed.
    """

    made: Made
    length: int = static()
    row: Slots | None = None
    held: Any = None

    @property
    def nbytes(self) -> int:
        """Of keys and values that are held."""
        return nbytes(self.held)


def check_way(slots: Slots, way: str, where: str) -> None:
    """Raise ValueError if rows of these slots cannot be parked so."""
    if way not in WAYS:
        raise ValueError(f"{where}: `preempt` must be one of {', '.join(WAYS)}, got {way!r}")
    if way == "compress" and not all(isinstance(layer, DenseLayer | PagedLayer) for layer in slots.cache.layers):
        raise ValueError(
            f"{where}: `preempt` can be 'compress' only where keys are held in full, as by Dense or Paged, but the "
            f"strategy is {slots.cache.strategy}: use 'offload' or 'recompute'"
        )


def park(slots: Slots, row: int, way: str) -> tuple[Slots, Parked]:
    """Free a row whose request has not ended. `slots` is donated.

    Raises:
        ValueError: for another way than those in `WAYS`, or one that the slots' cache does not allow.
    """
    check_way(slots, way, "park")
    length = int(watch(slots).held[row])
    if way == "recompute" or length == 0:
        slots, (made,) = retire(slots, [row])
        return slots, Parked(made, length)
    (made,), at = look(slots, [row]), jnp.int32(row)
    paged = isinstance(slots.cache.layers[0], PagedLayer)
    if paged or way == "compress":
        held = _by_layer(slots.cache, at, width=min(power_of_two(length), slots.capacity), coded=way == "compress")
    else:
        held = _row_arrays(slots.cache, at)
    one = _without_cache(row_of_slots(slots, at))
    if way == "offload":
        held = jax.device_get(held)
    return retire(slots, [row])[0], Parked(made, length, one, held)


def unpark(model: Transformer, slots: Slots, row: int, parked: Parked, *, draft: Draft | None = None) -> Slots:
    """Seat a parked request, whose keys and values were held, in a free row. `slots` is donated.

    One that is to be recomputed comes back by `admit(made=parked.made)`.

    Raises:
        ValueError: for a row that is not free, or a request that holds nothing.
    """
    if not watch(slots).free[row]:
        raise ValueError(f"unpark: `row` must be a free one, got {row}")
    if parked.row is None:
        raise ValueError("unpark: `parked` holds no keys and values: `admit` it with what it had made")
    return _seat(slots, jnp.int32(row), parked.row, parked.held, jnp.int32(parked.length), draft, model=model)


def _without_cache(one: Slots) -> Slots:
    """What is a row's own: the draft's state, the automaton and the tables of grammars are not."""
    spec = replace(one.spec, own=None, choice=None, rounds=None, state=replace(one.spec.state, cache=None, step=None))
    return replace(one, spec=spec, rules=replace(one.rules, automaton=None, grammars=None))


@jax.jit
def _row_arrays(cache: Cache, row) -> list[Array]:
    return jax.tree.leaves(row_of(cache, row))


@partial(jax.jit, static_argnames=("width", "coded"))
def _by_layer(cache: Cache, row, *, width: int, coded: bool):
    """Keys and values of a row's first `width` positions, a pair a layer."""
    one = row_of(cache, row)
    opened = one.opened(jnp.zeros(1, jnp.int32))[0]
    pairs = [tuple(x[:, :width] for x in layer.tokens()) for layer in opened.layers]
    return (
        jax.tree.map(lambda x: affine(x[:, None].astype(jnp.float32), 8, -1, x.dtype.name), pairs) if coded else pairs
    )


@partial(jax.jit, static_argnames="model", donate_argnames="slots")
def _seat(slots: Slots, row, one: Slots, held, length, draft, *, model) -> Slots:
    slots, empty = vacant(model, slots, row, draft)
    if isinstance(held[0], tuple):
        cache = _refilled(empty.cache, held, length[None])
    else:
        cache = jax.tree.unflatten(jax.tree.structure(empty.cache), held)
    return put_row_of_slots(slots, row, with_cache(one, cache))


def _refilled(one: Cache, held: list[Any], length: Int[Array, "one"]) -> Cache:
    """An empty cache of one row with the keys and values that `_by_layer` took from another."""
    opened, full = one.opened(length)
    length = jnp.where(full, 0, length)
    layers = []
    for layer, pair, window in zip(opened.layers, held, one.config.windows, strict=True):
        k, v = (_decoded(x, layer.k.dtype) for x in pair)
        nth = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
        positions = jnp.where(nth < length[:, None], nth, -1)
        layers.append(layer.take(k, v, positions, Mask(1.0, window=window), layer))
    return opened.closed(tuple(layers), length)


def _decoded(x: Any, dtype) -> Float[Array, "kv_heads tokens head_dim"]:
    if not isinstance(x, tuple):
        return jnp.asarray(x)
    codes, scale, offset = x
    return (codes.astype(jnp.float32) * scale + offset)[:, 0].astype(dtype)
