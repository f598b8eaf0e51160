"""The interface of a score: what a token is worth keeping for, one K/V head a row.

Rows are `batch * kv_heads`; queries come as `[rows, width, group, head_dim]`. Larger is worth more.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.base import LayerSpec

Keys = Float[Array, "rows slots head_dim"]
Worth = Float[Array, "rows slots"]


class Score:
    """A rule of worth. Subclasses are frozen dataclasses; what they learn from tokens is a pytree, `state`."""

    queries: ClassVar[bool] = False
    """Whether worth depends on queries, so that it cannot be found from keys and values that are held."""

    def begin(self, spec: LayerSpec) -> Any:
        """What is known before any token; every leaf has a leading axis of `rows`."""
        return ()

    def observe(
        self,
        state: Any,
        q: Float[Array, "rows width group head_dim"],
        k: Float[Array, "rows width head_dim"],
        positions: Int[Array, "rows width"],
        valid: Bool[Array, "rows width"],
    ) -> Any:
        """What is known after these tokens."""
        return state

    def rate(self, state: Any, k: Keys, v: Keys, positions: Int[Array, "rows slots"]) -> Worth:
        """The worth of tokens by their keys and values alone."""
        return jnp.zeros(positions.shape, jnp.float32)
