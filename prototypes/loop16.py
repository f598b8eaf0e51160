import os, sys, time, collections
os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
import jax, jax.numpy as jnp, numpy as np
from functools import partial
import kvjax
from kvjax.config import ModelConfig, Precision, Rope
from kvjax.model import Transformer, param_shapes, cached
from kvjax.cache import Dense
import kvjax.cache.dense as dense
from kernels.decode_attention import decode_attention
from jax._src.lib import mosaic_gpu
cupti = mosaic_gpu._mosaic_gpu_ext
L = 8
cfg = ModelConfig("llama", 32768, 4096, 14336, 32, 8, 128, 131072, (None,)*L, rope=Rope(theta=500000.0), tied=False)
model = Transformer(cfg, Precision(*("bfloat16",)*3, logits="float32"))
@partial(jax.jit, static_argnums=(1,2))
def rnd(key, shape, dtype): return (jax.random.normal(key, shape, jnp.bfloat16)*jnp.asarray(0.02, jnp.bfloat16)).astype(dtype)
leaves, tree = jax.tree.flatten(param_shapes(model))
keys = jax.random.split(jax.random.key(0), len(leaves))
params = jax.tree.unflatten(tree, [jnp.ones(s.shape, s.dtype) if len(s.shape)==1 else rnd(k, s.shape, s.dtype) for k, s in zip(keys, leaves)])
old = dense.write
def scatter(buffer, new, start, keep):
    batch, slots = start.shape[0], buffer.shape[1]
    per = buffer.shape[0]//batch
    at = start[:, None]+jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    at = jnp.where(keep, at, slots)
    at = jnp.repeat(at, per, axis=0)
    return buffer.at[jnp.arange(buffer.shape[0])[:, None], at].set(new, mode="drop")
def unrolled(buffer, new, start, keep):
    batch = start.shape[0]; per = buffer.shape[0]//batch
    if new.shape[1] > 1: return old(buffer, new, start, keep)
    for b in range(batch):
        at = (b*per, jnp.minimum(start[b], buffer.shape[1]-1)) + (0,)*(buffer.ndim-2)
        held = jax.lax.dynamic_slice(buffer, at, (per, 1, *buffer.shape[2:]))
        fresh = jnp.where(keep[b, 0] & (start[b] < buffer.shape[1]), new[b*per:(b+1)*per], held)
        buffer = jax.lax.dynamic_update_slice(buffer, fresh, at)
    return buffer
look = dense.DenseLayer.look
def kernel_look(self, q, positions, mask):
    if q.shape[1] > 8: return look(self, q, positions, mask)
    return decode_attention(q, self.k, self.v, positions, self.positions, mask)
rng = np.random.default_rng(0)
for B in (16, 1):
  for name, w, lk in (("as is", old, look), ("scatter", scatter, look), ("unrolled", unrolled, look), ("scatter+kernel", scatter, kernel_look)):
    dense.write = w; dense.DenseLayer.look = lk; jax.clear_caches()
    cache = Dense().init(model, batch=B, capacity=2048)
    logits, cache = kvjax.prefill(model, params, cache, rng.integers(0, 32768, (B, 1024)).astype(np.int32))
    tok = jnp.argmax(logits, -1).astype(jnp.int32)
    def make(N):
        @partial(jax.jit, donate_argnums=(1,))
        def loop(params, cache, tok):
            def body(i, c):
                cache, tok = c
                logits, cache = cached(model, params, tok[:, None], None, cache)
                return cache, jnp.argmax(logits, -1).astype(jnp.int32)
            return jax.lax.fori_loop(0, N, body, (cache, tok))
        return loop
    try:
        N = 32; f = make(N)
        cache, tok = f(params, cache, tok); jax.block_until_ready(tok)
        ts = []
        for _ in range(4):
            t = time.perf_counter(); cache, tok = f(params, cache, tok); jax.block_until_ready(tok); ts.append((time.perf_counter()-t)/N)
        print(f"B={B} {name}: loop {min(ts)*1e3:.3f} ms/step for {L} layers", flush=True)
        cupti._cupti_init(); cache, tok = f(params, cache, tok); jax.block_until_ready(tok)
        st = cupti._cupti_get_timings(False); agg = collections.OrderedDict()
        for n, ms in st:
            a = agg.setdefault(n, [0, 0.0]); a[0] += 1; a[1] += ms
        print("  kernels a step", len(st)/N, "ms a step", sum(m for _, m in st)/N)
        for n, (k, ms) in sorted(agg.items(), key=lambda x: -x[1][1])[:14]: print(f"    {ms/N:8.3f} ms {k/N:6.1f} x {1e3*ms/k:8.2f} us {n[:80]}")
    except Exception as e: print("FAILED", name, repr(e)[:500], flush=True)
