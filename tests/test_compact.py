"""Tokens without the padding between rows: the same logits, and the same cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.compact import compact
from kvjax.draft import plan
from kvjax.draft.plan import fitting
from kvjax.draft.state import tokens_checked
from tests.tiny import tiny


def test_places_are_those_of_the_rows_tokens_in_order():
    places = compact(jnp.array([2, 0, 3]), width=4, places=6)
    assert places.source.tolist() == [0, 1, 8, 9, 10, 12]
    assert places.place.tolist() == [[0, 1, 6, 6], [6, 6, 6, 6], [2, 3, 4, 6]]
    x = jnp.arange(12.0).reshape(3, 4) + 1
    assert places.gathered(x).tolist() == [[1, 2, 9, 10, 11, 0]]
    assert places.spread(places.gathered(x)).tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [9, 10, 11, 0]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_and_cache_are_those_of_padded_rows(family):
    model, params = tiny(family)
    tokens = jax.random.randint(jax.random.key(1), (3, 5), 0, model.config.vocab)
    lengths = jnp.array([5, 0, 2])
    fresh = kvjax.cache.Dense().init(model, batch=3, capacity=8)
    places = compact(lengths, width=5, places=8)
    want, cache = model.apply({"params": params}, tokens, lengths, fresh)
    got, other = model.apply({"params": params}, tokens, lengths, fresh, places=places)
    assert got.shape == (1, 8, model.config.vocab)
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(places.spread(got)[row, :length], want[row, :length], atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    last, _ = model.apply({"params": params}, tokens, lengths, fresh, places=places, last=True)
    np.testing.assert_allclose(last[0], want[0, 4], atol=1e-5)


def test_a_row_without_room_is_nan_and_harms_no_other():
    model, params = tiny("llama")
    fresh = kvjax.cache.Dense().init(model, batch=2, capacity=3)
    lengths, tokens = jnp.array([4, 2]), jnp.ones((2, 4), jnp.int32)
    places = compact(lengths, width=4, places=6)
    logits, cache = model.apply({"params": params}, tokens, lengths, fresh, places=places)
    assert jnp.isnan(logits[0, :4]).all() and jnp.isfinite(logits[0, 4:6]).all()
    assert cache.length.tolist() == [0, 2]


def test_a_token_outside_the_vocabulary_harms_no_other_row():
    model, params = tiny("llama")
    fresh = kvjax.cache.Dense().init(model, batch=2, capacity=4)
    lengths, tokens = jnp.array([1, 2]), jnp.array([[model.config.vocab, 0], [1, 2]])
    places = compact(lengths, width=2, places=3)
    logits, _ = model.apply({"params": params}, tokens, lengths, fresh, places=places)
    assert jnp.isnan(logits[0, 0]).all() and jnp.isfinite(logits[0, 1:]).all()


def test_guesses_worth_most_go_first_and_none_without_those_before_it(monkeypatch):
    hope = jnp.array([[0.9, 0.8, 0.7], [0.5, 0.2, 0.1], [0.6, 0.6, 0.6]])
    running, count = jnp.ones(3, bool), jnp.array([3, 3, 3])
    monkeypatch.setattr(plan, "tokens_checked", lambda batch, width: 8)  # five guesses beside the rows' newest tokens
    assert fitting(hope, count, running, 3).tolist() == [3, 0, 2]
    assert fitting(hope, count, jnp.array([False, True, True]), 3).tolist() == [0, 3, 3]
    one_poor = hope.at[0, 1].set(0.05)  # of a tree: what comes after it is worth no more than it is
    assert fitting(one_poor, count, running, 3).tolist() == [1, 1, 3]


def test_a_call_has_a_place_for_all_guesses_of_a_few_rows():
    assert [tokens_checked(1, width) for width in (1, 3, 7, 15)] == [2, 4, 8, 16]
    assert [tokens_checked(3, width) for width in (1, 3, 7)] == [6, 12, 16]
    assert [tokens_checked(8, width) for width in (1, 3, 7)] == [16, 16, 32]
