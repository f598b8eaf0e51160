"""What runs a cache's attention: read off the program that its layers trace, so that no record can be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend import core

from kvjax.cache.base import Cache
from kvjax.config import Acceleration, ModelConfig, Precision

if TYPE_CHECKING:
    from kvjax.model import Transformer

Settings = tuple[str, str | None]
"""The dtype that a model computes in, and the backend that it asks for."""

KERNELS = ("mpmd_map", "core_map", "pallas_call")
"""How the names of JAX's primitives begin that run a kernel of one's own."""


def backends(cache: Cache, model: Transformer | None = None) -> tuple[str, ...]:
    """Of each layer, what runs the attention of a decode step on the device at hand: `"mosaic"` or `"xla"`.

    Caches of one shape are looked at once in a process, and layers that are alike once. Works inside jit.

    Args:
        model: whose queries they are; None for a model that computes in the cache's dtype and asks for no backend.
    """
    if _platform() not in ("gpu", "cuda"):
        return ("xla",) * len(cache.layers)
    leaves, tree = jax.tree.flatten(cache)
    settings: Any = model  # hashable, as every Flax module is
    return _backends(tree, tuple((x.shape, x.dtype) for x in leaves), settings)


def _platform() -> str:
    """Of the device that programs run on now."""
    chosen = jax.config.jax_default_device  # ty: ignore[missing-attribute]  # config makes them at run time
    return getattr(chosen, "platform", chosen) or jax.default_backend()


@lru_cache(maxsize=64)
def _backends(tree: Any, shapes: tuple, model: Transformer | None) -> tuple[str, ...]:
    """Of a cache of this structure, and arrays of these shapes and dtypes."""
    cache = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*each) for each in shapes])
    settings = None if model is None else (model.precision.compute, model.accelerate.attention)
    whole = (False,) * len(cache.layers) if model is None else _wholly_fused(model, cache)
    opened = jax.eval_shape(lambda cache: cache.opened(jnp.ones(cache.batch, jnp.int32))[0], cache)
    known: dict[Any, str] = {}
    found = []
    for layer, window, fused in zip(opened.layers, cache.config.windows, whole, strict=True):
        if fused:
            found.append("mosaic")
            continue
        leaves, kind = jax.tree.flatten(layer)
        alike = kind, window, tuple((x.shape, x.dtype) for x in leaves)
        if alike not in known:
            program = traced(layer, cache.config, window, cache.batch, settings)
            known[alike] = "mosaic" if has_kernel(program) else "xla"
        found.append(known[alike])
    return tuple(found)


def _wholly_fused(model: Transformer, cache: Cache) -> tuple[bool, ...]:
    from kvjax.fused import wholly_fused
    from kvjax.model import param_shapes

    return wholly_fused(model, param_shapes(model), cache)


def traced(
    layer: Any, config: ModelConfig, window: int | None, batch: int, settings: Settings | None = None
) -> core.Jaxpr:
    """The program of one token's attention to an opened layer with this window, of which only shapes are needed.

    Args:
        settings: dtype of the queries and the backend asked for; None for the layer's own dtype and no backend.
    """
    from kvjax.block import Block

    c = config
    dtype, asked = (_dtype(layer), None) if settings is None else settings
    mask = Block(c, Precision(), window, Acceleration(attention=asked), parent=None).mask
    q, kv = (jax.ShapeDtypeStruct((batch, 1, heads, c.head_dim), dtype) for heads in (c.heads, c.kv_heads))
    at, valid = (jax.ShapeDtypeStruct((batch, 1), kind) for kind in (jnp.int32, jnp.bool_))
    step = jax.make_jaxpr(lambda layer, q, k, v, at, valid: layer.attend(q, k, v, at, valid, mask))
    return step(layer, q, kv, kv, at, valid).jaxpr


def _dtype(layer: Any) -> Any:
    """Of a layer's keys and values in full precision."""
    kept = (x.dtype for x in jax.tree.leaves(layer) if x.ndim > 2 and jnp.issubdtype(x.dtype, jnp.floating))
    return next(kept, jnp.dtype("float32"))


def has_kernel(program: core.Jaxpr) -> bool:
    """Whether a program runs a kernel that was written as one."""
    return any(eqn.primitive.name.startswith(KERNELS) for eqn in _equations(program))


def _equations(program: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in program.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr)):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, core.Jaxpr):
                yield from _equations(inner)
