"""A prefix store that outlives its process."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Paged, release, stats
from kvjax.cache.prefix import POLICIES, keep, open_store
from tests.tiny import LLAMA, prompts, tiny

MODEL, PARAMS = tiny()
TEXTS = np.asarray(prompts(0, 2, 20)).tolist()


def empty(page=4, pool=16, batch=2, capacity=48):
    return Paged(page=page, pool=pool).init(MODEL, batch=batch, capacity=capacity)


def filled(policy="lru"):
    """A store that keeps ten pages, with made-up keys."""
    cache = empty()
    cache, _ = cache.opened(jnp.array([20, 20]))
    layers = [
        replace(layer, k=jax.random.normal(jax.random.key(i), layer.k.shape), v=1.0 + layer.v)
        for i, layer in enumerate(cache.layers)
    ]
    cache = cache.closed(tuple(layers), jnp.array([20, 20]))
    return keep(open_store(cache, POLICIES[policy]), cache, TEXTS, time=5.0)


@pytest.fixture
def saved(tmp_path):
    store, cache = filled("workload_adaptive")
    kvjax.save_store(tmp_path / "s", store, cache, PARAMS)
    return tmp_path / "s"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pool", [16, 30])
def test_a_store_comes_back_with_its_pages_wherever_they_go(policy, pool, tmp_path):
    store, cache = filled(policy)
    kvjax.save_store(tmp_path / "s", store, cache, PARAMS)
    busy, _ = empty(pool=pool, batch=1).opened(jnp.array([6]))  # its first two pages are taken
    other, found = kvjax.restore_store(tmp_path / "s", busy.closed(busy.layers, jnp.array([6])), PARAMS)
    assert [replace(a, page=0) for a in other.blocks.values()] == [replace(b, page=0) for b in store.blocks.values()]
    assert (other.policy, other.tally, other.time, other.most) == (store.policy, store.tally, 5.0, 16)
    assert found.shared.kept.sum() == 10 and found.shared.free == pool - 12
    for name, block in other.blocks.items():
        for before, after in zip(cache.layers, found.layers, strict=True):
            np.testing.assert_array_equal(before.k[store.blocks[name].page], after.k[block.page])
            np.testing.assert_array_equal(before.v[store.blocks[name].page], after.v[block.page])


def test_a_restored_store_serves_prompts(tmp_path):
    settings = {"max_new": 4}
    out = kvjax.generate(MODEL, PARAMS, empty(), TEXTS, store=open_store(empty(), POLICIES["lru"]), **settings)
    kvjax.save_store(tmp_path / "s", out.store, out.cache, PARAMS)
    store, cache = kvjax.restore_store(tmp_path / "s", empty(), PARAMS)
    again = [[*text[:15], 7, 8] for text in TEXTS]
    found = kvjax.generate(MODEL, PARAMS, cache, again, store=store, **settings)
    wanted = kvjax.generate(MODEL, PARAMS, release(out.cache), again, store=out.store, **settings)
    np.testing.assert_array_equal(stats(found.cache).hits, [15, 15])
    np.testing.assert_array_equal(found.logprobs, wanted.logprobs)
    assert replace(found.store.tally) == wanted.store.tally


def test_an_empty_store_comes_back(tmp_path):
    cache = empty()
    kvjax.save_store(tmp_path / "s", open_store(cache, POLICIES["predictive"], most=3), cache, PARAMS)
    store, _ = kvjax.restore_store(tmp_path / "s", empty(), PARAMS)
    assert (dict(store.blocks), store.most) == ({}, 3)


def test_another_model_other_weights_or_another_cache_is_refused(saved):
    with pytest.raises(ValueError, match="is of other weights than `params`"):
        kvjax.restore_store(saved, empty(), kvjax.init_params(MODEL, jax.random.key(8)))
    model = kvjax.Transformer(replace(LLAMA, hidden=64, heads=8))
    with pytest.raises(ValueError, match="written for another model: its hidden, heads differ"):
        kvjax.restore_store(saved, Paged(page=4).init(model, batch=1, capacity=48), PARAMS)
    with pytest.raises(ValueError, match="has pages of 4 tokens, but `cache` has pages of 8"):
        kvjax.restore_store(saved, empty(page=8), PARAMS)
    with pytest.raises(ValueError, match="has 10 pages, but 9 of the pool's 9 are free"):
        kvjax.restore_store(saved, empty(pool=9), PARAMS)
    with pytest.raises(ValueError, match="must be a Paged one, got Dense"):
        kvjax.restore_store(saved, Dense().init(MODEL, batch=1, capacity=48), PARAMS)
    with pytest.raises(ValueError, match="`cache` already holds pages of a store"):
        kvjax.restore_store(saved, filled()[1], PARAMS)
    with pytest.raises(ValueError, match="bfloat16"):
        kvjax.restore_store(saved, Paged(page=4, dtype="bfloat16").init(MODEL, batch=2, capacity=48), PARAMS)


def test_another_version_or_a_corrupted_store_is_refused(saved):
    cache, path = empty(), saved / "store.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"format": "kvjax-store-0"}))
    with pytest.raises(ValueError, match="is of another version: 'kvjax-store-0', not 'kvjax-store-1'"):
        kvjax.restore_store(saved, cache, PARAMS)
    path.write_text(json.dumps(whole | {"store": whole["store"] | {"time": 6.0}}))
    with pytest.raises(ValueError, match="store.json is corrupted: its digest is another"):
        kvjax.restore_store(saved, cache, PARAMS)
    path.write_text(json.dumps(whole)[:-20])
    with pytest.raises(ValueError, match="not valid JSON"):
        kvjax.restore_store(saved, cache, PARAMS)
    with pytest.raises(FileNotFoundError, match="no store at"):
        kvjax.restore_store(saved / "pages", cache, PARAMS)


def test_pages_that_changed_are_refused_and_the_cache_stays(saved):
    cache = empty()
    kept = json.loads((saved / "store.json").read_text())["store"]
    kvjax.save(saved / "pages", {"kept": [np.ones((10, 4, 16), np.float32)] * 4, "arrays": arrays(saved, kept)})
    with pytest.raises(ValueError, match="pages is corrupted: digests differ"):
        kvjax.restore_store(saved, cache, PARAMS)
    for file in (saved / "pages" / "leaves").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="pages"):
        kvjax.restore_store(saved, cache, PARAMS)
    assert cache.shared.kept.sum() == 0 and np.isfinite(cache.layers[0].k).all()


def arrays(saved, kept):
    like = {"kept": [np.empty((10, 4, 16), np.float32)] * 4, "arrays": [np.empty(*about) for about in kept["arrays"]]}
    return kvjax.restore(saved / "pages", like)["arrays"]


def test_a_save_that_fails_leaves_the_earlier_store(saved):
    store, cache = filled()
    with pytest.raises(TypeError, match="got function"):
        kvjax.save_store(saved, replace(store, turns=replace(store.turns, state=lambda: 0)), cache, PARAMS)
    with pytest.raises(ValueError, match="save_store: `cache` does not hold the pages"):
        kvjax.save_store(saved, store, empty(), PARAMS)
    assert len(kvjax.restore_store(saved, empty(), PARAMS)[0].blocks) == 10
