"""Llama-3.1-8B shape, random bf16: kvjax's decode step as it is, by kernel, and with XLA flags."""
import os, sys, time, json, collections, subprocess
FLAGS = {
 "default": "",
 "cb all": "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
 "notriton": "--xla_gpu_enable_triton_gemm=false",
}
if len(sys.argv) == 1:
    for name in FLAGS:
        print("=====", name, flush=True)
        subprocess.run([sys.executable, __file__, name], timeout=400)
    sys.exit()
name = sys.argv[1]
os.environ["XLA_FLAGS"] = FLAGS[name]; os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
import jax, jax.numpy as jnp, numpy as np
from functools import partial
import kvjax
from kvjax.config import ModelConfig, Precision, Rope
from kvjax.model import Transformer, param_shapes, cached
from kvjax.cache import Dense
cfg = ModelConfig("llama", 128256, 4096, 14336, 32, 8, 128, 131072, (None,)*32, rope=Rope(theta=500000.0), tied=False)
model = Transformer(cfg, Precision(*("bfloat16",)*3, logits="float32"))
shapes = param_shapes(model)
@partial(jax.jit, static_argnums=(1,2))
def rnd(key, shape, dtype): return (jax.random.normal(key, shape, jnp.bfloat16)*jnp.asarray(0.02, jnp.bfloat16)).astype(dtype)
t=time.time()
leaves, tree = jax.tree.flatten(shapes)
keys = jax.random.split(jax.random.key(0), len(leaves))
params = jax.tree.unflatten(tree, [jnp.ones(s.shape, s.dtype) if len(s.shape)==1 else rnd(k, s.shape, s.dtype) for k, s in zip(keys, leaves)])
jax.block_until_ready(params); print("params", sum(x.nbytes for x in leaves and jax.tree.leaves(params))/1e9, time.time()-t, flush=True)
for B in (1, 16):
    cache = Dense().init(model, batch=B, capacity=2048)
    t=time.time()
    logits, cache = kvjax.prefill(model, params, cache, np.random.default_rng(0).integers(0, 128256, (B, 1024)).astype(np.int32))
    tok = jnp.argmax(logits, -1).astype(jnp.int32); jax.block_until_ready(tok); print("prefill", time.time()-t, flush=True)
    N = 64
    @partial(jax.jit, donate_argnums=(1,))
    def loop(params, cache, tok):
        def body(i, c):
            cache, tok = c
            logits, cache = cached(model, params, tok[:, None], None, cache)
            return cache, jnp.argmax(logits, -1).astype(jnp.int32)
        return jax.lax.fori_loop(0, N, body, (cache, tok))
    t=time.time(); c = loop.lower(params, cache, tok).compile(); tc=time.time()-t
    cache, tok = c(params, cache, tok); jax.block_until_ready(tok)
    ts=[]
    for _ in range(5):
        t=time.perf_counter(); cache, tok = c(params, cache, tok); jax.block_until_ready(tok); ts.append((time.perf_counter()-t)/N)
    print(f"{name} B={B} loop {min(ts)*1e3:.3f} {sorted(ts)[2]*1e3:.3f} ms/step compile {tc:.0f}s", flush=True)
    if name == "default" or B == 1:
        from jax._src.lib import mosaic_gpu
        cupti = mosaic_gpu._mosaic_gpu_ext
        step = jax.jit(lambda p, c, t: cached(model, p, t[:, None], None, c), donate_argnums=(1,))
        lg, cache = step(params, cache, tok); lg, cache = step(params, cache, tok); jax.block_until_ready(lg)
        cupti._cupti_init(); lg, cache = step(params, cache, tok); jax.block_until_ready(lg)
        stamps = cupti._cupti_get_timings(False)
        agg = collections.OrderedDict()
        for n, ms in stamps:
            a = agg.setdefault(n, [0, 0.0]); a[0]+=1; a[1]+=ms
        print("kernels", len(stamps), "sum ms", sum(ms for _, ms in stamps))
        for n, (k, ms) in sorted(agg.items(), key=lambda x: -x[1][1])[:25]: print(f"  {ms:8.3f} ms {k:4d} x {1e3*ms/k:8.2f} us {n[:90]}")
        for n, ms in stamps[20:50]: print("   seq", f"{1e3*ms:.2f}", n[:70])
    del cache
