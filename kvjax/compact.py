"""A batch's real tokens one after the other, without the padding between its rows.

What a model computes for each token alone, its matrix products above all, then costs what the tokens cost; attention
still sees rows. The idea is that of Zhai et al. 2022, "ByteTransformer" (arXiv:2210.03052), section 4.1.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from kvjax.pytree import pytree


@pytree
class Compact:
    """Where tokens of a batch are. Made by `compact`.

    Args:
        source: of each place, the index among `batch * width`, one past them where the place is left over.
        place: of each token, its place, one past them where it is padding.
    """

    source: Int[Array, "places"]
    place: Int[Array, "batch width"]

    def gathered(self, x: Shaped[Array, "batch width *rest"]) -> Shaped[Array, "1 places *rest"]:
        """The tokens of `x` only; what is left over is zeros."""
        flat = x.reshape(-1, *x.shape[2:])
        return jnp.take(flat, self.source, axis=0, mode="fill", fill_value=0)[None]

    def spread(self, x: Shaped[Array, "1 places *rest"]) -> Shaped[Array, "batch width *rest"]:
        """`gathered` undone; padding is zeros."""
        return jnp.take(x[0], self.place, axis=0, mode="fill", fill_value=0)


def compact(lengths: Int[Array, "batch"], width: int, places: int) -> Compact:
    """Where the first `lengths` tokens of each row are, of `width`, in order; those that find no place are left out."""
    real = (jnp.arange(width, dtype=jnp.int32)[None] < lengths[:, None]).reshape(-1)
    nth = jnp.where(real, jnp.cumsum(real, dtype=jnp.int32) - 1, places)
    index = jnp.arange(real.size, dtype=jnp.int32)
    source = jnp.full(places, real.size, jnp.int32).at[nth].set(index, mode="drop")
    return Compact(source, jnp.minimum(nth, places).reshape(-1, width))
