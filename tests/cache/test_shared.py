"""A prefix that is held once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Paged, Ring, Shared, release, share
from tests.tiny import prompts, tiny

PREFIX, REST, LENGTHS = prompts(1, 1, 11), prompts(2, 3, 5), np.array([5, 2, 1])


def prefix(family="llama", strategy=None, capacity=16):
    model, params = tiny(family)
    cache = (strategy or Dense()).init(model, batch=1, capacity=capacity)
    return model, params, kvjax.prefill(model, params, cache, PREFIX)[1]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("inner", [Dense(), Paged(page=4), Ring()], ids=str)
def test_rows_go_on_as_if_each_held_the_prefix(family, inner):
    model, params, held = prefix(family)
    cache = share(model, held, batch=3, capacity=10, inner=inner)
    out = kvjax.generate(model, params, cache, REST, LENGTHS, max_new=6)
    whole = jnp.concatenate([jnp.repeat(PREFIX, 3, axis=0), REST], axis=1)
    alone = Dense().init(model, batch=3, capacity=32)
    wanted = kvjax.generate(model, params, alone, whole, LENGTHS + 11, max_new=6)
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_allclose(out.logprobs, wanted.logprobs, atol=1e-5)
    np.testing.assert_array_equal(out.cache.length, wanted.cache.length)


@pytest.mark.parametrize("strategy", [Paged(page=4, pool=8), Ring(window=6, sinks=2)], ids=str)
def test_a_prefix_may_be_kept_in_any_way(strategy):
    model, params, held = prefix(strategy=strategy)
    wanted, _ = kvjax.decode_step(model, params, kvjax.fork(held, jnp.array([0, 0])), jnp.array([3, 4]))
    _, _, held = prefix(strategy=strategy)
    logits, _ = kvjax.decode_step(model, params, share(model, held, batch=2, capacity=4), jnp.array([3, 4]))
    if not isinstance(strategy, Ring):  # which forgets nothing of the prefix once it is shared
        np.testing.assert_allclose(logits, wanted, atol=1e-5)
    assert np.isfinite(logits).all()


def test_the_prefix_is_counted_once_and_stays_valid():
    model, params, held = prefix(capacity=400)
    few, many = (kvjax.nbytes(share(model, held, batch=n, capacity=10)) for n in (1, 9))
    own = kvjax.nbytes(Dense().shapes(model, batch=8, capacity=10))
    assert many - few == own
    kvjax.decode_step(model, params, share(model, held, batch=1, capacity=10), jnp.array([1]))
    assert np.isfinite(kvjax.decode_step(model, params, held, jnp.array([1]))[0]).all()


def test_room_is_counted_after_the_prefix():
    model, params, held = prefix()
    cache = share(model, held, batch=3, capacity=5)
    logits, cache = kvjax.prefill(model, params, cache, REST)
    with pytest.raises(ValueError, match="need 6 slots a row, but the cache's capacity is 5"):
        kvjax.prefill(model, params, cache, [[1]] * 3)
    logits, cache = kvjax.decode_step(model, params, cache, jnp.array([1, 2, 3]))
    assert np.isnan(logits).all() and (cache.length == 16).all()


def test_only_one_row_can_be_shared():
    model, _ = tiny()
    with pytest.raises(ValueError, match="share: `prefix` must hold one row, got 2"):
        share(model, Dense().init(model, batch=2, capacity=4), batch=3, capacity=5)


def test_a_prefix_of_another_model_or_none_is_refused(unchecked):
    model, _ = tiny()
    with pytest.raises(ValueError, match="share: `prefix` was made for another model"):
        share(model, Dense().init(tiny("gpt2")[0], batch=1, capacity=4), batch=3, capacity=5)
    with pytest.raises(ValueError, match="share: `prefix` must be what a strategy's `init` makes, got Dense"):
        share(model, Dense(), batch=3, capacity=5)


@pytest.mark.parametrize("inner", [Shared(), None, Dense, "dense"], ids=str)
def test_what_cannot_follow_a_prefix_is_refused(inner, unchecked):
    with pytest.raises(ValueError, match="Shared: `inner` must be a strategy that keeps rows apart.*got"):
        Shared(inner)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["as it is", "jit"])
def test_rows_in_pages_go_back_to_the_prefix_and_give_theirs_back(wrap):
    model, params, held = prefix()
    cache = share(model, held, batch=3, capacity=8, inner=Paged(page=4, pool=4))
    wanted, cache = kvjax.prefill(model, params, cache, REST, LENGTHS)
    assert cache.shared.inner.free == 0
    cache = wrap(release)(cache, jnp.array([True, False, False]))
    assert cache.length.tolist() == [11, 13, 12] and cache.shared.inner.free == 2
    logits, cache = kvjax.prefill(model, params, cache, REST, np.array([5, 1, 1]))
    np.testing.assert_allclose(logits[0], wanted[0], atol=1e-5)
    cache = wrap(release)(cache)
    assert cache.length.tolist() == [11, 11, 11] and cache.shared.inner.free == 4
