"""Many continuations of prompts that are held once: each as if alone, and which of them is taken."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Sampling
from kvjax.cache import Dense, Evicting, Paged, Quantized, Ring, Shared
from kvjax.decode import REASONS
from kvjax.decode.spread import _regroup, _spread, regroup
from tests.compiles import Compiles
from tests.tiny import prompts, tiny

KEY = jax.random.key(5)
WARM = Sampling(temperature=1.2, top_p=0.95)
PROMPT = prompts(8, 1, 7)
TWO, LENGTHS = prompts(9, 2, 9), np.array([9, 6])


def held(strategy=None, batch=1, capacity=24, family="llama"):
    """A model, its parameters and an empty cache for prompts."""
    model, params = tiny(family)
    return model, params, (strategy or Dense()).init(model, batch=batch, capacity=capacity)


def alone(seed: int, tokens=PROMPT, lengths=None, sampling=WARM, max_new=8, family="llama"):
    """One row with a cache of its own that draws as row `seed`."""
    args = held(capacity=40, family=family)
    return kvjax.generate(*args, tokens, lengths, max_new=max_new, key=KEY, sampling=replace(sampling, seed=seed))


def same(out, row, one):
    np.testing.assert_array_equal(out.tokens[row], one.tokens[0])
    np.testing.assert_allclose(out.logprobs[row], one.logprobs[0], atol=1e-5)
    for name in ("lengths", "reason"):
        assert getattr(out, name)[row] == getattr(one, name)[0]
    assert out.cache.length[row] == one.cache.length[0]


@pytest.mark.parametrize(
    ("strategy", "inner"),
    [
        (Dense(), None),
        (Ring(), Paged(page=4)),
        (Evicting(64), Ring()),
        (Quantized(8, residual=32), None),
        (Shared(Dense()), Dense()),
        (Paged(page=4, pool=16), None),
        (Paged(page=4), Dense()),
    ],
    ids=str,
)
def test_each_row_is_generate_with_a_cache_of_its_own(strategy, inner):
    out = kvjax.sample_n(*held(strategy), PROMPT, n=3, max_new=8, key=KEY, sampling=WARM, inner=inner)
    for row in range(3):
        same(out, row, alone(row))
    assert len({tuple(row) for row in out.tokens.tolist()}) == 3


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_windows_and_learned_positions(family):
    out = kvjax.sample_n(*held(family=family), PROMPT, n=2, max_new=8, key=KEY, sampling=WARM)
    for row in range(2):
        same(out, row, alone(row, family=family))


@pytest.mark.parametrize("width", [1, 7])
def test_one_continuation_is_generate(width):
    stop = replace(WARM, stop=range(0, 61, 7))
    out = kvjax.sample_n(*held(), PROMPT[:, :width], n=1, max_new=8, key=KEY, sampling=stop)
    same(out, 0, alone(0, PROMPT[:, :width], sampling=stop))


def test_several_prompts_share_pages_with_their_own_continuations():
    args = held(Paged(page=4, pool=30), batch=2)
    out = kvjax.sample_n(*args, TWO, LENGTHS, n=3, max_new=8, key=KEY, sampling=WARM)
    for row in range(6):
        prompt, length = TWO[row // 3 :][:1], LENGTHS[row // 3 :][:1]
        same(out, row, alone(row, prompt, length))
    table = np.asarray(out.cache.shared.table).reshape(2, 3, -1)
    for rows, full in zip(table, LENGTHS // 4, strict=True):
        assert (rows[:, :full] == rows[:1, :full]).all()
    wanted = (LENGTHS // 4).sum() + 3 * (-(-(LENGTHS + 7) // 4) - LENGTHS // 4).sum()
    assert (np.asarray(out.cache.shared.refs) > 0).sum() == wanted


def test_the_prompt_is_held_once_to_the_byte():
    model, params, cache = held(capacity=300)
    prefix, own = kvjax.nbytes(cache), kvjax.nbytes(Dense().shapes(model, batch=9, capacity=6))
    out = kvjax.sample_n(model, params, cache, prompts(1, 1, 290), n=9, max_new=6, key=KEY, sampling=WARM)
    assert kvjax.nbytes(out.cache) == prefix + own
    assert kvjax.nbytes(out.cache) < kvjax.nbytes(Dense().shapes(model, batch=9, capacity=296)) / 7


def test_a_seed_counts_up_within_a_prompt_and_a_list_is_taken_as_it_is():
    args = held(Paged(page=4, pool=30), batch=2)
    out = kvjax.sample_n(*args, TWO, LENGTHS, n=2, max_new=8, key=KEY, sampling=replace(WARM, seed=2**32 - 1))
    for row, seed in enumerate([2**32 - 1, 0, 2**32 - 1, 0]):
        same(out, row, alone(seed, TWO[row // 2 :][:1], LENGTHS[row // 2 :][:1]))
    settings = [replace(WARM, seed=4), Sampling(), replace(WARM, limit=3)]
    out = kvjax.sample_n(*held(), PROMPT, n=3, max_new=8, key=KEY, sampling=settings)
    for row, seed in enumerate([4, 1, 2]):
        same(out, row, alone(seed, sampling=settings[row]))


def test_inside_jit():
    model, params, cache = held()

    @jax.jit
    def inside(params, cache, tokens, lengths):
        out = kvjax.sample_n(model, params, cache, tokens, lengths, n=3, max_new=8, key=KEY, sampling=WARM)
        best = kvjax.best_of(model, params, cache, tokens, lengths, n=3, max_new=8, key=KEY, sampling=WARM)
        return out, best

    out, best = inside(params, cache, PROMPT, jnp.array([5]))
    for row in range(3):
        same(out, row, alone(row, lengths=[5]))
    np.testing.assert_array_equal(best.tokens[0], out.tokens[int(out.logprobs.mean(1).argmax())])
    with pytest.raises(ValueError, match="best_of: `scorer` is called on the host, and cannot be used inside `jit`"):
        jax.jit(lambda cache: kvjax.best_of(model, params, cache, PROMPT, n=2, max_new=8, scorer=len))(cache)


def test_lengths_settings_and_new_tokens_cost_no_compile():
    run = {"n": 3, "key": KEY, "capacity": 16}
    kvjax.sample_n(*held(), PROMPT, max_new=16, sampling=WARM, **run)
    with Compiles() as compiles:
        kvjax.sample_n(*held(), prompts(0, 1, 12), max_new=16, sampling=replace(WARM, seed=3, top_k=5), **run)
        kvjax.sample_n(*held(), PROMPT, [3], max_new=11, sampling=Sampling(), **run)
    for name in ("_chunk", "_spread", "first", "_advance"):
        assert compiles.of(name) == 0, compiles.names


def test_prompts_stay_where_they_are():
    """Neither sharing a prompt nor choosing rows copies it, or a pool."""
    model, _, cache = held(capacity=4096)
    rest = replace(cache, layers=())
    program = _spread.lower(model, cache.layers, rest, rows=3, capacity=4, inner=Dense()).compile()
    lengths = kvjax.nbytes([layer.length for layer in cache.layers])
    assert program.memory_analysis().alias_size_in_bytes >= kvjax.nbytes(cache.layers) - lengths
    assert program.memory_analysis().temp_size_in_bytes < cache.layers[0].k.nbytes / 2
    cache = Paged(page=64).init(model, batch=2, capacity=4096)
    leaves, tree = jax.tree.flatten(cache)
    pools = [x if x.ndim == 3 else None for x in leaves]
    others = [None if x.ndim == 3 else x for x in leaves]
    program = _regroup.lower(pools, others, jnp.array([0, 0, 1]), tree=tree).compile()
    assert program.memory_analysis().alias_size_in_bytes >= kvjax.nbytes(cache.layers)
    assert program.memory_analysis().temp_size_in_bytes < cache.layers[0].k.nbytes / 2
    wanted, pool = kvjax.fork(cache, jnp.array([1, 0, 1])), cache.layers[0].k
    forked = regroup(cache, jnp.array([1, 0, 1]))
    assert pool.is_deleted()
    jax.tree.map(np.testing.assert_array_equal, forked, wanted)


@pytest.mark.parametrize(
    ("strategy", "batch", "settings", "words"),
    [
        (Dense(), 1, {"n": 0}, "sample_n: `n` must be at least 1, a whole number, got 0"),
        (Dense(), 1, {"max_new": 0}, "sample_n: `max_new` must be at least 1"),
        (Dense(), 1, {"capacity": 6}, r"sample_n: .*need 7 slots a row, but the cache's capacity is 6"),
        (Dense(), 2, {}, r"sample_n: `cache` must be a `Paged` one.*got 2 prompts.*one at a time"),
        (Paged(), 2, {"inner": Dense()}, r"sample_n: .*`inner` None.*got 2 prompts"),
        (Paged(), 1, {"capacity": 9}, "sample_n: `capacity` must be None where a `Paged` cache is forked"),
        (Dense(), 1, {"inner": Paged(page=2, pool=11)}, "need 12 pages of 2 tokens, but 11 of the pool's 11 are free"),
        (Paged(page=4, pool=10), 1, {}, "need 11 pages of 4 tokens, but 10 of the pool's 10 are free"),
        (Paged(page=4, pool=30), 1, {"max_new": 19}, "need 25 slots a row, but the cache's capacity is 24"),
        (Dense(), 1, {"sampling": [WARM] * 2}, "expected one setting or 3, one a row, got 2"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_refused_is_refused_before_the_cache_is_taken(strategy, batch, settings, words):
    model, params, cache = held(strategy, batch)
    with pytest.raises(ValueError, match=words):
        kvjax.sample_n(model, params, cache, [[1] * 7] * batch, **{"n": 3, "max_new": 8, "key": KEY} | settings)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


def test_pages_that_are_just_enough_are_enough():
    """What is asked for beforehand is what the loop needs: 2 pages of the prompt, 3 copies and 3 times 2 more."""
    out = kvjax.sample_n(*held(Paged(page=4, pool=11)), PROMPT, n=3, max_new=8, key=KEY, sampling=WARM)
    assert [REASONS[reason] for reason in out.reason.tolist()] == ["limit"] * 3


def test_learned_positions_run_out():
    with pytest.raises(ValueError, match="need 97 positions, but the model has learned 96"):
        kvjax.sample_n(*held(capacity=90, family="gpt2"), prompts(0, 1, 90), n=2, max_new=8)


def test_the_best_has_the_highest_mean_logprob():
    sampling = replace(WARM, stop=range(0, 61, 5))
    every = kvjax.sample_n(*held(), PROMPT, n=6, max_new=8, key=KEY, sampling=sampling)
    out = kvjax.best_of(*held(), PROMPT, n=6, max_new=8, key=KEY, sampling=sampling, capacity=32)
    means = np.asarray(every.logprobs).sum(1) / np.asarray(every.lengths)
    assert len(set(every.lengths.tolist())) > 1, "means and sums must differ"
    np.testing.assert_allclose(out.score, [means.max()], rtol=1e-6)
    for name in ("tokens", "lengths", "logprobs", "reason"):
        np.testing.assert_array_equal(getattr(out, name)[0], getattr(every, name)[means.argmax()])


def test_the_best_can_go_on_and_be_forked():
    out = kvjax.best_of(*held(), PROMPT, n=4, max_new=6, key=KEY, sampling=WARM, capacity=32)
    whole = jnp.concatenate([PROMPT, out.tokens], axis=1)
    model, params, cache = held(capacity=40)
    wanted = kvjax.generate(model, params, cache, whole, max_new=5)
    rest = kvjax.generate(
        model, params, kvjax.fork(out.cache, jnp.array([0, 0])), jnp.tile(out.last, (2, 1)), max_new=5
    )
    np.testing.assert_array_equal(rest.tokens, jnp.tile(wanted.tokens, (2, 1)))
    np.testing.assert_allclose(rest.logprobs[1], wanted.logprobs[0], atol=1e-5)


def test_a_scorer_chooses_for_every_prompt_and_the_others_leave_their_pages():
    def scorer(ids):
        return jnp.float32(-abs(ids[2] - 30))

    def run(decoder, **settings):
        args = held(Paged(page=4, pool=40), batch=2)
        return decoder(*args, TWO, LENGTHS, n=4, max_new=8, key=KEY, sampling=WARM, **settings)

    every, out = run(kvjax.sample_n), run(kvjax.best_of, scorer=scorer)
    scores = np.array([float(scorer(row)) for row in every.tokens.tolist()]).reshape(2, 4)
    np.testing.assert_array_equal(out.score, scores.max(1))
    np.testing.assert_array_equal(out.tokens, every.tokens[scores.argmax(1) + np.array([0, 4])])
    assert (np.asarray(out.cache.shared.refs) > 0).sum() == (-(-(LENGTHS + 7) // 4)).sum()


@pytest.mark.parametrize("bad", [float("nan"), None, "0.5", jnp.array([1.0, 2.0])], ids=str)
def test_a_score_that_is_no_number_names_its_row(bad):
    scores = iter([0.5, np.float32(1), bad])
    with pytest.raises(ValueError, match=r"best_of: `scorer` must return a number, got .* for row 2"):
        kvjax.best_of(*held(), PROMPT, n=3, max_new=8, key=KEY, sampling=WARM, scorer=lambda ids: next(scores))


@pytest.mark.parametrize("kinds", [2, 3, 40])
def test_the_majority_is_counted(kinds):
    """With 40 kinds of answers few agree, and logprobs decide."""

    def answer(ids):
        assert len(ids) == 8
        return None if ids[-1] % kinds == 1 else ("answer", ids[-1] % kinds)

    every = kvjax.sample_n(*held(), PROMPT, n=8, max_new=8, key=KEY, sampling=WARM)
    given = [answer(row) for row in every.tokens.tolist()]
    votes = Counter(x for x in given if x is not None)
    sums = {x: sum(float(every.logprobs[i].sum()) for i, y in enumerate(given) if y == x) for x in votes}
    winner = max(votes, key=lambda x: (votes[x], sums[x]))
    out = kvjax.majority(*held(), PROMPT, n=8, max_new=8, key=KEY, sampling=WARM, answer=answer)
    assert out.score.tolist() == [votes[winner]]
    np.testing.assert_array_equal(out.tokens[0], every.tokens[given.index(winner)])
    assert out.cache.length.tolist() == [14]


def test_no_answer_wins_only_where_there_is_no_other():
    run = {"n": 3, "max_new": 8, "key": KEY, "sampling": WARM}
    every = kvjax.sample_n(*held(), PROMPT, **run)
    only = every.tokens[2].tolist()
    out = kvjax.majority(*held(), PROMPT, answer=lambda ids: 7 if ids == only else None, **run)
    assert out.score.tolist() == [1]
    np.testing.assert_array_equal(out.tokens[0], every.tokens[2])
    assert kvjax.majority(*held(), PROMPT, answer=lambda ids: None, **run).score.tolist() == [3]
    with pytest.raises(ValueError, match=r"majority: `answer` must return something hashable, got \[\] for row 0"):
        kvjax.majority(*held(), PROMPT, answer=lambda ids: [], **run)


@pytest.mark.usefixtures("unchecked")
def test_a_judge_must_be_a_function():
    with pytest.raises(ValueError, match="majority: `answer` must be a function of a list of ids, got 3"):
        kvjax.majority(*held(), PROMPT, n=3, max_new=8, answer=3)
