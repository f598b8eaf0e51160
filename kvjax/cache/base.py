"""What every cache is: a strategy (settings) that makes a `Cache` (a pytree of layers)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import Mask
from kvjax.config import ModelConfig, Rope, differing
from kvjax.pytree import pytree, static

if TYPE_CHECKING:
    from kvjax.model import Transformer


@runtime_checkable
class Attends(Protocol):
    """What the model asks of a layer's cache."""

    def attend(
        self,
        q: Float[Array, "batch width heads head_dim"],
        k: Float[Array, "batch width kv_heads head_dim"],
        v: Float[Array, "batch width kv_heads head_dim"],
        positions: Int[Array, "batch width"],
        valid: Bool[Array, "batch width"],
        mask: Mask,
    ) -> tuple[Float[Array, "batch width heads head_dim"], Float[Array, "batch width heads"], Attends]:
        """Take in new tokens and attend their queries to all that is kept, themselves included.

        Only tokens with `valid` are kept; `positions` of a row are consecutive. Returns `out`, the
        log-sum-exp of each query's logits in float32 nats, and the layer that holds the new tokens.
        """
        ...


@runtime_checkable
class LayerCache(Attends, Protocol):
    """One layer's keys and values, however they are stored. A pytree; every method returns a new one."""

    @property
    def limit(self) -> int | None:
        """Tokens a row can hold, or None if older ones make room."""

    def look(
        self, q: Float[Array, "batch width heads head_dim"], positions: Int[Array, "batch width"], mask: Mask
    ) -> tuple[Float[Array, "batch width heads head_dim"], Float[Array, "batch width heads"]]:
        """Attend queries to all that is kept, and take nothing in: `attend`'s first two results."""
        ...

    def ahead(
        self,
        q: Float[Array, "batch width heads head_dim"],
        k: Float[Array, "batch width kv_heads head_dim"],
        v: Float[Array, "batch width kv_heads head_dim"],
        positions: Int[Array, "batch width"],
        valid: Bool[Array, "batch width"],
        mask: Mask,
        path: Int[Array, "batch width width"] | None = None,
    ) -> tuple[Float[Array, "batch width heads head_dim"], Float[Array, "batch width heads"]]:
        """`attend`'s first two results, had the tokens come one at a time; nothing is taken in.

        With `path`, token `j` comes after those that `path[:, j]` names, itself the last before the -1s, and no other.
        The cache is open, as for `look`. Holds for as many tokens as `steady` says.
        """
        ...

    def steady(self) -> Int[Array, "batch"] | None:
        """Tokens that `ahead` is right about, and that `attend` takes in as if one by one; None for any number."""
        ...

    @property
    def by_token(self) -> bool:
        """Whether `attend` must take in tokens one at a time to keep what it would keep of each."""
        ...

    def held(self, length: Int[Array, "batch"]) -> Int[Array, "rows slots"]:
        """The position that each slot holds when rows have taken in `length` tokens, -1 where none.

        One row a batch row, or one a K/V head of each (`rows = batch * kv_heads`). The cache is open, as for `look`.
        """
        ...

    def fork(self, rows: Int[Array, "new_batch"]) -> LayerCache:
        """The layer whose row `i` is this one's row `rows[i]`."""
        ...

    @property
    def assured(self) -> tuple[int | None, int]:
        """How many of a row's newest tokens, None for all, and of its first ones are held whatever they are."""

    def tokens(self) -> tuple[Float[Array, "rows slots head_dim"], Float[Array, "rows slots head_dim"]]:
        """Keys and values in the slots that `held` speaks of, a row a K/V head. The cache is open, as for `look`."""
        ...

    def take(
        self,
        k: Float[Array, "rows tokens head_dim"],
        v: Float[Array, "rows tokens head_dim"],
        positions: Int[Array, "some_rows tokens"],
        mask: Mask,
        old: LayerCache,
    ) -> LayerCache:
        """This layer, an empty one, with what it keeps of tokens that come in any order; their queries are gone.

        Args:
            positions: as `held` says them: -1 where there is no token, a row a batch row or a K/V head.
            mask: the model's for this layer, of which only the window counts.
            old: the layer that they were in, for what it has learnt of them. It holds all that this one is `assured`.
        Raises:
            ValueError: while tracing, if such a layer cannot be filled from `old`.
        """
        ...


