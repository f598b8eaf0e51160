"""Moving rows."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def take_rows(
    buffer: Shaped[Array, "rows *rest"], rows: Int[Array, "new_batch"], batch: int
) -> Shaped[Array, "new_rows *rest"]:
    """Choose batch rows of a buffer that has one or more rows for each."""
    split = buffer.reshape(batch, -1, *buffer.shape[1:])
    return jnp.take(split, rows, axis=0, mode="clip").reshape(-1, *buffer.shape[1:])
