"""The work of a whole model's step, whatever its cache: weights and what is kept are read once, no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kvjax.accelerate.roofline import Work, prefill_attention
from kvjax.cache.base import Cache, Strategy, nbytes

if TYPE_CHECKING:
    from kvjax.model import Transformer

TABLES = ("embed", "positions")
"""Parameters of which a token needs a row; a tied head reads the first as a whole."""


def decode_step(model: Transformer, strategy: Strategy, *, batch: int, context: int) -> Work:
    """A token of each of `batch` rows, when `context` tokens with it are taken in.

    Between the layers nothing is written: a step that does is further from its bound. Of a cache in codes the codes
    are read, of one that evicts what it has room for, and of a layer with a sliding window the tokens inside.
    """
    c = model.config
    cache = strategy.shapes(model, batch=batch, capacity=context)
    read, flops = nbytes(cache.shared), _kernel_flops(model, batch, batch)
    for window, layer, slots in zip(c.windows, cache.layers, _slots(cache), strict=True):
        seen = slots if window is None else min(slots, window)
        read += nbytes(layer) * seen // slots
        flops += 4 * batch * c.heads * seen * c.head_dim
    written = nbytes(cache.layers) // context
    return Work(flops, _weights(model, batch) + read + written + _logits(model, batch), model.precision.compute)


def prefill(model: Transformer, strategy: Strategy, *, batch: int, width: int) -> Work:
    """A prompt of `width` tokens in each of `batch` rows of an empty cache, and what follows its last."""
    c = model.config
    cache = strategy.shapes(model, batch=batch, capacity=width)
    flops = _kernel_flops(model, batch * width, batch)
    for window in c.windows:
        flops += prefill_attention(
            batch, width, heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, window=window
        ).flops
    moved = _weights(model, batch * width) + nbytes((cache.layers, cache.shared)) + _logits(model, batch)
    return Work(flops, moved, model.precision.compute)


def _params(model: Transformer) -> Any:
    from kvjax.model import param_shapes

    return param_shapes(model)


def _kernel_flops(model: Transformer, tokens: int, scored: int) -> int:
    """Of products with kernels: every layer's for `tokens`, the head for `scored` of them."""
    kernels = sum(x.size for x in jax.tree.leaves(_params(model)["layers"]) if len(x.shape) == 2)
    return 2 * tokens * kernels + 2 * scored * model.config.vocab * model.config.hidden


def _weights(model: Transformer, tokens: int) -> int:
    """Bytes of weights that `tokens` need: all, but of tables that are nothing else a row for each."""
    params = dict(_params(model))
    rows = 0
    for name in TABLES:
        if name in params and not (name == "embed" and model.config.tied):
            table = params.pop(name)
            rows += min(tokens, table.shape[0]) * table.shape[1] * table.dtype.itemsize
    return nbytes(params) + rows


def _logits(model: Transformer, rows: int) -> int:
    return rows * model.config.vocab * jnp.dtype(model.precision.logits).itemsize


def _slots(cache: Cache) -> list[int]:
    """How many tokens each layer has room for."""

    def held(cache: Cache):
        layers = cache.opened(jnp.zeros(cache.batch, jnp.int32))[0].layers
        return [layer.held(cache.length) for layer in layers]

    return [x.shape[-1] for x in jax.eval_shape(held, cache)]
