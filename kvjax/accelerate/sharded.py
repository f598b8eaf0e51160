"""A cache on a mesh of devices: each attends to its own rows, heads and slots, as if there were no others.

What a layer does with new tokens runs in `shard_map`, on its part of the arrays, in the code of its own class and with
the kernels of one device. So no program that XLA makes of it can move keys or values between devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kvjax.accelerate.axes import axes_of, filled, joined, outlined, spec_of, specs_of, split
from kvjax.accelerate.context import ContextLayer, collected, deal
from kvjax.accelerate.layout import layout_of
from kvjax.cache.attention import Mask
from kvjax.cache.base import Cache, LayerSpec, Strategy
from kvjax.cache.dense import DenseLayer
from kvjax.cache.shared import Shared
from kvjax.mesh import CONTEXT, DATA, HEADS
from kvjax.pytree import pytree, static

ROWS = PartitionSpec(DATA)
BY_HEAD = PartitionSpec(DATA, None, HEADS)
"""How queries, keys, values, results and `lse` lie: `[batch, width, heads, …]`."""


@pytree
class ShardedLayer:
    """A layer of any strategy whose arrays lie on a mesh, `[batch, kv_heads, …]` where they have `rows` without one."""

    layer: Any
    mesh: Mesh = static()

    @property
    def limit(self) -> int | None:
        return outlined(self.layer).limit

    @property
    def by_token(self) -> bool:
        return outlined(self.layer).by_token

    @property
    def assured(self) -> tuple[int | None, int]:
        return outlined(self.layer).assured

    def steady(self) -> Int[Array, "batch"] | None:
        return outlined(self.layer).steady()

    def attend(self, q, k, v, positions, valid, mask: Mask):
        specs, shards = specs_of(self.layer), self.mesh.shape[HEADS]

        def local(layer, q, k, v, positions, valid):
            out, lse, layer = joined(layer, shards).attend(q, k, v, positions, valid, mask)
            return out, lse, split(layer, positions.shape[0], shards)

        given = specs, BY_HEAD, BY_HEAD, BY_HEAD, ROWS, ROWS
        out, lse, layer = self._on_each(local, given, (BY_HEAD, BY_HEAD, specs))(self.layer, q, k, v, positions, valid)
        return out, lse, replace(self, layer=layer)

    def look(self, q, positions, mask: Mask):
        def local(layer, q, positions):
            return joined(layer, self.mesh.shape[HEADS]).look(q, positions, mask)

        given = specs_of(self.layer), BY_HEAD, ROWS
        return self._on_each(local, given, (BY_HEAD, BY_HEAD))(self.layer, q, positions)

    def ahead(self, q, k, v, positions, valid, mask: Mask, path: Int[Array, "batch width width"] | None = None):
        def local(layer, q, k, v, positions, valid, path):
            return joined(layer, self.mesh.shape[HEADS]).ahead(q, k, v, positions, valid, mask, path)

        given = specs_of(self.layer), BY_HEAD, BY_HEAD, BY_HEAD, ROWS, ROWS, ROWS
        return self._on_each(local, given, (BY_HEAD, BY_HEAD))(self.layer, q, k, v, positions, valid, path)

    def held(self, length: Int[Array, "batch"]) -> Int[Array, "rows slots"]:
        layer = outlined(self.layer)
        if not isinstance(layer, DenseLayer):
            return self.whole().held(length)
        nth = jnp.arange(layer.limit, dtype=jnp.int32)[None]  # keys and values stay where they are
        return jnp.where(nth < jnp.minimum(length, layer.length)[:, None], nth, -1)

    def tokens(self) -> tuple[Float[Array, "rows slots head_dim"], Float[Array, "rows slots head_dim"]]:
        return self.whole().tokens()

    def take(self, k, v, positions, mask: Mask, old):
        old = old.whole() if isinstance(old, ShardedLayer) else old
        return sharded_layer(self.whole().take(k, v, positions, mask, old), positions.shape[0], self.mesh)

    def fork(self, rows: Int[Array, "new_batch"]) -> ShardedLayer:
        leaves, tree = jax.tree.flatten(self.layer)
        of_rows = [names[:1] in (("rows",), ("batch",)) for names in axes_of(self.layer)]
        forked = [
            jnp.take(x, rows, axis=0, mode="clip") if own else jnp.copy(x)  # caches share no buffer
            for x, own in zip(leaves, of_rows, strict=True)
        ]
        return replace(self, layer=laid_out(jax.tree.unflatten(tree, forked), self.mesh))

    def whole(self) -> Any:
        """The layer as its strategy makes it, for what is not done in every step: XLA may move all of it."""
        layer = joined(self.layer, 1)
        return collected(layer) if isinstance(layer, ContextLayer) else layer

    def _on_each(self, call: Callable, given: Any, gives: Any) -> Callable:
        # `all_gather` gives what is the same on all devices, which JAX does not infer
        return jax.shard_map(call, mesh=self.mesh, in_specs=given, out_specs=gives, check_vma=False)


@dataclass(frozen=True)
class Sharded(Strategy):
    """What `inner` keeps, on a mesh. Made by `inner.init` of a model that is on one, or by `shard_cache`."""

    inner: Strategy
    mesh: Mesh

    def layer(self, spec: LayerSpec) -> ShardedLayer:
        return sharded_layer(self.inner.layer(spec), spec.batch, self.mesh)

    def init(self, model, *, batch: int, capacity: int) -> Cache:
        alone = model.clone(accelerate=model.accelerate.alone)
        return made_on(partial(self.inner.init, alone, batch=batch, capacity=capacity), self.mesh)

    def open(self, cache: Cache, lengths):
        opened, full = self.inner.open(self._inner(self._even(cache)), lengths)
        layers = (ShardedLayer(filled(layer), self.mesh) for layer in opened.layers)
        return replace(cache, layers=tuple(layers), shared=opened.shared), full

    def positions(self, cache: Cache, width: int):
        return self.inner.positions(self._inner(cache), width)

    def close(self, cache: Cache, layers, lengths) -> Cache:
        closed = self.inner.close(cache, tuple(outlined(layer.layer) for layer in layers), lengths)
        layers = tuple(ShardedLayer(filled(layer), self.mesh) for layer in closed.layers)
        return self._even(replace(closed, layers=layers))

    def fork(self, cache: Cache, rows) -> Cache:
        return self._even(self.inner.fork(cache, rows))

    def release(self, cache: Cache, rows: Bool[Array, "batch"]) -> Cache:
        return self._even(self.inner.release(cache, rows))

    def need(self, cache: Cache, lengths) -> str | None:
        return self.inner.need(self._inner(cache), lengths)

    def _inner(self, cache: Cache) -> Cache:
        """The cache as the inner strategy knows it, its large arrays outlined."""
        return replace(cache, layers=tuple(outlined(layer.layer) for layer in cache.layers), strategy=self.inner)

    def _even(self, cache: Cache) -> Cache:
        """What is no layer's is whole on every device: any host can read it, and a step's result suits the next."""
        length, shared = _everywhere((cache.length, cache.shared), self.mesh)
        return replace(cache, length=length, shared=shared, strategy=self)


def shard_cache(cache: Cache, mesh: Mesh) -> Cache:
    """A cache, empty or in use, on a mesh. `init` of a model that is on a mesh makes one there at once.

    Raises:
        ValueError: for a batch, model or strategy that the mesh cannot share: `Shared`, `Paged` over `data` (a pool is
            one), or, over `context`, layers that are not dense.
    """
    if isinstance(cache.strategy, Shared | Sharded):
        raise ValueError(
            f"shard_cache: `cache` must be of a strategy that keeps rows apart and is on no mesh yet, got "
            f"{type(cache.strategy).__name__}: for a shared prefix, `kvjax.cache.share` one that is on the mesh"
        )
    return jax.device_put(_sharded(cache, mesh), shardings(_sharded, cache, mesh))


def made_on(make: Callable[[], Cache], mesh: Mesh) -> Cache:
    """What `shard_cache` gives of the cache that `make` makes, with no device ever holding more than its part."""

    def made() -> Cache:
        return _sharded(make(), mesh)

    return jax.jit(made, out_shardings=shardings(made))()


def shardings(make: Callable[..., Cache], *args: Any) -> Any:
    """Where each array of the sharded cache that `make` gives lies."""

    def lies(layer: ShardedLayer):
        return jax.tree.map(lambda spec: NamedSharding(layer.mesh, spec), replace(layer, layer=specs_of(layer.layer)))

    cache = jax.eval_shape(lambda: make(*args))
    everywhere = NamedSharding(cache.strategy.mesh, PartitionSpec())
    rest = jax.tree.map(lambda _: everywhere, replace(cache, layers=()))
    return replace(rest, layers=tuple(lies(layer) for layer in cache.layers))


def sharded_layer(layer: Any, batch: int, mesh: Mesh) -> ShardedLayer:
    """A layer as its strategy makes it, in the form that lies on a mesh.

    Raises:
        ValueError: for one that the mesh cannot share.
    """
    name, devices = type(layer).__name__, mesh.shape[CONTEXT]
    if devices > 1 and type(layer) is not DenseLayer:
        raise ValueError(
            f"shard_cache: over `context` every layer must be dense, as `Dense()` makes it, got {name} and "
            f"{devices} devices: use `heads` or `data`"
        )
    if mesh.shape[DATA] > 1 and any("pages" in names for names in axes_of(layer)):
        raise ValueError(
            f"shard_cache: a pool of pages is one for all rows, so `data` must be 1 for {name}, got "
            f"{mesh.shape[DATA]}: use `heads`, or a cache for each group of devices"
        )
    return ShardedLayer(split(deal(layer, devices) if devices > 1 else layer, batch), mesh)


def laid_out(layer: Any, mesh: Mesh) -> Any:
    """A split layer whose arrays XLA is told to keep where they belong."""
    leaves, tree = jax.tree.flatten(layer)
    each = (
        jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(names)))
        for x, names in zip(leaves, axes_of(layer), strict=True)
    )
    return jax.tree.unflatten(tree, list(each))


def _everywhere(tree: Any, mesh: Mesh) -> Any:
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), tree)


def _sharded(cache: Cache, mesh: Mesh) -> Cache:
    layout_of(mesh).check(cache.config, cache.batch)
    layers = tuple(sharded_layer(layer, cache.batch, mesh) for layer in cache.layers)
    return replace(cache, layers=layers, strategy=Sharded(cache.strategy, mesh))
