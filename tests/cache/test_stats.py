"""What slots hold, and what follows from it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Paged, Ring, Shared, release, share, stats
from tests.strategies import CACHES
from tests.tiny import prompts, tiny

LENGTHS = np.array([9, 14, 3])


def filled(strategy, batch=3):
    model, params = tiny()
    cache = strategy.init(model, batch=batch, capacity=40)
    _, cache = kvjax.prefill(model, params, cache, prompts(0, batch, 20), LENGTHS[:batch])
    return model, params, cache


def positions(cache, layer=0):
    """The positions that each row's slots hold, sorted."""
    held = cache.opened(jnp.zeros(cache.batch, jnp.int32))[0].layers[layer].held(cache.length)
    rows = np.asarray(held).reshape(cache.batch, -1, held.shape[-1])[:, 0]
    return [sorted(row[row >= 0].tolist()) for row in rows]


@pytest.mark.parametrize("name", CACHES)
def test_slots_hold_the_positions_that_are_kept(name):
    _, _, cache = filled(CACHES[name])
    wanted = [list(range(length)) for length in LENGTHS]
    if "window" in name:
        wanted = [[p for p in row if p < 2 or p >= len(row) - 6] for row in wanted]
    for got in (positions(cache), positions(cache, 1)):
        if "budget=9" not in name:
            assert got == wanted
            continue
        for row, all_of_them in zip(got, wanted, strict=True):  # each layer keeps a choice of its own
            assert len(set(row)) == len(row) == min(9, len(all_of_them))
            assert set(all_of_them[:1] + all_of_them[-3:]) <= set(row) <= set(all_of_them)


def test_the_prefix_and_the_rows_own():
    model, params = tiny()
    prefix = Dense().init(model, batch=1, capacity=16)
    _, prefix = kvjax.prefill(model, params, prefix, prompts(1, 1, 5))
    cache = share(model, prefix, batch=3, capacity=20, inner=Ring(window=4))
    _, cache = kvjax.prefill(model, params, cache, prompts(0, 3, 20), LENGTHS)
    assert positions(cache) == [[0, 1, 2, 3, 4, *range(max(5, n + 5 - 4), n + 5)] for n in LENGTHS]
    np.testing.assert_array_equal(stats(cache).evictions, [[5, 10, 0]] * 2)


def test_figures_of_a_ring_by_hand():
    _, _, cache = filled(Ring(window=6, sinks=2))
    got = jax.jit(stats)(cache)
    np.testing.assert_array_equal(got.evictions, [[1, 6, 0]] * 2)
    np.testing.assert_allclose(got.fill, [[1, 1, 3 / 8]] * 2)
    ages = [(8 + 7 + 15) / 8, (13 + 12 + 15) / 8, 1]
    np.testing.assert_allclose(got.age, [ages] * 2)
    np.testing.assert_array_equal(got.hits, [0, 0, 0])


@pytest.mark.parametrize("name", CACHES)
def test_shares_of_bytes_sum_up_and_an_empty_cache_has_no_figures(name):
    model, _ = tiny()
    cache = CACHES[name].init(model, batch=3, capacity=40)
    got = stats(cache)
    np.testing.assert_allclose(got.bytes.sum(), kvjax.nbytes(cache.layers), rtol=1e-6)
    for figure in (got.evictions, got.fill, got.age):
        np.testing.assert_array_equal(figure, np.zeros((2, 3)))


def test_hits_go_with_the_row_they_belong_to():
    _, _, cache = filled(Paged(page=4))
    cache = replace(cache, shared=replace(cache.shared, hits=jnp.array([4, 5, 6]), misses=jnp.array([1, 2, 3])))
    forked = kvjax.fork(cache, jnp.array([2, 0]))
    np.testing.assert_array_equal(stats(forked).hits, [6, 4])
    np.testing.assert_array_equal(stats(release(forked, jnp.array([True, False]))).misses, [0, 1])
    assert stats(Shared(Paged(page=4)).init(tiny()[0], batch=2, capacity=8)).hits.shape == (2,)
