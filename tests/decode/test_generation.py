"""generate and stream: the same tokens, early ends, going on, and what cannot go on."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Sampling
from kvjax.cache import Dense
from kvjax.decode import REASONS
from tests.compiles import Compiles
from tests.tiny import prompts, tiny

KEY = jax.random.key(11)
WARM = Sampling(temperature=0.9, top_p=0.95)


def new(batch=1, capacity=64, family="llama"):
    model, params = tiny(family)
    return model, params, Dense().init(model, batch=batch, capacity=capacity)


def run(*args, **settings):
    """All of a stream: its steps, and the output it returns."""
    steps, source = [], kvjax.stream(*args, **settings)
    while True:
        try:
            steps.append(next(source))
        except StopIteration as end:
            return steps, end.value


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("width", [1, 5])
def test_stream_is_generate(sampling, width):
    tokens = prompts(0, 2, width)
    out = kvjax.generate(*new(2), tokens, max_new=12, key=KEY, sampling=sampling)
    steps, end = run(*new(2), tokens, max_new=12, key=KEY, sampling=sampling)
    np.testing.assert_array_equal(np.stack([s.tokens for s in steps], 1), out.tokens)
    for name in ("tokens", "lengths", "logprobs", "reason"):
        np.testing.assert_array_equal(getattr(end, name), getattr(out, name))
    for a, b in zip(jax.tree.leaves(end.cache), jax.tree.leaves(out.cache), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cut", [1, 7])
def test_going_on_is_bit_for_bit_one_longer_call(cut):
    tokens = prompts(1, 2, 6)
    whole = kvjax.generate(*new(2), tokens, max_new=16, key=KEY, sampling=WARM)
    first = kvjax.generate(*new(2), tokens, max_new=cut, key=KEY, sampling=WARM)
    model, params, _ = new()
    rest = kvjax.generate(model, params, first.cache, first.last, max_new=16 - cut, key=KEY, sampling=WARM)
    np.testing.assert_array_equal(np.concatenate([first.tokens, rest.tokens], 1), whole.tokens)
    np.testing.assert_array_equal(np.concatenate([first.logprobs, rest.logprobs], 1), whole.logprobs)
    for a, b in zip(jax.tree.leaves(rest.cache), jax.tree.leaves(whole.cache), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_state_saved_half_way_goes_on_bit_for_bit(tmp_path):
    """Everything a generation under way is goes through Orbax, penalties' counts and all."""
    model, params, cache = new()
    setting = replace(WARM, repetition=1.2, frequency=0.3)
    settings = kvjax.decode.rules(setting, batch=1, vocab=61, max_new=16, key=KEY)
    begun = kvjax.decode.begin(cache, jnp.array([3]), jnp.zeros((1, 61), bool), 16)
    half = kvjax.decode.advance(model, params, begun, settings, 8)
    shapes = jax.eval_shape(lambda x: x, half)
    kvjax.save(tmp_path / "half", (half, settings))
    loaded, settings_loaded = kvjax.restore(tmp_path / "half", (shapes, jax.eval_shape(lambda x: x, settings)))
    one = kvjax.decode.advance(model, params, half, settings, 8)
    two = kvjax.decode.advance(model, params, loaded, settings_loaded, 8)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.lengths.tolist() == [16]


def test_logprobs_are_the_models_own():
    tokens = prompts(2, 1, 4)
    out = kvjax.generate(*new(), tokens, max_new=6, key=KEY, sampling=replace(WARM, temperature=1.7))
    model, params, _ = new()
    whole = jnp.concatenate([tokens, out.tokens], 1)
    scores = jax.nn.log_softmax(kvjax.forward(model, params, whole))[0, 3:-1]
    np.testing.assert_allclose(out.logprobs[0], scores[jnp.arange(6), out.tokens[0]], atol=1e-4)


