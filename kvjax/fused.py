"""Layers whose products are one kernel each, from a layer's attention to the next one's: a decode step on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import dispatch
from kernels.layer_attention import Cached
from kernels.layer_products import MOST_ROWS, Weights, layer_products, layer_step, refusal, step_refusal
from kvjax.block import Block, Norm, attended
from kvjax.cache.base import Attends, Cache
from kvjax.cache.dense import DenseLayer
from kvjax.cache.ring import RingLayer
from kvjax.config import ModelConfig
from kvjax.product import product
from kvjax.rope import angles

if TYPE_CHECKING:
    from kvjax.model import Transformer

Params = Any

WHOLE = (DenseLayer, RingLayer)
"""Layers whose attention the kernel does as they do; a layer made from one of them may not."""


def fusible(blocks: list[Block], params: Params, x: Float[Array, "batch width hidden"]) -> bool:
    """Whether the kernel runs these layers, and the head, on the device at hand. One warning says why it does not."""
    if not _asked(blocks[0], x):
        return False
    if why := _refusal(blocks[0], params, x):
        dispatch.warn("a layer's products are", why)
    return not why


def fused(
    blocks: list[Block],
    params: Params,
    x: Float[Array, "batch width hidden"],
    positions: Int[Array, "batch width"],
    valid: Bool[Array, "batch width"],
    layers: list[Attends | None],
) -> tuple[list[Float[Array, "batch width hidden"]], Float[Array, "batch width vocab"], list[Attends | None]]:
    """What each layer gives, the head's product with the last of it, normed, and the layers' caches."""
    first = params["layers"][0]
    qkv = product(_normed(blocks[0].config, first["attention_norm"], x), first["qkv"]["kernel"].astype(x.dtype))
    states, kept = [], []
    for block, own, weights, layer in zip(blocks, params["layers"], _weights(params), layers, strict=True):
        x, qkv, layer = _layer(block, own, weights, qkv, x, positions, valid, layer)
        states.append(x)
        kept.append(layer)
    return states, qkv, kept


def wholly_fused(model: Transformer, params: Params, cache: Cache) -> tuple[bool, ...]:
    """Of each layer, whether a decode step's attention to it is part of its kernel, on the device at hand.

    Args:
        params, cache: or the shapes of their arrays.
    """
    c, batch, dtype = model.config, cache.batch, model.precision.compute
    x, at, valid = (
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((batch, 1, c.hidden), dtype), ((batch, 1), "int32"), ((batch, 1), "bool"))
    )
    blocks = [Block(c, model.precision, window, model.accelerate, parent=None) for window in c.windows]
    if not _asked(blocks[0], x) or _refusal(blocks[0], params, x):
        return (False,) * c.layers
    opened = jax.eval_shape(lambda cache: cache.opened(jnp.ones(batch, jnp.int32))[0], cache)
    qkv = jax.ShapeDtypeStruct((batch, (c.heads + 2 * c.kv_heads) * c.head_dim), dtype)
    rows = jax.ShapeDtypeStruct((batch, c.hidden), dtype)

    def whole(block: Block, weights: Weights, layer: Attends) -> bool:
        cached = jax.eval_shape(lambda *args: _placed(block, *args)[1], layer, at, valid)
        return cached is not None and not step_refusal(qkv, rows, cached, weights)

    return tuple(whole(*each) for each in zip(blocks, _weights(params), opened.layers, strict=True))


@partial(jax.jit, static_argnames="block")
def _layer(block: Block, own: Params, weights: Weights, qkv, x, positions, valid, layer):
    """From a layer's queries, keys and values to the next layer's, or to the head's product."""
    c = block.config
    norms = (partial(_normed, c, own["q_norm"]), partial(_normed, c, own["k_norm"])) if c.qk_norm else None
    if c.qkv_bias:
        qkv = qkv + own["qkv"]["bias"].astype(qkv.dtype)[None, None]
    place, cached = _placed(block, layer, positions, valid)
    if cached is not None and not step_refusal(qkv[:, 0], x[:, 0], cached, weights):
        *results, k, v = layer_step(qkv[:, 0], x[:, 0], cached, weights, place.mask, eps=c.norm_eps)
        layer = replace(place.after, k=k, v=v)
    else:
        out, layer = attended(block, qkv, positions, valid, layer, None, norms)
        rows = [y.reshape(-1, y.shape[-1]) for y in (out, x)]
        results = layer_products(*rows, weights, eps=c.norm_eps)
    return *(y.reshape(*x.shape[:2], -1) for y in results), layer


def _placed(block: Block, layer: Attends | None, positions, valid) -> tuple[Any, Cached | None]:
    """Where a new token goes and what it meets, if attention to that may be part of the layer's kernel."""
    c, asked = block.config, block.accelerate
    turned = c.rope is not None and c.rope.rotary_dim in (None, c.head_dim) and not c.qk_norm
    if not isinstance(layer, DenseLayer | RingLayer) or type(layer) not in WHOLE or not turned:
        return None, None
    if positions.shape[1] != 1 or asked.attention == "xla" or asked.layers == "products":
        return None, None
    place = layer.place(positions, valid, block.mask)
    cos, sin = (part[:, 0] for part in angles(positions, c.rope, c.head_dim))
    return place, Cached(layer.k, layer.v, place.slots, place.to, positions[:, 0], cos, sin)


def _normed(c: ModelConfig, own: Params, x: Array) -> Array:
    return cast("Array", Norm(c).apply({"params": own}, x))


def _weights(params: Params) -> list[Weights]:
    """What each layer multiplies by, from its attention on."""
    layers = params["layers"]
    after = [(each["attention_norm"]["scale"], each["qkv"]["kernel"]) for each in layers[1:]]
    after.append((params["norm"]["scale"], params.get("head", params["embed"])))
    return [
        Weights(
            own["out"]["kernel"], own["mlp_norm"]["scale"], own["gate_up"]["kernel"], own["down"]["kernel"], *following
        )
        for own, following in zip(layers, after, strict=True)
    ]


def _asked(block: Block, x) -> bool:
    """Whether these might be for the kernel at all."""
    asked = block.accelerate
    few = x.shape[0] * x.shape[1] <= MOST_ROWS
    return few and asked.layers != "xla" and asked.mesh is None and dispatch.hopper()


def _refusal(block: Block, params: Params, x) -> str | None:
    """Why the kernel does not take a model, or rows like `x`; None if it does."""
    if why := _other(block.config):
        return why
    rows = jax.ShapeDtypeStruct((x.shape[0] * x.shape[1], x.shape[2]), x.dtype)
    for weights in _weights(params):
        out = jax.ShapeDtypeStruct((rows.shape[0], weights.out.shape[1]), x.dtype)
        if why := refusal(out, rows, weights):
            return why
    return None


def _other(c: ModelConfig) -> str | None:
    """What a model has that the kernel does not."""
    if c.norm != "rms" or not c.gated or c.activation != "silu":
        return f"expected RMSNorm and SwiGLU, got {c.norm} norm and {c.activation}{', gated' if c.gated else ''}"
    if c.post_norms or c.out_bias or c.mlp_bias:
        return "expected no norm and no bias after a layer's products"
    return None
