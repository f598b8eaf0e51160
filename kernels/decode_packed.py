"""Decode attention on a Hopper GPU over keys and values of 8, 4 or 2 bits, which are never unpacked in memory."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.decode_attention import bounded
from kernels.decode_packed_kernel import run
from kernels.decode_plan import Plan, Tiling, plan
from kernels.packed import BITS, Packed
from kernels.reference import Mask, Partial
from kernels.tuned import tuned

UNIT = 128
"""Rows of bytes in a tile, or a multiple of it: sixteen for each of eight warps."""

SCORERS = 2
"""Warpgroups that see a tile, beside the one that reads it."""

WIDEST = 2048
"""Queries, in eights, times channels that fit in a thread's registers."""


def decode_packed(
    q: Float[Array, "batch width heads head_dim"],
    k: Packed,
    v: Packed,
    positions: Int[Array, "batch width"],
    slots: Int[Array, "batch slots"],
    mask: Mask,
    *,
    work: Plan | None = None,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> Partial:
    """What `kernels.packed.attend_packed` gives, for few queries, each tile read once for all that share it.

    Args:
        work: `plan_packed(positions, slots, mask, k, heads, tiling)`, to share it among layers.
        interpret: `plgpu.InterpretGPUParams()` to run on a CPU; partial results are then merged outside the kernel.
    Returns:
        `out` in `q.dtype` and `lse` in float32 nats. A query that sees nothing gives zeros and -inf.
        Whatever empty slots hold, a scale of NaN too, changes nothing.
    Raises:
        ValueError: while tracing, for shapes that do not belong together.
        NotImplementedError: while tracing, for what this kernel does not take.
    Source: Dao et al. 2023, "Flash-Decoding"; scales outside the products as in KIVI (arXiv:2402.02750).
    """
    check(q, k, v, slots)
    batch, width, heads, dim = q.shape
    rows = k.codes.shape[0]
    kv_heads, group = rows // batch, heads * batch // rows
    if tiling is None:
        tiling = (
            chosen_packed(dim, group, rows, slots.shape[1], k.bits)
            if work is None
            else fitting_packed(dim, rows, k.bits)
        )
    if tiling.tile * k.bits // 8 % UNIT or UNIT % k.span:
        raise NotImplementedError(
            f"decode_packed: expected tiles of a multiple of {UNIT * 8 // k.bits} slots and groups that divide that, "
            f"got {tiling.tile} and {k.group}"
        )
    work = work or plan(positions, slots, mask, kv_heads, tiling)
    folded = q.reshape(batch, width, kv_heads, group, dim).transpose(0, 2, 3, 1, 4).reshape(rows, -1, dim)
    out, lse = run(folded, k, v, work, mask, tiling=tiling, scorers=SCORERS, interpret=interpret)
    out = out.reshape(batch, kv_heads, group, width, dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    lse = lse.reshape(batch, kv_heads, group, width).transpose(0, 3, 1, 2).reshape(q.shape[:3])
    return out.astype(q.dtype), lse


def check(q, k: Packed, v: Packed, slots) -> None:
    """Refuse what does not belong together or what the kernel does not take."""
    batch, width, heads, dim = q.shape
    rows, held = k.codes.shape[0], slots.shape[1]
    if rows % batch or not rows or heads * batch % rows:
        raise ValueError(
            f"decode_packed: {heads} heads of width {width} over {rows} rows of `k` in a batch of {batch}; "
            "expected a whole number of queries a K/V head"
        )
    wanted = (rows, held * k.bits // 8, dim)
    if not k.codes.shape == v.codes.shape == wanted or (k.bits, k.group) != (v.bits, v.group):
        raise ValueError(
            f"decode_packed: expected codes of {wanted} for {held} slots, with the same bits and group, got "
            f"{k.codes.shape} of {k.bits} bits in groups of {k.group} and {v.codes.shape} of {v.bits} in {v.group}"
        )
    vectors = [x for x in (k.scales, v.scales, k.offsets, v.offsets) if x is not None]
    if any(x.shape != (rows, held) for x in vectors) or (k.offsets is None) != (v.offsets is None):
        raise ValueError(
            f"decode_packed: expected scales of {(rows, held)}, and offsets for both or neither, got "
            f"{[x.shape for x in vectors]}"
        )
    if q.dtype != jnp.bfloat16 or k.bits not in BITS:
        raise NotImplementedError(
            f"decode_packed: expected bfloat16 queries and bits among {BITS}, got {q.dtype} and {k.bits}"
        )
    queries = heads * batch // rows * width
    if dim not in (64, 128, 256) or -(-queries // 8) * 8 * dim > WIDEST or held % 16:
        raise NotImplementedError(
            f"decode_packed: expected a `head_dim` of 64, 128 or 256, up to {WIDEST // dim} queries a K/V head and "
            f"slots that 16 divides, got {dim}, {queries} and {held}"
        )


def plan_packed(
    positions: Int[Array, "batch width"],
    slots: Int[Array, "batch slots"],
    mask: Mask,
    k: Packed,
    tiling: Tiling | None = None,
) -> Plan:
    """The plan of `decode_packed`, for keys packed as `k` is."""
    rows, _, dim = k.codes.shape
    return plan(positions, slots, mask, rows // slots.shape[0], tiling or fitting_packed(dim, rows, k.bits))


def chosen_packed(head_dim: int, queries: int, rows: int, slots: int, bits: int) -> Tiling:
    """What was fastest for such a shape on the device at hand, or `fitting_packed`."""
    exact = {"dtype": f"int{bits}", "head_dim": head_dim, "queries": queries, "rows": rows}
    default = fitting_packed(head_dim, rows, bits)
    return bounded(tuned("decode_packed", default, exact=exact, sizes={"slots": slots}))


def fitting_packed(head_dim: int, rows: int, bits: int, most: int | None = None) -> Tiling:
    """Two stages of 32 KiB, as `decode_attention.fitting` has them: with three or more an H100 read more slowly."""
    most = most or dispatch.cores()
    workers = next((n for n in range(most, most - most // 8, -1) if n % rows == 0 or rows % n == 0), most)
    return Tiling(UNIT * 8 // bits, 2, workers)
