"""Beam search against a plain search that keeps no cache, and against trying everything."""

import re
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Paged, Quantized
from kvjax.decode import REASONS
from kvjax.decode.beam import PAGE, _at_most, _search
from kvjax.decode.grammars import pack
from kvjax.decode.spread import spread
from tests.compiles import Compiles
from tests.tiny import LLAMA, prompts, tiny

WIDTH, BEAMS, NEW = 32, 4, 12


def small(vocab: int, scale: float = 10.0):
    """A model of few tokens."""
    model = kvjax.Transformer(replace(LLAMA, vocab=vocab))
    params = kvjax.init_params(model, jax.random.key(3))
    return model, jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, params)


def search(model, params, prompt, strategy=None, **settings):
    cache = (strategy or Dense()).init(model, batch=1, capacity=24)
    return kvjax.beam(model, params, cache, prompt, **settings)


def logprobs(model, params, texts):
    """What follows each text, without a cache; texts have one length."""
    batch = np.zeros((-(-len(texts) // 8) * 8, WIDTH), np.int32)
    batch[: len(texts), : len(texts[0])] = texts
    logits = np.concatenate([kvjax.forward(model, params, part) for part in np.split(batch, len(batch) // 8)])
    return np.asarray(jax.nn.log_softmax(logits[: len(texts), len(texts[0]) - 1].astype(np.float64), axis=-1))


def plain(model, params, prompt, beams, max_new, penalty, stop):
    """Beam search as it is told, to the last step: (score, tokens, logprobs) of the best."""
    live, ended = [(0.0, [], [])], []
    for _ in range(max_new):
        after = logprobs(model, params, [prompt + tokens for _, tokens, _ in live])
        grown = [
            (total + row[token], [*tokens, token], [*each, row[token]])
            for (total, tokens, each), row in zip(live, after, strict=True)
            for token in range(len(row))
        ]
        ended += [one for one in grown if one[1][-1] in stop]
        live = sorted((one for one in grown if one[1][-1] not in stop), key=lambda one: -one[0])[:beams]
        if not live:
            break
    found = [(total / len(tokens) ** penalty, tokens, each) for total, tokens, each in ended + live]
    return sorted(found, key=lambda one: -one[0])[:beams]


def same(out, found, stop):
    np.testing.assert_allclose(out.score, [score for score, *_ in found], atol=1e-4)
    for row, (_, tokens, each) in enumerate(found):
        length = len(tokens)
        assert out.tokens[row].tolist() == tokens + [-1] * (out.tokens.shape[1] - length)
        np.testing.assert_allclose(out.logprobs[row, :length], each, atol=1e-4)
        assert (out.logprobs[row, length:] == 0).all()
        assert out.lengths[row] == length
        assert REASONS[out.reason[row]] == ("stop token" if tokens[-1] in stop else "limit")


@pytest.mark.parametrize("penalty", [1.0, 0.0, 0.6, 2.0, -0.5])
@pytest.mark.parametrize("stops", [[], [3], [5, 17, 40], list(range(0, 61, 4))], ids=len)
def test_it_is_the_plain_search(stops, penalty):
    model, params = tiny()
    for seed in range(3):
        prompt = prompts(seed, 1, 5 + seed)
        out = search(model, params, prompt, beams=BEAMS, max_new=NEW, length_penalty=penalty, stop=stops)
        same(out, plain(model, params, prompt[0].tolist(), BEAMS, NEW, penalty, stops), stops)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2"])
def test_families_and_a_prompt_in_any_cache(family):
    model, params = tiny(family)
    prompt, stop = prompts(4, 1, 9), [7, 30]
    found = plain(model, params, prompt[0].tolist(), BEAMS, NEW, 1.0, stop)
    for strategy in (Dense(), Paged(page=4), Quantized(8, residual=32)):
        same(search(model, params, prompt, strategy, beams=BEAMS, max_new=NEW, stop=stop), found, stop)


@pytest.mark.parametrize("penalty", [1.0, 0.0, 3.0, -1.0])
@pytest.mark.parametrize(
    ("vocab", "max_new", "stop"),
    [(5, 1, ()), (5, 2, ()), (5, 2, (2,)), (4, 3, (0, 3)), (4, 3, (0, 1, 2)), (3, 4, (0, 1, 2))],
    ids=str,
)
def test_it_finds_the_best_of_all_where_nothing_is_left_out(vocab, max_new, stop, penalty):
    """With as many beams as tokens, and stops that leave no more prefixes than beams."""
    model, params = small(vocab, 5.0)
    prompt = [1, 2, 0]
    every = []
    for length in range(1, max_new + 1):
        rows = [list(row) for row in product(range(vocab), repeat=length)]
        scored = [np.zeros((len(rows), 0))]
        for at in range(length):
            after = logprobs(model, params, [prompt + row[:at] for row in rows])
            scored.append(after[np.arange(len(rows)), [row[at] for row in rows]][:, None])
        for row, each in zip(rows, np.concatenate(scored, axis=1), strict=True):
            ends = row[-1] in stop or length == max_new
            if ends and not set(row[:-1]) & set(stop):
                every.append((each.sum() / length**penalty, row, each))
    found = sorted(every, key=lambda one: -one[0])[:vocab]
    out = search(model, params, [prompt], beams=vocab, max_new=max_new, length_penalty=penalty, stop=stop)
    same(out, found, stop)


@pytest.mark.parametrize(("vocab", "scale", "seed"), [(8, 10.0, 29), (4, 20.0, 20), (4, 20.0, 24)])
def test_it_goes_on_while_a_beam_behind_may_still_win(vocab, scale, seed):
    """Here the mean of a full pool is above that of the live beam, until likely tokens lift it."""
    model, params = small(vocab, scale)
    prompt, stop = prompts(seed, 1, 5, vocab), (1, 2)
    found = plain(model, params, prompt[0].tolist(), 1, NEW, 1.0, stop)
    same(search(model, params, prompt, beams=1, max_new=NEW, stop=stop), found, stop)


def test_one_beam_is_greedy():
    model, params = tiny()
    out = search(model, params, prompts(6, 1, 5), beams=1, max_new=NEW)
    wanted = kvjax.generate(model, params, Dense().init(model, batch=1, capacity=24), prompts(6, 1, 5), max_new=NEW)
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_allclose(out.logprobs, wanted.logprobs, atol=1e-5)


def test_nothing_that_follows_scores_more_than_was_said():
    random = np.random.default_rng(0)
    for _ in range(300):
        made, more = random.integers(1, 20, 2)
        limit, penalty = int(made + more), float(random.choice([-2.0, -0.3, 0.0, 0.5, 1.0, 3.0]))
        total = -random.exponential(3.0)
        numbers = jnp.array([total]), jnp.int32(made), jnp.int32(limit), jnp.float32(penalty)
        most = float(_at_most(*numbers)[0])
        after = total - np.cumsum(random.exponential(random.choice([0.0, 0.1]), more))
        scores = after / np.arange(made + 1, limit + 1) ** penalty
        assert scores.max() <= most + 1e-5 * abs(most)


@pytest.mark.parametrize("penalty", [0.0, -0.5])
def test_it_ends_once_no_beam_can_win(penalty):
    """The model has no positions past 30: a search that went on would meet what is not finite there."""
    model, params = tiny("gpt2")
    params = params | {"positions": params["positions"].at[30:].set(jnp.nan)}
    often = tuple(range(0, 61, 2))
    prompt = prompts(2, 1, 9)
    out = search(model, params, prompt, beams=3, max_new=64, stop=often, length_penalty=penalty)
    assert (out.lengths < 20).all() and {REASONS[reason] for reason in out.reason.tolist()} == {"stop token"}
    with pytest.raises(FloatingPointError, match="beam: logits were not finite after 22 new tokens"):
        search(model, params, prompt, beams=3, max_new=64)


def test_the_cache_goes_on_from_every_hypothesis():
    model, params = tiny()
    prompt, stop = prompts(1, 1, 6), list(range(0, 61, 12))
    out = search(model, params, prompt, beams=BEAMS, max_new=NEW, stop=stop, capacity=32)
    lengths = np.asarray(out.lengths)
    assert len(set(lengths.tolist())) > 1
    np.testing.assert_array_equal(out.cache.length, 6 + lengths - 1)
    own = kvjax.nbytes(Paged(PAGE, BEAMS * 2 + BEAMS // 2).shapes(model, batch=BEAMS, capacity=32))
    assert kvjax.nbytes(out.cache) == own + kvjax.nbytes(Dense().shapes(model, batch=1, capacity=24))
    rest = kvjax.generate(model, params, out.cache, out.last, max_new=4)
    texts = [prompt[0].tolist() + row[:n] for row, n in zip(out.tokens.tolist(), lengths, strict=True)]
    wanted = kvjax.generate(model, params, Dense().init(model, batch=BEAMS, capacity=40), texts, max_new=4)
    np.testing.assert_array_equal(rest.tokens, wanted.tokens)
    np.testing.assert_allclose(rest.logprobs, wanted.logprobs, atol=1e-5)


def test_inside_jit():
    model, params = tiny()
    settings = {"beams": BEAMS, "max_new": NEW, "stop": [3], "length_penalty": 0.5}
    inside = jax.jit(lambda cache, tokens, n: kvjax.beam(model, params, cache, tokens, n, **settings))
    out = inside(Dense().init(model, batch=1, capacity=24), prompts(0, 1, 9), jnp.array([6]))
    wanted = search(model, params, prompts(0, 1, 9)[:, :6], **settings)
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_allclose(out.score, wanted.score, atol=1e-5)


def test_lengths_settings_and_new_tokens_cost_no_compile():
    model, params = tiny()
    search(model, params, prompts(0, 1, 5), beams=BEAMS, max_new=NEW, stop=[3])
    with Compiles() as compiles:
        search(model, params, prompts(0, 1, 11), beams=BEAMS, max_new=NEW, length_penalty=0.2)
        search(model, params, prompts(0, 1, 5), beams=BEAMS, max_new=9, stop=[8])
    for name in ("_chunk", "_spread", "_search"):
        assert compiles.of(name) == 0, compiles.names


def test_beams_change_places_without_moving_keys():
    """Neither the pool nor the prompt is copied, in the whole program and so in no step of its loop."""
    model = kvjax.Transformer(replace(LLAMA, head_dim=64))  # keys are larger than what is made of them in a step
    params = kvjax.init_params(model, jax.random.key(0))
    prompt = Dense().init(model, batch=1, capacity=8192)
    cache = spread(model, prompt, 4, 4096, Paged(PAGE, 4 * 4096 // PAGE + 2))
    numbers = jnp.array([3], jnp.int32), jnp.float32(1.0), jnp.int32(16)
    program = _search.lower(
        model, params, cache, jnp.zeros((1, 61)), *numbers, jnp.array([-1]), pack([None], 61)[1], new=16
    ).compile()
    memory, text, layer = program.memory_analysis(), program.as_text(), cache.layers[0]
    assert memory.alias_size_in_bytes >= kvjax.nbytes(cache.layers)
    for buffer in (layer.inner.k, layer.prefix.k):
        assert memory.temp_size_in_bytes < buffer.nbytes
        shape = ",".join(map(str, buffer.shape))
        assert f"f32[{shape}]" in text
        assert not re.search(rf"= f32\[{shape}\]\S* copy\(", text)


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (1, {"beams": 0}, "beam: `beams` must be at least 1, a whole number, got 0"),
        (1, {"beams": 62}, "beam: `beams` must be at most the vocabulary's 61 tokens, got 62"),
        (1, {"banned": range(60)}, "beam: `beams` must be at most the 1 tokens that are not `banned`, got 2"),
        (1, {"banned": [61]}, r"`banned` ids must be in \[0, 61\)"),
        (1, {"max_new": 0}, "beam: `max_new` must be at least 1"),
        (2, {}, "beam: `tokens` must be one prompt, got 2: search one at a time"),
        (1, {"length_penalty": float("inf")}, "beam: `length_penalty` must be a finite number, got inf"),
        (1, {"length_penalty": 100.0}, "beam: `length_penalty` must leave `max_new` to its power between"),
        (1, {"length_penalty": "1"}, "beam: `length_penalty` must be a finite number, got '1'"),
        (1, {"stop": [61]}, r"beam: `stop` must be token ids in \[0, 61\), got \[61\]"),
        (1, {"stop": [1.5]}, r"beam: `stop` must be token ids in \[0, 61\), got \[1.5\]"),
        (1, {"capacity": 0}, "beam: `capacity` must be at least 1"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_refused(rows, settings, words):
    model, params = tiny()
    cache = Dense().init(model, batch=rows, capacity=24)
    with pytest.raises(ValueError, match=words):
        kvjax.beam(model, params, cache, [[1, 2]] * rows, **{"beams": 2, "max_new": 4} | settings)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


def test_banned_tokens_are_in_no_hypothesis():
    """The rest is as if the model gave them no chance, and logprobs stay the model's own."""
    model, params = tiny()
    prompt = prompts(0, 1, 11)
    free = search(model, params, prompt, beams=2, max_new=6)
    banned = sorted(set(free.tokens[0].tolist()))
    out = search(model, params, prompt, beams=2, max_new=6, banned=banned)
    assert not set(out.tokens.flatten().tolist()) & set(banned)
    first = logprobs(model, params, [prompt[0].tolist()])[0]
    assert set(out.tokens[:, 0].tolist()) <= set(
        np.argsort(np.where(np.isin(range(61), banned), -np.inf, first))[-2:].tolist()
    )
    np.testing.assert_allclose(out.logprobs[:, 0], first[np.asarray(out.tokens[:, 0])], atol=1e-4)


def test_learned_positions_run_out():
    model, params = tiny("gpt2")
    cache = Dense().init(model, batch=1, capacity=90)
    with pytest.raises(ValueError, match="need 97 positions, but the model has learned 96"):
        kvjax.beam(model, params, cache, prompts(0, 1, 90), beams=2, max_new=8)
