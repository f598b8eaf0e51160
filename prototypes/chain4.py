"""Prototype: out-projection, gate-up, down and the next layer's QKV of one row as one persistent kernel.

Whole rows belong to a worker (no partial sums between workers); weights stream through a ring that does not wait for the
grid's barriers; products by mma.m16n8k16 with weights as the operand of 16 rows, one 16-byte read a thread and row.
"""
import os, sys, time, math
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")
import jax, jax.numpy as jnp, numpy as np
from dataclasses import dataclass
from functools import partial
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, memref
from kernels.decode_lanes import i32, f32, add, mul, div, rem, load, store, asm, product
W = 132
WARPS = 8

def private(each): return plgpu.Layout.WG_STRIDED((128 * each,), vec_size=1)
def wrap(regs):
    t = ir.VectorType.get((1,), regs[0].type)
    some = [llvm.insertelement(llvm.mlir_undef(t), x, i32(0)) for x in regs]
    return mgpu.FragmentedArray(_registers=np.asarray(some, dtype=object), _layout=mgpu.WGStridedFragLayout((128 * len(regs),), vec_size=1), _is_signed=None)
def unwrap(a): return [llvm.extractelement(x, i32(0)) for x in a.registers.flat]
def void(text, *args): utils.inline_ptx(text, *args, result_types=None, has_side_effects=True) if False else utils.inline_ptx(text, *args, has_side_effects=True)
def meet(): void(f"bar.sync 9, {32 * WARPS};")
def eq(a, b): return arith.cmpi(arith.CmpIPredicate.eq, a, b if not isinstance(b, int) else i32(b))
def lt(a, b): return arith.cmpi(arith.CmpIPredicate.ult, a, b if not isinstance(b, int) else i32(b))
def when(c): 
    op = scf.IfOp(c); return op
class If:
    def __init__(self, c): self.op = scf.IfOp(c)
    def __enter__(self): self.ip = ir.InsertionPoint(self.op.then_block); self.ip.__enter__()
    def __exit__(self, *a):
        scf.yield_([]); self.ip.__exit__(*a)
def bf_lo(w): return arith.bitcast(ir.F32Type.get(), arith.shli(w, i32(16)))
def bf_hi(w): return arith.bitcast(ir.F32Type.get(), arith.andi(w, i32(0xFFFF0000)))
def pack_bf(lo, hi): return asm("cvt.rn.bf16x2.f32 $0, $1, $2;", hi, lo, result=ir.IntegerType.get_signless(32))
def to_bf16(x): return arith.truncf(ir.BF16Type.get(), x)
def ld_cg(ptr, offset):
    """16 bytes that another block wrote."""
    at = utils.getelementptr(ptr, [offset], ir.IntegerType.get_signless(8))
    t = ir.IntegerType.get_signless(32)
    return list(utils.inline_ptx("ld.relaxed.gpu.global.v4.u32 {$0,$1,$2,$3}, [$4];" if False else "ld.global.cg.v4.u32 {$0,$1,$2,$3}, [$4];", at, result_types=(t,) * 4, has_side_effects=True))

@dataclass(frozen=True)
class Phase:
    units: int     # of 16 rows (8 pairs of rows)
    k: int
    kc: int        # of a stage
    paired: int    # rows between the halves of a unit, 0: next to each other
    @property
    def stages(self): return self.k // self.kc

