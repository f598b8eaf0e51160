"""The two matrix products of attention, in the forms that XLA runs fastest for the number of queries at hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEW = 4
"""Queries a row up to which a CPU takes them one at a time (48 rows of 3: 0.57 to 0.32 ms; 24 of 6: 0.19 to 0.42)."""

MANY = 256
"""Slots above which a CPU multiplies values by one query's weights at a time (4 ms a token at 1,089 slots)."""


def scores(
    q: Float[Array, "rows queries head_dim"], k: Float[Array, "rows slots head_dim"]
) -> Float[Array, "rows queries slots"]:
    """`q @ k.T` a row, in float32. On a CPU a few queries go one at a time: XLA is faster at matrix times vector."""

    def together(q, k):
        return jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)

    def one_by_one(q, k):
        each = [
            jax.lax.dot_general(k, q[:, i], (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
            for i in range(q.shape[1])
        ]
        return jnp.stack(each, axis=1)

    if q.shape[1] > FEW:
        return together(q, k)
    return jax.lax.platform_dependent(q, k, cpu=one_by_one, default=together)


def mix(
    weights: Float[Array, "rows queries slots"], v: Float[Array, "rows slots head_dim"]
) -> Float[Array, "rows queries head_dim"]:
    """`weights @ v` a row, in float32. On a CPU a few queries go one at a time once there are many slots."""

    def together(weights, v):
        return jax.lax.dot_general(weights, v, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)

    def one_by_one(weights, v):
        each = [
            jax.lax.dot_general(v, weights[:, i], (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
            for i in range(weights.shape[1])
        ]
        return jnp.stack(each, axis=1)

    if weights.shape[1] > FEW or weights.shape[2] <= MANY:
        return together(weights, v)
    return jax.lax.platform_dependent(weights, v, cpu=one_by_one, default=together)
