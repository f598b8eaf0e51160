"""A decode step, and attention over one long context, on more and more devices of one machine.

Weights, keys and values are drawn where they lie, at random. All steps of a turn are one compiled loop, as `generate`
has it; what is compared takes turns. One device runs without a mesh. Shares are of the devices' summed bandwidth, and
count the weights once, even where groups of devices that have different rows each read them.
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

from experiments.gpu_model import SHAPES, greedy_steps, needed, shaped
from experiments.gpu_timing import parse_work
from experiments.registry import Progress, Row
from kvjax.accelerate import rates


@dataclass(frozen=True)
class Config:
    """The fields of `multi_gpu.yaml`.

    Args:
        model: a name of `SHAPES`.
        layouts: `DATAxCONTEXTxHEADS`, devices along each axis. The first is what others are compared with.
        works: `BATCHxCONTEXT`: rows, and tokens each has in the cache before the first step. A layout that cannot share
            the rows is left out.
        contexts: tokens of one row for attention alone, in one layer.
        splits: devices that share such a context. The first is what others are compared with.
        weights: dtype of weights, activations, keys and values.
        steps: of a turn, one compiled loop.
        turns: in which the layouts follow each other, after two that warm up.
    """

    model: str = "llama-3.1-8b"
    layouts: tuple[str, ...] = ("1x1x1",)
    works: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()
    splits: tuple[int, ...] = (1,)
    weights: str = "bfloat16"
    steps: int = 64
    turns: int = 7

    def __post_init__(self):
        if self.model not in SHAPES:
            raise ValueError(f"multi_gpu: `model` must be among {', '.join(SHAPES)}, got {self.model!r}")
        for layout in self.layouts:
            parse_layout(layout)
        for work in self.works:
            parse_work("multi_gpu", work)
        for name in ("layouts", "splits"):
            if not getattr(self, name):
                raise ValueError(f"multi_gpu: `{name}` must name at least one, got none")
        for name in ("steps", "turns", "contexts", "splits"):
            given = getattr(self, name)
            if any(x < 1 for x in (given if isinstance(given, tuple) else (given,))):
                raise ValueError(f"multi_gpu: `{name}` must be at least 1, got {given}")


def parse_layout(text: str):
    """The layout that a config names.

    Raises:
        ValueError: if it is not `DATAxCONTEXTxHEADS`.
    """
    from kvjax.accelerate import Layout

    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"multi_gpu: `layouts` must be DATAxCONTEXTxHEADS, such as 1x1x4, got {text!r}")
    return Layout(*map(int, sizes))


def run(config: Config, progress: Progress) -> list[Row]:
    """A row for each work and layout, then one for each long context and number of devices.

    Raises:
        ValueError: for a layout of more devices than there are.
    """
    from kvjax.accelerate import Layout

    layouts = [parse_layout(layout) for layout in config.layouts]
    splits = [Layout(context=size) for size in config.splits]
    for layout in (*layouts, *splits):
        layout.mesh()
    bandwidth = rates.bandwidth("read", "gpu") if jax.default_backend() == "gpu" else None
    rows: list[Row] = []
    whole = len(config.works) + len(config.contexts)
    for i, work in enumerate(config.works):
        progress(f"decode, {work}", i / whole)
        batch, context = parse_work("multi_gpu", work)
        fitting = [layout for layout in layouts if batch % layout.data == 0]
        ready = partial(decoding, config, batch=batch, context=context)
        rows += measured(config, "decode", batch, context, fitting, ready, bandwidth)
    for i, context in enumerate(config.contexts, len(config.works)):
        progress(f"attention, {context} tokens", i / whole)
        ready = partial(attending, config, context=context)
        rows += measured(config, "attention", 1, context, splits, ready, bandwidth)
    return rows


def on(layout, model):
    """The model on a layout's first devices; without a mesh on one."""
    from kvjax import Acceleration

    return model if layout.devices == 1 else model.clone(accelerate=Acceleration(mesh=layout.mesh()))


def drawn(model) -> Any:
    """Parameters where they lie: small random kernels, norms of one; array by array, for all at once would not fit."""
    from kvjax import param_shapes
    from kvjax.accelerate import param_shardings

    mesh = model.accelerate.mesh
    leaves, tree = jax.tree.flatten(param_shapes(model))
    places = [None] * len(leaves) if mesh is None else jax.tree.leaves(param_shardings(model, mesh))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            random(key, leaf, place, one=len(leaf.shape) == 1)
            for key, leaf, place in zip(keys, leaves, places, strict=True)
        ],
    )


@partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key, shape: tuple[int, ...], dtype: Any, place: Any):
    x = jax.random.normal(key, shape, dtype)
    return x if place is None else jax.lax.with_sharding_constraint(x, place)


def random(key, leaf, place: Any, *, one: bool = False, size: float = 0.02):
    """An array like `leaf`, at a sharding or on the first device: of ones, or normal with this deviation."""
    if one:
        return jax.device_put(jnp.ones(leaf.shape, leaf.dtype), place)
    return _normal(key, leaf.shape, leaf.dtype, place) * jnp.asarray(size, leaf.dtype)


def full(model, batch: int, context: int, room: int) -> Any:
    """A dense cache of `context` random tokens a row, with `room` for more."""
    from kvjax.cache import Dense

    capacity = context + room
    cache = Dense().init(model, batch=batch, capacity=capacity + -capacity % 64)
    leaves, tree = jax.tree.flatten(cache)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    mesh = model.accelerate.mesh
    filled = [
        random(key, x, None if mesh is None else x.sharding, size=1.0)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x + jnp.asarray(context, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, filled)


def decoding(config: Config, layout, batch: int, context: int) -> tuple[Callable, Any, int]:
    """A turn of greedy steps, what goes into it and comes out, and the bytes that a step must read."""
    from kvjax.model import cached

    model = on(layout, shaped(config.model, config.weights))
    params = drawn(model)
    tokens = jnp.arange(batch, dtype=jnp.int32) + 5

    def step(params, cache, token):
        return cached(model, params, token[:, None], None, cache)

    loop = jax.jit(partial(greedy_steps, step, config.steps), donate_argnums=1)
    size = needed(model, params, batch, context)
    return lambda cache: loop(params, cache, tokens), full(model, batch, context, config.steps), size


def attending(config: Config, layout, context: int) -> tuple[Callable, Any, int]:
    """The same of attention alone: one layer takes in a token and attends to all, again and again at one place."""
    from kvjax.cache.attention import Mask

    model = shaped(config.model, config.weights)
    c = model.config
    model = on(layout, model.clone(config=replace(c, windows=c.windows[:1])))
    mask = Mask(c.head_dim**-0.5)

    def turn(cache, q):
        positions, valid = cache.length[:, None], jnp.ones((1, 1), bool)
        new = q[:, :, : c.kv_heads]

        def body(_, carry):
            layer, q = carry
            out, _, layer = layer.attend(q, new, new, positions, valid, mask)
            return layer, q + out  # each waits for the one before

        layer, q = jax.lax.fori_loop(0, config.steps, body, (cache.layers[0], q))
        return replace(cache, layers=(layer,)), q

    loop = jax.jit(turn, donate_argnums=0)
    q = jax.random.normal(jax.random.key(2), (1, 1, c.heads, c.head_dim), model.precision.compute)
    size = 2 * context * c.kv_heads * c.head_dim * jnp.dtype(config.weights).itemsize
    return lambda cache: loop(cache, q), full(model, 1, context, 1), size


def measured(config: Config, what: str, batch: int, context: int, layouts, make: Callable, bandwidth) -> list[Row]:
    """A row for each layout, in turns; `make` gives what `decoding` does of one."""
    loops, caches, sizes = map(list, zip(*(make(layout) for layout in layouts), strict=True))
    times: list[list[float]] = [[] for _ in loops]
    for turn in range(-2, config.turns):
        for i, loop in enumerate(loops):
            start = time.perf_counter()
            caches[i], out = loop(caches[i])
            jax.block_until_ready(out)
            if turn >= 0:
                times[i].append((time.perf_counter() - start) / config.steps)
    one = median(times[0])
    return [
        {
            "what": what,
            "model": config.model,
            "layout": "x".join(map(str, layout.sizes)),
            "devices": layout.devices,
            "batch": batch,
            "context": context,
            "ms": 1e3 * median(seconds),
            "speed_up": one / median(seconds),
            "tokens_per_s": batch / median(seconds),
            "share_of_bandwidth": None if bandwidth is None else size / bandwidth / layout.devices / median(seconds),
            "range": [1e3 * min(seconds), 1e3 * max(seconds)],
            "ceiling_GB_s": None if bandwidth is None else layout.devices * bandwidth / 1e9,
        }
        for layout, seconds, size in zip(layouts, times, sizes, strict=True)
    ]