def chain(attn, x, wo, wgu, wd, wq, s1, s2, sync, *, kcs=(1024,) * 4, ST=6, D=2, eps=1e-5, turn=True):
    E, HD = wo.shape; F = wd.shape[1]; Q = wq.shape[0]
    P = [Phase(E // 16, HD, kcs[0], 0), Phase(F // 8, E, kcs[1], F), Phase(E // 16, F, kcs[2], 0), Phase(Q // 16, E, kcs[3], 0)]
    KC, KX = max(kcs), max(HD, E, F)
    starts = np.cumsum([0] + [p.units for p in P]).tolist()
    def body(attn_ref, x_ref, wo_ref, wgu_ref, wd_ref, wq_ref, s1_ref, s2_ref, sync_ref, outx_ref, outq_ref, x1_ref, h_ref, w_smem, x_smem, red_smem, full, free):
        me = lax.axis_index("worker"); role = lax.axis_index("role")
        weights = [wo_ref, wgu_ref, wd_ref, wq_ref]
        def mine(p):
            """First unit of this worker, which takes every W-th."""
            first = lax.rem(me + (W - (starts[p] % W)), W) if turn else me
            return first, lax.div(P[p].units - first + W - 1, W) if P[p].units >= W else jnp.where(first < P[p].units, 1, 0)
        def produce():
            done = jnp.int32(0)
            for p, ph in enumerate(P):
                first, count = mine(p)
                def unit(i, done, p=p, ph=ph, first=first):
                    u = first + i * W
                    def stage(j, done):
                        s = lax.rem(done, ST); k = pl.ds(j * ph.kc, ph.kc)
                        pl.when(done >= ST)(lambda: plgpu.barrier_wait(free.at[s]))
                        if D < ST: pl.when(done >= D)(lambda: plgpu.barrier_wait(full.at[lax.rem(done - D, ST)]))
                        a, b = (u * 8, ph.paired + u * 8) if ph.paired else (u * 16, u * 16 + 8)
                        cols = pl.ds(0, ph.kc)
                        plgpu.copy_gmem_to_smem(weights[p].at[pl.ds(a, 8), k], w_smem.at[s, pl.ds(0, 8), cols], full.at[s])
                        plgpu.copy_gmem_to_smem(weights[p].at[pl.ds(b, 8), k], w_smem.at[s, pl.ds(8, 8), cols], full.at[s])
                        return done + 1
                    return lax.fori_loop(0, ph.stages, stage, done)
                done = lax.fori_loop(0, count, unit, done)
            @pl.loop(jnp.maximum(done - ST, 0), done)
            def _(j): plgpu.barrier_wait(free.at[lax.rem(j, ST)])
        def bring(p):
            """The phase's input into shared memory, normed where it must be."""
            source = [attn_ref, x1_ref, h_ref, outx_ref][p]; norm = [None, s1_ref, None, s2_ref][p]; K = P[p].k
            refs = [source, x_smem, red_smem, sync_ref] + ([norm] if norm is not None else [])
            @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
            def go(_, source, x_smem, red, sync, *norm):
                t = utils.thread_idx(); ptr = utils.memref_ptr(source); xs = utils.memref_ptr(x_smem); rs = utils.memref_ptr(red)
                each = -(-K // (8 * 32 * WARPS))
                scales = []
                def inside(i): return lt(add(t, 32 * WARPS * i), K // 8)
                if norm:
                    for i in range(each):
                        at = mul(arith.select(inside(i), add(t, 32 * WARPS * i), i32(0)), 32)
                        scales.append([load(utils.memref_ptr(norm[0]), add(at, 16 * j), 4, ir.F32Type.get()) for j in range(2)])
                if p:
                    with If(eq(t, 0)):
                        loop = scf.WhileOp([], [])
                        before = loop.before.blocks.append(); after = loop.after.blocks.append()
                        with ir.InsertionPoint(before):
                            at = utils.getelementptr(utils.memref_ptr(sync), [i32(4 * (p - 1))], ir.IntegerType.get_signless(8))
                            seen = utils.inline_ptx("ld.acquire.gpu.global.u32 $0, [$1];", at, result_types=ir.IntegerType.get_signless(32), has_side_effects=True)
                            scf.condition(lt(seen, W), [])
                        with ir.InsertionPoint(after): scf.yield_([])
                    meet()
                words = []
                for i in range(each):
                    at = mul(arith.select(inside(i), add(t, 32 * WARPS * i), i32(0)), 16)
                    words.append(ld_cg(ptr, at))
                if norm:
                    total = f32(0.0)
                    for i in range(each):
                        part = f32(0.0)
                        for w in words[i]:
                            for v in (bf_lo(w), bf_hi(w)): part = arith.addf(part, arith.mulf(v, v))
                        total = arith.addf(total, arith.select(inside(i), part, f32(0.0)))
                    for d in (1, 2, 4, 8, 16): total = arith.addf(total, utils.shfl_bfly(total, d))
                    with If(eq(rem(t, 32), 0)): store(rs, mul(add(div(t, 32), 2 * 16 * WARPS), 4), total)
                    meet()
                    parts = sum((load(rs, i32(4 * (2 * 16 * WARPS + 4 * j)), 4, ir.F32Type.get()) for j in range(WARPS // 4)), [])
                    total = parts[0]
                    for v in parts[1:]: total = arith.addf(total, v)
                    inv = asm("rsqrt.approx.ftz.f32 $0, $1;", arith.addf(arith.mulf(total, f32(1.0 / K)), f32(eps)))
                    for i in range(each):
                        sc = scales[i][0] + scales[i][1]
                        words[i] = [pack_bf(*(arith.mulf(arith.mulf(v, inv), sc[2 * j + m]) for m, v in enumerate((bf_lo(w), bf_hi(w))))) for j, w in enumerate(words[i])]
                for i in range(each):
                    with If(inside(i)): store(xs, mul(add(t, 32 * WARPS * i), 16), *words[i])
                meet()
            go(*refs)
        def consume():
            done = jnp.int32(0)
            for p, ph in enumerate(P):
                first, count = mine(p)
                bring(p)
                def unit(i, done, p=p, ph=ph, first=first):
                    u = first + i * W
                    def stage(j, carry):
                        done, acc = carry
                        s = lax.rem(done, ST)
                        plgpu.barrier_wait(full.at[s])
                        out = plgpu.ShapeDtypeStruct((128 * 4,), jnp.float32, layout=private(4))
                        laid = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
                        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(laid), plgpu.RefType(), plgpu.Layout.WG_SPLAT, private(4)), return_type=out)
                        def go(_, w, xs, j, acc):
                            t = utils.thread_idx(); warp, lane = div(t, 32), rem(t, 32); r, c = div(lane, 4), rem(lane, 4)
                            j = j.registers.flat[0]; acc = unwrap(acc)
                            wp, xp = utils.memref_ptr(w), utils.memref_ptr(xs)
                            odd = [f32(0.0)] * 4
                            chunks = ph.kc // 32
                            for n in range(-(-chunks // WARPS)):
                                ch = add(warp, WARPS * n)
                                ok = None if WARPS * (n + 1) <= chunks else lt(ch, chunks)
                                if ok is not None: ch = arith.select(ok, ch, i32(0))
                                row = add(mul(r, 128), mul(arith.xori(add(mul(rem(ch, 2), 4), c), r), 16))
                                at = add(mul(div(ch, 2), 1024), row)
                                lo, hi = load(wp, at, 4), load(wp, add(at, 8 * KC * 2), 4)
                                xv = load(xp, mul(add(add(mul(j, ph.kc), mul(ch, 32)), mul(c, 8)), 2), 4)
                                if ok is not None: xv = [arith.select(ok, v, i32(0)) for v in xv]
                                acc = product(acc, [lo[0], hi[0], lo[1], hi[1]], xv[:2])
                                odd = product(odd, [lo[2], hi[2], lo[3], hi[3]], xv[2:])
                            return wrap([arith.addf(a, b) for a, b in zip(acc, odd)])
                        acc = go(w_smem.at[s], x_smem, j, acc)
                        plgpu.barrier_arrive(free.at[s])
                        return done + 1, acc
                    zero = plgpu.layout_cast(jnp.zeros((128 * 4,), jnp.float32), private(4))
                    done, acc = lax.fori_loop(0, ph.stages, stage, (done, zero))
                    refs = [red_smem, [outx_ref, h_ref, outx_ref, outq_ref][p] if p else x1_ref] + ([x_ref] if p == 0 else [x1_ref] if p == 2 else [])
                    @plgpu.inline_mgpu(arg_types=(private(4), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT) + (plgpu.RefType(),) * len(refs))
                    def finish(_, acc, u, i, red, out, *old):
                        t = utils.thread_idx(); warp, lane = div(t, 32), rem(t, 32); r, c = div(lane, 4), rem(lane, 4)
                        acc = unwrap(acc); u, i = u.registers.flat[0], i.registers.flat[0]
                        rs, op = utils.memref_ptr(red), utils.memref_ptr(out)
                        base = mul(rem(i, 2), 16 * WARPS * 4)
                        with If(eq(c, 0)):
                            store(rs, add(base, mul(add(mul(warp, 16), r), 4)), acc[0])
                            store(rs, add(base, mul(add(mul(warp, 16), add(r, 8)), 4)), acc[2])
                        meet()
                        with If(lt(t, 8 if p == 1 else 16)):
                            def total(row):
                                s = None
                                for w in range(WARPS):
                                    [v] = load(rs, add(base, mul(add(row, 16 * w), 4)), 1, ir.F32Type.get())
                                    s = v if s is None else arith.addf(s, v)
                                return arith.extf(ir.F32Type.get(), to_bf16(s))  # as a product's result is rounded
                            y = total(t)
                            if p == 1:
                                up = total(add(t, 8))
                                share = asm("rcp.approx.ftz.f32 $0, $1;", arith.addf(f32(1.0), asm("ex2.approx.ftz.f32 $0, $1;", arith.mulf(y, f32(-math.log2(math.e))))))
                                act = arith.extf(ir.F32Type.get(), to_bf16(arith.mulf(y, share)))
                                store(op, mul(add(mul(u, 8), t), 2), to_bf16(arith.mulf(act, up)))
                            else:
                                at = mul(add(mul(u, 16), t), 2)
                                if old:
                                    [o] = load(utils.memref_ptr(old[0]), at, 1, ir.BF16Type.get())
                                    y = arith.addf(y, arith.extf(ir.F32Type.get(), o))
                                store(op, at, to_bf16(y))
                    finish(acc, u, i, *refs)
                    return done
                done = lax.fori_loop(0, count, unit, done)
                @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
                def signal(_, sync):
                    t = utils.thread_idx()
                    with If(lt(t, 32)):
                        void("bar.warp.sync 0xffffffff;")
                        with If(eq(t, 0)):
                            at = utils.getelementptr(utils.memref_ptr(sync), [i32(4 * p)], ir.IntegerType.get_signless(8))
                            old = utils.inline_ptx("fence.acq_rel.gpu; atom.add.acq_rel.gpu.global.u32 $0, [$1], 1;", at, result_types=ir.IntegerType.get_signless(32), has_side_effects=True)
                            if p == 3:
                                with If(eq(old, W - 1)):
                                    for q in range(4): store(utils.memref_ptr(sync), i32(4 * q), i32(0))
                signal(sync_ref)
        pl.when(role < 2)(consume)
        pl.when(role == 2)(produce)
    S = jax.ShapeDtypeStruct; bf = jnp.bfloat16
    laid = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.kernel(body, out_type=(S((E,), bf), S((Q,), bf), S((E,), bf), S((F,), bf)), grid=(W,), grid_names=("worker",), num_threads=3, thread_name="role",
        scratch_types=dict(w_smem=plgpu.SMEM((ST, 16, KC), bf, transforms=laid), x_smem=plgpu.SMEM((KX,), bf), red_smem=plgpu.SMEM((2 * 16 * WARPS + 2 * WARPS,), jnp.float32),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=ST), free=plgpu.Barrier(num_arrivals=2, num_barriers=ST)),
        compiler_params=plgpu.CompilerParams(approx_math=True))(attn, x, wo, wgu, wd, wq, s1, s2, sync)

def reference(attn, x, wo, wgu, wd, wq, s1, s2, eps=1e-5):
    f = lambda a: a.astype(jnp.float32); b = lambda a: a.astype(jnp.bfloat16)
    dot = lambda a, w: b(jnp.einsum("k,nk->n", a, w, preferred_element_type=jnp.float32))
    x1 = x + dot(attn, wo); w = f(x1); n1 = b(w * lax.rsqrt(jnp.mean(w * w) + eps) * s1)
    g, u = jnp.split(dot(n1, wgu), 2); h = jax.nn.silu(g) * u
    x2 = x1 + dot(h, wd); w = f(x2); n2 = b(w * lax.rsqrt(jnp.mean(w * w) + eps) * s2)
    return x2, dot(n2, wq)

SHAPES = {"8b": (4096, 14336, 4096, 6144, 6, (1024,) * 4), "smol": (576, 1536, 576, 960, 24, (576, 576, 512, 576))}
if __name__ == "__main__" and sys.argv[1:] == ["lower"]:
    for name, (E, F, HD, Q, L, kcs) in SHAPES.items():
        S = jax.ShapeDtypeStruct; bf = jnp.bfloat16
        args = S((HD,), bf), S((E,), bf), S((E, HD), bf), S((2 * F, E), bf), S((E, F), bf), S((Q, E), bf), S((E,), jnp.float32), S((E,), jnp.float32), S((4,), jnp.int32)
        print(name, len(jax.jit(lambda *a: chain(*a, kcs=kcs)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()))
elif __name__ == "__main__":
    from jax._src.lib import mosaic_gpu
    cupti = mosaic_gpu._mosaic_gpu_ext
    @partial(jax.jit, static_argnums=(1,))
    def rnd(key, shape): return jax.random.normal(key, shape, jnp.bfloat16) * jnp.asarray(0.02, jnp.bfloat16)
    for name, (E, F, HD, Q, L, kcs) in SHAPES.items():
        ks = jax.random.split(jax.random.key(0), 4 * L + 4)
        ws = [[rnd(ks[4 * i + j], s) for j, s in enumerate([(E, HD), (2 * F, E), (E, F), (Q, E)])] for i in range(L)]
        attn, x = rnd(ks[-1], (HD,)) * 20, rnd(ks[-2], (E,)) * 50
        s1, s2 = (jax.random.uniform(ks[i], (E,), jnp.float32, 0.5, 1.5) for i in (-3, -4))
        sync = jnp.zeros(4, jnp.int32); nbytes = sum(w.nbytes for w in ws[0])
        want = jax.jit(reference)(attn, x, *ws[0], s1, s2)
        def time_of(f, n=36):
            cupti._cupti_init(); outs = [f(attn, x, *ws[i % L], s1, s2) for i in range(n)]; jax.block_until_ready(outs)
            st = cupti._cupti_get_timings(False); each = len(st) // n
            us = sorted(sum(1e3 * ms for _, ms in st[i * each:(i + 1) * each]) for i in range(n)); return f"{us[n // 2]:.2f} us (min {us[0]:.2f}) {each} kernels {nbytes / us[n // 2] / 1e3:.0f} GB/s"
        g = jax.jit(reference); g(attn, x, *ws[0], s1, s2); print(name, "XLA", time_of(g), flush=True)
        for cfg in (dict(), dict(D=3), dict(D=4), dict(D=6), dict(D=4, turn=False), dict(kcs=tuple(k // 2 for k in kcs), ST=12, D=6)):
            if name == "smol" and "kcs" in cfg: continue
            try:
                cfg = dict(kcs=kcs) | cfg
                f = jax.jit(lambda *a: chain(*a, sync, **cfg)[:2])
                t = time.time(); got = f(attn, x, *ws[0], s1, s2); jax.block_until_ready(got); c = time.time() - t
                for _ in range(3):
                    got = f(attn, x, *ws[0], s1, s2)
                    err = [float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32))) for a, b in zip(got, want)]
                print(name, cfg, "errors", [f"{e:.1e}" for e in err], "sync", sync, f"compile {c:.0f}", flush=True)
                print(name, cfg, time_of(f), flush=True)
            except Exception as e: print("FAILED", name, cfg, repr(e)[:700], flush=True)
