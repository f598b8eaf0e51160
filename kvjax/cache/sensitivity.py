"""Measure what each layer's keys and values lose by how many bits, and choose bits within a byte budget.

The cost of a choice is the mean KL divergence of the next-token distribution from the full cache's, with that one
buffer coded and all else in full; costs of different buffers are taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache.allocation import SOLVERS, AllocationProblem
from kvjax.cache.attention import Mask
from kvjax.cache.base import Cache, nbytes
from kvjax.cache.dense import Dense, DenseLayer
from kvjax.cache.packing import PLANES
from kvjax.cache.quantized import Quantized, QuantizedLayer
from kvjax.divergence import divergence

if TYPE_CHECKING:
    from kvjax.model import Params, Transformer

Tokens = Int[Array, "batch width"] | Int[np.ndarray, "batch width"]


def allocate_bits(
    model: Transformer,
    params: Params,
    sample: Tokens,
    bytes: int,
    *,
    capacity: int,
    strategy: Quantized | None = None,
    solver: str = "exact",
    progress: Callable[[float], None] | None = None,
) -> Quantized:
    """`strategy` with bits for each layer's keys and values that lose least within `bytes`.

    Args:
        sample: text of the kind that will be decoded, as for `bit_problem`, which see.
        bytes: that a row's cache may take, everything counted, as `nbytes` of it does.
        capacity: tokens a row.
        strategy: all but its bits: forms, groups, what stays in full; `Quantized()` if None.
        solver: a name in `kvjax.cache.allocation.SOLVERS`.
    Raises:
        ValueError: as `bit_problem` does, or for a solver that does not exist.
    """
    if solver not in SOLVERS:
        raise ValueError(f"allocate_bits: `solver` must be one of {', '.join(SOLVERS)}, got {solver!r}")
    strategy = Quantized() if strategy is None else strategy
    problem = bit_problem(model, params, sample, bytes, capacity=capacity, strategy=strategy, progress=progress)
    return with_bits(strategy, problem, SOLVERS[solver](problem))


def with_bits(strategy: Quantized, problem: AllocationProblem, choice: Int[np.ndarray, "groups"]) -> Quantized:
    """`strategy` with the bits that a solver chose for `bit_problem`'s groups."""
    bits = [problem.options[option] for option in choice]
    return replace(strategy, bits=tuple(bits[::2]), value_bits=tuple(bits[1::2]))


def bit_problem(
    model: Transformer,
    params: Params,
    sample: Tokens,
    bytes: int,
    *,
    capacity: int,
    strategy: Quantized | None = None,
    options: tuple[int, ...] = tuple(sorted(PLANES)),
    progress: Callable[[float], None] | None = None,
) -> AllocationProblem:
    """The problem that `allocate_bits` solves: groups are `layer 0 keys`, `layer 0 values`, `layer 1 keys`, ….

    The first half of `sample` is taken in and coded, the second half scored. That is one forward pass of the second
    half for every layer, kind and number of bits.

    Args:
        sample: token ids, rows of one width; longer rows and more of them measure better.
        strategy: as for `allocate_bits`.
        progress: told the share of the work that is behind, 0 to 1.
    Raises:
        ValueError: for a sample that is no rows of the model's tokens or half of which fills no group, a strategy
            that is not `Quantized`, or fewer `bytes` than the least bits need.
    """
    strategy = Quantized() if strategy is None else strategy
    if not isinstance(strategy, Quantized):
        raise ValueError(f"bit_problem: `strategy` must be Quantized, whose bits are chosen, got {strategy}")
    sample = _ids(sample, model.config.vocab)
    half = sample.shape[1] // 2
    shapes = {
        bits: replace(strategy, bits=bits, value_bits=bits).shapes(model, batch=1, capacity=capacity)
        for bits in options
    }
    layers = {bits: [_coded(layer, capacity) for layer in cache.layers] for bits, cache in shapes.items()}
    if half < strategy.sinks + strategy.residual + strategy.group:
        raise ValueError(
            f"bit_problem: `sample` must be at least {2 * (strategy.sinks + strategy.residual + strategy.group)} "
            f"tokens wide, so that half of it fills a group, got {sample.shape[1]}"
        )
    full, reference = _start(model, params, sample[:, :half], sample[:, half:])
    room = {
        bits: replace(strategy, bits=bits, value_bits=bits, dtype=None).init(
            model, batch=sample.shape[0], capacity=max(capacity, half)
        )
        for bits in options
    }
    groups, cost, size = [], [], []
    total = model.config.layers * 2 * len(options)
    for index in range(model.config.layers):
        coarse = {bits: _coarse(room[bits].layers[index], full.layers[index], half) for bits in options}
        for kind, name in (("k", "keys"), ("v", "values")):
            groups.append(f"layer {index} {name}")
            costs, sizes = [], []
            for bits in options:
                layer = layers[bits][index]
                changed = replace(full.layers[index], **{kind: coarse[bits][kind == "v"]})
                cache = replace(full, layers=(*full.layers[:index], changed, *full.layers[index + 1 :]))
                costs.append(float(_divergence(model, params, cache, sample[:, half:], reference)))
                sizes.append(nbytes((getattr(layer, f"{kind}_codes"), getattr(layer, f"{kind}_scales"))))
                if progress is not None:
                    progress((len(cost) * len(options) + len(costs)) / total)
            cost.append(costs)
            size.append(sizes)
    rest = nbytes(shapes[options[0]]) - sum(sizes[0] for sizes in size)
    least = rest + sum(min(sizes) for sizes in size)
    if bytes < least:
        raise ValueError(f"bit_problem: `bytes` must be at least {least}, what {min(options)} bits need, got {bytes}")
    return AllocationProblem(tuple(groups), options, np.array(cost), np.array(size), bytes - rest)


