"""What runs attention is read off the traced program."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kernels import dispatch
from kvjax.cache import Dense, Paged, Quantized, Ring, backend, stats
from kvjax.cache.backend import backends, has_kernel, traced
from tests.kernels.marks import interpreted
from tests.strategies import CACHES
from tests.tiny import tiny

BFLOAT16 = kvjax.Precision(compute="bfloat16", cache="bfloat16")
CONFIG = kvjax.ModelConfig(
    "llama", vocab=61, hidden=64, intermediate=48, heads=8, kv_heads=2, head_dim=64, max_positions=2048,
    windows=(None, 304),
)  # fmt: skip


@pytest.fixture
def hopper(monkeypatch):
    """As if JAX ran on an H100."""
    backend._backends.cache_clear()
    monkeypatch.setattr(backend, "_platform", lambda: "gpu")
    monkeypatch.setattr(dispatch, "hopper", lambda: True)
    yield
    backend._backends.cache_clear()


@pytest.mark.parametrize("name", CACHES)
def test_on_a_cpu_it_is_xla(name):
    model, _ = tiny()
    cache = CACHES[name].init(model, batch=3, capacity=40)
    assert jax.eval_shape(stats, cache).backend == stats(cache, model).backend == ("xla", "xla")


@interpreted
def test_on_a_hopper_gpu_it_is_our_kernel_where_it_suits(hopper):
    model = kvjax.Transformer(CONFIG, BFLOAT16)
    dense = Dense().init(model, batch=2, capacity=1024)
    assert backends(dense) == backends(dense, model) == ("mosaic", "mosaic")
    assert stats(dense, model).backend == ("mosaic", "mosaic")
    assert backends(Dense().init(model, batch=2, capacity=64)) == ("xla", "xla")  # too few slots to pay
    assert backends(dense, model.clone(accelerate=kvjax.Acceleration("xla"))) == ("xla", "xla")
    ring = Ring(window=300, sinks=4).init(model, batch=2, capacity=1024)
    assert backends(ring) == ("mosaic", "mosaic")


@interpreted
def test_a_model_that_computes_in_float32_is_left_to_xla(hopper):
    model = kvjax.Transformer(CONFIG, kvjax.Precision(cache="bfloat16"))
    dispatch._told.clear()
    with pytest.warns(UserWarning, match="attention is left to XLA"):
        assert backends(Dense().init(model, batch=2, capacity=1024), model) == ("xla", "xla")


@pytest.mark.parametrize("strategy", [Dense(), Paged(page=16), Quantized(4)], ids=lambda s: type(s).__name__)
def test_programs_of_xla_have_no_kernel(strategy):
    model = kvjax.Transformer(CONFIG, BFLOAT16)
    cache = strategy.init(model, batch=2, capacity=1024)
    opened = jax.eval_shape(lambda cache: cache.opened(jnp.ones(2, jnp.int32))[0], cache)
    assert not has_kernel(traced(opened.layers[1], CONFIG, 304, 2, ("bfloat16", "xla")))


def test_layers_that_are_alike_are_traced_once(hopper, monkeypatch):
    times = []
    monkeypatch.setattr(backend, "traced", lambda layer, config, window, *_: times.append(window))
    monkeypatch.setattr(backend, "has_kernel", lambda program: True)
    config = replace(CONFIG, windows=(None, 304, None, 304, None))
    cache = Dense().init(kvjax.Transformer(config, BFLOAT16), batch=2, capacity=1024)
    assert backends(cache) == backends(cache) == ("mosaic",) * 5 and times == [None, 304]


def test_the_field_is_part_of_the_program_and_no_array():
    model, _ = tiny()
    figures = jax.jit(stats)(Dense().init(model, batch=3, capacity=40))
    assert figures.backend == ("xla", "xla") and len(jax.tree.leaves(figures)) == 6
    assert jax.tree.map(lambda x: x, figures).backend == ("xla", "xla")


@interpreted
def test_a_layer_that_is_one_kernel_has_its_attention_there(hopper):
    config = replace(CONFIG, vocab=64, intermediate=64)
    model = kvjax.Transformer(config, kvjax.Precision(*("bfloat16",) * 3))
    cache = Dense().init(model, batch=2, capacity=64)  # too few slots for a kernel of their own
    assert backends(cache, model) == ("mosaic", "mosaic")
    apart = model.clone(accelerate=kvjax.Acceleration(layers="products"))
    assert backends(cache, apart) == backends(cache) == ("xla", "xla")
