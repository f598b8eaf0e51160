"""Attention of many queries on a Hopper GPU, in Pallas Mosaic GPU: prompts, and what follows them in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels.decode_parts import LOG2E, clear, full, other_dtypes, seen
from kernels.reference import EIGHT, ROWS, Mask, Partial
from kernels.tuned import tuned

PAIR = 2 * ROWS
"""Queries of a thread block: two warpgroups, one of which multiplies while the other takes exponentials."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of the kernel; static, chosen by device and shape.

    Args:
        tile: slots that are read and scored at once, a multiple of 64.
        stages: tiles in flight to each thread block.
    """

    tile: int = 128
    stages: int = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """Which tiles of slots each block of queries sees: made once for all layers with one mask.

    Args:
        asks: the position of each query, -1 in the padding of the last block.
        slots: the position that each slot holds, -1 where it is empty and in the padding of the last tile.
        numbers: of each block, the tiles that all its queries see whole, then those that some see in part.
        whole: how many are seen whole.
        counts: how many are seen at all.
    """

    __no_type_check__ = True  # read by jaxtyping's import hook in the tests: inside JAX leaves may be placeholders
    asks: Int[Array, "batch padded"]
    slots: Int[Array, "batch padded_slots"]
    numbers: Int[Array, "batch blocks tiles"]
    whole: Int[Array, "batch blocks"]
    counts: Int[Array, "batch blocks"]


def tiles(
    positions: Int[Array, "batch width"], slots: Int[Array, "batch slots"], mask: Mask, blocks: Blocks = Blocks()
) -> Tiles:
    """What a block of queries may see of a tile, from the least and the largest position in either.

    A tile may be listed that no query sees, never the other way round; which slots of a tile in part are seen the
    kernel asks itself.
    """
    far = jnp.iinfo(jnp.int32).max
    asks = jnp.pad(positions, ((0, 0), (0, -positions.shape[1] % PAIR)), constant_values=-1).astype(jnp.int32)
    slots = jnp.pad(slots, ((0, 0), (0, -slots.shape[1] % blocks.tile)), constant_values=-1).astype(jnp.int32)

    def bounds(x, size):
        x = x.reshape(x.shape[0], -1, size)
        return jnp.where(x < 0, far, x).min(2), x.max(2), (x >= 0).all(2)

    first, last, _ = (x[:, :, None] for x in bounds(asks, PAIR))
    low, high, filled = (x[:, None] for x in bounds(slots, blocks.tile))
    padded = (asks.reshape(*first.shape[:2], PAIR) < 0).any(2)[..., None]
    some = (high >= 0) & (low <= last)
    every = filled & (high <= first) & ~padded
    if mask.window is not None:
        some &= (high > first - mask.window) | (low < mask.sinks)
        every &= (low > last - mask.window) | (high < mask.sinks)
    every &= some
    rank = jnp.where(every, 0, jnp.where(some, 1, 2))
    numbers = jnp.argsort(rank, axis=2, stable=True).astype(jnp.int32)
    return Tiles(asks, slots, numbers, every.sum(2, dtype=jnp.int32), some.sum(2, dtype=jnp.int32))


def prefill_attention(
    q: Float[Array, "batch width heads head_dim"],
    k: Float[Array, "rows slots head_dim"],
    v: Float[Array, "rows slots head_dim"],
    positions: Int[Array, "batch width"],
    slots: Int[Array, "batch slots"],
    mask: Mask,
    *,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> Partial:
    """What `kernels.reference.attend` gives, for many queries.

    Args:
        blocks: None takes what was fastest for such a shape on the device at hand.
        interpret: `plgpu.InterpretGPUParams()` to run on a CPU.
    Returns:
        `out` in `q.dtype` and `lse` in float32 nats. A query that sees nothing gives zeros and -inf.
        Whatever empty slots hold, NaN too, changes nothing.
    Raises:
        ValueError: while tracing, for shapes or dtypes that this kernel does not take.
    Source: Shah et al. 2024, "FlashAttention-3" (arXiv:2407.08608), section 3.1: warpgroups that take turns.
    """
    if why := refusal(q, k, v):
        raise ValueError(f"prefill_attention: {why}")
    batch, width, heads, dim = q.shape
    if blocks is None:
        exact = {"dtype": str(q.dtype), "head_dim": dim, "queries": heads * batch // k.shape[0]}
        sizes = {"rows": k.shape[0], "width": width, "slots": k.shape[1]}
        blocks = tuned("prefill", Blocks(), exact=exact, sizes=sizes)
    work = tiles(positions, slots, mask, blocks)
    if short := -k.shape[1] % EIGHT:
        k, v = (jnp.pad(x, ((0, 0), (0, short), (0, 0))) for x in (k, v))
    flat = jnp.pad(q.reshape(batch, width, heads * dim), ((0, 0), (0, -width % PAIR), (0, 0)))
    out, lse = _run(flat, k, v, work, mask, dim, blocks, interpret)
    return out[:, :width].reshape(q.shape), lse[:, :, :width].swapaxes(1, 2)


def refusal(
    q: Float[Array, "batch width heads head_dim"],
    k: Float[Array, "rows slots head_dim"],
    v: Float[Array, "rows slots head_dim"],
) -> str | None:
    """Why the kernel does not take these; None if it does."""
    batch, _, heads, dim = q.shape
    rows = k.shape[0]
    if rows % batch or not rows or heads % (rows // batch):
        return f"{heads} heads over {rows} rows of `k` in a batch of {batch}; expected a whole number a K/V head"
    if why := other_dtypes(q, k, v):
        return why
    if dim not in (64, 128):
        return f"expected a `head_dim` of 64 or 128, got {dim}"
    return None


def _run(q, k, v, work: Tiles, mask: Mask, dim: int, blocks: Blocks, interpret: Any):
    """`out`, shaped as `q [batch, padded, heads * head_dim]`, and `lse [batch, heads, padded]`."""
    batch, width, channels = q.shape
    heads, tall, tile, stages = channels // dim, width // PAIR, blocks.tile, blocks.stages
    group = heads * batch // k.shape[0]
    swizzle = plgpu.find_swizzle(dim * 16)
    laid = (plgpu.TilingTransform((EIGHT, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    across, down = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)
    unit = mask.scale * LOG2E if mask.softcap is None else 1.0
    """What turns a product into a logit in units of `log 2`; a cap is applied by itself."""

    def body(q_ref, k_ref, v_ref, asks_ref, slots_ref, numbers_ref, whole_ref, counts_ref, out_ref, lse_ref, **scratch):
        index, role = lax.axis_index("block"), lax.axis_index("role")
        head, rest = lax.rem(index, heads), lax.div(index, heads)
        b, block = lax.rem(rest, batch), tall - 1 - lax.div(rest, batch)  # later ones see more: they begin first
        row = b * (heads // group) + lax.div(head, group)
        count = counts_ref[b, block]

        def read(k_smem, v_smem, slots_smem, k_full, v_full, k_free, v_free, **_):
            if not interpret:
                plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, count)
            def _(i):
                stage, number = lax.rem(i, stages), numbers_ref[b, block, i]
                here = pl.ds(number * tile, tile)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(k_free.at[stage]))
                plgpu.copy_gmem_to_smem(k_ref.at[row, here], k_smem.at[stage], k_full.at[stage])
                plgpu.copy_gmem_to_smem(slots_ref.at[b, here], slots_smem.at[stage], k_full.at[stage])
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(v_free.at[stage]))
                plgpu.copy_gmem_to_smem(v_ref.at[row, here], v_smem.at[stage], v_full.at[stage])

            @pl.loop(jnp.maximum(count - stages, 0), count)
            def _(i):
                plgpu.barrier_wait(k_free.at[lax.rem(i, stages)])
                plgpu.barrier_wait(v_free.at[lax.rem(i, stages)])

        def see(q_smem, k_smem, v_smem, slots_smem, left_smem, lse_smem, q_full, k_full, v_full, k_free, v_free, turn):
            if not interpret:
                plgpu.set_max_registers(232, action="increase")
            at = pl.ds(block * PAIR + role * ROWS, ROWS)
            columns = pl.ds(head * dim, dim)
            plgpu.copy_gmem_to_smem(q_ref.at[b, at, columns], q_smem.at[role], q_full.at[role])
            asked = plgpu.load(asks_ref.at[b, at], layout=down, optimized=False)  # ty: ignore[missing-argument]
            asks = lax.broadcast_in_dim(asked, (ROWS, tile), [0])
            plgpu.barrier_wait(q_full.at[role])

            def hand_over():
                """Let the other warpgroup multiply."""
                if not interpret:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            pl.when(role == 1)(hand_over)

            def step(i, carry, part: bool):
                sums, peak, total = carry
                stage = lax.rem(i, stages)
                plgpu.barrier_wait(k_full.at[stage])

                def product(acc):
                    plgpu.wgmma(acc, q_smem.at[role], k_smem.at[stage].transpose((1, 0)))
                    return acc[...]

                logits = pl.run_scoped(product, plgpu.ACC((ROWS, tile), jnp.float32))
                hand_over()
                if mask.softcap is not None:
                    logits = jnp.tanh(logits * (mask.scale / mask.softcap)) * (mask.softcap * LOG2E)
                lowest = 0
                if part:
                    held = plgpu.load(slots_smem.at[stage], layout=across, optimized=False)  # ty: ignore[missing-argument]
                    lowest = held.min()
                    held = lax.broadcast_in_dim(held, (ROWS, tile), [1])
                    logits = jnp.where(seen(held, asks, mask), logits, -jnp.inf)
                plgpu.barrier_arrive(k_free.at[stage])
                top = jnp.maximum(peak, logits.max(axis=1) * unit)
                base = jnp.where(top == -jnp.inf, 0.0, top)
                old = jnp.exp2(peak - base)
                weights = jnp.exp2(logits * unit - lax.broadcast_in_dim(base, (ROWS, tile), [0]))
                total = total * old + weights.sum(axis=1)
                weights = weights.astype(v.dtype)
                sums = sums * lax.broadcast_in_dim(old, (ROWS, dim), [0])
                plgpu.barrier_wait(v_full.at[stage])
                if part:
                    pl.when(lowest < 0)(lambda: clear(v_smem.at[stage], slots_smem.at[stage]))
                if interpret:  # it takes a product's left side from memory only
                    left_smem[role] = weights
                hand_over()

                def mix(acc):
                    plgpu.wgmma(acc, left_smem.at[role] if interpret else weights, v_smem.at[stage])
                    return acc[...] if interpret else None

                if interpret:  # nor does it add to what is there
                    sums = sums + pl.run_scoped(mix, plgpu.ACC((ROWS, dim), jnp.float32))
                else:
                    sums = pl.run_state(mix)(plgpu.ACC.init(sums))
                plgpu.barrier_arrive(v_free.at[stage])
                return sums, top, total

            empty = full((ROWS, dim), 0.0, plgpu.Layout.WGMMA), full((ROWS,), -jnp.inf, down), full((ROWS,), 0.0, down)
            whole = whole_ref[b, block]
            state = lax.fori_loop(0, whole, lambda i, carry: step(i, carry, False), empty)
            sums, peak, total = lax.fori_loop(whole, count, lambda i, carry: step(i, carry, True), state)
            pl.when(role == 0)(hand_over)
            some = jnp.where(total > 0, total, 1.0)
            lse_smem[role] = jnp.where(total > 0, peak / LOG2E + jnp.log(some), -jnp.inf)
            out = sums / lax.broadcast_in_dim(some, (ROWS, dim), [0])
            q_smem[role] = out.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[role], out_ref.at[b, at, columns])
            plgpu.copy_smem_to_gmem(lse_smem.at[role], lse_ref.at[b, head, at])
            plgpu.wait_smem_to_gmem(0)

        pl.when(role < 2)(lambda: see(**scratch))
        pl.when(role == 2)(lambda: read(**scratch))

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, width), jnp.float32),
        ),
        grid=(batch * heads * tall,),
        grid_names=("block",),
        num_threads=3,
        thread_name="role",
        scratch_types=dict(
            q_smem=plgpu.SMEM((2, ROWS, dim), q.dtype, transforms=laid),
            k_smem=plgpu.SMEM((stages, tile, dim), k.dtype, transforms=laid),
            v_smem=plgpu.SMEM((stages, tile, dim), v.dtype, transforms=laid),
            slots_smem=plgpu.SMEM((stages, tile), jnp.int32),
            left_smem=plgpu.SMEM((2, ROWS, tile) if interpret else (1, 128), v.dtype),
            lse_smem=plgpu.SMEM((2, ROWS), jnp.float32),
            q_full=plgpu.Barrier(num_barriers=2),
            k_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            v_full=plgpu.Barrier(num_barriers=stages),
            k_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            v_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            turn=plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, work.asks, work.slots, work.numbers, work.whole, work.counts)
