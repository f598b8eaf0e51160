"""The kernel of decode attention: one warpgroup of each worker reads tiles of K/V, the other scores and sums them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.decode_parts import (
    LOG2E,
    await_all,
    clear,
    full,
    load_rows,
    masked,
    merge_all,
    merge_some,
    signal,
    store_row,
    store_rows,
)
from kernels.decode_plan import Plan, Tiling, partials
from kernels.reference import EIGHT, ROWS, Mask

CHUNK = 128
"""Columns of the values that are summed at once, so that the sums fit in registers."""


def run(q, k, v, work: Plan, mask: Mask, new: Any = None, *, tiling: Tiling, kv_heads: int, interpret: Any):
    """`out [rows, queries, head_dim]` and `lse [rows, queries]` for `q [rows, queries, head_dim]`.

    Args:
        new: a token that each query sees besides the slots of the plan: keys and values `[rows, head_dim]`, and the
            slot `[batch]` that each is written to, -1 for none. `k` and `v` are then references.
    """
    rows, queries, dim = q.shape
    tile, stages, workers = tiling.tile, tiling.stages, tiling.workers
    take = -(-queries // EIGHT) * EIGHT
    flat = q.reshape(rows * queries, dim)
    fused = not interpret
    swizzle = plgpu.find_swizzle(dim * 16)
    shape = (plgpu.TilingTransform((EIGHT, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    chunks = [(start, min(CHUNK, dim - start)) for start in range(0, dim, CHUNK)]
    across, down = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)

    def body(
        q_ref, k_ref, v_ref, asks_ref, slots_ref, tiles_ref, counts_ref, pieces_ref, arrived_ref, *refs, **scratch
    ):
        new_refs, (out_ref, lse_ref, some_ref, some_lse_ref) = refs[:-4], refs[-4:]
        me = lax.axis_index("worker")
        first, stop, entry, leave, sharing, *starts = (pieces_ref[me, i] for i in range(5 + stages))

        def cut(row):
            b = lax.div(row, kv_heads)
            begin = jnp.where(row == first, entry, 0)
            return b, begin, lax.cond(row == stop - 1, lambda: leave, lambda: counts_ref[b])

        def read(k_smem, v_smem, slots_smem, k_full, v_full, free, **_):
            def row_loop(row, done):
                b, begin, end = cut(row)

                def step(i, done):
                    stage = lax.rem(done, stages)
                    early = (row == first) & (done < stages)
                    number = lax.cond(early, lambda: pick(starts, done), lambda: tiles_ref[row, i])

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

        def score(q_smem, k_smem, v_smem, slots_smem, left_smem, k_full, v_full, free):
            def begun(row, begin):
                """Bring a row's queries.

                Returns the positions they ask from, and sums, largest logit and weights' sum before the first tile:
                those of the new token, in one worker.
                """
                b = lax.div(row, kv_heads)
                asking = load_rows(q_ref.at[pl.ds(row * queries, queries)], interpret)
                asks = plgpu.load(asks_ref.at[b], layout=down, optimized=False)  # ty: ignore[missing-argument]
                news = [
                    [load(ref.at[row, pl.ds(start, size)]) for start, size in chunks] for ref in new_refs[:2]
                ]  # asked for before anything waits
                slot = new_refs[2][b] if new_refs else -1
                q_smem[...] = asking
                plgpu.commit_smem()
                sums = tuple(full((ROWS, size), 0.0, plgpu.Layout.WGMMA) for _, size in chunks)
                peak, total = full((ROWS,), -jnp.inf, down), full((ROWS,), 0.0, down)
                if not new_refs:
                    return asks, (sums, peak, total)

                def spread(value):
                    return lax.broadcast_in_dim(value.astype(jnp.float32), (ROWS, value.shape[0]), [1])

                products = total
                for (start, size), value in zip(chunks, news[0], strict=True):
                    part = asking if size == dim else asking[:, start : start + size]
                    products += (part.astype(jnp.float32) * spread(value)).sum(axis=1)
                mine = (begin == 0) & (slot >= 0)

                @pl.when(mine)
                def _():
                    for values, ref in zip(news, (k_ref, v_ref), strict=True):
                        for (start, size), value in zip(chunks, values, strict=True):
                            store_row(value, ref.at[row, slot, pl.ds(start, size)], interpret)

                own = total + jnp.where(mine, 1.0, 0.0)
                sums = tuple(
                    jnp.where(lax.broadcast_in_dim(own, old.shape, [0]) > 0, spread(value), old)
                    for value, old in zip(news[1], sums, strict=True)
                )
                return asks, (sums, jnp.where(own > 0, masked(products, asks, asks, mask), peak), own)

            def load(ref):
                return plgpu.load(ref, layout=across, optimized=False)  # ty: ignore[missing-argument]

            def finish(row, state, part):
                """Store a row's results, or number `part` of its partial ones."""
                sums, peak, total = state
                some = jnp.where(total > 0, total, 1.0)
                lse = jnp.where(total > 0, peak / LOG2E + jnp.log(some), -jnp.inf)

                def store(out_ref, lse_ref):
                    for (start, size), part in zip(chunks, sums, strict=True):
                        here = (slice(None), pl.ds(start, size))
                        out = part / lax.broadcast_in_dim(some, part.shape, [0])
                        spread = lax.broadcast_in_dim(lse, part.shape, [0])
                        store_rows(out.astype(out_ref.dtype), out_ref.at[*here], queries, interpret)
                        store_rows(spread, lse_ref.at[*here], queries, interpret)

                if part is None:
                    here = pl.ds(row * queries, queries)
                    store(out_ref.at[here], lse_ref.at[here])
                else:
                    store(some_ref.at[part], some_lse_ref.at[part])

            def row_loop(row, done):
                b, begin, end = cut(row)
                whole = (begin == 0) & (end == counts_ref[b]) & fused
                asks, empty = begun(row, begin)
                asks = lax.broadcast_in_dim(asks, (ROWS, tile), [0])

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

                state = lax.fori_loop(begin, end, step, empty)
                pl.when(whole)(lambda: finish(row, state, None))

                @pl.when(jnp.logical_not(whole))
                def _():
                    finish(row, state, me + row)
                    if fused:
                        pl.when(begin > 0)(lambda: signal(arrived_ref.at[pl.ds(row, 1)]))

                return done + end - begin

            lax.fori_loop(first, stop, row_loop, jnp.int32(0))

            def merge_shared():
                """The worker in whose piece a row begins merges it: that is its last row, so nobody waits for it."""

                @pl.when((sharing > 1) & ((stop - 1 > first) | (entry == 0)))
                def _():
                    row = stop - 1
                    await_all(arrived_ref.at[pl.ds(row, 1)], sharing - 1)
                    parts = [me + row + jnp.minimum(i, sharing - 1) for i in range(tiling.most(kv_heads))]

                    @pl.loop(0, take // EIGHT)
                    def _(turn):
                        for start, size in chunks:
                            here = (pl.ds(turn * EIGHT, EIGHT), pl.ds(start, size))
                            out, lse = merge_some(
                                [some_ref.at[part, *here] for part in parts],
                                [some_lse_ref.at[part, *here] for part in parts],
                                sharing,
                            )
                            there = (pl.ds(row * queries + turn * EIGHT, EIGHT), pl.ds(start, size))
                            count = jnp.minimum(queries - turn * EIGHT, EIGHT)
                            store_rows(out.astype(out_ref.dtype), out_ref.at[*there], count, interpret)
                            store_rows(lse, lse_ref.at[*there], count, interpret)

            if fused:
                merge_shared()

            @pl.loop(0, lax.div(rows + workers - 1 - me, workers))
            def _(i):
                row = me + i * workers

                @pl.when(counts_ref[lax.div(row, kv_heads)] == 0)
                def _():
                    finish(row, begun(row, jnp.int32(0))[1], None if fused else workers + rows + row)

        role = lax.axis_index("role")
        pl.when(role == 0)(lambda: score(**scratch))
        pl.when(role == 1)(lambda: read(**scratch))

    number, each = (workers + rows, take) if fused else (workers + 2 * rows, queries)
    out, lse, some, some_lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((rows * queries, dim), q.dtype),
            jax.ShapeDtypeStruct((rows * queries, dim), jnp.float32),
            jax.ShapeDtypeStruct((number, each, dim), jnp.float32),
            jax.ShapeDtypeStruct((number, each, dim), jnp.float32),
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
            k_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            v_full=plgpu.Barrier(num_barriers=stages),
            free=plgpu.Barrier(num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(flat, k, v, work.asks, work.slots, work.tiles, work.counts, work.pieces, work.arrived, *(new or ()))
    if fused:
        return out.reshape(q.shape), lse[:, 0].reshape(rows, queries)
    alone = workers + rows + jnp.arange(rows, dtype=jnp.int32)[:, None]
    empty = jnp.repeat(work.counts == 0, kv_heads)[:, None]
    parts = jnp.where(empty, -1, partials(work, kv_heads, tiling))
    out, lse = merge_all(some, some_lse[..., 0], jnp.concatenate([jnp.where(empty, alone, -1), parts], axis=1))
    return out.astype(q.dtype), lse


def pick(values, index):
    """`values[index]` of a few scalars."""
    chosen = values[0]
    for i, value in enumerate(values[1:], 1):
        chosen = jnp.where(index == i, value, chosen)
    return chosen
