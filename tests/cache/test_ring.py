"""A ring against a mask: full attention that may see only the window and the sinks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kernels.reference import Mask, attend
from kvjax.cache import Dense, LayerSpec, Ring
from tests.kernels.test_reference import inputs
from tests.tiny import prompts, tiny

TOTAL, CHUNK = 40, 6


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (5, 3), (9, 2)])
def test_a_ring_sees_the_window_and_the_sinks(window, sinks):
    """Rows take in their own random number of tokens a time: chunks, empty chunks and single tokens."""
    rng = np.random.default_rng(window)
    q, k, v, positions, slots = inputs(0, batch=2, width=TOTAL, heads=4, slots=TOTAL)
    wanted = attend(q, k, v, positions, slots, Mask(0.3, window, sinks))
    k, v = (np.asarray(x.reshape(2, 2, TOTAL, 8).swapaxes(1, 2)) for x in (k, v))
    layer = Ring(window, sinks).layer(LayerSpec(2, 64, 2, 8, None, "float32"))
    step = jax.jit(lambda layer, *new: layer.attend(*new, Mask(0.3)))
    at = np.zeros(2, int)
    while (at < TOTAL).any():
        width = int(rng.choice([1, CHUNK]))
        lengths = np.minimum(rng.integers(0, width + 1, 2), TOTAL - at)
        index = np.minimum(at[:, None] + np.arange(width), TOTAL - 1)
        new = [np.take_along_axis(np.asarray(x), index[..., None, None], 1) for x in (q, k, v)]
        valid = np.arange(width) < lengths[:, None]
        out, lse, layer = step(layer, *map(jnp.asarray, new), jnp.asarray(at[:, None] + np.arange(width)), valid)
        for row, n in enumerate(lengths):
            cut = slice(at[row], at[row] + n)
            np.testing.assert_allclose(out[row, :n], wanted[0][row, cut], atol=2e-6)
            np.testing.assert_allclose(lse[row, :n], wanted[1][row, cut], atol=2e-6)
        at += lengths
        for row in range(2):
            kept = {p for p in range(at[row]) if p < sinks or p >= at[row] - window}
            assert set(np.asarray(layer.positions[row]).tolist()) - {-1} >= kept


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
    assert [layer.k.shape[1] for layer in cache.layers] == [6, 50]
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
