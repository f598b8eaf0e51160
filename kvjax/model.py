"""The transformer: one Flax module for every family, cache in and cache out.

Parameters are a plain pytree, `{"embed", "layers": (…), "norm", …}`, with one entry of the tuple a
layer. Kernels are stored `[out, in]`, as checkpoints have them; QKV and gate-up are fused.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from kvjax.block import Block, Norm
from kvjax.cache.base import Attends, Cache
from kvjax.compact import Compact
from kvjax.config import Acceleration, ModelConfig, Precision
from kvjax.fused import fused, fusible
from kvjax.mesh import DATA, HEADS, laid
from kvjax.product import product

Params = Any
"""A pytree of arrays as `init_params` lays it out."""

HIDDEN = "hidden"
"""The Flax collection that holds what is between embedding and head, where a call makes it mutable."""


class Transformer(nn.Module):
    """A decoder-only language model: static and hashable, so it is a static argument of `jit`.

    Call it through `kvjax.forward`, `kvjax.prefill` and `kvjax.decode_step`, or directly:
    `model.apply({"params": params}, tokens, lengths, cache)`.
    """

    config: ModelConfig
    precision: Precision = Precision()
    accelerate: Acceleration = Acceleration()

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch width"],
        lengths: Int[Array, "batch"] | None = None,
        cache: Cache | None = None,
        *,
        last: bool = False,
        places: Compact | None = None,
    ) -> tuple[Float[Array, "rows tokens vocab"] | Float[Array, "batch vocab"], Cache | None]:
        """Score the next token after each position.

        Args:
            tokens: right-padded token ids. An id outside the vocabulary gives NaN logits for its row.
            lengths: real tokens a row, `0 <= lengths <= width`; all of them if None.
            cache: what came before; the row continues at `cache.length`. None starts at 0 and keeps nothing.
            last: score only each row's last real token, which saves most of the head's work.
            places: `compact(lengths, …)`, to compute nothing but attention for padding; each token needs a place.
        Returns:
            Logits in `precision.logits` (`[batch, vocab]` if `last`, `[1, places, vocab]` with `places`), NaN in a
            row whose cache has no room, which then stays as it is, and the cache holding the new tokens.
        """
        c, p, mesh = self.config, self.precision, self.accelerate.mesh
        batch, width = tokens.shape
        lengths = jnp.full((batch,), width, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        full = jnp.zeros(batch, bool)
        if cache is not None:
            cache, full = cache.opened(lengths)
            lengths = jnp.where(full, 0, lengths)
        tokens, lengths, full = (laid(each, mesh) for each in (tokens, lengths, full))  # as is what follows from them
        offset = jnp.arange(width, dtype=jnp.int32)[None]
        positions = jnp.tile(offset, (batch, 1)) if cache is None else cache.positions(width)
        positions, valid = laid(positions, mesh), laid(offset < lengths[:, None], mesh)

        embed = self.param("embed", nn.initializers.normal(0.02), (c.vocab, c.hidden), p.params)
        if places is not None:
            tokens = places.gathered(tokens)
        x = jnp.take(embed, jnp.where(tokens < 0, c.vocab, tokens), axis=0).astype(p.compute)  # NaN past the table
        if c.embed_scale != 1.0:
            x = x * jnp.asarray(c.embed_scale, p.compute)
        if c.rope is None:
            shape = (c.max_positions, c.hidden)
            table = self.param("positions", nn.initializers.normal(0.02), shape, p.params)
            at = positions if places is None else places.gathered(positions)
            x = x + jnp.take(table, at, axis=0, mode="clip").astype(p.compute)
        x = laid(x, mesh, DATA)

        blocks = [Block(c, p, window, self.accelerate, parent=None) for window in c.windows]
        layers: list[Attends | None] = [None] * c.layers if cache is None else list(cache.layers)
        scored = None
        if places is None and not self.is_initializing() and fusible(blocks, self.variables["params"], x):
            states, scored, layers = fused(blocks, self.variables["params"], x, positions, valid, layers)
        else:
            params = self.get_variable("params", "layers")  # `self.param` would trace every layer's initializer again
            if params is None:
                params = self.param("layers", _init_layers, blocks, x.shape, x.dtype)
            states = []
            for i, block in enumerate(blocks):
                x, layers[i] = _apply_block(block, params[i], x, positions, valid, layers[i], places)
                states.append(x)
        for i, x in enumerate(states):
            self.sow(HIDDEN, f"layer_{i}", x)

        if last:
            x = x if places is None else places.spread(x)
            at = jnp.maximum(lengths - 1, 0)[:, None, None]
            x = jnp.take_along_axis(x, at, axis=1)
            scored = None if scored is None else jnp.take_along_axis(scored, at, axis=1)
        x = Norm(c, name="norm")(x)
        self.sow(HIDDEN, "final", x)
        head = embed if c.tied else self.param("head", nn.initializers.normal(0.02), embed.shape, p.params)
        if scored is None:
            scored = laid(product(x, head.astype(p.compute), whole=mesh is not None), mesh, DATA, None, HEADS)
        logits = laid(scored.astype(p.logits), mesh)  # all of them on every device, for what chooses a token
        if c.logit_softcap is not None:
            logits = jnp.tanh(logits / c.logit_softcap) * c.logit_softcap
        if last:
            logits = logits[:, 0]
        if cache is None:
            return logits, None
        if not last:
            full = jnp.broadcast_to(full[:, None], (batch, width))
            full = full if places is None else places.gathered(full)
        return jnp.where(full[..., None], jnp.nan, logits), cache.closed(tuple(layers), lengths)


def cached(
    model: Transformer,
    params: Params,
    tokens: Int[Array, "batch width"],
    lengths: Int[Array, "batch"] | None,
    cache: Cache,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Take in `lengths` tokens a row and score what follows each row's last: the step inside every decoder."""
    out = model.apply({"params": params}, tokens, lengths, cache, last=True)
    return cast("tuple[Array, Cache]", out)


