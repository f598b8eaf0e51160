"""Layers whose products are one kernel each, from a layer's attention to the next one's: a decode step on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
from jaxtyping import Array, Bool, Float, Int

from kernels import dispatch
from kernels.layer_attention import Cached
from kernels.layer_products import MOST_ROWS, Weights, layer_products, layer_step, refusal, step_refusal
from kvjax.block import Block, Norm, attended
from kvjax.cache.base import Attends
from kvjax.cache.placing import Placing
from kvjax.config import ModelConfig
from kvjax.product import product
from kvjax.rope import angles

Params = Any


def fusible(blocks: list[Block], params: Params, x: Float[Array, "batch width hidden"]) -> bool:
    """Whether the kernel runs these layers, and the head, on the device at hand. One warning says why it does not."""
    asked = blocks[0].accelerate
    if asked.layers == "xla" or asked.mesh is not None or x.shape[0] * x.shape[1] > MOST_ROWS or not dispatch.hopper():
        return False
    why = _other(blocks[0].config) or next(filter(None, (_refusal(x, each) for each in _weights(params))), None)
    if why:
        dispatch.warn("a layer's products", why)
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
    qkv = product(_normed(blocks[0].config, first["attention_norm"], x), first["qkv"]["kernel"])
    states, kept = [], []
    for block, own, weights, layer in zip(blocks, params["layers"], _weights(params), layers, strict=True):
        x, qkv, layer = _layer(block, own, weights, qkv, x, positions, valid, layer)
        states.append(x)
        kept.append(layer)
    return states, qkv, kept


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
    c = block.config
    turned = c.rope is not None and c.rope.rotary_dim in (None, c.head_dim) and not c.qk_norm
    one = isinstance(layer, Placing) and positions.shape[1] == 1
    if not (one and turned) or block.accelerate.attention == "xla" or block.accelerate.layers == "products":
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


def _other(c: ModelConfig) -> str | None:
    """What a model has that the kernel does not."""
    if c.norm != "rms" or not c.gated or c.activation != "silu":
        return f"expected RMSNorm and SwiGLU, got {c.norm} norm and {c.activation}{', gated' if c.gated else ''}"
    if c.post_norms or c.out_bias or c.mlp_bias:
        return "expected no norm and no bias after a layer's products"
    return None


def _refusal(x, weights: Weights) -> str | None:
    rows = jax.ShapeDtypeStruct((x.shape[0] * x.shape[1], x.shape[2]), x.dtype)
    out = jax.ShapeDtypeStruct((rows.shape[0], weights.out.shape[1]), x.dtype)
    return refusal(out, rows, weights)
