"""Which axis of the mesh each axis of a cache's arrays lies along, by the names that their fields declare.

A layer says what its arrays are in the annotations of its fields, `Float[Array, "rows slots head_dim"]` say. So a
strategy that is written like the others needs no rule of its own.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kvjax.mesh import CONTEXT, DATA, HEADS

Names = tuple[str, ...]

RULES = {"rows": (DATA, HEADS), "batch": (DATA,), "kv_heads": (HEADS,), "kv_size": (HEADS,), "dealt": (CONTEXT,)}
"""By an axis's name. `rows` are split into a batch and its K/V heads, so that each is an axis of its own."""

_DECLARED = re.compile(r"""\[Array, ["']([^"']*)["']\]""")


def axes_of(tree: Any) -> list[Names]:
    """The names of the axes of each leaf, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: for an array whose field declares none.
    """
    found: list[Names] = []
    for item in fields(tree):
        held = getattr(tree, item.name)
        if item.metadata.get("static") or held is None:
            continue
        if declared := _DECLARED.search(str(item.type)):
            found.append(tuple(declared[1].split()))
        elif is_dataclass(held):
            found += axes_of(held)
        elif jax.tree.leaves(held):
            where = f"{type(tree).__name__}.{item.name}"
            raise ValueError(f"shard_cache: {where} must declare its axes, as in 'Float[Array, \"rows slots\"]'")
    return found


def spec_of(names: Names) -> PartitionSpec:
    """How an array with these axes lies on the mesh, `rows` being two."""
    axes: list[str | None] = []
    for name in names:
        axes += RULES.get(name, (None,))
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def specs_of(layer: Any) -> Any:
    """A tree like `layer` of what `spec_of` says of each leaf."""
    return jax.tree.unflatten(jax.tree.structure(layer), [spec_of(names) for names in axes_of(layer)])


def joined(layer: Any, shards: int) -> Any:
    """The layer as its class writes it, of a device's part of one that was `split` over `shards` of the heads."""
    return _heads(_mapped(layer, lambda x: x.reshape(-1, *x.shape[2:])), lambda n: n // shards)


def split(layer: Any, batch: int, shards: int = 1) -> Any:
    """The layer with `[batch, kv_heads, ...]` where it has `rows`; undoes `joined`."""
    return _heads(_mapped(layer, lambda x: x.reshape(batch, -1, *x.shape[1:])), lambda n: n * shards)


def _mapped(layer: Any, change) -> Any:
    leaves, tree = jax.tree.flatten(layer)
    each = zip(leaves, axes_of(layer), strict=True)
    return jax.tree.unflatten(tree, [change(x) if names[:1] == ("rows",) else x for x, names in each])


def _heads(layer: Any, change) -> Any:
    """A layer that counts its K/V heads counts those of the device."""
    if not any(item.name == "kv_heads" and item.metadata.get("static") for item in fields(layer)):
        return layer
    return replace(layer, kv_heads=change(layer.kv_heads))


class Outlined:
    """An array of rows, by the shape that a layer's class writes; `held` is the one that lies on the mesh."""

    def __init__(self, held: Any):
        self.held, self.dtype = held, held.dtype
        self.shape = (held.shape[0] * held.shape[1], *held.shape[2:])


def outlined(layer: Any) -> Any:
    """A split layer for questions about its sizes and its small arrays; arrays of rows are only outlined."""
    return _mapped(layer, Outlined)


def filled(layer: Any) -> Any:
    """`outlined` undone."""
    return jax.tree.map(lambda x: x.held if isinstance(x, Outlined) else x, layer)