def _ids(sample: Tokens, vocab: int) -> Int[Array, "batch width"]:
    ids = np.asarray(sample)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError(f"bit_problem: `sample` must be token ids [rows, width], got {ids.dtype} {ids.shape}")
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(f"bit_problem: `sample` must be token ids in [0, {vocab}), got {ids.min()} to {ids.max()}")
    return jnp.asarray(ids, jnp.int32)


def _coded(layer: Any, capacity: int) -> QuantizedLayer:
    if not isinstance(layer, QuantizedLayer):
        raise ValueError(
            f"bit_problem: `capacity` must leave something to code after what stays in full, got {capacity}"
        )
    return layer


@partial(jax.jit, static_argnames="model")
def _start(model, params, context, rest) -> tuple[Cache, Float[Array, "batch rest vocab"]]:
    """The full cache of the context, with room for the rest, and the logits that follow each token of the rest."""
    cache = Dense().init(model, batch=context.shape[0], capacity=context.shape[1] + rest.shape[1])
    _, cache = model.apply({"params": params}, context, None, cache, last=True)
    logits, _ = model.apply({"params": params}, rest, None, cache)
    return cast(Cache, cache), logits


@partial(jax.jit, static_argnames="count")
def _coarse(empty: QuantizedLayer, full: DenseLayer, count: int) -> tuple[Array, Array]:
    """The buffers of `full` with what is left of its first `count` tokens in a layer that coded them."""
    batch, slots = full.length.shape[0], full.limit
    length = jnp.full(batch, count)
    layer = empty.take(full.k[:, :count], full.v[:, :count], full.held(length)[:, :count], Mask(1.0), full)
    held = layer.held(length)
    to = jnp.where(held < 0, slots, held)

    def put(x: Float[Array, "rows slots dim"], new: Float[Array, "rows held dim"]) -> Float[Array, "rows slots dim"]:
        rows = jax.vmap(lambda x, new, to: x.at[:, to].set(new, mode="drop"))
        x, new = (y.reshape(batch, -1, *y.shape[1:]) for y in (x, new))
        return rows(x, new, to).reshape(full.k.shape)

    k, v = layer.tokens()
    return put(full.k, k), put(full.v, v)


@partial(jax.jit, static_argnames="model")
def _divergence(model, params, cache: Cache, tokens, reference) -> Float[Array, ""]:
    logits, _ = model.apply({"params": params}, tokens, None, cache)
    return divergence(reference, logits).mean()
