"""Where a model's arrays lie on a mesh of devices: the names of its axes, and what XLA is told of activations."""

from __future__ import annotations

from itertools import accumulate

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

DATA, CONTEXT, HEADS = AXES = ("data", "context", "heads")
"""Rows of a batch, slots of one sequence, heads with the channels of the MLP and the vocabulary.

Devices next to each other share heads, for those talk most.
"""


def laid(x: Shaped[Array, "..."], mesh: Mesh | None, *axes: str | None) -> Shaped[Array, "..."]:
    """`x` with its first dimensions over these axes of the mesh, and whole on each device along all others.

    A dimension that its axis does not divide, as where rows were put in one, is whole too. Without a mesh, nothing.
    """
    if mesh is None:
        return x
    fitting = (
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, x.shape, strict=False)
    )
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*fitting)))


def cut(x: Float[Array, "*lead fused"], sizes: tuple[int, ...], shards: int) -> list[Float[Array, "*lead part"]]:
    """Split what a fused kernel gave into its parts, whose channels are dealt to `shards` devices.

    Each device has its own share of every part side by side, as `kvjax.accelerate.shard_params` lays kernels out, so
    that none needs a channel of another.
    """
    ends = list(accumulate(size // shards for size in sizes))[:-1]
    if shards == 1:
        return jnp.split(x, ends, axis=-1)
    lead = x.shape[:-1]
    parts = jnp.split(x.reshape(*lead, shards, -1), ends, axis=-1)
    return [part.reshape(*lead, -1) for part in parts]
