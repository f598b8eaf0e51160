"""Decode attention on a Hopper GPU, in Pallas Mosaic GPU: a few queries against many slots, at the memory's speed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels.decode_parts import EIGHT, LOG2E, clear, full, masked, merge_all, merge_some, store_rows
from kernels.decode_plan import Plan, Tiling, partials, plan
from kernels.reference import Mask, Partial

ROWS = 64
"""Queries that one matrix instruction takes; a K/V head's group times the width must fit."""

CHUNK = 128
"""Columns of the values that are summed at once, so that the sums fit in registers."""


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
    tiling = tiling or fitting(dim)
    work = work or plan(positions, slots, mask, kv_heads, tiling)
    group = heads // kv_heads
    folded = q.reshape(batch, width, kv_heads, group, dim).transpose(0, 2, 3, 1, 4).reshape(rows, queries, dim)
    packed = EIGHT % queries == 0 and rows * queries % EIGHT == 0 and queries * min(dim, CHUNK) % 256 == 0
    if packed and not interpret:
        folded = folded.reshape(-1, EIGHT, dim)  # a row's queries and its neighbours', as they lie in memory
    else:
        folded = jnp.pad(folded, ((0, 0), (0, -queries % EIGHT), (0, 0)))
    at = jnp.tile(positions.astype(jnp.int32), (1, -(-ROWS // width)))[:, :ROWS]
    each = queries if packed and not interpret else folded.shape[1]
    out, lse = _run(folded, k, v, at, work, mask, each, tiling=tiling, kv_heads=kv_heads, interpret=interpret)
    out, lse = out.reshape(rows, each, dim)[:, :queries], lse.reshape(rows, each)[:, :queries]
    out = out.reshape(batch, kv_heads, group, width, dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    lse = lse.reshape(batch, kv_heads, group, width).transpose(0, 3, 1, 2).reshape(q.shape[:3])
    return out.astype(q.dtype), lse


def fitting(head_dim: int, workers: int = 132) -> Tiling:
    """Two stages of 32 KiB or more in flight: on an H100 each further stage made reading slower, not faster."""
    return Tiling(128 if head_dim < 128 else 64, 2, workers)


def _run(q, k, v, at, work: Plan, mask: Mask, each: int, *, tiling: Tiling, kv_heads: int, interpret):
    """`out` and `lse` of all queries, `each` a row, shaped as `q` is: `[…, eights, head_dim]` and `[…, eights]`."""
    rows, _, dim = k.shape
    tile, stages, workers = tiling.tile, tiling.stages, tiling.workers
    take = q.shape[1]
    fused = not interpret
    swizzle = plgpu.find_swizzle(dim * 16)
    shape = (plgpu.TilingTransform((EIGHT, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    chunks = [(start, min(CHUNK, dim - start)) for start in range(0, dim, CHUNK)]
    across, down = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)

    def body(
        q_ref,
        k_ref,
        v_ref,
        at_ref,
        slots_ref,
        tiles_ref,
        counts_ref,
        pieces_ref,
        out_ref,
        lse_ref,
        some_ref,
        some_lse_ref,
        **scratch,
    ):
        me = lax.axis_index("worker")
        first, stop, entry, leave, sharing = (pieces_ref[me, i] for i in range(5))

        def cut(row):
            b = lax.div(row, kv_heads)
            begin = jnp.where(row == first, entry, 0)
            return b, begin, lax.cond(row == stop - 1, lambda: leave, lambda: counts_ref[b])

        def home(row):
            """Which eights of queries a row's are in, and the place there."""
            return lax.div(row * each, take), lax.rem(row * each, take)

        def read(k_smem, v_smem, slots_smem, k_full, v_full, free, **_):
            def row_loop(row, done):
                b, begin, end = cut(row)

                def step(i, done):
                    stage = lax.rem(done, stages)
                    early = (row == first) & (done < stages)
                    number = lax.cond(early, lambda: pieces_ref[me, 5 + done], lambda: tiles_ref[b, i])

                    @pl.when(done >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[stage])

                    here = pl.ds(number * tile, tile)
                    plgpu.copy_gmem_to_smem(k_ref.at[row, here], k_smem.at[stage], k_full.at[stage])
                    plgpu.copy_gmem_to_smem(slots_ref.at[b, here], slots_smem.at[stage], k_full.at[stage])
                    plgpu.copy_gmem_to_smem(v_ref.at[row, here], v_smem.at[stage], v_full.at[stage])
                    return done + 1

                return lax.fori_loop(begin, end, step, done)

            done = lax.fori_loop(first, stop, row_loop, jnp.int32(0))

            @pl.loop(jnp.maximum(done - stages, 0), done)
            def _(last):
                plgpu.barrier_wait(free.at[lax.rem(last, stages)])

        def score(q_smem, k_smem, v_smem, slots_smem, left_smem, q_full, k_full, v_full, free):
            shared: Any = pl.get_global(plgpu.SemaphoreType.REGULAR((rows,))) if fused else None

            def row_loop(row, done):
                b, begin, end = cut(row)
                eights, place = home(row)
                plgpu.copy_gmem_to_smem(q_ref.at[eights], q_smem.at[:take], q_full)
                whole = (begin == 0) & (end == counts_ref[b]) & fused
                asks = plgpu.load(at_ref.at[b], layout=down, optimized=False)  # ty: ignore[missing-argument]
                asks = lax.broadcast_in_dim(asks, (ROWS, tile), [0])
                plgpu.barrier_wait(q_full)

                def step(i, carry):
                    sums, peak, total = carry
                    stage = lax.rem(done + i - begin, stages)
                    plgpu.barrier_wait(k_full.at[stage])

                    def product(acc):
                        plgpu.wgmma(acc, q_smem, k_smem.at[stage].transpose((1, 0)))
                        return acc[...]

                    logits = pl.run_scoped(product, plgpu.ACC((ROWS, tile), jnp.float32))
                    held = plgpu.load(slots_smem.at[stage], layout=across, optimized=False)  # ty: ignore[missing-argument]
                    lowest = held.min()
                    held = lax.broadcast_in_dim(held, (ROWS, tile), [1])
                    logits = masked(logits, held, asks, mask)
                    top = jnp.maximum(peak, logits.max(axis=1))
                    base = jnp.where(top == -jnp.inf, 0.0, top)
                    old = jnp.exp2(peak - base)
                    weights = jnp.exp2(logits - lax.broadcast_in_dim(base, (ROWS, tile), [0]))
                    total = total * old + weights.sum(axis=1)
                    weights = weights.astype(v.dtype)
                    plgpu.barrier_wait(v_full.at[stage])

                    @pl.when(lowest < 0)
                    def _():
                        clear(v_smem.at[stage], slots_smem.at[stage])

                    if interpret:  # it takes a product's left side from memory only
                        left_smem[...] = weights
                    mixed = []
                    for (start, size), part in zip(chunks, sums, strict=True):

                        def mix(acc, start=start, size=size):
                            left = left_smem if interpret else weights
                            plgpu.wgmma(acc, left, v_smem.at[stage, :, pl.ds(start, size)])
                            return acc[...]

                        new = pl.run_scoped(mix, plgpu.ACC((ROWS, size), jnp.float32))
                        mixed.append(part * lax.broadcast_in_dim(old, (ROWS, size), [0]) + new)
                    plgpu.barrier_arrive(free.at[stage])
                    return tuple(mixed), top, total

                empty = (
                    tuple(full((ROWS, size), 0.0, plgpu.Layout.WGMMA) for _, size in chunks),
                    full((ROWS,), -jnp.inf, down),
                    full((ROWS,), 0.0, down),
                )
                sums, peak, total = lax.fori_loop(begin, end, step, empty)
                some = jnp.where(total > 0, total, 1.0)
                lse = jnp.where(total > 0, peak / LOG2E + jnp.log(some), -jnp.inf)
                outs = [part / lax.broadcast_in_dim(some, part.shape, [0]) for part in sums]

                def store(out_ref, lse_ref):
                    for (start, size), part in zip(chunks, outs, strict=True):
                        here = (slice(None), pl.ds(start, size))
                        spread = lax.broadcast_in_dim(lse, part.shape, [0])
                        store_rows(part.astype(out_ref.dtype), out_ref.at[*here], place, each, interpret)
                        store_rows(spread, lse_ref.at[*here], place, each, interpret)

                pl.when(whole)(lambda: store(out_ref.at[eights], lse_ref.at[eights]))

                @pl.when(jnp.logical_not(whole))
                def _():
                    store(some_ref.at[me + row], some_lse_ref.at[me + row])
                    if fused:
                        pl.when(begin > 0)(lambda: plgpu.semaphore_signal(shared.at[row], memory_scope="gpu"))

                return done + end - begin

            lax.fori_loop(first, stop, row_loop, jnp.int32(0))
            if not fused:
                return

            # The worker in whose piece a row begins merges it: that is its last row, so nobody waits for it.
            @pl.when((sharing > 1) & ((stop - 1 > first) | (entry == 0)))
            def _():
                row = stop - 1
                plgpu.semaphore_wait(shared.at[row], sharing - 1, memory_scope="gpu")
                eights, place = home(row)
                parts = [me + row + jnp.minimum(i, sharing - 1) for i in range(tiling.most(kv_heads))]

                together = min(each, EIGHT)

                @pl.loop(0, each // together)
                def _(turn):
                    for start, size in chunks:
                        here = (pl.ds(place + turn * together, together), pl.ds(start, size))
                        out, lse = merge_some(
                            [some_ref.at[part, *here] for part in parts],
                            [some_lse_ref.at[part, *here] for part in parts],
                            sharing,
                        )
                        out_ref[eights, *here] = out.astype(out_ref.dtype)
                        lse_ref[eights, *here] = lse

            @pl.loop(0, lax.div(rows + workers - 1 - me, workers))
            def _(i):
                row = me + i * workers
                eights, place = home(row)

                @pl.when(counts_ref[lax.div(row, kv_heads)] == 0)
                def _():
                    for start, size in chunks:
                        here = (eights, slice(None), pl.ds(start, size))
                        nothing = full((ROWS, size), 0.0, plgpu.Layout.WGMMA)
                        store_rows(nothing.astype(out_ref.dtype), out_ref.at[*here], place, each, interpret)
                        store_rows(nothing - jnp.inf, lse_ref.at[*here], place, each, interpret)

        role = lax.axis_index("role")
        pl.when(role == 0)(lambda: score(**scratch))
        pl.when(role == 1)(lambda: read(**scratch))

    def result(number, dtype):
        return jax.ShapeDtypeStruct((number, take, dim), dtype)

    out, lse, some, some_lse = plgpu.kernel(
        body,
        out_type=(
            result(q.shape[0], q.dtype),
            result(q.shape[0], jnp.float32),
            result(workers + rows, jnp.float32),
            result(workers + rows, jnp.float32),
        ),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=2,
        thread_name="role",
        scratch_types=dict(
            q_smem=plgpu.SMEM((ROWS, dim), q.dtype, transforms=shape),
            k_smem=plgpu.SMEM((stages, tile, dim), k.dtype, transforms=shape),
            v_smem=plgpu.SMEM((stages, tile, dim), v.dtype, transforms=shape),
            slots_smem=plgpu.SMEM((stages, tile), jnp.int32),
            left_smem=plgpu.SMEM((ROWS, tile) if interpret else (1, 128), v.dtype),
            q_full=plgpu.Barrier(),
            k_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            v_full=plgpu.Barrier(num_barriers=stages),
            free=plgpu.Barrier(num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, at, work.slots, work.tiles, work.counts, work.pieces)
    if fused:
        return out, lse[..., 0]
    return merge_all(some, some_lse[..., 0], partials(work, kv_heads, tiling))
