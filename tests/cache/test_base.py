"""What holds for every strategy: sizes, forks, saving, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Ring
from tests.strategies import CACHES
from tests.tiny import prompts, tiny


@pytest.fixture(params=CACHES, ids=str)
def strategy(request):
    return CACHES[request.param]


def filled(strategy, batch=3):
    model, params = tiny("mistral")
    cache = strategy.init(model, batch=batch, capacity=40)
    lengths = np.arange(batch) * 5 + 9
    logits, cache = kvjax.prefill(model, params, cache, prompts(0, batch, 40), lengths)
    return model, params, logits, cache


def test_bytes_are_exact_and_known_before(strategy):
    model, _ = tiny("mistral")
    cache = strategy.init(model, batch=2, capacity=40)
    held = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert kvjax.nbytes(strategy.shapes(model, batch=2, capacity=40)) == kvjax.nbytes(cache) == held


def test_dense_bytes_by_hand():
    model, _ = tiny()  # 2 layers, 2 K/V heads of 8
    cache = Dense("bfloat16").init(model, batch=3, capacity=10)
    assert kvjax.nbytes(cache) == 2 * (3 * 10 * 2 * 2 * 8 * 2 + 3 * 4) + 3 * 4


def test_a_ring_frees_bytes():
    model, _ = tiny()
    ring = Ring(window=6, sinks=2).shapes(model, batch=1, capacity=800)
    assert kvjax.nbytes(ring) < kvjax.nbytes(Dense().shapes(model, batch=1, capacity=800)) / 50


def test_a_fork_continues_the_rows_it_names(strategy):
    model, params, _, cache = filled(strategy)
    order = jnp.array([2, 0, 2, 1])
    forked = kvjax.fork(cache, order)
    assert forked.batch == 4
    token = jnp.array([5, 6, 7])
    wanted, _ = kvjax.decode_step(model, params, cache, token)
    got, _ = kvjax.decode_step(model, params, forked, token[order])
    np.testing.assert_allclose(got, wanted[order], atol=1e-5)


def test_forked_rows_do_not_share(strategy):
    model, params, _, cache = filled(strategy, batch=1)
    forked = kvjax.fork(cache, jnp.array([0, 0]))
    _, forked = kvjax.decode_step(model, params, forked, jnp.array([3, 4]))
    different, _ = kvjax.decode_step(model, params, forked, jnp.array([9, 9]))
    assert not np.allclose(different[0], different[1])


def test_saved_mid_generation_it_continues_bit_for_bit(strategy, tmp_path):
    model, params, _, cache = filled(strategy)
    token = jnp.array([1, 2, 3])
    _, cache = kvjax.decode_step(model, params, cache, token)
    kvjax.save(tmp_path / "cache", cache)
    restored = kvjax.restore(tmp_path / "cache", strategy.shapes(model, batch=3, capacity=40))
    for _ in range(4):
        one, cache = kvjax.decode_step(model, params, cache, token)
        two, restored = kvjax.decode_step(model, params, restored, token)
        np.testing.assert_array_equal(one, two)
        token = one.argmax(-1).astype(jnp.int32)


def test_a_step_changes_only_its_own_slot(strategy):
    """Of the keys and values held in full, a step changes as many numbers as it brings, and no more."""
    model, params, _, cache = filled(strategy)
    before = jax.tree.map(np.asarray, cache.layers)
    _, cache = kvjax.decode_step(model, params, cache, jnp.array([1, 2, 3]))
    changed = dict.fromkeys("kv", 0)
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(cache.layers), strict=True
    ):
        if path[-1].name in changed:
            changed[path[-1].name] += (old != np.asarray(new)).sum()
    c = model.config
    new = 3 * c.layers * c.kv_heads * c.head_dim
    assert changed == {"k": new, "v": new}


def test_vmap_over_caches(strategy):
    """A cache is a pytree like any other: two of them stack and step together."""
    model, params, _, cache = filled(strategy)
    _, _, _, other = filled(strategy)
    token = jnp.array([1, 2, 3])
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), cache, other)
    wanted, _ = kvjax.decode_step(model, params, cache, token)
    got, _ = jax.vmap(lambda c: kvjax.decode_step(model, params, c, token))(both)
    np.testing.assert_allclose(got[1], wanted, atol=1e-5)


def test_gradients_pass_through_cached_steps(strategy):
    """The same gradient as without a cache, where the cache loses nothing."""
    model, params = tiny("mistral")
    tokens = prompts(3, 1, 6)

    def cached(params):
        cache, total = strategy.init(model, batch=1, capacity=40), 0.0
        for i in range(5):
            logits, cache = kvjax.decode_step(model, params, cache, tokens[:, i])
            total -= jax.nn.log_softmax(logits)[0, tokens[0, i + 1]]
        return total

    def whole(params):
        scores = jax.nn.log_softmax(kvjax.forward(model, params, tokens[:, :5]))
        return -jnp.take_along_axis(scores[0], tokens[0, 1:, None], 1).sum()

    got, wanted = jax.jit(jax.grad(cached))(params), jax.grad(whole)(params)  # jit: donation ends at its border
    largest = max(float(abs(x).max()) for x in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * largest)


@pytest.mark.parametrize("name", ["batch", "capacity"])
def test_sizes_below_one_are_refused(strategy, name):
    model, _ = tiny()
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, a whole number, got 0"):
        strategy.init(model, **{"batch": 1, "capacity": 8, name: 0})


def test_capacity_beyond_learned_positions_is_refused(strategy):
    model, _ = tiny("gpt2")
    with pytest.raises(ValueError, match="96 learned positions"):
        strategy.init(model, batch=1, capacity=97)


def test_another_models_cache_is_refused(strategy):
    model, params = tiny("llama")
    cache = strategy.init(tiny("qwen3")[0], batch=1, capacity=8)
    with pytest.raises(ValueError, match="another model.*kv_heads"):
        kvjax.decode_step(model, params, cache, jnp.array([1]))
    with pytest.raises(ValueError, match="another model"):
        kvjax.prefill(model, params, cache, [[1]])


def test_another_batch_is_refused(strategy):
    model, params = tiny()
    cache = strategy.init(model, batch=2, capacity=8)
    with pytest.raises(ValueError, match="2 rows, but the tokens have 3"):
        kvjax.decode_step(model, params, cache, jnp.array([1, 2, 3]))


def test_a_full_row_gets_nan_and_keeps_what_it_held():
    model, params = tiny()
    cache = Dense().init(model, batch=2, capacity=4)
    _, cache = kvjax.prefill(model, params, cache, [[1, 2, 3, 4], [1, 2]])
    held = jax.tree.map(np.asarray, cache.layers)
    logits, cache = kvjax.decode_step(model, params, cache, jnp.array([5, 5]))
    assert jnp.isnan(logits[0]).all()
    assert jnp.isfinite(logits[1]).all()
    for old, new in zip(jax.tree.leaves(held), jax.tree.leaves(cache.layers), strict=True):
        each = old.shape[0] // 2
        np.testing.assert_array_equal(old[:each], new[:each])
