"""What the kernel of a layer does between its waits, in registers and, for the interpreter, by whole arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.layer_attention import split_qkv, turned
from kernels.layer_products import normed
from kernels.reference import attend
from kernels.registers import private, unwrap, wrap


class Lanes:
    """What `kernels.layer_lanes` does in registers, as operations on references."""

    def __init__(self, kept):
        self.kept = kept

    def nothing(self):
        return plgpu.layout_cast(jnp.zeros((128 * 4,), jnp.float32), private(4).layout)

    def bring(self, phase, source, x, sums, norm, waits):
        """`waits` is a counter and what it must have reached."""
        from kernels import layer_lanes

        some = [ref for ref in (norm, waits and waits[0]) if ref is not None]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (3 + len(some)))
        def bring(_, source, x, sums, *some):
            scale = layer_lanes.scales(phase, some[0]) if phase.normed else None
            if waits is not None:
                layer_lanes.await_all(some[-1], waits[1])
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

    def signal(self, arrived, nth, zero=0):
        from kernels import layer_lanes

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def signal(_, arrived):
            layer_lanes.signal(arrived, nth, self.kept.workers, zero)

        signal(arrived)

    def append(self, sight, head, to, *refs):
        from kernels import layer_attention_lanes

        @plgpu.inline_mgpu(arg_types=(*(plgpu.Layout.WG_SPLAT,) * 2, *(plgpu.RefType(),) * len(refs)))
        def append(_, head, to, *refs):
            layer_attention_lanes.append(sight, *(x.registers.flat[0] for x in (head, to)), *refs)

        append(head, to, *refs)

    def attend(self, sight, scalars, refs, scratch, out, lse):
        """`scalars` are head, first slot, end and position."""
        from kernels import layer_attention_lanes as lanes

        refs = (*refs, scratch, out, lse)

        @plgpu.inline_mgpu(arg_types=(*(plgpu.Layout.WG_SPLAT,) * 4, *(plgpu.RefType(),) * len(refs)))
        def attend(_, *args):
            scalars, refs = [x.registers.flat[0] for x in args[:4]], args[4:]
            lanes.leave(sight, lanes.attend(sight, *scalars, *refs[:-3]), *refs[-3:])

        attend(*scalars, *refs)

    def merge(self, sight, first, count, *refs):
        from kernels import layer_attention_lanes

        @plgpu.inline_mgpu(arg_types=(*(plgpu.Layout.WG_SPLAT,) * 2, *(plgpu.RefType(),) * len(refs)))
        def merge(_, first, count, *refs):
            layer_attention_lanes.merge(sight, *(x.registers.flat[0] for x in (first, count)), *refs)

        merge(first, count, *refs)


class Plain:
    """The same by whole arrays, for the interpreter: the first warpgroup does all of it."""

    def __init__(self, kept, role):
        self.kept, self.mine = kept, role == 0

    def nothing(self):
        return jnp.zeros((16, self.kept.rows), jnp.float32)

    def bring(self, phase, source, x, sums, norm, waits):
        del sums, waits

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

    def append(self, sight, head, to, qkv, cos, sin, k, v):
        @pl.when(self.mine)
        def _():
            _, new_k, new_v = split_qkv(qkv[...][None], sight.heads, sight.kv_heads, sight.dim)
            new_k = turned(new_k, cos[...][None], sin[...][None])
            k[to], v[to] = (lax.dynamic_index_in_dim(x[0], head, keepdims=False) for x in (new_k, new_v))

    def attend(self, sight, scalars, refs, scratch, out, lse):
        del scratch
        head, first, stop, position = scalars
        qkv, cos, sin, k, v, held = refs

        @pl.when(self.mine)
        def _():
            q, _, _ = split_qkv(qkv[...][None], sight.heads, sight.kv_heads, sight.dim)
            q = turned(q, cos[...][None], sin[...][None])
            q = lax.dynamic_slice_in_dim(q, head * sight.group, sight.group, axis=1)
            nth = jnp.arange(sight.slots, dtype=jnp.int32)
            inside = jnp.where((nth >= first) & (nth < stop), held[...], -1)[None]
            values = jnp.where(inside[0][:, None] >= 0, v[...], jnp.zeros((), v.dtype))
            some = attend(q[None], k[...][None], values[None], position.reshape(1, 1), inside, sight.mask)
            out[...], lse[...] = some[0][0, 0].astype(out.dtype), some[1][0, 0]

    def merge(self, *_):
        """Partial results are merged after the kernel."""
