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
from kernels.layer_products import Weights, chunk, depth, normed
from kernels.registers import private, unwrap, wrap

AHEAD = 2
"""Stages that are asked for at once: with more, weights came no faster (107 and 108 µs a layer)."""


def run(attended, x, weights: Weights, *, eps: float, workers: int | None = None, interpret: Any = None):
    """What `layer_products.reference` gives.

    Args:
        workers: thread blocks, which must all run at once; one for each of the GPU's multiprocessors if None.
    """
    kernels = (weights.out, weights.gate_up, weights.down, weights.following)
    norms = (None, weights.mlp_norm, None, weights.following_norm)
    workers = workers or dispatch.cores()

    def launch(which, source, residual):
        return _launch(which, source, residual, kernels, norms, eps, workers, interpret)

    if not interpret:
        _, _, x, projected = launch(range(4), attended, x)
        return x, projected
    [between] = launch([0], attended, x)  # the interpreter runs one worker after the other: none can wait
    [inner] = launch([1], between, x)
    [x] = launch([2], inner, between)
    [projected] = launch([3], x, x)
    return x, projected


def _launch(which, source, residual, kernels, norms, eps: float, workers: int, interpret: Any):
    """Results of the products `which`, each from the one before and the first from `source`.

    Args:
        residual: what is added to the first product.
    """
    from kernels.layer_lanes import UNIT, Phase, Sizes

    rows = source.shape[0]
    inputs = [kernel.shape[1] for kernel in kernels]
    phases = [
        Phase(kernels[i].shape[0] // UNIT, inputs[i], chunk(inputs[i]), gated=i == 1, normed=norms[i] is not None)
        for i in which
    ]
    stages = depth(inputs, rows)
    kept = Sizes(rows, max(inputs), max(chunk(size) for size in inputs), workers, eps)
    starts = np.cumsum([0] + [phase.units for phase in phases]).tolist()
    count, residuals = len(phases), [i % 2 == 0 for i in which]
    scales = [norms[i] for i in which if norms[i] is not None]

    def body(source_ref, residual_ref, arrived_ref, *refs, w_smem, x_smem, sums_smem, full, free):
        kernel_refs, scale_refs, out_refs = refs[:count], list(refs[count:-count]), refs[-count:]
        norm_refs = [scale_refs.pop(0) if phase.normed else None for phase in phases]
        me, role = lax.axis_index("worker"), lax.axis_index("role")
        does = _Plain(kept, role) if interpret else _Lanes(kept)

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

            done = jnp.int32(0)
            for nth, phase in enumerate(phases):
                counter = arrived_ref.at[pl.ds(nth - 1, 1)] if nth else None
                does.bring(phase, out_refs[nth - 1] if nth else source_ref, x_smem, sums_smem, norm_refs[nth], counter)
                done = each(nth, partial(used, nth), done)
                does.signal(arrived_ref, nth, count)

        pl.when(role < 2)(use)
        pl.when(role == 2)(read)

    laid = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    outs = [jax.ShapeDtypeStruct((rows, phase.units * phase.results), source.dtype) for phase in phases]
    return plgpu.kernel(
        body,
        out_type=tuple(outs),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="role",
        scratch_types=dict(
            w_smem=plgpu.SMEM((stages, UNIT, kept.chunk), source.dtype, transforms=laid),
            x_smem=plgpu.SMEM((rows, kept.stride), source.dtype),
            sums_smem=plgpu.SMEM((kept.shared,), jnp.float32),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(source, residual, jnp.zeros(4, jnp.int32), *(kernels[i] for i in which), *scales)


class _Lanes:
    """What `kernels.layer_lanes` does in registers, as operations on references."""

    def __init__(self, kept):
        self.kept = kept

    def nothing(self):
        return plgpu.layout_cast(jnp.zeros((128 * 4,), jnp.float32), private(4).layout)

    def bring(self, phase, source, x, sums, norm, counter):
        from kernels import layer_lanes

        some = [ref for ref in (norm, counter) if ref is not None]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (3 + len(some)))
        def bring(_, source, x, sums, *some):
            scale = layer_lanes.scales(phase, some[0]) if phase.normed else None
            if counter is not None:
                layer_lanes.await_all(some[-1], self.kept.workers)
            layer_lanes.bring(self.kept, phase, source, x, sums, scale)

        bring(source, x, sums, *some)

    def multiply(self, phase, w, x, stage, acc):
        from kernels import layer_lanes

        laid = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))
        kinds = laid, plgpu.RefType(), plgpu.Layout.WG_SPLAT, private(4).layout

        @plgpu.inline_mgpu(arg_types=kinds, return_type=private(4))
        def multiply(_, w, x, stage, acc):
            return wrap(layer_lanes.multiply(self.kept, phase, w, x, stage.registers.flat[0], unwrap(acc)))

        return multiply(w, x, stage, acc)

    def finish(self, phase, acc, unit, nth, sums, out, residual):
        from kernels import layer_lanes

        refs = [ref for ref in (sums, out, residual) if ref is not None]

        @plgpu.inline_mgpu(
            arg_types=(private(4).layout, *(plgpu.Layout.WG_SPLAT,) * 2, *(plgpu.RefType(),) * len(refs))
        )
        def finish(_, acc, unit, nth, *refs):
            unit, nth = (x.registers.flat[0] for x in (unit, nth))
            layer_lanes.finish(self.kept, phase, unwrap(acc), unit, nth, *refs)

        finish(acc, unit, nth, *refs)

    def signal(self, arrived, nth, count):
        from kernels import layer_lanes

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def signal(_, arrived):
            layer_lanes.signal(arrived, nth, self.kept.workers, count)

        signal(arrived)


class _Plain:
    """The same by whole arrays, for the interpreter: the first warpgroup does all of it."""

    def __init__(self, kept, role):
        self.kept, self.mine = kept, role == 0

    def nothing(self):
        return jnp.zeros((16, self.kept.rows), jnp.float32)

    def bring(self, phase, source, x, sums, norm, counter):
        del sums, counter

        @pl.when(self.mine)
        def _():
            value = source[...]
            x[:, pl.ds(0, phase.inputs)] = value if norm is None else normed(value, norm[...], self.kept.eps)

    def multiply(self, phase, w, x, stage, acc):
        w, x = w[:, pl.ds(0, phase.chunk)], x[:, pl.ds(stage * phase.chunk, phase.chunk)]
        return acc + lax.dot_general(w, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def finish(self, phase, acc, unit, nth, sums, out, residual):
        del nth, sums

        @pl.when(self.mine)
        def _():
            y, here = acc.astype(out.dtype), pl.ds(unit * phase.results, phase.results)
            y = (jax.nn.silu(y[:8]) * y[8:] if phase.gated else y).T
            out[:, here] = y if residual is None else y + residual[:, here]

    def signal(self, *_):
        pass
