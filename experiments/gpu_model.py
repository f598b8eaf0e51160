"""A whole model's decode step on a GPU, weights drawn at random: ours and what one would write in plain JAX.

All steps of a turn are one compiled loop, as `generate` has it; the engines take turns. The ceiling is the time to read
the weights that a step needs, and the keys and values of the context, at the fastest speed that this device reads at.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from experiments.gpu_timing import parse_work, require_gpu
from experiments.registry import Progress, Row
from kvjax.accelerate import rates

SHAPES = {
    "llama-3.1-8b": {
        "vocab": 128_256,
        "hidden": 4096,
        "intermediate": 14_336,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "max_positions": 131_072,
        "tied": False,
        "layers": 32,
    },
    "smollm2-135m": {
        "vocab": 49_152,
        "hidden": 576,
        "intermediate": 1536,
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "max_positions": 8192,
        "tied": True,
        "layers": 30,
    },
}
"""Fields of `ModelConfig`, and how many layers."""


@dataclass(frozen=True)
class Config:
    """The fields of `gpu_model.yaml`.

    Args:
        models: names of `SHAPES`.
        engines: names of `ENGINES`.
        works: `BATCHxCONTEXT`: rows, and tokens each has in the cache before the first step.
        weights: dtype of weights, activations, keys and values.
        steps: of a turn, one compiled loop.
        turns: in which the engines follow each other, after two that warm up.
    """

    models: tuple[str, ...]
    engines: tuple[str, ...]
    works: tuple[str, ...]
    weights: str = "bfloat16"
    steps: int = 64
    turns: int = 7

    def __post_init__(self):
        for field, known in (("models", SHAPES), ("engines", ENGINES)):
            if unknown := [name for name in getattr(self, field) if name not in known]:
                raise ValueError(f"gpu_model: `{field}` must be among {', '.join(known)}, got {unknown}")
        for work in self.works:
            parse_work("gpu_model", work)
        for name in ("steps", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"gpu_model: `{name}` must be at least 1, got {getattr(self, name)}")


def run(config: Config, progress: Progress) -> list[Row]:
    """A row for each model, work and engine."""
    require_gpu("gpu_model")
    bandwidth = rates.bandwidth("read", "gpu")
    rows: list[Row] = []
    for i, name in enumerate(config.models):
        model = shaped(name, config.weights)
        params = drawn(model)
        for j, work in enumerate(config.works):
            progress(f"{name}, {work}", (i + j / len(config.works)) / len(config.models))
            rows += measured(config, name, model, params, *parse_work("gpu_model", work), bandwidth)
    return rows


def shaped(name: str, dtype: str):
    """A model of a shape of `SHAPES`."""
    from kvjax import ModelConfig, Precision, Transformer

    sizes: dict[str, Any] = dict(SHAPES[name])
    layers = sizes.pop("layers")
    return Transformer(ModelConfig("llama", windows=(None,) * layers, **sizes), Precision(dtype, dtype, dtype))


def drawn(model) -> Any:
    """Parameters: small random kernels, norms of one; drawn array by array, for all at once would not fit."""
    from kvjax import param_shapes

    leaves, tree = jax.tree.flatten(param_shapes(model))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = jax.jit(
        lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype), static_argnums=(1, 2)
    )
    return jax.tree.unflatten(
        tree,
        [
            jnp.ones(leaf.shape, leaf.dtype) if len(leaf.shape) == 1 else draw(key, leaf.shape, leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ],
    )


def measured(config: Config, name: str, model, params, batch: int, context: int, bandwidth: float) -> list[Row]:
    """A row for each engine, at one batch and context."""
    capacity = context + config.steps
    capacity += -capacity % 64
    tokens = jnp.arange(batch, dtype=jnp.int32) + 5
    ready = {}
    for engine in config.engines:
        cache, step = ENGINES[engine](model, batch, capacity, context)
        loop = jax.jit(partial(greedy_steps, step, config.steps), donate_argnums=1)
        loop = loop.lower(params, cache, tokens).compile()
        for _ in range(2):  # in the second call XLA makes its graphs
            cache, token = loop(params, cache, tokens)
        ready[engine] = [loop, jax.block_until_ready(cache)]
    times: dict[str, list[float]] = {engine: [] for engine in ready}
    for _ in range(config.turns):
        for engine, state in ready.items():
            loop, cache = state
            start = time.perf_counter()
            state[1], token = loop(params, cache, tokens)
            jax.block_until_ready(token)
            times[engine].append((time.perf_counter() - start) / config.steps)
    size = needed(model, params, batch, context)
    return [
        {
            "engine": engine,
            "model": name,
            "weights": config.weights,
            "cache": config.weights,
            "batch": batch,
            "context": context,
            "ms": 1e3 * median(seconds),
            "share_of_ceiling": size / bandwidth / median(seconds),
            "tokens_per_s": batch / median(seconds),
            "range": [1e3 * min(seconds), 1e3 * max(seconds)],
            "ceiling_GB_s": bandwidth / 1e9,
        }
        for engine, seconds in times.items()
    ]


def needed(model, params, batch: int, context: int) -> int:
    """Bytes that a step must read: weights but for a table of embeddings beside the head, and keys and values."""
    c = model.config
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    table = 0 if c.tied else params["embed"].nbytes
    kept = 2 * batch * context * c.layers * c.kv_heads * c.head_dim * jnp.dtype(model.precision.cache).itemsize
    return weights - table + kept


def greedy_steps(step: Callable, count: int, params, cache, tokens):
    """Greedy steps from the same place each time; the length is set back at the end, so that turns do the same work."""
    length = cache.length

    def body(_, carry):
        cache, token = carry
        logits, cache = step(params, cache, token)
        return cache, logits.argmax(-1).astype(jnp.int32)

    cache, token = jax.lax.fori_loop(0, count, body, (cache, tokens))
    return replace(cache, length=length), token


def _kvjax(accelerate: Any):
    def engine(model, batch: int, capacity: int, context: int):
        from kvjax import Acceleration
        from kvjax.cache import Dense
        from kvjax.model import cached

        model = model.clone(accelerate=Acceleration(**accelerate))
        cache = Dense().init(model, batch=batch, capacity=capacity)
        keys = jax.random.split(jax.random.key(1), 2 * len(cache.layers))
        layers = tuple(
            replace(
                layer,
                k=jax.random.normal(keys[2 * i], layer.k.shape, layer.k.dtype),
                v=jax.random.normal(keys[2 * i + 1], layer.v.shape, layer.v.dtype),
                length=jnp.full(batch, context, jnp.int32),
            )
            for i, layer in enumerate(cache.layers)
        )
        cache = replace(cache, layers=layers, length=jnp.full(batch, context, jnp.int32))
        return cache, lambda params, cache, token: cached(model, params, token[:, None], None, cache)

    return engine


def _plain(model, batch: int, capacity: int, context: int):
    """Layers one after the other, `[batch, kv_heads, capacity, head_dim]` buffers, one length for all rows."""
    from kvjax.pytree import pytree

    c, dtype = model.config, jnp.dtype(model.precision.compute)

    @pytree
    class Buffers:
        layers: tuple[tuple[jax.Array, ...], ...]
        length: jax.Array

    def norm(x, scale):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + c.norm_eps) * scale[None]).astype(dtype)

    def turned(x, at):
        half = c.head_dim // 2
        angle = at.astype(jnp.float32) * c.rope.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
        cos, sin = jnp.cos(angle)[None, None], jnp.sin(angle)[None, None]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(dtype)

    def attend(x, kernels, pair, at):
        qkv = x @ kernels["qkv"]["kernel"].T
        q, k, v = jnp.split(qkv.reshape(batch, -1, c.head_dim), (c.heads, c.heads + c.kv_heads), axis=1)
        new = turned(k, at), v
        pair = tuple(
            jax.lax.dynamic_update_slice(old, x[:, :, None], (0, 0, at, 0)) for old, x in zip(pair, new, strict=True)
        )
        q = turned(q, at).reshape(batch, c.kv_heads, -1, c.head_dim)
        logits = jnp.einsum("bhgd,bhtd->bhgt", q, pair[0], preferred_element_type=jnp.float32) * c.head_dim**-0.5
        seen = (jnp.arange(capacity) <= at)[None, None, None]
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1).astype(dtype)
        out = jnp.einsum("bhgt,bhtd->bhgd", weights, pair[1]).reshape(batch, -1)
        return out @ kernels["out"]["kernel"].T, pair

    def step(params, cache, token):
        layers = []
        x = params["embed"][token]
        for kernels, pair in zip(params["layers"], cache.layers, strict=True):
            out, pair = attend(norm(x, kernels["attention_norm"]["scale"]), kernels, pair, cache.length)
            layers.append(pair)
            x = x + out
            gate, up = jnp.split(norm(x, kernels["mlp_norm"]["scale"]) @ kernels["gate_up"]["kernel"].T, 2, -1)
            x = x + (jax.nn.silu(gate) * up) @ kernels["down"]["kernel"].T
        head = params["embed"] if c.tied else params["head"]
        logits = norm(x, params["norm"]["scale"]) @ head.T
        return logits, Buffers(tuple(layers), cache.length + 1)

    shape = (batch, c.kv_heads, capacity, c.head_dim)
    keys = jax.random.split(jax.random.key(1), 2 * c.layers)
    pairs = [tuple(jax.random.normal(keys[2 * i + j], shape, dtype) for j in range(2)) for i in range(c.layers)]
    return Buffers(tuple(pairs), jnp.int32(context)), step


ENGINES: dict[str, Callable] = {
    "kvjax": _kvjax({}),
    "kvjax, attention apart": _kvjax({"layers": "products"}),
    "kvjax, products by XLA": _kvjax({"layers": "xla"}),
    "kvjax, XLA alone": _kvjax({"attention": "xla", "layers": "xla"}),
    "plain JAX": _plain,
}
"""From a model, batch, capacity and context to a filled cache and a step."""
