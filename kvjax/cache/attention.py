"""The one place where kvjax calls `kernels`: caches and the model get their attention here."""

from __future__ import annotations

from jaxtyping import Array, Float

from kernels.reference import Mask, attend, attend_blocks, merge, visible

__all__ = ["Mask", "attend", "attend_blocks", "by_head", "merge", "visible"]


def by_head(x: Float[Array, "batch width kv_heads head_dim"]) -> Float[Array, "rows width head_dim"]:
    """Fold the K/V heads into the batch axis: `rows = batch * kv_heads`, the layout that caches keep."""
    batch, width, heads, dim = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, width, dim)
