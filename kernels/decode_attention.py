"""Decode attention on a Hopper GPU, in Pallas Mosaic GPU: a few queries against many slots, at the memory's speed."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.decode_kernel import CHUNK, run
from kernels.decode_parts import EIGHT
from kernels.decode_plan import ROWS, Plan, Tiling, plan
from kernels.reference import Mask, Partial


def decode_attention(
    q: Float[Array, "batch width heads head_dim"],
    k: Float[Array, "rows slots head_dim"],
    v: Float[Array, "rows slots head_dim"],
    positions: Int[Array, "batch width"],
    slots: Int[Array, "batch slots"],
    mask: Mask,
    *,
    work: Plan | None = None,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> Partial:
    """What `kernels.reference.attend` gives, for few queries, each tile of K/V read once for all that share it.

    Args:
        work: `plan(positions, slots, mask, kv_heads, tiling)`, to share it among layers.
        interpret: `plgpu.InterpretGPUParams()` to run on a CPU; partial results are then merged outside the kernel.
    Returns:
        `out` in `q.dtype` and `lse` in float32 nats. A query that sees nothing gives zeros and -inf.
        Whatever empty slots hold, NaN too, changes nothing.
    Raises:
        ValueError: while tracing, for shapes or dtypes that this kernel does not take.
    Source: Dao et al. 2023, "Flash-Decoding"; warp specialisation as in arXiv:2407.08608.
    """
    batch, width, heads, dim = q.shape
    rows, held, _ = k.shape
    kv_heads = rows // batch
    queries = heads // max(kv_heads, 1) * width
    if not kv_heads or rows != batch * kv_heads or heads % kv_heads or queries > ROWS:
        raise ValueError(
            f"decode_attention: {heads} heads of width {width} over {rows} rows of `k` in a batch of {batch} are "
            f"{queries} queries a K/V head; expected a whole number up to {ROWS}"
        )
    if q.dtype != k.dtype or k.dtype != v.dtype or k.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"decode_attention: expected bfloat16 or float16 throughout, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if dim % 32 or dim > 256 or held % EIGHT:
        raise ValueError(
            f"decode_attention: expected a `head_dim` that 32 divides, up to 256, and slots that {EIGHT} divides, "
            f"got {dim} and {held}"
        )
    tiling = tiling or fitting(dim, rows)
    work = work or plan(positions, slots, mask, kv_heads, tiling)
    group = heads // kv_heads
    folded = q.reshape(batch, width, kv_heads, group, dim).transpose(0, 2, 3, 1, 4).reshape(rows, queries, dim)
    packed = EIGHT % queries == 0 and rows * queries % EIGHT == 0 and queries * min(dim, CHUNK) % 256 == 0
    if packed and not interpret:
        folded = folded.reshape(-1, EIGHT, dim)  # a row's queries and its neighbours', as they lie in memory
    else:
        folded = jnp.pad(folded, ((0, 0), (0, -queries % EIGHT), (0, 0)))
    each = queries if packed and not interpret else folded.shape[1]
    out, lse = run(folded, k, v, work, mask, each, tiling=tiling, kv_heads=kv_heads, interpret=interpret)
    out, lse = out.reshape(rows, each, dim)[:, :queries], lse.reshape(rows, each)[:, :queries]
    out = out.reshape(batch, kv_heads, group, width, dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    lse = lse.reshape(batch, kv_heads, group, width).transpose(0, 3, 1, 2).reshape(q.shape[:3])
    return out.astype(q.dtype), lse


def fitting(head_dim: int, rows: int, most: int = 132) -> Tiling:
    """Two stages of 32 KiB or more in flight: on an H100 each further stage made reading slower, not faster.

    A few workers fewer, so that rows of one length end where pieces do: 132 workers took 189 µs for 32 rows of 4,096
    tokens in 8 heads, 128 workers 181.
    """
    workers = next((n for n in range(most, most - most // 8, -1) if n % rows == 0 or rows % n == 0), most)
    return Tiling(128 if head_dim < 128 else 64, 2, workers)
