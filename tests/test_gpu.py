"""Whole models on a GPU: a cached one is the whole one, a loop of steps copies no cache, tokens are the CPU's."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Acceleration, Precision, Transformer
from kvjax.cache import Dense, Ring
from kvjax.levels import ACCELERATIONS
from tests.kernels.marks import on_hopper
from tests.tiny import tiny

pytestmark = [pytest.mark.gpu, on_hopper]
BFLOAT16 = Precision(*("bfloat16",) * 3)

NEAR = 0.25
"""Logits nearer than this are one to bfloat16: those of SmolLM2 are up to 20, of which it keeps eight bits."""


def small(**changed):
    sizes = dict(vocab=512, hidden=256, intermediate=512, heads=8, kv_heads=2, head_dim=64, windows=(None,) * 3)
    model = Transformer(replace(tiny()[0].config, max_positions=32_768, **(sizes | changed)), BFLOAT16)
    return model, kvjax.init_params(model, jax.random.key(0))


@pytest.mark.parametrize("level", ACCELERATIONS)
@pytest.mark.parametrize("batch", [1, 3, 12])
@pytest.mark.parametrize(
    ("strategy", "changed"),
    [(Dense(), {}), (Ring(), {"windows": (None, 300, 300)}), (Dense(), {"windows": (200, None)})],
    ids=["dense", "ring", "windows"],
)
def test_a_cached_model_is_the_whole_one(level, batch, strategy, changed):
    model, params = small(**changed)
    lengths = jax.random.randint(jax.random.key(1), (batch,), 1, 700).at[0].set(700)
    tokens = jax.random.randint(jax.random.key(2), (batch, 704), 0, 512)
    with jax.default_matmul_precision("highest"):
        wide = Transformer(model.config, accelerate=Acceleration("xla", "xla"))
        full = kvjax.forward(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params), tokens)
    model = model.clone(accelerate=ACCELERATIONS[level])
    cache = strategy.init(model, batch=batch, capacity=1024)
    logits, cache = kvjax.prefill(model, params, cache, tokens[:, :700], lengths)
    rows = jnp.arange(batch)
    for _ in range(4):
        want = full[rows, lengths - 1]
        assert jnp.linalg.norm(logits.astype(jnp.float32) - want) < 3e-2 * jnp.linalg.norm(want)
        logits, cache = kvjax.decode_step(model, params, cache, tokens[rows, lengths])
        lengths = lengths + 1


@pytest.mark.parametrize("level", ACCELERATIONS)
@pytest.mark.parametrize("batch", [1, 12])
def test_a_loop_of_steps_copies_no_cache(level, batch):
    model, params = small()
    model = model.clone(accelerate=ACCELERATIONS[level])
    cache = Dense().init(model, batch=batch, capacity=16_384)

    @partial(jax.jit, donate_argnums=1)
    def loop(params, cache, token):
        def step(_, carry):
            cache, token = carry
            logits, cache = kvjax.decode_step(model, params, cache, token)
            return cache, logits.argmax(-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, 64, step, (cache, token))

    compiled = loop.lower(params, cache, jnp.zeros(batch, jnp.int32)).compile()
    layer = kvjax.nbytes(cache.layers[0])
    assert compiled.memory_analysis().temp_size_in_bytes < layer / 2
    cache, _ = compiled(params, cache, jnp.zeros(batch, jnp.int32))
    assert cache.length.tolist() == [64] * batch


@pytest.mark.real
@pytest.mark.parametrize("batch", [1, 4])
def test_the_real_models_tokens_are_those_of_a_cpu_but_for_near_ties(batch):
    model, params, tokenizer = kvjax.load("smollm2", precision=BFLOAT16)
    prompts = [
        "The capital of France is",
        "Once upon a time there was a little girl who lived in a village near the forest.",
        "def fibonacci(n):",
        "Water boils at a temperature of",
    ]
    ids = [tokenizer.encode(text) for text in prompts[:batch]]
    width = max(map(len, ids))
    tokens = np.array([row + [0] * (width - len(row)) for row in ids], np.int32)
    lengths = np.array([len(row) for row in ids], np.int32)

    def decoded(device):
        with jax.default_device(device):
            here = jax.device_put(params, device)
            cache = Dense().init(model, batch=batch, capacity=512)
            return np.asarray(kvjax.generate(model, here, cache, tokens, lengths, max_new=64).tokens)

    gpu, cpu = (decoded(jax.devices(kind)[0]) for kind in ("gpu", "cpu"))
    same = 0
    with jax.default_device(jax.devices("cpu")[0]):
        here = jax.device_put(params, jax.devices("cpu")[0])
        for row, (ours, theirs) in enumerate(zip(gpu, cpu, strict=True)):
            apart = np.flatnonzero(ours != theirs)
            if not apart.size:
                same += 1
                continue
            text = np.concatenate([ids[row], theirs[: apart[0]]])[None].astype(np.int32)
            logits = kvjax.forward(model, here, text)[0, -1]
            assert abs(float(logits[ours[apart[0]]] - logits[theirs[apart[0]]])) < NEAR
    assert same or batch == 1