@dataclass(frozen=True)
class LayerSpec:
    """What one layer's cache is made for: its sizes, its place among the model's `layers`, its rotary embedding.

    `capacity` is in tokens a row, `group` the query heads that share a K/V head.
    """

    batch: int
    capacity: int
    kv_heads: int
    head_dim: int
    window: int | None
    dtype: str
    group: int = 1
    index: int = 0
    layers: int = 1
    rope: Rope | None = None

    def zeros(self, slots: int) -> Float[Array, "rows slots head_dim"]:
        return jnp.zeros((self.batch * self.kv_heads, slots, self.head_dim), self.dtype)


def layer_spec(config: ModelConfig, index: int, batch: int, capacity: int, dtype: str) -> LayerSpec:
    """What a cache of `batch` rows and `capacity` tokens needs for the model's layer `index`."""
    c = config
    group, window = c.heads // c.kv_heads, c.windows[index]
    return LayerSpec(batch, capacity, c.kv_heads, c.head_dim, window, dtype, group, index, c.layers, c.rope)


@pytree
class Cache:
    """Keys and values of a batch of sequences, as a pytree that goes through jitted functions.

    `length` counts the tokens each row has taken in, which is also its next position.
    `config` and `strategy` are static: they say which model it serves and how it was made.
    `shared` is what the layers have in common, such as a page table; most strategies need nothing there.
    """

    layers: tuple[Any, ...]
    length: Int[Array, "batch"]
    config: ModelConfig = static()
    strategy: Strategy = static()
    shared: Any = None

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    @property
    def capacity(self) -> int | None:
        """Tokens a row can take in, or None if there is no bound."""
        limits = [layer.limit for layer in self.layers if layer.limit is not None]
        if self.config.rope is None:
            limits.append(self.config.max_positions)
        return min(limits, default=None)

    def opened(self, lengths: Int[Array, "batch"]) -> tuple[Cache, Bool[Array, "batch"]]:
        """The cache as its layers need it to take in `lengths` tokens a row, and which rows have no room for them."""
        return self.strategy.open(self, lengths)

    def positions(self, width: int) -> Int[Array, "batch width"]:
        """Where `width` new tokens a row will be."""
        return self.strategy.positions(self, width)

    def closed(self, layers: tuple[Any, ...], lengths: Int[Array, "batch"]) -> Cache:
        """An opened cache after its layers took in `lengths` tokens a row."""
        return self.strategy.close(self, layers, lengths)


