"""Knobs turned in a cache that already holds tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Evicting, Shared
from kvjax.cache.evict import turn
from tests.cache.evict.test_evicting import held
from tests.tiny import prompts, tiny

MODEL, PARAMS = tiny()


def used(strategy, length=30):
    """A cache of one row that has taken in `length` tokens."""
    cache = strategy.init(MODEL, batch=1, capacity=64)
    return jax.jit(lambda cache, tokens: kvjax.prefill(MODEL, PARAMS, cache, tokens)[1])(cache, prompts(0, 1, length))


@jax.jit
def stepped(cache):
    """12 more tokens, one at a time."""

    def step(cache, token):
        return kvjax.decode_step(MODEL, PARAMS, cache, token)[::-1]

    return jax.lax.scan(step, cache, prompts(1, 12, 1))


@pytest.mark.parametrize(("score", "inner"), [("h2o", None), ("key_diff", 8)])
def test_a_lower_budget_holds_at_once_and_a_higher_one_leaves_room(score, inner):
    cache = used(Evicting(20, score, sinks=2, recent=4, inner=inner))
    low = turn(cache, budget=jnp.array([9, 12]))
    for before, after in zip(cache.layers, low.layers, strict=True):
        worth = np.asarray(before.worth)
        for row, (old, new) in enumerate(zip(held(before), held(after), strict=True)):
            safe = {p for p in old if p < 2 or p >= 26}
            slot = {p: i for i, p in enumerate(np.asarray(before.positions)[row].tolist())}
            best = sorted(old - safe, key=lambda p: -worth[row, slot[p]])  # noqa: B023
            assert new == safe | set(best[: (3, 6)[row]])
    later = stepped(low)[0]
    assert all([len(kept) for kept in held(layer)] == [9, 12] for layer in later.layers)
    assert all([len(kept) for kept in held(layer)] == [20, 20] for layer in stepped(turn(later, budget=20))[0].layers)


def test_vmap_over_budgets_of_a_cache_in_use():
    cache = used(Evicting(20, sinks=1, recent=2))
    budgets = jnp.array([5, 9, 20])
    together = jax.jit(jax.vmap(lambda budget: stepped(turn(cache, budget=budget))[1]))(budgets)
    for budget, logits in zip(budgets.tolist(), together, strict=True):
        np.testing.assert_allclose(logits, stepped(turn(cache, budget=budget))[1], atol=1e-4)
    assert not np.allclose(together[0], together[1], atol=1e-3)
    assert not np.allclose(together[1], together[2], atol=1e-3)


def test_what_the_models_window_left_behind_is_dropped_first():
    model, params = tiny("mistral")
    cache = Evicting(20, sinks=2, recent=1).init(model, batch=1, capacity=64)
    _, cache = kvjax.prefill(model, params, cache, prompts(0, 1, 30))
    assert [held(layer) for layer in turn(cache, budget=7).layers] == [[set(range(23, 30))] * 2] * 2


def test_a_turned_cache_can_be_donated():
    budget, threshold = jnp.array([12, 12], jnp.int32), jnp.float32(0.1)
    cache = turn(used(Evicting(20, sinks=1, recent=2)), budget=budget, threshold=threshold)
    kvjax.decode_step(MODEL, PARAMS, cache, jnp.zeros(1, jnp.int32))
    assert budget.tolist() == [12, 12] and float(threshold) == np.float32(0.1)


@pytest.mark.parametrize(
    ("knobs", "budget", "safe"),
    [({"recent": 100}, 20, {0, 1, *range(26, 42)}), ({"budget": 3}, 6, {0, 1, *range(38, 42)})],
)
def test_traced_knobs_that_cannot_be_met_lose_no_sink_and_nothing_new(knobs, budget, safe):
    cache = used(Evicting(20, "random", sinks=2, recent=4))
    last = jax.jit(lambda knobs: stepped(turn(cache, **knobs))[0])(knobs)
    for layer in last.layers:
        assert layer.knobs.budget.tolist() == [budget] * 2
        assert all(len(kept) == budget and kept >= safe for kept in held(layer))


def test_a_capacity_below_sinks_and_recent_keeps_both():
    """Ten slots: four sinks and the six newest, not whatever slot comes first."""
    cache = Evicting(36, "h2o").init(MODEL, batch=1, capacity=10)
    _, cache = kvjax.prefill(MODEL, PARAMS, cache, prompts(0, 1, 8))
    assert all(held(layer) == [{0, 1, 2, 3, *range(14, 20)}] * 2 for layer in stepped(cache)[0].layers)


def test_the_rows_of_a_shared_cache_are_turned():
    cache = Shared(Evicting(20, sinks=2, recent=4)).init(MODEL, batch=1, capacity=64)
    _, cache = kvjax.prefill(MODEL, PARAMS, cache, prompts(0, 1, 30))
    assert [len(kept) for layer in turn(cache, budget=8).layers for kept in held(layer.inner)] == [8] * 4


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"recent": 100}, r"`sinks` \+ `recent` must be at most a layer's 40 slots, got 4 \+ 100"),
        ({"recent": 0}, "`recent` must be at least 1 token, got 0"),
        ({"sinks": -1}, "`sinks` must not be negative, got -1"),
        ({"budget": 3}, r"`budget` must be at least `sinks` \+ `recent`, 36 tokens, got 3"),
        ({"budget": [40, 40, 40]}, r"`budget` must be a whole number, or 2, one a K/V head, got \[40, 40, 40\]"),
        ({"budget": 0.5}, "`budget` must be a whole number, .* got 0.5"),
        ({"budget": None}, "`budget` must be a whole number, .* got None"),
        ({"recent": True}, "`recent` must be a whole number, got True"),
        ({"threshold": "high"}, "`threshold` must be a number, got 'high'"),
    ],
)
def test_impossible_turns_are_refused(knobs, words):
    cache = Evicting(40).init(MODEL, batch=1, capacity=64)
    with pytest.raises(ValueError, match=f"turn: {words}"):
        turn(cache, **knobs)


def test_a_cache_without_knobs_is_refused():
    with pytest.raises(ValueError, match="turn: `cache` must be one that `Evicting` makes, got a layer Dense"):
        turn(Dense().init(MODEL, batch=1, capacity=8), budget=4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (([40, 40],), r"`budget` must be tokens, .* got \[40, 40\]"),
        (("0.5",), "`budget` must be tokens, .* got '0.5'"),
        ((None,), "`budget` must be tokens, .* got None"),
        ((True,), "`budget` must be tokens, .* got True"),
        (((40, "40"),), "`budget` must be tokens, .* got '40'"),
        ((40, None), "`score` must be one of .*, or a `Score`, got None"),
        ((40, "h2o", 4, 3.5), "`recent` must be a whole number, got 3.5"),
        ((40, "h2o", "4"), "`sinks` must be a whole number, got '4'"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(settings, words, unchecked):
    with pytest.raises(ValueError, match=f"Evicting: {words}"):
        Evicting(*settings)


def test_numpys_numbers_count_as_numbers(unchecked):
    strategy = Evicting((np.int64(9), np.float32(0.25)), sinks=np.int32(2), recent=4)
    assert strategy == Evicting((9, 0.25), sinks=2, recent=4)
    assert strategy.shapes(MODEL, batch=1, capacity=64).layers[0].positions.shape == (2, 9)
