"""Take in a prompt, or one token: the two functions that everything else is made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache.base import Cache, check
from kvjax.decode.prompts import Lengths, Tokens, as_prompts
from kvjax.model import Params, Transformer, cached

BUCKETS = (16, 32, 64, 128, 256, 512)
"""Widths that prompts are padded to; a longer prompt goes in chunks of the last one."""


def forward(
    model: Transformer,
    params: Params,
    tokens: Int[Array, "batch width"] | Int[np.ndarray, "batch width"],
    lengths: Int[Array, "batch"] | Int[np.ndarray, "batch"] | None = None,
) -> Float[Array, "batch width vocab"]:
    """Logits at every position without a cache: what cached decoding must agree with.

    Raises:
        ValueError: for prompts that `prefill` refuses, or longer than the model's learned positions.
    """
    tokens, lengths = as_prompts(model, None, tokens, lengths, "forward")
    if model.config.rope is None and tokens.shape[1] > model.config.max_positions:
        raise ValueError(
            f"forward: `tokens` must be at most {model.config.max_positions} wide, the model's learned positions, "
            f"got {tokens.shape[1]}"
        )
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
            are unknown, and only shapes are checked; a row then gets NaN logits, and takes in nothing of the first
            chunk that it has no room for and of those after it.
    """
    if not buckets or any(a >= b for a, b in zip((0, *buckets), buckets, strict=False)):
        raise ValueError(f"prefill: `buckets` must be widths of at least 1, ascending, got {tuple(buckets)}")
    tokens, lengths = as_prompts(model, cache, tokens, lengths, "prefill")
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
    if not isinstance(token, jax.Array) or token.ndim != 1 or not jnp.issubdtype(token.dtype, jnp.integer):
        got = f"{token.dtype} of shape {token.shape}" if isinstance(token, jax.Array) else type(token).__name__
        raise ValueError(f"decode_step: `token` must be an array [batch] of integers, one id a row, got {got}")
    check(cache, model, token.shape[0], "decode_step")
    return cached(model, params, token[:, None], None, cache)


@partial(jax.jit, static_argnames="model")
def _forward(model, params, tokens, lengths):
    return model.apply({"params": params}, tokens, lengths)[0]


@partial(jax.jit, static_argnames="model", donate_argnames=("cache", "logits"))
def _chunk(model, params, cache, tokens, lengths, logits):
    """One padded chunk; rows whose prompt ended, or had no room, earlier take in nothing and keep their logits."""
    lengths = jnp.where(jnp.isnan(logits).any(-1), 0, lengths)
    new, cache = cached(model, params, tokens, lengths, cache)
    done = lengths == 0
    return jnp.where(done[:, None], logits, new), cache


def _pad(tokens, width: int):
    pad = [(0, 0), (0, width - tokens.shape[1])]
    return np.pad(tokens, pad) if isinstance(tokens, np.ndarray) else jnp.pad(tokens, pad)
