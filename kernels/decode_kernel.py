"""The kernel of decode attention: one warpgroup of each worker reads tiles of K/V, the other scores and sums them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.decode_parts import EIGHT, LOG2E, await_all, clear, full, masked, merge_all, merge_some, signal, store_rows
from kernels.decode_plan import ROWS, Plan, Tiling, partials
from kernels.reference import Mask

CHUNK = 128
"""Columns of the values that are summed at once, so that the sums fit in registers."""


def run(q, k, v, work: Plan, mask: Mask, each: int, *, tiling: Tiling, kv_heads: int, interpret: Any):
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
        asks_ref,
        slots_ref,
        tiles_ref,
        counts_ref,
        pieces_ref,
        arrived_ref,
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
                    number = lax.cond(early, lambda: pieces_ref[me, 5 + done], lambda: tiles_ref[row, i])

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
            def row_loop(row, done):
                b, begin, end = cut(row)
                eights, place = home(row)
                plgpu.copy_gmem_to_smem(q_ref.at[eights], q_smem.at[:take], q_full)
                whole = (begin == 0) & (end == counts_ref[b]) & fused
                asks = plgpu.load(asks_ref.at[b], layout=down, optimized=False)  # ty: ignore[missing-argument]
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
                        pl.when(begin > 0)(lambda: signal(arrived_ref.at[pl.ds(row, 1)]))

                return done + end - begin

            lax.fori_loop(first, stop, row_loop, jnp.int32(0))
            if not fused:
                return

            # The worker in whose piece a row begins merges it: that is its last row, so nobody waits for it.
            @pl.when((sharing > 1) & ((stop - 1 > first) | (entry == 0)))
            def _():
                row = stop - 1
                await_all(arrived_ref.at[pl.ds(row, 1)], sharing - 1)
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
    )(q, k, v, work.asks, work.slots, work.tiles, work.counts, work.pieces, work.arrived)
    if fused:
        return out, lse[..., 0]
    return merge_all(some, some_lse[..., 0], partials(work, kv_heads, tiling))
