"""Prompts as arrays, and what is wrong with those that cannot be taken in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from kvjax.cache.base import Cache, check
from kvjax.model import Transformer

Tokens = Int[Array, "batch width"] | Int[np.ndarray, "batch width"] | Sequence[Sequence[int]]

Lengths = Int[Array, "batch"] | Int[np.ndarray, "batch"] | Sequence[int]


def traced(*values) -> bool:
    """Whether any value is unknown because an outer transformation is tracing."""
    return any(isinstance(x, Tracer) for x in values)


def as_prompts(model: Transformer, cache: Cache | None, tokens, lengths, where: str):
    """Tokens and lengths as int32 arrays, on the host where their values are known; ragged lists are padded.

    Raises:
        ValueError: starting with `where`, for what `prefill` refuses, as far as values are known.
    """
    tokens, lengths = (np.asarray(x) if isinstance(x, jax.Array) and not traced(x) else x for x in (tokens, lengths))
    own = None
    if not isinstance(tokens, (jax.Array, np.ndarray)):
        tokens, own = _padded(tokens, where)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{where}: `tokens` must be integers [batch, width], got {tokens.dtype} {tokens.shape}")
    if 0 in tokens.shape:
        raise ValueError(f"{where}: `tokens` is an empty prompt, of shape {tokens.shape}")
    if lengths is None:
        lengths = np.full(tokens.shape[0], tokens.shape[1]) if own is None else own
    if not isinstance(lengths, jax.Array):
        lengths = np.asarray(lengths)
    if lengths.shape != tokens.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"{where}: `lengths` must be [{tokens.shape[0]}] integers, one a row, got {lengths.dtype} {lengths.shape}"
        )
    if cache is not None:
        check(cache, model, tokens.shape[0], where)
    if not traced(tokens, lengths):
        _check_values(model, tokens, lengths, own, where)
        if cache is not None and not traced(cache.length) and (why := cache.strategy.need(cache, lengths)):
            raise ValueError(f"{where}: `tokens`, with what the cache holds, {why}")
    return tokens.astype(np.int32), lengths.astype(np.int32)


def _padded(tokens: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids, a row each, as one array, and each row's length."""
    wrong = f"{where}: `tokens` must be integers [batch, width] or lists of ids, one a row, got "
    try:
        rows = [np.asarray(row) for row in (() if isinstance(tokens, str) else tokens)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wrong}{_shortened(tokens)}") from error
    if not rows or any(row.ndim != 1 or (row.size and row.dtype.kind not in "iu") for row in rows):
        raise ValueError(f"{wrong}{_shortened(tokens)}")
    if empty := [i for i, row in enumerate(rows) if not row.size]:
        raise ValueError(f"{where}: `tokens` has an empty prompt in row {empty[0]}")
    own = np.array([row.size for row in rows])
    padded = np.zeros((len(rows), own.max()), np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: row.size] = row
    return padded, own


def _check_values(model: Transformer, tokens: np.ndarray, lengths: np.ndarray, own, where: str) -> None:
    width, vocab = tokens.shape[1], model.config.vocab
    if (lengths < 1).any() or (lengths > width).any():
        raise ValueError(f"{where}: `lengths` must be in [1, {width}], the width of `tokens`, got {lengths.tolist()}")
    if own is not None and (lengths > own).any():
        raise ValueError(
            f"{where}: `lengths` must not exceed the rows of `tokens`, which have {own.tolist()} ids, "
            f"got {lengths.tolist()}"
        )
    real = np.arange(width)[None] < lengths[:, None]
    wrong = tokens[real & ((tokens < 0) | (tokens >= vocab))]
    if wrong.size:
        raise ValueError(f"{where}: `tokens` must be ids in [0, {vocab}), got {wrong[:8].tolist()}")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
