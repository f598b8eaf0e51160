"""Turning the knobs of an evicting cache that is in use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Shaped

from kvjax.cache.attention import Mask
from kvjax.cache.base import Cache
from kvjax.cache.evict.coded import CodedLayer
from kvjax.cache.evict.knobs import Knobs, fitted
from kvjax.cache.evict.layer import ByHead
from kvjax.cache.shared import SharedLayer

COUNTS = ("budget", "sinks", "recent")
"""The knobs that are whole numbers of tokens."""


def turn(cache: Cache, **knobs: Any) -> Cache:
    """The cache with some of its layers' `Knobs` replaced: `turn(cache, threshold=0.1)`. Arrays may be traced.

    A lower budget holds at once: of what is held, the tokens worth most stay. A higher one leaves room for those to
    come. Of a `Shared` cache, the rows' own part is turned. Traced counts are not refused but moved: see `fitted`.

    Raises:
        ValueError: for a cache without knobs, a knob that does not exist, or a value that it cannot have.
    """
    known = list(Knobs.__dataclass_fields__)
    for name in knobs:
        if name not in known:
            raise ValueError(f"turn: `{name}` is no knob; expected one of {', '.join(known)}")
    windows = cache.config.windows
    layers = (_turned(layer, knobs, window) for layer, window in zip(cache.layers, windows, strict=True))
    return replace(cache, layers=tuple(layers))


def _turned(layer: Any, knobs: dict[str, Any], window: int | None) -> Any:
    if isinstance(layer, SharedLayer):
        return replace(layer, inner=_turned(layer.inner, knobs, window))
    if not isinstance(layer, ByHead):
        raise ValueError(f"turn: `cache` must be one that `Evicting` makes, got a layer {type(layer).__name__}")
    fixed = sorted({"sinks", "recent"} & set(knobs))
    if fixed and isinstance(layer, CodedLayer):
        raise ValueError(f"turn: {', '.join(fixed)} are fixed in a cache with an `inner`, whose slots they decide")
    new = {name: _own(name, value, getattr(layer.knobs, name)) for name, value in knobs.items()}
    turned = replace(layer, knobs=replace(layer.knobs, **new))
    if not set(COUNTS) & set(knobs):
        return turned
    slots = layer.positions.shape[1]
    counts = [knobs.get(name, getattr(layer.knobs, name)) for name in COUNTS]
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(counts)):
        _check(*(np.asarray(x) for x in counts), slots)
    turned = replace(turned, knobs=fitted(turned.knobs, slots))
    return turned.trimmed(Mask(1.0, window=window)) if "budget" in knobs else turned


def _own(name: str, value: Any, old: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The value as an array of the layer's own: one that layers had in common could not be donated."""
    try:
        given = jnp.asarray(value)
        good = jnp.issubdtype(given.dtype, jnp.integer) or (
            name not in COUNTS and jnp.issubdtype(given.dtype, jnp.floating)
        )
    except (TypeError, ValueError, OverflowError):
        given, good = old, False
    if not good or given.shape not in ((), old.shape):
        what = "a whole number" if name in COUNTS else "a number"
        each = f", or {old.shape[0]}, one a K/V head" if old.shape else ""
        raise ValueError(f"turn: `{name}` must be {what}{each}, got {value!r}")
    return jnp.array(jnp.broadcast_to(given, old.shape), old.dtype)


def _check(budget: np.ndarray, sinks: np.ndarray, recent: np.ndarray, slots: int) -> None:
    if sinks < 0:
        raise ValueError(f"turn: `sinks` must not be negative, got {sinks}")
    if recent < 1:
        raise ValueError(f"turn: `recent` must be at least 1 token, got {recent}")
    if sinks + recent > slots:
        raise ValueError(f"turn: `sinks` + `recent` must be at most a layer's {slots} slots, got {sinks} + {recent}")
    if budget.min() < sinks + recent:
        raise ValueError(
            f"turn: `budget` must be at least `sinks` + `recent`, {sinks + recent} tokens, got {budget.min()}"
        )
