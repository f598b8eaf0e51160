"""Take in a prompt, or one token: the two functions that everything else is made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from kvjax.cache.base import Cache, check
from kvjax.model import Params, Transformer, cached

BUCKETS = (16, 32, 64, 128, 256, 512)
"""Widths that prompts are padded to; a longer prompt goes in chunks of the last one."""

Tokens = Int[Array, "batch width"] | Int[np.ndarray, "batch width"] | Sequence[Sequence[int]]

Lengths = Int[Array, "batch"] | Int[np.ndarray, "batch"] | Sequence[int]


def forward(
    model: Transformer,
    params: Params,
    tokens: Int[Array, "batch width"] | Int[np.ndarray, "batch width"],
    lengths: Int[Array, "batch"] | Int[np.ndarray, "batch"] | None = None,
) -> Float[Array, "batch width vocab"]:
    """Logits at every position without a cache: what cached decoding must agree with."""
    return _forward(model, params, tokens, lengths)


def prefill(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens: Tokens,
    lengths: Lengths | None = None,
    *,
    buckets: Sequence[int] = BUCKETS,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Take in a batch of prompts, or what follows what the cache already holds.

    Prompts are cut into chunks of the largest bucket and padded to the smallest that fits, so any length
    costs at most one compile a bucket, and memory does not grow with the prompt but by its cache.

    Args:
        cache: donated: use the returned one.
        tokens: right-padded ids; rows may also be lists of different lengths, if `lengths` is None.
        lengths: real tokens a row, from 1 to the width; all of them if None.
        buckets: chunk widths, ascending.
    Returns:
        Logits of the token after each row's last, and the cache.
    Raises:
        ValueError: for a cache of another model or batch, an empty prompt, lengths outside [1, width], ids
            outside the vocabulary, or more tokens than the cache has room for. Under an outer `jit` values
            are unknown, and only shapes are checked; a row without room then gets NaN logits.
    """
    tokens, lengths = as_batch(tokens, lengths)
    check(cache, model, tokens.shape[0], "prefill")
    check_values(model, cache, tokens, lengths)
    return fill(model, params, cache, tokens, lengths, buckets)


def fill(
    model: Transformer, params: Params, cache: Cache, tokens, lengths, buckets: Sequence[int] = BUCKETS
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """`prefill` of what was checked already."""
    logits = jnp.asarray(np.zeros((tokens.shape[0], model.config.vocab), model.precision.logits))
    width, largest = tokens.shape[1], buckets[-1]
    for start in range(0, width, largest):
        chunk = tokens[:, start : start + largest]
        bucket = next(size for size in buckets if size >= chunk.shape[1])
        if cache.capacity is not None:
            bucket = max(min(bucket, cache.capacity), chunk.shape[1])
        padded = _pad(chunk, bucket)
        here = (lengths - start).clip(0, chunk.shape[1])
        logits, cache = _chunk(model, params, cache, padded, here, logits)
    return logits, cache


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def decode_step(
    model: Transformer, params: Params, cache: Cache, token: Int[Array, "batch"]
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Take in one token a row and score the next.

    Args:
        cache: donated: use the returned one. Inside a `jit` of your own, gradients included, donation is up to it.
    Returns:
        Logits and the cache. A row past the capacity, or fed an id outside the vocabulary, gets NaN logits.
    Raises:
        ValueError: while tracing, for a cache of another model or batch.
    """
    if token.ndim != 1:
        raise ValueError(f"decode_step: `token` must be [batch], one id a row, got shape {token.shape}")
    check(cache, model, token.shape[0], "decode_step")
    return cached(model, params, token[:, None], None, cache)


@partial(jax.jit, static_argnames="model")
def _forward(model, params, tokens, lengths):
    return model.apply({"params": params}, tokens, lengths)[0]


@partial(jax.jit, static_argnames="model", donate_argnames=("cache", "logits"))
def _chunk(model, params, cache, tokens, lengths, logits):
    """One padded chunk; rows whose prompt ended earlier keep their logits."""
    new, cache = cached(model, params, tokens, lengths, cache)
    return jnp.where((lengths > 0)[:, None], new, logits), cache


def as_batch(tokens: Tokens, lengths):
    """Arrays for tokens and lengths, on the host where values are known; ragged lists are padded."""
    tokens, lengths = (np.asarray(x) if isinstance(x, jax.Array) and not traced(x) else x for x in (tokens, lengths))
    if not isinstance(tokens, (jax.Array, np.ndarray)):
        rows = [list(row) for row in tokens]
        if lengths is None:
            lengths = [len(row) for row in rows]
        width = max((len(row) for row in rows), default=0)
        tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32).reshape(len(rows), width)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"prefill: `tokens` must be integers [batch, width], got {tokens.dtype} {tokens.shape}")
    if 0 in tokens.shape:
        raise ValueError(f"prefill: `tokens` is an empty prompt, of shape {tokens.shape}")
    if lengths is None:
        lengths = np.full(tokens.shape[0], tokens.shape[1], np.int32)
    if not isinstance(lengths, jax.Array):
        lengths = np.asarray(lengths, np.int32)
    if lengths.shape != tokens.shape[:1]:
        raise ValueError(f"prefill: `lengths` must be [{tokens.shape[0]}], one a row, got shape {lengths.shape}")
    return tokens.astype(np.int32), lengths.astype(np.int32)


def traced(*values) -> bool:
    """Whether any value is unknown because an outer transformation is tracing."""
    return any(isinstance(x, Tracer) for x in values)


def check_values(model: Transformer, cache: Cache, tokens, lengths) -> None:
    """Raise ValueError for prompts that `prefill` must refuse, as far as values are known."""
    if traced(tokens, lengths, cache.length):
        return
    tokens, lengths = np.asarray(tokens), np.asarray(lengths)
    width, vocab = tokens.shape[1], model.config.vocab
    if (lengths < 1).any() or (lengths > width).any():
        raise ValueError(f"prefill: `lengths` must be in [1, {width}], the width of `tokens`, got {lengths.tolist()}")
    real = np.arange(width)[None] < lengths[:, None]
    wrong = tokens[real & ((tokens < 0) | (tokens >= vocab))]
    if wrong.size:
        raise ValueError(f"prefill: `tokens` must be ids in [0, {vocab}), got {wrong[:8].tolist()}")
    if cache.capacity is not None:
        need = np.asarray(cache.length) + lengths
        if (need > cache.capacity).any():
            raise ValueError(
                f"prefill: `tokens` need {int(need.max())} slots a row with what the cache holds, "
                f"but its capacity is {cache.capacity}"
            )


def _pad(tokens, width: int):
    pad = [(0, 0), (0, width - tokens.shape[1])]
    return np.pad(tokens, pad) if isinstance(tokens, np.ndarray) else jnp.pad(tokens, pad)
