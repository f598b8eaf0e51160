"""What the decode attention kernel does in registers: masking, clearing, storing and merging."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels.reference import ROWS, Mask

LOG2E = math.log2(math.e)


def full(shape, value, layout):
    """An array of one value, spread over the warpgroup as `layout` says."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def masked(logits, held, asks, mask: Mask):
    """Scaled and masked logits, in units of `log 2`: the hardware's exponential has base 2."""
    if mask.softcap is None:
        logits *= mask.scale * LOG2E
    else:
        logits = jnp.tanh(logits * (mask.scale / mask.softcap)) * (mask.softcap * LOG2E)
    return jnp.where(seen(held, asks, mask), logits, -jnp.inf)


def seen(held, asks, mask: Mask):
    """Where a slot that holds `held` is seen from `asks`."""
    there = (held >= 0) & (held <= asks)
    if mask.window is not None:
        there &= (held > asks - mask.window) | (held < mask.sinks)
    return there


def other_dtypes(q, k, v) -> str | None:
    """Why kernels for 16-bit numbers do not take these; None if they do."""
    if q.dtype == k.dtype == v.dtype and k.dtype in (jnp.bfloat16, jnp.float16):
        return None
    return f"expected bfloat16 or float16 throughout, got {q.dtype}, {k.dtype}, {v.dtype}"


def clear(v_smem, slots_smem) -> None:
    """Zero the values in empty slots: a weight of zero would let a NaN there through."""
    values = plgpu.load(v_smem, layout=plgpu.Layout.WGMMA)  # ty: ignore[missing-argument]
    held = plgpu.load(slots_smem, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)  # ty: ignore[missing-argument]
    filled = lax.broadcast_in_dim(held, values.shape, [0]) >= 0
    v_smem[...] = jnp.where(filled, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def load_rows(ref, interpret):
    """A row's queries from device memory, as the left side of a product; what is past them is of no use."""
    queries, dim = ref.shape
    if interpret:
        return jnp.pad(ref[...], ((0, ROWS - queries), (0, 0)))
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((ROWS, dim), ref.dtype, layout=layout)
    )
    def load(_, ref):
        last = mgpu.c(queries - 1, ir.IndexType.get())
        number = ir.MemRefType(ref.type).element_type
        shape = mgpu.WGMMA_LAYOUT.registers_shape((ROWS, dim))
        registers = np.empty(shape, dtype=object)
        places = mgpu.WGMMA_LAYOUT.thread_idxs((ROWS, dim))
        pair = ir.VectorType.get((2,), number)
        for at, (row, column) in zip(np.ndindex(shape), places, strict=True):
            registers[at] = vector.load(pair, ref, [arith.minui(row, last), column])
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return load(ref)


def store_rows(value, ref, count, interpret) -> None:
    """The first `count` rows of a result, from registers straight to device memory."""
    if interpret:
        ref[...] = value[: ref.shape[0]]
        return
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref

    layout = plgpu.Layout.WGMMA if value.shape[0] == ROWS else strided(value.shape)

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def store(_, value, ref, count):
        bound = arith.index_castui(ir.IndexType.get(), count.registers.flat[0])

        def one(x, at):
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, at[0], bound)):
                memref.store(x, ref, list(at))

        value.foreach(one)

    store(value, ref, jnp.asarray(count, jnp.int32))


def store_row(value, ref, interpret) -> None:
    """A row of numbers that all threads have a part of, to device memory."""
    if interpret:
        ref[...] = value
        return
    from jaxlib.mlir.dialects import memref

    layout = plgpu.Layout.WGMMA.reduce(0)

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def store(_, value, ref):
        value.foreach(lambda x, at: memref.store(x, ref, list(at)))

    store(value, ref)


def strided(shape):
    """A layout in which neighbours in memory belong to one thread."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=math.gcd(math.prod(shape) // 128, 4))


def signal(counter) -> None:
    """Count one worker up, after all it has stored. The counter is `i32[1]` in device memory."""
    from jax.experimental.mosaic.gpu import utils

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def count(_, ref):
        utils.warpgroup_barrier()
        utils.SemaphoreRef(utils.memref_ptr(ref)).signal(1, memory_scope="gpu")

    count(counter)


def await_all(counter, number) -> None:
    """Wait until `number` workers have signalled, then see what they stored, and count down to zero again."""
    from jax.experimental.mosaic.gpu import utils

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def wait(_, ref, number):
        utils.SemaphoreRef(utils.memref_ptr(ref)).wait(number.registers.flat[0], memory_scope="gpu")

    wait(counter, number)


def merge_some(outs, lses, number):
    """The first `number` partials of some queries, weighed by their softmax denominators, which each column has."""
    layout = strided(outs[0].shape)
    lses = [plgpu.load(ref, layout=layout, optimized=False) for ref in lses]  # ty: ignore[missing-argument]
    outs = [plgpu.load(ref, layout=layout, optimized=False) for ref in outs]  # ty: ignore[missing-argument]
    peak = lses[0]
    for lse in lses[1:]:
        peak = jnp.maximum(peak, lse)
    base = jnp.where(peak == -jnp.inf, 0.0, peak)
    total, mixed = 0.0, 0.0
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        weight = jnp.exp(lse - base) * jnp.where(i < number, 1.0, 0.0)
        total += weight
        mixed += weight * out
    some = jnp.where(total > 0, total, 1.0)
    return mixed / some, jnp.where(total > 0, base + jnp.log(some), -jnp.inf)


def merge_all(
    out: Float[Array, "partials queries head_dim"],
    lse: Float[Array, "partials queries"],
    parts: Int[Array, "rows parts"],
) -> tuple[Float[Array, "rows queries head_dim"], Float[Array, "rows queries"]]:
    """A row's partials, weighed by their softmax denominators. Source: Ye et al. 2024, "Cascade Inference"."""
    there = parts >= 0
    at = jnp.maximum(parts, 0)
    lse = jnp.where(there[..., None], lse[at], -jnp.inf)
    peak = lse.max(1, keepdims=True)
    weights = jnp.exp(lse - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = weights.sum(1)
    out = jnp.where(there[..., None, None], out[at], 0.0)
    out = (out * weights[..., None]).sum(1) / jnp.where(total > 0, total, 1.0)[..., None]
    return out, jnp.where(total > 0, peak[:, 0] + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
