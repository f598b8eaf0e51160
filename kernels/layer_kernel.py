"""The kernel of a layer's products: one warpgroup of each worker reads weights, two multiply by them.

Four products follow each other, and each needs all of the one before. Workers wait for each other between them, but the
reading warpgroup does not: it has the next product's weights in shared memory by then.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch
from kernels.decode_parts import merge_all
from kernels.layer_attention import Cached, Sight, reach, stretch
from kernels.layer_parts import Lanes, Plain
from kernels.layer_products import Weights, chunk, depth
from kernels.reference import Mask

Seen = tuple[Sight, tuple[Any, ...]]
"""Sizes of a new token's attention; and references to keys and values, what slots hold, from which to which some are
seen, where the token goes, its position and its angles."""

AHEAD = 2
"""Stages that are asked for at once: with more, weights came no faster (107 and 108 µs a layer)."""


def run(attended, x, weights: Weights, *, eps: float, workers: int | None = None, interpret: Any = None):
    """What `layer_products.reference` gives.

    Args:
        workers: thread blocks, which must all run at once; one for each of the GPU's multiprocessors if None.
    """
    launch = partial(_launch, weights=weights, eps=eps, workers=workers or dispatch.cores(), interpret=interpret)
    if not interpret:
        _, _, x, projected = launch(range(4), attended, x)
        return x, projected
    [between] = launch([0], attended, x)  # the interpreter runs one worker after the other: none can wait
    [inner] = launch([1], between, x)
    [x] = launch([2], inner, between)
    [projected] = launch([3], x, x)
    return x, projected


def run_step(
    qkv,
    x,
    cached: Cached,
    weights: Weights,
    mask: Mask,
    *,
    eps: float,
    workers: int | None = None,
    interpret: Any = None,
):
    """What `layer_products.reference_step` gives; keys and values are written in place where they may be."""
    (rows, outputs), (kept, slots, dim) = qkv.shape, cached.k.shape
    workers, kv_heads = workers or dispatch.cores(), kept // rows
    sight = Sight(rows, outputs // dim - 2 * kv_heads, kv_heads, dim, slots, workers, mask)
    held, bounds = reach(cached, mask)
    around = (held, bounds, cached.to, cached.at, cached.cos, cached.sin)
    launch = partial(_launch, weights=weights, eps=eps, workers=workers, interpret=interpret)

    def step(refs):
        x_ref, projected_ref, k_ref, v_ref = refs
        seen = (sight, (k_ref, v_ref, *around))
        if not interpret:
            *_, x_ref[...], projected_ref[...] = launch(range(4), qkv, x, seen=seen)
            return
        _, _, outs, lses = launch([], qkv, x, seen=seen)
        _, count = stretch(bounds[:, 0], bounds[:, 1], sight.splits)
        nth = jnp.arange(sight.splits, dtype=jnp.int32)[None]
        first = sight.splits * jnp.arange(sight.items, dtype=jnp.int32)[:, None]
        parts = jnp.where(nth < jnp.repeat(count, kv_heads)[:, None], first + nth, -1)
        attended = merge_all(outs, lses, parts)[0].astype(qkv.dtype).reshape(rows, -1)
        x_ref[...], projected_ref[...] = run(attended, x, weights, eps=eps, workers=workers, interpret=interpret)

    empty = jnp.zeros_like(x), jnp.zeros((rows, weights.following.shape[0]), x.dtype)  # never made: all is written
    return pl.run_state(step)((*empty, cached.k, cached.v))


def _launch(
    which,
    source,
    residual,
    weights: Weights,
    eps: float,
    workers: int,
    interpret: Any,
    seen: Seen | None = None,
):
    """Results of the products `which`, each from the one before and the first from `source`.

    Args:
        residual: what is added to the first product.
        seen: attention that comes before them, of `source`, then queries, keys and values. Its results come first too:
            of rows' K/V heads, merged, and of workers.
    """
    from kernels.layer_lanes import UNIT, Phase, Sizes

    kernels = (weights.out, weights.gate_up, weights.down, weights.following)
    norms = (None, weights.mlp_norm, None, weights.following_norm)
    rows = source.shape[0]
    inputs = [kernel.shape[1] for kernel in kernels]
    phases = [
        Phase(kernels[i].shape[0] // UNIT, inputs[i], chunk(inputs[i]), gated=i == 1, normed=norms[i] is not None)
        for i in which
    ]
    kept = Sizes(rows, max(inputs), max(chunk(size) for size in inputs), workers, eps)
    sight, beside = seen or (None, ())
    lines = max(rows, -(-4 * sight.scratch // (2 * kept.stride))) if sight else rows
    stages, arrived = depth(inputs, lines), jnp.zeros(5 + (sight.items if sight else 0), jnp.int32)
    # Counters begin at zero and are left so: XLA may give all calls the same zeros. No two calls may run at the same
    # time, as a model's layers never do, nor independent kernels of one XLA program.
    starts = np.cumsum([0] + [phase.units for phase in phases]).tolist()
    count, residuals = len(phases), [i % 2 == 0 for i in which]
    scales = [norms[i] for i in which if norms[i] is not None]

    def body(source_ref, residual_ref, arrived_ref, *refs, w_smem, x_smem, sums_smem, full, free):
        cuts = np.cumsum([0, len(beside), count, len(scales), 4 if sight else 0]).tolist()
        beside_refs, kernel_refs, scale_refs, seen_refs, out_refs = (
            list(refs[start:stop]) for start, stop in zip(cuts, [*cuts[1:], None], strict=True)
        )
        attended_ref = seen_refs[0] if sight else source_ref
        norm_refs = [scale_refs.pop(0) if phase.normed else None for phase in phases]
        me, role = lax.axis_index("worker"), lax.axis_index("role")
        does = Plain(kept, role) if interpret else Lanes(kept)

        def see(sight: Sight):
            """This worker's part of the attention; the last one of an item merges its parts."""
            k_ref, v_ref, held_ref, bounds_ref, to_ref, at_ref, cos_ref, sin_ref = beside_refs
            _, lse_ref, outs_ref, lses_ref = seen_refs
            item, split = lax.div(me, sight.splits), lax.rem(me, sight.splits)

            @pl.when(item < sight.items)
            def _():
                b, head = lax.div(item, sight.kv_heads), lax.rem(item, sight.kv_heads)
                piece, sharing = stretch(bounds_ref[b, 0], bounds_ref[b, 1], sight.splits)
                first = bounds_ref[b, 0] + split * piece
                stop, to = jnp.minimum(first + piece, bounds_ref[b, 1]), to_ref[b]
                angles, slots = (source_ref.at[b], cos_ref.at[b], sin_ref.at[b]), (k_ref.at[item], v_ref.at[item])

                @pl.when(split < sharing)
                def _():
                    mine = (to >= first) & (to < stop)
                    pl.when(mine)(lambda: does.append(sight, head, to, *angles, *slots))
                    scalars, given = (head, first, stop, at_ref[b]), (*angles, *slots, held_ref.at[b])
                    does.attend(sight, scalars, given, x_smem, outs_ref.at[me], lses_ref.at[me])
                    counters = (arrived_ref.at[pl.ds(i, 1)] for i in (5 + item, 4))
                    places = sums_smem.at[pl.ds(0, 1)], outs_ref, lses_ref, attended_ref.at[item], lse_ref.at[item]
                    does.merge(sight, item * sight.splits, sharing, *counters, *places)

        def each(nth, one, done):
            """Run `one(i, unit, done)` for this worker's units: all take turns, from where the last product ended."""
            units = phases[nth].units
            first = lax.rem(me + workers - starts[nth] % workers, workers)
            mine = lax.div(units - first + workers - 1, workers)
            return lax.fori_loop(0, mine, lambda i, done: one(i, first + i * workers, done), done)

        def read():
            def brought(nth, i, unit, done):
                del i
                phase, half = phases[nth], UNIT // 2

                def step(j, done):
                    stage, here = lax.rem(done, stages), pl.ds(j * phase.chunk, phase.chunk)
                    pl.when(done >= stages)(lambda: plgpu.barrier_wait(free.at[stage]))
                    pl.when(done >= AHEAD)(lambda: plgpu.barrier_wait(full.at[lax.rem(done - AHEAD, stages)]))
                    for i in range(2):
                        at = unit * half + i * phase.units * half if phase.gated else unit * UNIT + i * half
                        to = w_smem.at[stage, pl.ds(i * half, half), pl.ds(0, phase.chunk)]
                        plgpu.copy_gmem_to_smem(kernel_refs[nth].at[pl.ds(at, half), here], to, full.at[stage])
                    return done + 1

                return lax.fori_loop(0, phase.inputs // phase.chunk, step, done)

            done = jnp.int32(0)
            for nth in range(count):
                done = each(nth, partial(brought, nth), done)
            pl.loop(jnp.maximum(done - AHEAD, 0), done)(lambda i: plgpu.barrier_wait(full.at[lax.rem(i, stages)]))
            pl.loop(jnp.maximum(done - stages, 0), done)(lambda i: plgpu.barrier_wait(free.at[lax.rem(i, stages)]))

        def use():
            def used(nth, i, unit, done):
                phase = phases[nth]

                def step(j, carry):
                    done, acc = carry
                    stage = lax.rem(done, stages)
                    plgpu.barrier_wait(full.at[stage])
                    acc = does.multiply(phase, w_smem.at[stage], x_smem, j, acc)
                    plgpu.barrier_arrive(free.at[stage])
                    return done + 1, acc

                done, acc = lax.fori_loop(0, phase.inputs // phase.chunk, step, (done, does.nothing()))
                added = (out_refs[0] if nth else residual_ref) if residuals[nth] else None
                does.finish(phase, acc, unit, i, sums_smem, out_refs[nth], added)
                return done

            if sight:
                see(sight)
            done = jnp.int32(0)
            for nth, phase in enumerate(phases):
                waits = (arrived_ref.at[pl.ds(nth - 1, 1)], workers) if nth else None
                if not nth and sight:
                    waits = (arrived_ref.at[pl.ds(4, 1)], sight.items)
                brought = out_refs[nth - 1] if nth else attended_ref
                does.bring(phase, brought, x_smem, sums_smem, norm_refs[nth], waits)
                done = each(nth, partial(used, nth), done)
                does.signal(arrived_ref, nth, 5 if nth == count - 1 else 0)

        pl.when(role < 2)(use)
        pl.when(role == 2)(read)

    laid = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    outs = [jax.ShapeDtypeStruct((rows, phase.units * phase.results), source.dtype) for phase in phases]
    if sight:
        shapes = [(n, sight.group, *rest) for n in (sight.items, workers) for rest in ((sight.dim,), ())]
        dtypes = (source.dtype, *(jnp.float32,) * 3)
        outs = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes, strict=True)] + outs
    return plgpu.kernel(
        body,
        out_type=tuple(outs),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="role",
        scratch_types=dict(
            w_smem=plgpu.SMEM((stages, UNIT, kept.chunk), source.dtype, transforms=laid),
            x_smem=plgpu.SMEM((lines, kept.stride), source.dtype),
            sums_smem=plgpu.SMEM((kept.shared,), jnp.float32),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(source, residual, arrived, *beside, *(kernels[i] for i in which), *scales)
