import sys; sys.path.insert(0, ".gpu")
import jax, jax.numpy as jnp, numpy as np, importlib, time
from statistics import median
from jax._src.lib import mosaic_gpu
cupti = mosaic_gpu._mosaic_gpu_ext
import kernels.decode_attention as kd, kernels.decode_plan as kp
from kernels.reference import Mask
def times(f, n):
    cupti._cupti_init(); f(n); st = cupti._cupti_get_timings(False)
    us = [1e3*ms for name, ms in st if "mosaic" in name]
    return f"{len(us)} med {median(us):.2f} min {min(us):.2f}"
for B, heads, kv, dim, ctx, cap in ((1,32,8,128,1024,2048),(1,9,3,64,200,1024),(16,32,8,128,1024,2048)):
    mask = Mask(dim**-.5); t = kd.fitting(dim, B*kv); G = heads//kv
    sets = [tuple(jax.random.normal(jax.random.key(2*i+j), (B*kv, cap, dim), jnp.bfloat16) for j in (0,1)) for i in range(16 if B == 1 else 3)]
    q = jax.random.normal(jax.random.key(99), (B*kv, G, dim), jnp.bfloat16); nk = jax.random.normal(jax.random.key(98), (B*kv, 1, dim), jnp.bfloat16)
    at = jnp.full((B,1), ctx, jnp.int32); held = jnp.broadcast_to(jnp.where(jnp.arange(cap) < ctx, jnp.arange(cap), -1), (B, cap)).astype(jnp.int32)
    work = jax.jit(lambda: kp.plan(at, held, mask, kv, t))()
    for name in ("v0", "v2", "v3", "v4", "v1"):
        try:
            m = importlib.import_module(name)
            if name == "v0":
                qp = q.reshape(-1, 8, dim) if 8 % G == 0 else jnp.pad(q, ((0,0),(0,8-G),(0,0)))
                f = jax.jit(lambda k, v, work: m.run(qp, k, v, work, mask, G if 8 % G == 0 else 8, tiling=t, kv_heads=kv, interpret=None))
                g = f
            else:
                f = jax.jit(lambda k, v, work: m.run(q, k, v, work, mask, tiling=t, kv_heads=kv, interpret=None))
                g = f
            if name in ("v0", "v1", "v2", "v4"):
                s = time.time(); jax.block_until_ready(f(*sets[0], work)); c = time.time()-s
                print(B, heads, dim, ctx, name, "plain ", times(lambda n: jax.block_until_ready([f(*sets[i % len(sets)], work) for i in range(n)]), 48), f"compile {c:.0f}", flush=True)
            if name == "v0": continue
            kd.run = m.run
            h = jax.jit(lambda k, v, work: kd.decode_append(q.reshape(B,1,heads,dim), nk, nk, k, v, at, held, at[:,0], mask, tiling=t), donate_argnums=(0,1))
            h2 = jax.jit(lambda k, v, work: (lambda r: r)(kd.decode_append(q.reshape(B,1,heads,dim), nk, nk, k, v, at, held, at[:,0], mask, tiling=t)), donate_argnums=(0,1))
            def go(n):
                for i in range(n):
                    j = i % len(sets); out, lse, k, v = h(*sets[j], work); sets[j] = (k, v)
                jax.block_until_ready(out)
            go(2); print(B, heads, dim, ctx, name, "append", times(go, 48), flush=True)
        except Exception as e: print("FAILED", name, repr(e)[:500], flush=True)