class Strategy:
    """How keys and values are kept. Subclasses are frozen dataclasses that say how one layer is made."""

    def layer(self, spec: LayerSpec) -> LayerCache:
        raise NotImplementedError(f"{type(self).__name__} must define `layer`")

    def open(self, cache: Cache, lengths: Int[Array, "batch"]) -> tuple[Cache, Bool[Array, "batch"]]:
        """See `Cache.opened`; what layers share is worked out here, once a step."""
        if cache.capacity is None:
            return cache, jnp.zeros(cache.batch, bool)
        return cache, cache.length + lengths > cache.capacity

    def positions(self, cache: Cache, width: int) -> Int[Array, "batch width"]:
        """See `Cache.positions`."""
        return cache.length[:, None] + jnp.arange(width, dtype=jnp.int32)[None]

    def close(self, cache: Cache, layers: tuple[Any, ...], lengths: Int[Array, "batch"]) -> Cache:
        """See `Cache.closed`."""
        return replace(cache, layers=layers, length=cache.length + lengths)

    def fork(self, cache: Cache, rows: Int[Array, "new_batch"]) -> Cache:
        """See `fork`."""
        layers = tuple(layer.fork(rows) for layer in cache.layers)
        return replace(cache, layers=layers, length=jnp.take(cache.length, rows, axis=0, mode="clip"))

    def release(self, cache: Cache, rows: Bool[Array, "batch"]) -> Cache:
        """See `release`."""
        raise ValueError(f"release: the rows of `cache` must be Paged, to have pages to give back, got {self}")

    def need(self, cache: Cache, lengths: np.ndarray) -> str | None:
        """What `lengths` more tokens a row need and do not find, as the end of a sentence; None if they fit.

        On the host, of known values; `open` says it again, inside the program.
        """
        if cache.capacity is None:
            return None
        need = int((np.asarray(cache.length) + lengths).max())
        return (
            None if need <= cache.capacity else f"need {need} slots a row, but the cache's capacity is {cache.capacity}"
        )

    def init(self, model: Transformer, *, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` sequences of up to `capacity` tokens, on the model's mesh if it has one.

        Raises:
            ValueError: if a size is below 1, the model has fewer learned positions than `capacity`, or its mesh cannot
                share such a cache.
        """
        for name, value in (("batch", batch), ("capacity", capacity)):
            if not is_whole(value, 1):
                raise ValueError(
                    f"{type(self).__name__}.init: `{name}` must be at least 1, a whole number, got {value!r}"
                )
        c = model.config
        if c.rope is None and capacity > c.max_positions:
            raise ValueError(
                f"{type(self).__name__}.init: `capacity` must be at most the model's {c.max_positions} "
                f"learned positions, got {capacity}"
            )

        def make() -> Cache:
            specs = (layer_spec(c, index, batch, capacity, model.precision.cache) for index in range(c.layers))
            return Cache(tuple(self.layer(spec) for spec in specs), jnp.zeros(batch, jnp.int32), c, self)

        if model.accelerate.mesh is None:
            return make()
        from kvjax.accelerate.sharded import made_on  # which is made of caches

        return made_on(make, model.accelerate.mesh)

    def shapes(self, model: Transformer, *, batch: int, capacity: int) -> Cache:
        """What `init` would return, as `jax.ShapeDtypeStruct`s: `nbytes` of it costs no memory."""
        return jax.eval_shape(lambda: self.init(model, batch=batch, capacity=capacity))


def nbytes(tree: Any) -> int:
    """Exact bytes of every array in a pytree; shapes without data (`Strategy.shapes`) count the same."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def is_whole(value: Any, least: int) -> bool:
    """Whether `value` is a whole number, and not below `least`."""
    return isinstance(value, (int, np.integer)) and value >= least


def check_dtype(strategy: Strategy, dtype: str | None) -> None:
    """Raise ValueError if `dtype` cannot hold keys and values; None, the model's own, can."""
    try:
        good = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{type(strategy).__name__}: `dtype` must be a floating-point type, got {dtype!r}")


def fork(cache: Cache, rows: Int[Array, "new_batch"]) -> Cache:
    """A cache whose row `i` continues row `rows[i]`: copies for parallel samples, or a new order.

    Source rows may repeat or be left out. Rows outside the batch raise no error inside jit: they are clipped.
    """
    return cache.strategy.fork(cache, jnp.asarray(rows))


def check(cache: Cache, model: Transformer, batch: int | None, where: str, name: str = "cache") -> None:
    """Raise ValueError, while tracing, if `cache` is none, or was made for another model or batch (None: any)."""
    if not isinstance(cache, Cache):
        raise ValueError(f"{where}: `{name}` must be what a strategy's `init` makes, got {type(cache).__name__}")
    if cache.config != model.config:
        raise ValueError(f"{where}: `{name}` was made for another model: {differing(model.config, cache.config)}")
    if batch is not None and cache.batch != batch:
        raise ValueError(f"{where}: `{name}` holds {cache.batch} rows, but the tokens have {batch}")
