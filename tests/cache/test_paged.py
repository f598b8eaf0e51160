"""Pages of a pool: allocation, sharing, running out, and release."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax.cache import Dense, Paged, Shared, release
from kvjax.cache.pages import allocate, counted, no_pages
from kvjax.decode.state import REASONS
from tests.tiny import prompts, tiny

PAGE, ROWS, POOL = 4, 3, 7
give = jax.jit(allocate, static_argnames="page")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 6)] * ROWS, st.integers(0, 3)), max_size=12))
def test_no_page_is_lost_or_given_twice(turns):
    """Whatever is asked, forked and released, every page belongs to those that the table names."""
    pages, length = no_pages(ROWS, 5, POOL), np.zeros(ROWS, int)
    for *asked, event in turns:
        asked = np.array(asked)
        before = pages
        pages, copies = give(before, jnp.array(length), jnp.array(asked), PAGE)
        starved = np.asarray(pages.starved)
        length = length + np.where(starved, 0, asked)
        table = np.asarray(pages.table)
        held = table[table >= 0]
        np.testing.assert_array_equal(pages.refs, np.bincount(held, minlength=POOL))
        np.testing.assert_array_equal((table >= 0).sum(1), -(-length // PAGE))
        for row in range(ROWS):
            if starved[row]:
                np.testing.assert_array_equal(table[row], before.table[row])
            elif asked[row]:  # what it writes to is its own
                written = table[row, (length[row] - asked[row]) // PAGE : -(-length[row] // PAGE)]
                assert (np.asarray(pages.refs)[written] == 1).all()
        copied = np.asarray(copies.target) < POOL
        assert (np.asarray(before.refs)[np.asarray(copies.source)[copied]] > 1).all()
        if event == 1:  # row 2 becomes a copy of row 0
            pages = counted(replace(pages, table=pages.table.at[2].set(pages.table[0])))
            length[2] = length[0]
        if event == 2:
            pages = counted(replace(pages, table=pages.table.at[1].set(-1)))
            length[1] = 0


def test_a_row_is_refused_only_when_pages_are_out():
    pages, _ = give(no_pages(ROWS, 5, POOL), jnp.zeros(ROWS, int), jnp.array([8, 16, 4]), PAGE)
    np.testing.assert_array_equal(pages.starved, [False, False, False])
    assert pages.free == 0
    again, _ = give(pages, jnp.array([8, 16, 4]), jnp.array([0, 1, 0]), PAGE)
    np.testing.assert_array_equal(again.starved, [False, True, False])
    np.testing.assert_array_equal(again.table, pages.table)


def starving():
    """Three rows whose next tokens need three pages of a pool that has one left."""
    model, params = tiny()
    cache = Paged(page=PAGE, pool=8).init(model, batch=3, capacity=40)
    logits, cache = kvjax.prefill(model, params, cache, prompts(0, 3, 12), [12, 8, 8])
    return model, params, logits, cache


def test_a_starved_row_says_so_stays_as_it_is_and_can_go_on():
    model, params, _, cache = starving()
    token = jnp.array([1, 2, 3])
    logits, cache = kvjax.decode_step(model, params, cache, token)
    np.testing.assert_array_equal(jnp.isnan(logits).any(-1), [False, True, True])
    np.testing.assert_array_equal(cache.shared.starved, [False, True, True])
    np.testing.assert_array_equal(cache.length, [13, 8, 8])
    cache = release(cache, jnp.array([True, False, False]))
    logits, cache = kvjax.decode_step(model, params, cache, token)
    dense = Dense().init(model, batch=3, capacity=40)
    _, dense = kvjax.prefill(model, params, dense, prompts(0, 3, 12), [12, 8, 8])
    wanted, _ = kvjax.decode_step(model, params, dense, token)
    np.testing.assert_allclose(logits[1:], wanted[1:], atol=1e-5)
    np.testing.assert_array_equal(cache.shared.starved, [False, False, False])


@pytest.mark.parametrize("strategy", [Paged(page=PAGE, pool=6), Dense()], ids=["paged", "dense"])
def test_a_prompt_that_runs_out_half_way_stops_there(strategy):
    """Inside jit, where it cannot be refused: what comes after the chunk without room is not taken in instead of it."""
    model, params = tiny()
    cache = strategy.init(model, batch=2, capacity=40 if isinstance(strategy, Paged) else 20)
    whole = jax.jit(partial(kvjax.prefill, model, params, buckets=(4, 16)))
    logits, cache = whole(cache, prompts(0, 2, 36), jnp.array([3, 36]))
    np.testing.assert_array_equal(jnp.isnan(logits).any(-1), [False, True])
    np.testing.assert_array_equal(cache.length, [3, 16])
    if isinstance(strategy, Paged):
        np.testing.assert_array_equal(cache.shared.starved, [False, True])


def test_generate_says_before_and_inside_the_loop_that_pages_run_out():
    model, params = tiny()
    cache = Paged(page=PAGE, pool=8).init(model, batch=3, capacity=40)
    _, cache = kvjax.prefill(model, params, cache, prompts(0, 3, 12), [11, 7, 7])
    with pytest.raises(ValueError, match="generate: .*need 6 pages of 4 tokens, but 1 of the pool's 8 are free"):
        kvjax.generate(model, params, cache, [[1], [2], [3]], max_new=6)
    inside = jax.jit(lambda cache: kvjax.generate(model, params, cache, jnp.array([[1], [2], [3]]), max_new=6))
    out = inside(cache)
    np.testing.assert_array_equal(out.lengths, [5, 1, 1])  # the first row got the last page
    assert [REASONS[reason] for reason in out.reason.tolist()] == ["not finite"] * 3


def test_a_pool_too_small_for_one_prompt_is_said():
    model, params = tiny()
    cache = Paged(page=PAGE, pool=2).init(model, batch=1, capacity=40)
    with pytest.raises(ValueError, match=r"prefill: .*need 3 pages of 4 tokens, but 2 of the pool's 2 are free"):
        kvjax.prefill(model, params, cache, prompts(0, 1, 9))


@pytest.mark.parametrize("settings", [{"page": 0}, {"page": 2.5}, {"page": None}, {"pool": 1.5}], ids=str)
def test_impossible_settings_are_refused(settings, unchecked):
    with pytest.raises(ValueError, match="Paged: `(page|pool)` must be at least 1, a whole number, got"):
        Paged(**settings)


@pytest.mark.parametrize("strategy", [Dense(), Shared()], ids=str)
def test_a_cache_without_pages_has_none_to_give_back(strategy):
    model, _ = tiny()
    with pytest.raises(ValueError, match=r"release: the rows of `cache` must be Paged, .* got Dense\("):
        release(strategy.init(model, batch=2, capacity=8))


def test_forks_share_pages_until_they_write():
    model, params = tiny()
    cache = Paged(page=PAGE, pool=20).init(model, batch=1, capacity=40)
    _, cache = kvjax.prefill(model, params, cache, prompts(0, 1, 10))
    forked = kvjax.fork(cache, jnp.array([0, 0, 0]))
    assert 20 - forked.shared.free == 3
    _, forked = kvjax.decode_step(model, params, forked, jnp.array([1, 2, 3]))
    assert 20 - forked.shared.free == 2 + 3  # two full pages shared, a page each with their own token
    _, forked = kvjax.decode_step(model, params, forked, jnp.array([0, 0, 0]))
    assert 20 - forked.shared.free == 5
    forked = release(forked, jnp.array([False, True, True]))
    assert 20 - forked.shared.free == 3


def test_no_cache_sized_copy():
    model, params = tiny()
    cache = Paged(page=64).init(model, batch=2, capacity=8192)
    token = jnp.zeros(2, jnp.int32)
    compiled = kvjax.decode_step.lower(model, params, cache, token).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < cache.layers[0].k.nbytes / 2
    assert memory.alias_size_in_bytes >= kvjax.nbytes(cache.layers)
