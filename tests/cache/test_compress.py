"""A compressed cache is the one that would have been, had it been of that strategy from the start."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Evicting, Paged, Quantized, Ring, Strategy
from kvjax.cache.compress import compress
from kvjax.pytree import pytree
from tests.tiny import prompts, tiny

LENGTHS = [37, 9, 30]
TO = {
    "quantized": Quantized(4, residual=3),
    "KIVI, by layer": Quantized((5, 2), 3, keys="channel", values="token", residual=0, sinks=1),
}


def filled(strategy):
    model, params = tiny()
    cache = strategy.init(model, batch=3, capacity=48)
    return model, params, kvjax.prefill(model, params, cache, prompts(2, 3, 37), LENGTHS)[1]


def decoded(model, params, cache, steps=4):
    rows = []
    for i in range(steps):
        logits, cache = kvjax.decode_step(model, params, cache, jnp.array([5, 6, 7]) + i)
        rows.append(logits)
    return np.stack(rows), cache


@pytest.mark.parametrize("name", TO)
def test_it_is_as_if_it_had_been_so_from_the_start(name):
    model, params, dense = filled(Dense())
    wanted, straight = decoded(*filled(TO[name]))
    held, before = jax.tree.leaves(dense.layers), kvjax.nbytes(dense)
    cache = compress(dense, TO[name])
    assert cache.length.tolist() == LENGTHS and kvjax.nbytes(cache) < before
    assert jax.tree.structure(cache) == jax.tree.structure(straight)
    assert all(x.is_deleted() for x in held)
    np.testing.assert_allclose(decoded(model, params, cache)[0], wanted, atol=1e-5)


def test_inside_jit_and_step_by_step():
    """Dense, 8 bits, 4 bits: near 4 bits at once."""
    model, params, dense = filled(Dense())
    wanted, _ = decoded(*filled(TO["quantized"]))
    twice = jax.jit(lambda cache: compress(compress(cache, Quantized(8, residual=3)), TO["quantized"]))
    got, _ = decoded(model, params, twice(dense))
    assert np.abs(got - wanted).mean() < 0.1 * wanted.std()


@pytest.mark.parametrize("steps", [[Ring(window=11, sinks=2)], [Ring(window=20, sinks=3), Ring(window=11, sinks=2)]])
def test_a_ring_has_the_newest_and_the_first(steps):
    """As the first layer of a ring from the start has them; deeper ones saw what such a ring never shows."""
    model, params, cache = filled(Dense())
    for strategy in steps:
        cache = compress(cache, strategy)
    jax.tree.map(np.testing.assert_array_equal, cache.layers[0], filled(steps[-1])[2].layers[0])
    assert np.isfinite(decoded(model, params, cache)[0]).all()


def test_what_was_set_back_is_not_taken_along():
    _, _, dense = filled(Dense())
    cache = compress(replace(dense, length=dense.length - 5), Ring(window=11, sinks=2))
    assert cache.length.tolist() == [32, 4, 25]
    assert cache.layers[0].held(cache.length).max(1).tolist() == [31, 3, 24]


@pytree
class EvenLayer:
    """The even positions below 8, each K/V head its own: what a strategy of one's own needs to be target and source."""

    k: Any
    v: Any
    positions: Any

    limit = None

    def held(self, length):
        return self.positions

    def tokens(self):
        return self.k, self.v

    def take(self, k, v, positions):
        held = jnp.repeat(positions, k.shape[0] // positions.shape[0], axis=0)
        slot = jnp.argsort(jnp.where((held >= 0) & (held % 2 == 0), held, 1000), axis=1)[:, :4]
        k, v = (jnp.take_along_axis(x, slot[..., None], axis=1) for x in (k, v))
        return EvenLayer(k, v, jnp.take_along_axis(held, slot, axis=1))


@dataclass(frozen=True)
class Even(Strategy):
    def layer(self, spec):
        empty = jnp.full((spec.batch * spec.kv_heads, 4), -1, jnp.int32)
        return EvenLayer(spec.zeros(4), spec.zeros(4), empty)


def test_a_strategy_of_ones_own_takes_tokens_in():
    _, _, quantized = filled(Quantized(8, residual=3))
    length = quantized.length
    first = jax.jit(lambda layer: (layer.tokens(), layer.held(length)))(quantized.layers[0])
    layer = compress(quantized, Even()).layers[0]
    assert (layer.held(length) == jnp.array([[0, 2, 4, 6]])).all()
    (k, _), held = first
    for row in range(6):
        slots = [held[row // 2].tolist().index(i) for i in (0, 2, 4, 6)]
        np.testing.assert_array_equal(layer.k[row], k[row, jnp.array(slots)])


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (Quantized(4), Quantized(8), "`strategy` must need fewer bytes than the .* there are"),
        (Ring(window=30), Quantized(2), "needs tokens that Ring.* has dropped"),
        (Ring(window=10), Ring(window=9, sinks=1), "needs tokens that Ring.* has dropped"),
        (Evicting(64), Quantized(2), "do not tell their tokens"),
        (Paged(), Quantized(4), "do not tell their tokens"),
        (Dense(), Paged(pool=1), "do not take tokens in"),
        (Dense(), Quantized((4, 4, 4)), "one entry for each of 2 layers, got 3"),
    ],
)
def test_what_cannot_work_is_refused(source, target, words):
    model, _ = tiny()
    cache = source.init(model, batch=1, capacity=96)
    with pytest.raises(ValueError, match=words):
        compress(cache, target)


def test_a_smaller_capacity_is_refused():
    model, _ = tiny()
    with pytest.raises(ValueError, match="`capacity` must be at least the cache's 96, got 64"):
        compress(Dense().init(model, batch=1, capacity=96), Quantized(2), capacity=64)
