"""The kernel of decode attention over packed codes: one warpgroup of a worker reads tiles, the others see them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.decode_lanes import Shape
from kernels.decode_parts import LOG2E, await_all, masked, merge_all, signal
from kernels.decode_plan import Plan, Tiling, partials
from kernels.packed import Packed, unpack_tokens
from kernels.reference import Mask
from kernels.registers import private, unwrap, wrap

BOX = 256
"""Most numbers that the copy engine takes along one axis."""


def run(q, k: Packed, v: Packed, work: Plan, mask: Mask, *, tiling: Tiling, scorers: int, interpret: Any):
    """`out [rows, queries, head_dim]` and `lse [rows, queries]` for `q [rows, queries, head_dim]`."""
    rows, queries, dim = q.shape
    tile, stages, workers, kv_heads = tiling.tile, tiling.stages, tiling.workers, rows // work.slots.shape[0]
    size, box = tile * k.bits // 8, min(tile, BOX)
    shape = Shape(dim, queries, 4 * scorers, size, k.bits, k.span)
    fused, offset = not interpret, k.offsets is not None
    laid = (plgpu.TilingTransform((8, shape.swizzle)), plgpu.SwizzleTransform(shape.swizzle))
    names = ["k", "v", "slots", "k_scales", "v_scales", *(["k_offsets", "v_offsets"] if offset else [])]
    sources: list[Any] = [k.codes, v.codes, work.slots, k.scales, v.scales, *((k.offsets, v.offsets) if offset else ())]

    def body(q_ref, asks_ref, tiles_ref, counts_ref, pieces_ref, arrived_ref, *refs, **scratch):
        inputs = dict(zip(names, refs[: len(names)], strict=True))
        out_ref, lse_ref, some_ref, some_lse_ref = refs[len(names) :]
        me, role = lax.axis_index("worker"), lax.axis_index("role")
        first, stop, entry, leave, sharing = (pieces_ref[me, i] for i in range(5))

        def cut(row):
            b = lax.div(row, kv_heads)
            begin = jnp.where(row == first, entry, 0)
            return b, begin, lax.cond(row == stop - 1, lambda: leave, lambda: counts_ref[b])

        def read(k_full, v_full, free, **smem):
            def row_loop(row, done):
                b, begin, end = cut(row)

                def step(i, done):
                    stage = lax.rem(done, stages)
                    early = (row == first) & (done < stages)
                    number = lax.cond(early, lambda: pieces_ref[me, 5 + done], lambda: tiles_ref[row, i])

                    @pl.when(done >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[stage])

                    def copy(name, line, full):
                        here = pl.ds(number * size, size)
                        if name in "kv":
                            plgpu.copy_gmem_to_smem(inputs[name].at[line, here], smem[name].at[stage], full.at[stage])
                            return
                        for start in range(0, tile, box):
                            source = inputs[name].at[line, pl.ds(number * tile + start, box)]
                            plgpu.copy_gmem_to_smem(source, smem[name].at[stage, pl.ds(start, box)], full.at[stage])

                    copy("k", row, k_full)
                    copy("slots", b, k_full)
                    for name in names[3:]:
                        if name.startswith("k"):
                            copy(name, row, k_full)
                    copy("v", row, v_full)
                    for name in names[3:]:
                        if name.startswith("v"):
                            copy(name, row, v_full)
                    return done + 1

                return lax.fori_loop(begin, end, step, done)

            done = lax.fori_loop(first, stop, row_loop, jnp.int32(0))

            @pl.loop(jnp.maximum(done - stages, 0), done)
            def _(last):
                plgpu.barrier_wait(free.at[lax.rem(last, stages)])

        def score(k_full, v_full, free, sums, stats, **smem):
            lanes: Any = _Plain(mask, k, queries, dim, role) if interpret else _Lanes(shape, mask, laid, offset)

            def row_loop(row, done):
                b, begin, end = cut(row)
                whole = (begin == 0) & (end == counts_ref[b]) & fused
                fixed, state = lanes.begin(q_ref.at[row], asks_ref.at[b])

                def step(i, state):
                    stage = lax.rem(done + i - begin, stages)
                    plgpu.barrier_wait(k_full.at[stage])
                    plgpu.barrier_wait(v_full.at[stage])
                    state = lanes.step([smem[name].at[stage] for name in names], fixed, state)
                    plgpu.barrier_arrive(free.at[stage])
                    return state

                state = lax.fori_loop(begin, end, step, state)
                lanes.spill(state, sums, stats)
                pl.when(whole)(lambda: lanes.collect(sums, stats, out_ref.at[row], lse_ref.at[row]))
                part = me + row
                no = jnp.logical_not(whole)
                pl.when(no)(lambda: lanes.collect(sums, stats, some_ref.at[part], some_lse_ref.at[part]))
                lanes.meet()
                if fused:
                    early = (role == 0) & no & (begin > 0)
                    pl.when(early)(lambda: signal(arrived_ref.at[pl.ds(row, 1)]))
                return done + end - begin

            lax.fori_loop(first, stop, row_loop, jnp.int32(0))
            if not fused:
                return

            # The worker in whose piece a row begins merges it: that is its last row, so nobody waits for it.
            @pl.when((role == 0) & (sharing > 1) & ((stop - 1 > first) | (entry == 0)))
            def _():
                row = stop - 1
                await_all(arrived_ref.at[pl.ds(row, 1)], sharing - 1)
                lanes.gather(some_ref, some_lse_ref, me + row, sharing, out_ref.at[row], lse_ref.at[row])

            @pl.loop(0, lax.div(rows + workers - 1 - me, workers))
            def _(i):
                row = me + i * workers
                empty = (role == 0) & (counts_ref[lax.div(row, kv_heads)] == 0)
                pl.when(empty)(lambda: lanes.clear(out_ref.at[row], lse_ref.at[row]))

        pl.when(role < scorers)(lambda: score(**scratch))
        pl.when(role == scorers)(lambda: read(**scratch))

    boxes = tile // box
    buffers = {
        name: plgpu.SMEM((stages, size, dim), jnp.uint8, transforms=laid)
        if name in "kv"
        else plgpu.SMEM((stages, tile), x.dtype)
        for name, x in zip(names, sources, strict=True)
    }
    number = workers + rows
    out, lse, some, some_lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((rows, queries, dim), q.dtype),
            jax.ShapeDtypeStruct((rows, queries), jnp.float32),
            jax.ShapeDtypeStruct((number, queries, dim), jnp.float32),
            jax.ShapeDtypeStruct((number, queries), jnp.float32),
        ),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=scorers + 1,
        thread_name="role",
        scratch_types=dict(
            **buffers,
            sums=plgpu.SMEM((shape.warps * queries * dim,), jnp.float32),
            stats=plgpu.SMEM((shape.warps * 3 * 8 * shape.eights,), jnp.float32),
            k_full=plgpu.Barrier(num_arrivals=1 + (2 + offset) * boxes, num_barriers=stages),
            v_full=plgpu.Barrier(num_arrivals=1 + (1 + offset) * boxes, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=scorers, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, work.asks, work.tiles, work.counts, work.pieces, work.arrived, *sources)
    if fused:
        return out, lse
    return merge_all(some, some_lse, partials(work, kv_heads, tiling))


class _Lanes:
    """What `kernels.decode_steps` does in registers, as operations on arrays of `128 * n` numbers, `n` a thread."""

    def __init__(self, shape: Shape, mask: Mask, laid, offset: bool):
        self.shape, self.mask, self.laid, self.offset = shape, mask, laid, offset

    def begin(self, q_ref, asks_ref):
        from kernels import decode_lanes

        types = private(self.shape.fixed, jnp.int32), private(self.shape.state, jnp.float32)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=types)
        def begin(_, q, asks):
            fixed, state = decode_lanes.begin(self.shape, q, asks)
            return wrap(fixed, True), wrap(state)

        return begin(q_ref, asks_ref)

    def step(self, refs, fixed, state):
        from kernels import decode_steps

        kinds = [plgpu.RefType(self.laid)] * 2 + [plgpu.RefType()] * (len(refs) - 2)
        layouts = [x.layout for x in (private(self.shape.fixed, jnp.int32), private(self.shape.state))]

        @plgpu.inline_mgpu(arg_types=(*kinds, *layouts), return_type=private(self.shape.state))
        def step(_, k, v, slots, *rest):
            *rest, fixed, state = rest
            offsets = rest[2:4] if self.offset else None
            regs = decode_steps.step(
                self.shape, self.mask, k, v, slots, rest[:2], offsets, unwrap(fixed), unwrap(state)
            )
            return wrap(regs)

        return step(*refs, fixed, state)

    def spill(self, state, sums, stats):
        from kernels import decode_steps

        layout = private(self.shape.state).layout

        @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), plgpu.RefType()))
        def spill(_, state, sums, stats):
            decode_steps.spill(self.shape, unwrap(state), sums, stats)

        spill(state, sums, stats)

    def collect(self, *refs):
        from jax.experimental.mosaic.gpu import utils

        from kernels import decode_steps

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4)
        def collect(_, sums, stats, *refs):
            decode_steps.collect(self.shape, *(utils.memref_ptr(x) for x in (sums, stats)), *refs)

        collect(*refs)

    def meet(self):
        from kernels import decode_steps

        @plgpu.inline_mgpu()
        def meet(_):
            decode_steps.meet(self.shape)

        meet()

    def gather(self, outs, lses, first, count, out, lse):
        from kernels import decode_steps

        kinds = (plgpu.RefType(),) * 2, (plgpu.Layout.WG_SPLAT,) * 2, (plgpu.RefType(),) * 2

        @plgpu.inline_mgpu(arg_types=sum(kinds, ()))
        def gather(_, outs, lses, first, count, out, lse):
            first, count = (x.registers.flat[0] for x in (first, count))
            decode_steps.gather(self.shape, outs, lses, first, count, out, lse)

        gather(outs, lses, first, count, out, lse)

    def clear(self, *refs):
        from kernels import decode_steps

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
        def clear(_, *refs):
            decode_steps.clear(self.shape, *refs)

        clear(*refs)


class _Plain:
    """The same by whole arrays, for the interpreter: the first warpgroup sees all of a tile."""

    def __init__(self, mask: Mask, k: Packed, queries: int, dim: int, role):
        self.mask, self.k, self.queries, self.dim, self.mine = mask, k, queries, dim, role == 0

    def begin(self, q_ref, asks_ref):
        empty = jnp.zeros((self.queries, self.dim)), jnp.full(self.queries, -1e30), jnp.zeros(self.queries)
        return (q_ref[...].astype(jnp.float32), asks_ref[...][: self.queries, None]), empty

    def step(self, refs, fixed, state):
        (q, asks), (sums, peak, total) = fixed, state
        k, v, slots, *rest = (ref[...] for ref in refs)
        rest = [x.astype(jnp.float32) for x in rest]
        k, v = (unpack_tokens(x, self.k.bits, self.k.group).astype(jnp.float32) - self.k.centre for x in (k, v))
        products = _dot(q, k.T) * rest[0][None]
        if len(rest) > 2:
            products += q.sum(1, keepdims=True) * rest[2][None]
        logits = masked(products, slots[None], asks, self.mask)
        top = jnp.maximum(peak, logits.max(1))
        weights, old = jnp.exp2(logits - top[:, None]), jnp.exp2(peak - top)
        v = v * rest[1][:, None] + (rest[3][:, None] if len(rest) > 2 else 0.0)
        new = _dot(weights, jnp.where(slots[:, None] >= 0, v, 0.0))
        return sums * old[:, None] + new, top, total * old + weights.sum(1)

    def spill(self, state, sums, stats):
        del sums, stats
        self.state = state

    def collect(self, sums_ref, stats_ref, out_ref, lse_ref):
        sums, peak, total = self.state
        some = jnp.where(total > 0, total, 1.0)

        @pl.when(self.mine)
        def _():
            out_ref[...] = (sums / some[:, None]).astype(out_ref.dtype)
            lse_ref[...] = jnp.where(total > 0, peak / LOG2E + jnp.log(some), -jnp.inf)

    def meet(self):
        pass


def _dot(a, b):
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision="highest", preferred_element_type=jnp.float32)
