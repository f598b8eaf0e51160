"""Decode attention on a Hopper GPU, in Pallas Mosaic GPU: a few queries against many slots, at the memory's speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.decode_kernel import run
from kernels.decode_parts import other_dtypes
from kernels.decode_plan import Plan, Tiling, plan
from kernels.reference import EIGHT, ROWS, Mask, Partial
from kernels.tuned import tuned


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
    if why := refusal(q, k, v):
        raise ValueError(f"decode_attention: {why}")
    rows, _, dim = k.shape
    kv_heads = rows // q.shape[0]
    if tiling is None:
        tiling = _chosen(q, k) if work is None else fitting(dim, rows)
    work = work or plan(positions, slots, mask, kv_heads, tiling)
    out, lse = run(_folded(q, kv_heads), k, v, work, mask, tiling=tiling, kv_heads=kv_heads, interpret=interpret)
    return _unfolded(out, lse, q)


def decode_append(
    q: Float[Array, "batch 1 heads head_dim"],
    new_k: Float[Array, "rows 1 head_dim"],
    new_v: Float[Array, "rows 1 head_dim"],
    k: Float[Array, "rows slots head_dim"],
    v: Float[Array, "rows slots head_dim"],
    positions: Int[Array, "batch 1"],
    slots: Int[Array, "batch slots"],
    to: Int[Array, "batch"],
    mask: Mask,
    *,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "batch 1 heads head_dim"], Float[Array, "batch 1 heads"], Any, Any]:
    """What `kernels.reference.append` gives, in one kernel; `k` and `v` are written in place where they may be.

    Raises:
        ValueError: as `decode_attention`, and for a width other than 1.
    """
    if why := refusal(q, k, v):
        raise ValueError(f"decode_append: {why}")
    if q.shape[1] != 1:
        raise ValueError(f"decode_append: expected one token a row, got {q.shape[1]}")
    rows, held, dim = k.shape
    to = jnp.where(to < held, to, -1)
    slots = jnp.where(jnp.arange(held)[None] == to[:, None], -1, slots)  # what is overwritten is not seen
    kv_heads = rows // q.shape[0]
    tiling = tiling or _chosen(q, k)
    work = plan(positions, slots, mask, kv_heads, tiling)
    new = (new_k[:, 0].astype(k.dtype), new_v[:, 0].astype(v.dtype), to)
    folded = _folded(q, kv_heads)

    def step(refs):
        out_ref, lse_ref, k_ref, v_ref = refs
        out_ref[...], lse_ref[...] = run(
            folded, k_ref, v_ref, work, mask, new, tiling=tiling, kv_heads=kv_heads, interpret=interpret
        )

    empty = jnp.zeros_like(folded), jnp.zeros(folded.shape[:2], jnp.float32)  # never made: all of it is written
    out, lse, k, v = pl.run_state(step)((*empty, k, v))
    return *_unfolded(out, lse, q), k, v


def _folded(q: Float[Array, "batch width heads head_dim"], kv_heads: int) -> Float[Array, "rows queries head_dim"]:
    """Queries by K/V head, the query heads before the width."""
    batch, width, _, dim = q.shape
    return q.reshape(batch, width, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4).reshape(batch * kv_heads, -1, dim)


def _unfolded(out: Float[Array, "rows queries head_dim"], lse: Float[Array, "rows queries"], q) -> Partial:
    """Undo `_folded` of results, for queries like `q`."""
    batch, width, _, dim = q.shape
    kv_heads = out.shape[0] // batch
    out = out.reshape(batch, kv_heads, -1, width, dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    lse = lse.reshape(batch, kv_heads, -1, width).transpose(0, 3, 1, 2).reshape(q.shape[:3])
    return out, lse


def refusal(
    q: Float[Array, "batch width heads head_dim"],
    k: Float[Array, "rows slots head_dim"],
    v: Float[Array, "rows slots head_dim"],
) -> str | None:
    """Why the kernel does not take these; None if it does."""
    batch, width, heads, dim = q.shape
    rows, held, _ = k.shape
    kv_heads = rows // batch
    queries = heads // max(kv_heads, 1) * width
    if not kv_heads or rows != batch * kv_heads or heads % kv_heads or queries > ROWS:
        return (
            f"{heads} heads of width {width} over {rows} rows of `k` in a batch of {batch} are {queries} queries a "
            f"K/V head; expected a whole number up to {ROWS}"
        )
    if why := other_dtypes(q, k, v):
        return why
    if dim % 32 or dim > 256 or held % EIGHT:
        return f"expected a `head_dim` that 32 divides, up to 256, and slots that {EIGHT} divides, got {dim} and {held}"
    return None


def _chosen(q, k) -> Tiling:
    rows, held, dim = k.shape
    return chosen(dim, q.shape[0] * q.shape[2] // rows, rows, held, str(k.dtype))


def chosen(head_dim: int, queries: int, rows: int, slots: int, dtype: str = "bfloat16") -> Tiling:
    """What was fastest for such a shape on the device at hand, or `fitting`."""
    exact = {"dtype": dtype, "head_dim": head_dim, "queries": queries, "rows": rows}
    return bounded(tuned("decode", fitting(head_dim, rows), exact=exact, sizes={"slots": slots}))


def bounded(tiling: Tiling) -> Tiling:
    """With no more workers than can run at once, for they wait for each other."""
    return replace(tiling, workers=min(tiling.workers, dispatch.cores()))


def fitting(head_dim: int, rows: int, most: int | None = None) -> Tiling:
    """Two stages of 32 KiB or more in flight: on an H100 each further stage made reading slower, not faster.

    A few workers fewer, so that rows of one length end where pieces do: 132 workers took 189 µs for 32 rows of 4,096
    tokens in 8 heads, 128 workers 181.

    Args:
        most: workers that run at once; one for each of the GPU's multiprocessors if None.
    """
    most = most or dispatch.cores()
    workers = next((n for n in range(most, most - most // 8, -1) if n % rows == 0 or rows % n == 0), most)
    return Tiling(128 if head_dim < 128 else 64, 2, workers, whole=2)