def with_hidden(
    model: Transformer,
    params: Params,
    tokens: Int[Array, "batch width"],
    lengths: Int[Array, "batch"] | None,
    cache: Cache | None,
    *,
    last: bool = False,
    places: Compact | None = None,
) -> tuple[Any, Cache | None, Float[Array, "rows scored hidden"], tuple[Float[Array, "rows tokens hidden"], ...]]:
    """The model's logits and cache, what its head saw, and what each of its layers gave.

    Inside `jit`, what is not used of these costs nothing.
    """
    call = partial(model.apply, {"params": params}, last=last, places=places, mutable=[HIDDEN])
    (logits, cache), kept = call(tokens, lengths, cache)
    hidden = kept[HIDDEN]
    layers = tuple(hidden[f"layer_{i}"][0] for i in range(model.config.layers))
    return logits, cache, hidden["final"][0], layers


@partial(jax.jit, static_argnames="block")
def _apply_block(block: Block, params: Params, x, positions, valid, layer, places):
    """One layer, traced once for all that are alike; XLA still sees every layer unrolled."""
    return cast("tuple[Array, Attends | None]", block.apply({"params": params}, x, positions, valid, layer, places))


@partial(jax.jit, static_argnames="model")
def init_params(model: Transformer, key: Key[Array, ""]) -> Params:
    """Random parameters of the model's shape: normal(0, 0.02) kernels, unit norms."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def param_shapes(model: Transformer) -> Params:
    """The tree that `model` takes, as `jax.ShapeDtypeStruct`s; allocates nothing.

    Layers differ only by their windows, so one is traced and repeated.
    """
    one = model.clone(config=replace(model.config, windows=model.config.windows[:1]))
    shapes = jax.eval_shape(partial(init_params, one), jax.random.key(0))
    return shapes | {"layers": shapes["layers"] * model.config.layers}


def _init_layers(key, blocks, shape, dtype):
    """A tuple of layer params; Flax treats whatever an initializer returns as one parameter."""
    x, at = jnp.zeros(shape, dtype), jnp.zeros(shape[:2], jnp.int32)
    keys = jax.random.split(key, len(blocks))
    return tuple(block.init(k, x, at, at == 0, None)["params"] for block, k in zip(blocks, keys, strict=True))
