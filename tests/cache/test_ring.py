"""A ring against a mask: full attention that may see only the window and the sinks."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kernels.reference import Mask, attend
from kvjax.cache import Dense, LayerSpec, Ring
from kvjax.cache.attention import by_head
from tests.kernels.test_reference import inputs
from tests.tiny import prompts, tiny


@settings(deadline=None, max_examples=40)
@given(
    window=st.integers(1, 9),
    sinks=st.integers(0, 4),
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    seed=st.integers(0, 2**16),
)
def test_a_ring_sees_the_window_and_the_sinks(window, sinks, chunks, seed):
    total = sum(chunks)
    q, k, v, positions, slots = inputs(seed, batch=2, width=total, heads=4, slots=total)
    k, v = (x.reshape(2, 2, total, 8).swapaxes(1, 2) for x in (k, v))
    wanted, wanted_lse = attend(q, by_head(k), by_head(v), positions, slots, Mask(0.3, window, sinks))
    layer = Ring(window, sinks).layer(LayerSpec(2, 64, 2, 8, None, "float32"))
    at = 0
    for width in chunks:
        cut = slice(at, at + width)
        valid = jnp.ones((2, width), bool)
        out, lse, layer = layer.attend(q[:, cut], k[:, cut], v[:, cut], positions[:, cut], valid, Mask(0.3))
        np.testing.assert_allclose(out, wanted[:, cut], atol=2e-6)
        np.testing.assert_allclose(lse, wanted_lse[:, cut], atol=2e-6)
        at += width
    kept = {p for p in range(total) if p < sinks or p >= total - window}
    assert set(np.asarray(layer.positions[0]).tolist()) - {-1} >= kept


def test_rows_grow_past_the_capacity():
    model, params = tiny()
    cache = Ring(window=6, sinks=2).init(model, batch=1, capacity=16)
    assert cache.capacity is None
    out = kvjax.generate(model, params, cache, prompts(0, 1, 30), max_new=100)
    assert out.cache.length.tolist() == [129]
    assert jnp.isfinite(out.logprobs).all()


def test_each_layer_keeps_its_models_own_window():
    model, _ = tiny("gemma2")  # windows 6 and None
    cache = Ring().init(model, batch=1, capacity=50)
    assert [layer.positions.shape[1] for layer in cache.layers] == [6, 50]
    assert cache.capacity == 50


def test_a_window_beyond_the_capacity_is_dense():
    model, _ = tiny()
    ring = Ring(window=8, sinks=2).init(model, batch=1, capacity=10)
    dense = Dense().init(model, batch=1, capacity=10)
    assert kvjax.nbytes(ring) == kvjax.nbytes(dense)


@pytest.mark.parametrize(("settings", "words"), [({"window": 0}, "`window`"), ({"sinks": -1}, "`sinks`")])
def test_impossible_rings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Ring(**settings)
