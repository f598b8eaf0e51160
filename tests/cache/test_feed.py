"""Tokens in no order, given to a layer in parts, leave it as a prompt would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.reference import Mask
from kvjax.cache import Dense, LayerSpec, Quantized, Ring
from kvjax.cache.feed import feed

SPEC = LayerSpec(2, 40, 2, 8, None, "float32")
COUNTS = jnp.array([[23], [6]])


@pytest.mark.parametrize("strategy", [Dense(), Ring(7), Quantized(8, residual=3, sinks=1)], ids=str)
def test_the_order_and_the_parts_do_not_matter(strategy, monkeypatch):
    k, v = jax.random.normal(jax.random.key(0), (2, 2, 29, 2, 8))
    positions = jnp.broadcast_to(jnp.arange(29), (2, 29))
    layer, valid, mask = strategy.layer(SPEC), positions < COUNTS, Mask(1.0)
    wanted = jax.jit(lambda layer: layer.attend(jnp.zeros_like(k), k, v, positions, valid, mask)[2])(layer)
    order = jax.random.permutation(jax.random.key(1), 29)
    rows = [x.swapaxes(1, 2).reshape(4, 29, 8)[:, order] for x in (k, v)]
    monkeypatch.setattr("kvjax.cache.feed.CHUNK", 5)
    got = jax.jit(lambda layer: feed(layer, *rows, jnp.where(valid, positions, -1)[:, order], 29, mask))(layer)
    held = [x.held(COUNTS[:, 0]) for x in (wanted, got)]
    np.testing.assert_array_equal(*held)
    for ours, theirs in zip(*(jax.jit(lambda x: x.tokens())(x) for x in (got, wanted)), strict=True):
        filled = jnp.repeat(held[0] >= 0, 2, axis=0)[..., None]
        np.testing.assert_allclose(jnp.where(filled, ours, 0), jnp.where(filled, theirs, 0), atol=1e-6)