def test_rows_end_at_different_steps_and_then_change_nothing():
    tokens = prompts(3, 3, 5)
    free = np.asarray(kvjax.generate(*new(3), tokens, max_new=12).tokens)
    stops = [Sampling(stop=[int(free[0, 2])]), Sampling(limit=5), Sampling()]
    out = kvjax.generate(*new(3), tokens, max_new=12, sampling=stops)
    ended = int(np.flatnonzero(free[0] == free[0, 2])[0]) + 1
    assert out.lengths.tolist() == [ended, 5, 12]
    assert [REASONS[r] for r in out.reason.tolist()] == ["stop token", "limit", "limit"]
    for row, length in enumerate(out.lengths.tolist()):
        np.testing.assert_array_equal(out.tokens[row, :length], free[row, :length])
        assert (out.tokens[row, length:] == -1).all()
        assert (out.logprobs[row, length:] == 0).all()
    assert out.cache.length.tolist() == [5 + n - 1 for n in out.lengths.tolist()]
    held = np.asarray(out.cache.layers[0].held(out.cache.length + 9))
    assert (held >= 0).sum(1).tolist() == out.cache.length.tolist()


def test_the_loop_ends_early():
    model, params, cache = new(1, 4096)
    free = kvjax.generate(model, params, cache, [[1, 2, 3]], max_new=2)
    model, params, cache = new(1, 4096)
    stop = Sampling(stop=[int(free.tokens[0, 1])])
    settings = kvjax.decode.rules(stop, batch=1, vocab=61, max_new=2048)
    logits, cache = kvjax.prefill(model, params, cache, [[1, 2, 3]])
    begun = kvjax.decode.begin(cache, jnp.zeros(1, jnp.int32), jnp.zeros((1, 61), bool), 2048)
    ended = kvjax.decode.advance(model, params, kvjax.decode.emit(begun, settings, logits), settings, 2048)
    assert int(ended.step) == 2


def test_lengths_and_settings_cost_no_compile():
    tokens = prompts(4, 2, 5)
    kvjax.generate(*new(2), tokens, max_new=16, key=KEY, sampling=WARM)
    with Compiles() as compiles:
        several = [WARM, Sampling(top_k=3, limit=4)]
        for max_new, sampling in ((9, Sampling()), (13, several), (16, Sampling(banned=[2]))):
            kvjax.generate(*new(2), tokens, max_new=max_new, key=KEY, sampling=sampling)
            run(*new(2), tokens[:, :4], max_new=max_new, key=KEY, sampling=sampling)
    assert compiles.of("_advance") == compiles.of("first") == compiles.of("_chunk") == 0


def test_all_of_a_capacity_can_be_used():
    model, params, cache = new(1, 12)
    out = kvjax.generate(model, params, cache, prompts(5, 1, 8), max_new=5)
    assert out.cache.length.tolist() == [12]
    with pytest.raises(ValueError, match="need 13 slots a row, but the cache's capacity is 12"):
        kvjax.generate(*new(1, 12), prompts(5, 1, 8), max_new=6)


@pytest.mark.parametrize("how", [kvjax.generate, run])
def test_a_non_finite_logit_is_reported_with_its_row_and_step(how):
    model, params, cache = new(3)
    poisoned = dict(params, embed=params["embed"].at[7].set(jnp.nan))
    rows = [Sampling(), Sampling(forced=[1, 2, 7]), Sampling()]
    untied = kvjax.Transformer(replace(model.config, tied=False))
    poisoned["head"] = params["embed"]
    cache = Dense().init(untied, batch=3, capacity=64)
    with pytest.raises(FloatingPointError, match=r"row 1 were not finite at step 3 \(position 6\).*\[1\]"):
        how(untied, poisoned, cache, [[1, 2, 3]] * 3, max_new=8, sampling=rows)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new": 0}, "`max_new` must be at least 1, a whole number, got 0"),
        ({"max_new": 2, "sampling": {"temperature": 1.0}}, "`sampling` must be a Sampling, or a list of them"),
        ({"max_new": 2, "sampling": Sampling(banned=range(61))}, "`banned` must leave a token, but all 61"),
        ({"max_new": 2, "sampling": WARM}, "needs `key`"),
        ({"max_new": 2, "sampling": [Sampling(), Sampling()]}, "one setting or 1"),
        ({"max_new": 2, "sampling": Sampling(stop=[61])}, r"`stop` ids must be in \[0, 61\)"),
        ({"max_new": 2, "sampling": Sampling(stop_strings=["x"])}, "`tokenizer`"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, words, unchecked):
    with pytest.raises(ValueError, match=words):
        kvjax.generate(*new(), [[1, 2]], **settings)
