"""The store with a model: what prefill is spared, and what is computed all the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Paged, release, stats
from kvjax.cache.prefix import POLICIES, keep, make_room, open_store, reuse
from kvjax.decode import generation
from kvjax.draft import DraftModel
from tests.tiny import prompts, tiny

PAGE, POOL, CAPACITY, NEW = 4, 16, 48, 4


def opened(policy="lru"):
    model, params = tiny()
    cache = Paged(page=PAGE, pool=POOL).init(model, batch=2, capacity=CAPACITY)
    return model, params, cache, open_store(cache, POLICIES[policy])


@pytest.fixture
def taken(monkeypatch):
    """How many tokens of each row prefill was given, call by call."""
    calls = []

    def watched(model, params, cache, tokens, lengths, *rest):
        calls.append(np.asarray(lengths).tolist())
        return fill(model, params, cache, tokens, lengths, *rest)

    fill = generation.fill
    monkeypatch.setattr(generation, "fill", watched)
    return calls


def recomputed(model, params, texts, **settings):
    cache = Dense().init(model, batch=len(texts), capacity=CAPACITY)
    return kvjax.generate(model, params, cache, texts, max_new=NEW, **settings)


def first(seed=0, width=20):
    return np.asarray(prompts(seed, 2, 29))[:, :width].tolist()


def again(*cuts, seed=0, more=5):
    """Rows that begin as those of `first` do, up to a cut, and go on in their own way."""
    rest = np.asarray(prompts(seed + 50, 2, 20))[:, :more].tolist()
    return [[*a[:cut], *b] for a, b, cut in zip(first(seed, 29), rest, cuts, strict=True)]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_second_prompt_takes_in_only_its_rest(policy, taken):
    model, params, cache, store = opened(policy)
    out = kvjax.generate(model, params, cache, first(), max_new=NEW, store=store)
    texts = again(18, 7)  # four pages and a half, and one and three quarters
    out = kvjax.generate(model, params, release(out.cache), texts, max_new=NEW, store=out.store)
    assert taken == [[20, 20], [5, 5]]
    wanted = recomputed(model, params, texts)
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_allclose(out.logprobs, wanted.logprobs, atol=1e-5)
    figures = stats(out.cache)
    np.testing.assert_array_equal([figures.hits, figures.misses], [[18, 7], [5, 5]])
    assert out.store.tally.found == 25 and out.store.tally.asked == 40 + 23 + 12


def test_speculation_takes_in_only_the_rest_and_keeps_what_it_made(taken):
    model, params, cache, store = opened()
    guess = partial(kvjax.speculate, model, params, max_new=NEW, draft=DraftModel(model, params, k=2), costs=[1.0] * 3)
    out = guess(cache, first(), store=store)
    np.testing.assert_array_equal(out.tokens, recomputed(model, params, first()).tokens)  # also by prefill
    texts = again(18, 7)
    out = guess(release(out.cache), texts, store=out.store)
    assert taken == [[20, 20], [20, 20], [5, 5]] and out.speculated.proposed.sum() > 0
    np.testing.assert_array_equal(out.tokens, recomputed(model, params, texts).tokens)
    held = [[*text, *new][:-1] for text, new in zip(texts, out.tokens.tolist(), strict=True)]
    _, _, rest = reuse(out.store, release(out.cache), [[*row, 7] for row in held])
    assert [len(row) for row in rest] == [1 + len(row) % 4 for row in held]


def test_logits_are_those_of_prompts_computed_anew():
    model, params, cache, store = opened()
    _, cache = kvjax.prefill(model, params, cache, first())
    store, cache = keep(store, cache, first(), time=0.0)
    texts = again(13, 16)
    store, cache, rest = reuse(store, release(cache), texts)
    assert [len(row) for row in rest] == [5, 5]
    logits, cache = kvjax.prefill(model, params, cache, rest)
    wanted, _ = kvjax.prefill(model, params, Dense().init(model, batch=2, capacity=CAPACITY), texts)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_the_same_prompts_again_compute_one_token(taken):
    model, params, cache, store = opened()
    one = kvjax.generate(model, params, cache, first(), max_new=NEW, store=store)
    two = kvjax.generate(model, params, release(one.cache), first(), max_new=NEW, store=one.store)
    assert taken == [[20, 20]]  # the one left goes straight to the loop
    np.testing.assert_array_equal(stats(two.cache).misses, [1, 1])
    np.testing.assert_array_equal(two.tokens, one.tokens)


def test_answers_are_kept_too_and_a_stream_keeps_as_a_call_does(taken):
    model, params, cache, store = opened()
    steps = kvjax.stream(model, params, cache, first(width=17), max_new=NEW, store=store)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        out = end.value
    texts = [[*text, *new, 5, 6] for text, new in zip(first(width=17), out.tokens.tolist(), strict=True)]
    out = kvjax.generate(model, params, release(out.cache), texts, max_new=NEW, store=out.store)
    assert taken == [[17, 17], [3, 3]]  # 20 tokens were held, five full pages
    np.testing.assert_array_equal(out.tokens, recomputed(model, params, texts).tokens)


@pytest.mark.parametrize(
    "sampling", [kvjax.Sampling(repetition=1e6), kvjax.Sampling(temperature=1.0)], ids=["penalties", "draws"]
)
def test_penalties_and_draws_know_the_whole_prompt(sampling):
    model, params, cache, store = opened()
    settings = {"key": jax.random.key(3), "sampling": sampling}
    out = kvjax.generate(model, params, cache, first(), max_new=NEW, store=store, **settings)
    texts = again(20, 18)
    out = kvjax.generate(model, params, release(out.cache), texts, max_new=NEW, store=out.store, **settings)
    assert out.store.tally.found == 38
    np.testing.assert_array_equal(out.tokens, recomputed(model, params, texts, **settings).tokens)
    if sampling.repetition > 1:
        assert not any(set(text) & set(new) for text, new in zip(texts, out.tokens.tolist(), strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_under_pressure_the_policy_makes_room_and_answers_stay_right(policy):
    model, params, cache, store = opened(policy)
    for seed in (0, 1, 0, 2):
        texts = again(8, 15, seed=seed, more=14)
        out = kvjax.generate(model, params, cache, texts, max_new=NEW, store=store)
        np.testing.assert_array_equal(out.tokens, recomputed(model, params, texts).tokens)
        assert not out.cache.shared.starved.any()
        store, cache = out.store, release(out.cache)
    assert store.tally.evicted > 0
    assert len(store.blocks) == cache.shared.kept.sum() <= POOL


def test_a_pool_too_small_for_the_prompts_is_said_and_nothing_is_lost():
    model, params, cache, store = opened()
    out = kvjax.generate(model, params, cache, first(), max_new=NEW, store=store)
    cache, store = release(out.cache), out.store
    with pytest.raises(ValueError, match="with nothing kept, need 18 pages of 4 tokens, but 16 of the pool's 16 are"):
        kvjax.generate(model, params, cache, first(seed=1), max_new=14, store=store)
    with pytest.raises(ValueError, match="`prompts` need 49 slots a row, but the cache's capacity is 48"):
        kvjax.generate(model, params, cache, first(), max_new=30, store=store)
    assert store.tally.evicted == 0
    out = kvjax.generate(model, params, cache, first(), max_new=NEW, store=store)
    np.testing.assert_array_equal(stats(out.cache).hits, [19, 19])


def test_prompts_that_fill_the_pool_give_kept_pages_up_rather_than_fail():
    model, params, cache, store = opened()
    out = kvjax.generate(model, params, cache, first(width=29), max_new=NEW, store=store)
    assert len(out.store.blocks) == POOL
    texts = again(27, 27, more=2)
    out = kvjax.generate(model, params, release(out.cache), texts, max_new=NEW, store=out.store)
    np.testing.assert_array_equal(out.tokens, recomputed(model, params, texts).tokens)
    assert out.store.tally.found == 54 and out.store.tally.evicted == 4  # without a copy of what is overwritten


def test_a_page_held_in_part_is_given_up_though_a_later_block_is_in_use():
    """Row 0 goes on inside the second of three blocks, whose third is row 1's: kept, it would cost a page."""
    model, params = tiny()
    cache = Paged(page=PAGE, pool=6).init(model, batch=2, capacity=CAPACITY)
    store, text = open_store(cache, POLICIES["lru"]), first()[0][:12]
    _, cache = kvjax.prefill(model, params, cache, [text[:8], text])
    store, cache = keep(store, cache, [text[:8], []])
    store, cache = keep(store, cache, [[], text])
    store, cache, _ = reuse(store, release(cache, jnp.array([True, False])), [[*text[:6], 3], []])
    assert len(store.blocks) == 3 and cache.length.tolist() == [6, 12]
    store, cache = make_room(store, cache, np.array([1, 1]))
    assert [block.page for block in store.blocks.values()] == [cache.shared.table[0, 0]] and store.tally.evicted == 2
    logits, cache = kvjax.decode_step(model, params, cache, jnp.array([3, 4]))
    dense = Dense().init(model, batch=2, capacity=CAPACITY)
    wanted, _ = kvjax.prefill(model, params, dense, [[*text[:6], 3], [*text, 4]])
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_rows_take_turns():
    """One row goes on while another begins anew, as in continuous batching."""
    model, params, cache, store = opened()
    _, cache = kvjax.prefill(model, params, cache, first())
    store, cache = keep(store, cache, [[], first()[1]])
    cache = release(cache, jnp.array([False, True]))
    text = [*first()[1][:17], 9]
    store, cache, rest = reuse(store, cache, [[], text], room=4)
    assert rest == [[], [9]] and cache.length.tolist() == [20, 17]
    logits, cache = kvjax.decode_step(model, params, cache, jnp.array([4, 9]))
    dense = Dense().init(model, batch=2, capacity=CAPACITY)
    wanted, _ = kvjax.prefill(model, params, dense, [[*first()[0], 4], text])
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_what_does_not_go_together_is_refused():
    model, params, cache, store = opened()
    with pytest.raises(ValueError, match="open_store: `cache` must be a Paged one, got Dense"):
        open_store(Dense().init(model, batch=1, capacity=8), POLICIES["lru"])
    with pytest.raises(ValueError, match=r"`most` must be in \[1, 16\], the pool's pages, got 17"):
        open_store(cache, POLICIES["lru"], most=17)
    with pytest.raises(ValueError, match="reuse: `store` keeps pages of 4 tokens of another model or cache"):
        other = Paged(page=8).init(model, batch=2, capacity=CAPACITY)
        kvjax.generate(model, params, other, [[1], [2]], max_new=1, store=store)
    with pytest.raises(ValueError, match="generate: `store` is an index on the host, and cannot be used inside `jit`"):
        jax.jit(lambda cache: kvjax.generate(model, params, cache, [[1], [2]], max_new=1, store=store).tokens)(cache)
    with pytest.raises(ValueError, match="`prompts` must be 2 lists of tokens, one a row, got 1"):
        reuse(store, cache, [[1, 2]])
    out = kvjax.generate(model, params, cache, first(), max_new=NEW, store=store)
    with pytest.raises(ValueError, match=r"rows \[0, 1\] hold tokens: `release` them"):
        kvjax.generate(model, params, out.cache, [[1], [2]], max_new=1, store=out.store)
    with pytest.raises(ValueError, match="`cache` does not hold the pages that `store` keeps"):
        fresh = Paged(page=PAGE, pool=POOL).init(model, batch=2, capacity=CAPACITY)
        kvjax.generate(model, params, fresh, [[1], [2]], max_new=1, store=out.store)
    with pytest.raises(ValueError, match="open_store: `cache` already holds pages of a store"):
        open_store(out.cache, POLICIES["lru"])
    with pytest.raises(ValueError, match="keep: `texts` has 3 tokens for row 1, which holds 23"):
        keep(out.store, out.cache, [[], [1, 2, 3]])
    with pytest.raises(ValueError, match="keep: `texts` must be 2 lists of tokens, one a row, got 1"):
        keep(out.store, out.cache, [[]])
    with pytest.raises(ValueError, match="make_room: rows, even with nothing kept, need 20 pages"):
        make_room(out.store, release(out.cache), np.array([40, 40]))


@pytest.mark.parametrize("policy", ["lru", type(POLICIES["lru"]), None], ids=str)
def test_a_policy_must_be_a_policy(policy, unchecked):
    model, _ = tiny()
    cache = Paged(page=PAGE, pool=POOL).init(model, batch=2, capacity=CAPACITY)
    with pytest.raises(ValueError, match=r'`policy` must be a policy, such as `POLICIES\["lru"\]` of .*, got'):
        open_store(cache, policy)


def test_a_store_must_be_a_store(unchecked):
    model, params, cache, _ = opened()
    with pytest.raises(ValueError, match="reuse: `store` must be what `open_store` makes, got Lru"):
        kvjax.generate(model, params, cache, [[1], [2]], max_new=1, store=POLICIES["lru"])
