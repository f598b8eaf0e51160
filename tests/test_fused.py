"""Models whose layers' products are one kernel each: the same numbers, the kernel where it can be, XLA elsewhere."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kernels import dispatch
from kvjax import Acceleration, Precision, Transformer, fused
from kvjax.cache import Dense, Quantized, Ring
from kvjax.levels import ACCELERATIONS
from kvjax.model import with_hidden
from tests.kernels.marks import interpreted
from tests.tiny import tiny

BFLOAT16 = Precision(*("bfloat16",) * 3)


@pytest.fixture
def on_hopper(monkeypatch):
    """As if there were such a GPU: traced programs have the kernel for it, and the same in plain JAX for others."""
    monkeypatch.setattr(dispatch, "hopper", lambda: True)
    monkeypatch.setattr(dispatch, "_told", set())


def build(layers=None, precision=BFLOAT16, **changed):
    small, _ = tiny()
    sizes = dict(vocab=128, hidden=64, intermediate=64, heads=4, kv_heads=2, head_dim=16)
    model = Transformer(replace(small.config, **(sizes | changed)), precision, accelerate=Acceleration(layers=layers))
    return model, kvjax.init_params(model, jax.random.key(0))


def close(x, y):
    x, y = (z.astype(jnp.float32) for z in (x, y))
    np.testing.assert_allclose(x, y, atol=0.02 * float(jnp.abs(y).max()) + 1e-6)


def run(model, params, width, strategy, capacity=32):
    """Logits of a prompt and of what follows, the hidden states of that, and the cache."""
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    cache = strategy.init(model, batch=2, capacity=capacity)
    first, cache = kvjax.prefill(model, params, cache, tokens[:, :8], jnp.asarray([8, 5]))
    return first, *jax.jit(with_hidden, static_argnums=0)(model, params, tokens[:, 8 : 8 + width], None, cache)


@interpreted
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("changed", "width"),
    [
        ({}, 1),
        ({"qkv_bias": True, "qk_norm": True}, 3),
        ({"tied": False, "windows": (None, 4, None), "logit_softcap": 9.0}, 3),
    ],
    ids=["plain", "biases and norms", "head, windows, cap"],
)
def test_the_numbers_are_those_of_layers_one_by_one(changed, width):
    model, params = build(**changed)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.1, x.dtype), params)  # biases too
    one_by_one = model.clone(accelerate=Acceleration(layers="xla"))
    got, want = run(model, params, width, Dense()), run(one_by_one, params, width, Dense())
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(close, got, want)


@interpreted
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("chosen", "batch", "kernels"), [(None, 2, 3), (None, 9, 0), ("xla", 2, 0)])
def test_a_step_has_a_kernel_a_layer_and_writes_in_place(chosen, batch, kernels):
    model, params = build(chosen, windows=(None, None, None), head_dim=64)
    cache = Dense().init(model, batch=batch, capacity=32)
    step = kvjax.decode_step.trace(model, params, cache, jnp.zeros(batch, jnp.int32))
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("call @_layer") == kernels
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == (2 if kernels else 0)  # the last layer's has the head, the others are one function
    assert all(line.count("#stablehlo.output_operand_alias<") == 2 for line in calls)


@interpreted
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("strategy", "chosen", "changed", "whole"),
    [
        (Dense(), None, {}, True),
        (Ring(8, 2), None, {"qkv_bias": True}, True),
        (Dense(), "xla", {}, False),
        (Dense(), None, {"layers": "products"}, False),
        (Dense(), None, {"qk_norm": True}, False),
        (Dense(), None, {"head_dim": 32}, False),
        (Quantized(8), None, {}, False),
    ],
    ids=["dense", "ring", "attention by XLA", "attention apart", "norms of heads", "small heads", "codes"],
)
def test_attention_is_part_of_the_kernel_where_it_can_be(strategy, chosen, changed, whole, monkeypatch):
    steps = []
    layer_step = fused.layer_step
    monkeypatch.setattr(fused, "layer_step", lambda *args, **how: steps.append(args) or layer_step(*args, **how))
    changed = {"head_dim": 64, "windows": (None, 4), "norm_eps": 3e-5} | changed  # a model that was not traced yet
    model, params = build(**changed)
    model = model.clone(accelerate=replace(model.accelerate, attention=chosen))
    xla = model.clone(accelerate=Acceleration("xla", "xla"))
    got, want = (run(m, params, 1, strategy, 512) for m in (model, xla))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(close, got, want)
    assert bool(steps) == whole


@interpreted
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"activation": "gelu"}, "gelu"),
        ({"norm": "layer"}, "layer norm"),
        ({"post_norms": True}, "no norm"),
        ({"mlp_bias": True}, "no bias"),
        ({"vocab": 100}, "`following`"),
        ({"precision": Precision()}, "float32"),
    ],
    ids=str,
)
def test_other_models_run_with_one_warning(changed, why):
    model, params = build(**changed)
    cache = Dense().init(model, batch=1, capacity=32)
    with pytest.warns(UserWarning, match=why):
        logits, cache = kvjax.decode_step(model, params, cache, jnp.zeros(1, jnp.int32))
    assert jnp.isfinite(logits).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kvjax.forward(model, params, jnp.zeros((1, 3), jnp.int32))


@interpreted
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("level", "kernels"), [("basic", 0), ("advanced", 1), ("expert", 2), ("master", 1)])
def test_levels_of_acceleration_have_their_kernels_a_layer(level, kernels):
    model, params = build(windows=(None,), head_dim=64)
    model = model.clone(accelerate=ACCELERATIONS[level])
    cache = Dense().init(model, batch=1, capacity=256)
    program = str(jax.make_jaxpr(kvjax.decode_step, static_argnums=0)(model, params, cache, jnp.zeros(1, jnp.int32)))
    assert program.count("mpmd_map[") == kernels


def test_an_acceleration_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="`layers` must be 'products', 'xla' or None, got 'mosaic'"):
        Acceleration(layers="mosaic")
