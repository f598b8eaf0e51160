"""The one place where kvjax's arrays meet `kernels`: caches and the model get their attention here."""

from __future__ import annotations

from jaxtyping import Array, Float

from kernels.attention import append, attend
from kernels.products import mix as full_mix
from kernels.products import scores as full_scores
from kernels.received import received
from kernels.reference import Mask, attend_blocks, finish, merge, weigh
from kernels.slots import placed, write

__all__ = [
    "Mask",
    "append",
    "attend",
    "attend_blocks",
    "by_head",
    "finish",
    "full_mix",
    "full_scores",
    "merge",
    "placed",
    "queries_by_head",
    "queries_together",
    "received",
    "weigh",
    "write",
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
