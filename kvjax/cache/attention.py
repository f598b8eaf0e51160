"""The one place where kvjax calls `kernels`: caches and the model get their attention here."""

from __future__ import annotations

from jaxtyping import Array, Float

from kernels.products import mix as full_mix
from kernels.products import scores as full_scores
from kernels.received import received
from kernels.reference import Mask, attend, attend_blocks, finish, merge, weigh

__all__ = [
    "Mask",
    "attend",
    "attend_blocks",
    "by_head",
    "finish",
    "full_mix",
    "full_scores",
    "merge",
    "queries_by_head",
    "queries_together",
    "received",
    "weigh",
]


def by_head(x: Float[Array, "batch width kv_heads head_dim"]) -> Float[Array, "rows width head_dim"]:
    """Fold the K/V heads into the batch axis: `rows = batch * kv_heads`, the layout that caches keep."""
    batch, width, heads, dim = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, width, dim)


def queries_by_head(
    x: Float[Array, "batch width heads *rest"], kv_heads: int
) -> Float[Array, "rows width group *rest"]:
    """Give each K/V head a row of its own, with the query heads that share it."""
    batch, width, heads, *rest = x.shape
    split = x.reshape(batch, width, kv_heads, heads // kv_heads, *rest).swapaxes(1, 2)
    return split.reshape(batch * kv_heads, width, heads // kv_heads, *rest)


def queries_together(
    x: Float[Array, "rows width group *rest"], kv_heads: int
) -> Float[Array, "batch width heads *rest"]:
    """Undo `queries_by_head`."""
    rows, width, group, *rest = x.shape
    split = x.reshape(rows // kv_heads, kv_heads, width, group, *rest).swapaxes(1, 2)
    return split.reshape(rows // kv_heads, width, kv_heads * group, *rest)
