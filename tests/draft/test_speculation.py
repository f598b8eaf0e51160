"""speculate: the tokens of generate, in fewer calls, whatever the draft says, with nothing of a wrong guess left."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Sampling
from kvjax.cache import Dense, Paged, Quantized, Ring
from kvjax.decode import REASONS
from kvjax.draft import DraftModel, PromptLookup, costs, rounds, speculate, speculation, widths
from kvjax.draft.base import View
from kvjax.pytree import pytree, static
from tests.chances import p_value
from tests.compiles import Compiles
from tests.strategies import CACHES, CHUNKED, crossed
from tests.tiny import prompts, tiny
from tests.tiny_model import bytes_tokenizer

KEY = jax.random.key(5)
TOKENS, LENGTHS = prompts(5, 3, 13), jnp.array([13, 4, 1])
EAGER = [1.0, 1.0, 1.0]
"""All numbers of guesses cost the same, so that as many as possible are checked."""


@pytree
class Told:
    """Guesses the tokens it was made with, wrong from each row's `wrong` on: what is right is known beforehand."""

    tokens: jax.Array
    wrong: jax.Array
    k: int = static(default=3)

    @property
    def most(self):
        return self.k

    def check(self, target):
        pass

    def init(self, batch, size):
        return None

    def propose(self, own, view: View, want):
        at = view.made[:, None] + jnp.arange(self.k, dtype=jnp.int32)[None]
        guess = jnp.take_along_axis(self.tokens, jnp.minimum(at, self.tokens.shape[1] - 1), axis=1)
        guess = jnp.where(at < self.wrong[:, None], guess, (guess + 1) % 61)
        return guess, jnp.full(view.length.shape, jnp.minimum(want, self.k)), None

    def observe(self, own, view: View):
        return None


def told(out, wrong=99, k=3):
    return Told(out.tokens, jnp.broadcast_to(jnp.asarray(wrong), out.lengths.shape), k)


def run(decoder, cache="Dense()", tokens=TOKENS, lengths=LENGTHS, capacity=64, **settings):
    model, params = tiny()
    made = CACHES[cache].init(model, batch=tokens.shape[0], capacity=capacity)
    return decoder(model, params, made, tokens, lengths, **settings)


def same(got, wanted):
    for name in ("tokens", "lengths", "reason"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
    np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=2e-4)


@pytest.mark.parametrize("cache", crossed(name for name in CACHES if "Paged" not in name))
def test_wrong_guesses_leave_nothing_behind(cache):
    """Every buffer of the cache is what it is when only the right tokens ever came."""
    one = {"lengths": None, "tokens": TOKENS[:, :1]} if cache in CHUNKED else {}  # the prompt itself in one way
    free = run(kvjax.generate, cache, max_new=24, **one)
    draft = told(free, wrong=[5, 0, 17])
    out = run(speculate, cache, max_new=24, draft=draft, costs=EAGER, **one)
    same(out, free)
    assert (out.speculated.accepted < out.speculated.proposed).all()
    assert (out.speculated.accepted > 0).tolist() == [True, False, True]
    for a, b in zip(jax.tree.leaves(out.cache), jax.tree.leaves(free.cache), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, atol=2e-4)
        else:
            assert (a == b).mean() > 0.99 if a.dtype == jnp.uint8 else (a == b).all()  # a code may round otherwise


def test_a_row_shorter_than_the_sinks_keeps_no_wrong_guess():
    """Also in slots that nothing reads yet."""
    model, params = tiny()
    strategy, first = Quantized(8, residual=8, sinks=12), TOKENS[:, :1]
    free = kvjax.generate(model, params, strategy.init(model, batch=3, capacity=64), first, max_new=6)
    draft, cache = told(free, wrong=[3, 0, 2]), strategy.init(model, batch=3, capacity=64)
    out = speculate(model, params, cache, first, max_new=6, draft=draft, costs=EAGER)
    same(out, free)
    for layer, wanted in zip(out.cache.layers, free.cache.layers, strict=True):
        np.testing.assert_allclose(layer.k, wanted.k, atol=2e-4)
        np.testing.assert_allclose(layer.v, wanted.v, atol=2e-4)


def test_pages_hold_the_right_tokens_only():
    free = run(kvjax.generate, "Paged(page=4, pool=24)", max_new=24)
    out = run(speculate, "Paged(page=4, pool=24)", max_new=24, draft=told(free, wrong=[5, 0, 17]), costs=EAGER)
    same(out, free)
    assert out.cache.shared.refs.sum() == free.cache.shared.refs.sum()
    for a, b in zip(*(o.cache.opened(jnp.zeros(3, jnp.int32))[0].layers for o in (out, free)), strict=True):
        held = np.repeat(np.asarray(a.held(out.cache.length)) >= 0, 2, axis=0)
        for x, y in zip(a.tokens(), b.tokens(), strict=True):
            np.testing.assert_allclose(np.asarray(x)[held], np.asarray(y)[held], atol=2e-4)


SETTINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=1.1),
    "filtered": Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01),
    "penalised": Sampling(temperature=0.8, repetition=1.3, presence=0.5, frequency=0.4, bias={3: 2.0}, banned=[5]),
    "forced": Sampling(forced=[7, 8, 9, 10, 11]),
    "each its own": [Sampling(), Sampling(temperature=1.0, seed=9), Sampling(repetition=1.5, limit=7)],
}


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("wrong", [99, [5, 0, 17]], ids=["right", "wrong at times"])
def test_same_key_same_tokens(sampling, wrong):
    settings = {"max_new": 21, "key": KEY, "sampling": sampling}
    free = run(kvjax.generate, **settings)
    out = run(speculate, draft=told(free, wrong), costs=EAGER, **settings)
    same(out, free)
    assert out.speculated.accepted.sum() > 0


def test_a_token_more_comes_with_every_round():
    """Three right guesses and the token after them: 24 tokens are the prompt's one, five rounds, and what is left."""
    free = run(kvjax.generate, max_new=24)
    out = run(speculate, max_new=24, draft=told(free), costs=EAGER)
    assert out.speculated.rounds.tolist() == [0, 0, 6]
    assert out.speculated.accepted.tolist() == [3 * 5 + 2] * 3
    same(out, free)


@pytest.mark.parametrize("stop", ["token", "string"])
@pytest.mark.parametrize("at", range(2, 8))
def test_an_end_inside_a_draft(stop, at):
    """Wherever among the guesses it falls, what comes after it is not taken."""
    free = np.asarray(run(kvjax.generate, max_new=16).tokens)
    rows = [Sampling() if row == 1 else Sampling(stop=[int(free[row, at])]) for row in range(3)]
    if stop == "string":
        text = [bytes([int(free[row, at])]).decode() for row in range(3)]
        rows = [Sampling() if row == 1 else Sampling(stop_strings=[text[row]]) for row in range(3)]
    settings = {"max_new": 16, "sampling": rows, "tokenizer": bytes_tokenizer()}
    free = run(kvjax.generate, **settings)
    out = run(speculate, draft=Told(jnp.asarray(run(kvjax.generate, max_new=16).tokens), jnp.full(3, 99)), **settings)
    same(out, free)
    assert REASONS[int(out.reason[0])] == f"stop {stop}" and out.cache.length.tolist() == free.cache.length.tolist()
    assert len(set(out.lengths.tolist())) > 1


@pytest.mark.parametrize("max_new", range(1, 9))
def test_a_limit_inside_a_draft_and_a_cache_just_large_enough(max_new):
    settings = {"max_new": max_new, "capacity": 13 + max_new - 1}
    free = run(kvjax.generate, **settings)
    out = run(speculate, draft=told(free), costs=EAGER, **settings)
    same(out, free)
    assert int(out.cache.length[0]) == out.cache.capacity


def test_going_on_from_what_comes_back():
    free = run(kvjax.generate, max_new=20)
    first = run(speculate, max_new=9, draft=told(free), costs=EAGER)
    model, params = tiny()
    rest = kvjax.generate(model, params, first.cache, first.last, max_new=11)
    np.testing.assert_array_equal(np.concatenate([first.tokens, rest.tokens], 1), free.tokens)


def test_inside_your_own_jit():
    model, params = tiny()
    free = run(kvjax.generate, max_new=12)
    draft = PromptLookup(k=3, shortest=1)

    @jax.jit
    def whole(params, cache, tokens, lengths):
        return speculate(model, params, cache, tokens, lengths, draft=draft, max_new=12).tokens

    np.testing.assert_array_equal(
        whole(params, Dense().init(model, batch=3, capacity=64), TOKENS, LENGTHS), free.tokens
    )


def test_a_draft_that_is_never_right_is_left_alone():
    free = run(kvjax.generate, max_new=256, capacity=280)
    costs = [1.0, 1.3, 1.6]
    out = run(speculate, draft=told(free, wrong=0), max_new=256, capacity=280, costs=costs)
    same(out, free)
    rounds = np.asarray(out.speculated.rounds)
    assert rounds.sum() == 255
    assert (rounds * (np.array(costs) - 1)).sum() < 0.02 * 255  # what the useless rounds cost more than a step
    assert rounds[1:].sum() > 2  # and yet it is tried again


def test_it_comes_back_when_guesses_become_right():
    free = run(kvjax.generate, max_new=256, capacity=280)

    @pytree
    class Late(Told):
        def propose(self, own, view: View, want):
            guess, count, own = super().propose(own, view, want)
            return jnp.where((view.made < 100)[:, None], (guess + 1) % 61, guess), count, own

    draft = Late(free.tokens, jnp.full(3, 999))
    out = run(speculate, draft=draft, max_new=256, capacity=280, costs=[1.0, 1.3, 1.6])
    same(out, free)
    assert int(out.speculated.rounds.sum()) < 100 + 156 * 0.75


def test_costs_decide():
    free = run(kvjax.generate, max_new=20)
    dear = run(speculate, draft=told(free), max_new=20, costs=[1.0, 50.0, 50.0])
    assert dear.speculated.rounds.tolist() == [19, 0, 0]
    same(dear, free)


def test_costs_are_measured_where_none_are_given_and_only_once(monkeypatch):
    monkeypatch.setattr(costs, "_TIMED", {})
    free = run(kvjax.generate, max_new=72, capacity=96)
    out = run(speculate, draft=told(free), max_new=72, capacity=96)
    same(out, free)
    assert (np.asarray(out.speculated.costs) > 0).all() and jnp.isfinite(out.speculated.costs).all()
    assert out.speculated.widths.tolist() == [0, 1, 3]
    (timed,) = costs._TIMED.values()
    assert timed.turns == 6 and (timed.seconds > 0).all() and np.isfinite(timed.seconds).all()
    monkeypatch.setattr(speculation, "timed", None)
    again = run(speculate, draft=told(free), max_new=72, capacity=96)
    same(again, free)
    np.testing.assert_array_equal(again.speculated.costs, out.speculated.costs)
    monkeypatch.undo()
    monkeypatch.setattr(costs, "_TIMED", {})
    short = run(speculate, draft=told(free), max_new=1)  # no round at all
    assert jnp.isfinite(short.speculated.costs).all()
    wanted, (timed,) = run(kvjax.generate, max_new=12), costs._TIMED.values()
    for _ in range(60):  # calls too short for all go on where the last has stopped
        if timed.turns == 6:
            break
        same(run(speculate, draft=told(free), max_new=12), wanted)
    assert timed.turns == 6


def test_lengths_and_settings_cost_no_compile():
    model, params = tiny()
    call = partial(run, speculate, draft=PromptLookup(k=3), costs=EAGER, key=KEY)
    call(max_new=16)
    with Compiles() as compiles:
        call(max_new=9, tokens=TOKENS[:, :9], lengths=jnp.array([9, 2, 3]), sampling=Sampling(temperature=0.8))
    assert compiles.of("advance") == 0


def test_the_cache_stays_in_place():
    model, params = tiny()
    cache = Dense().init(model, batch=2, capacity=4096)
    state = kvjax.decode.begin(cache, jnp.zeros(2, jnp.int32), jnp.zeros((2, 61), bool), 16)
    draft = PromptLookup(k=3)
    spec = speculation._begin(model, draft, state, np.ones((2, 1), np.int32), np.ones(2, np.int32), False)
    rules = kvjax.decode.rules(Sampling(), batch=2, vocab=61, max_new=16)
    costs = jnp.ones(3)
    program = rounds.advance.lower(model, params, draft, spec, rules, costs, 9, 1, widths=widths(draft)).compile()
    assert program.memory_analysis().alias_size_in_bytes >= kvjax.nbytes(cache)
    assert program.memory_analysis().temp_size_in_bytes < kvjax.nbytes(cache) / 1.8  # logits of four queries a row
    assert "f32[4,4096,8]" in program.as_text()
    assert not re.search(r"= f32\[4,4096,8\]\S* copy\(", program.as_text())


def test_draws_are_the_models_own():
    """Chi-square of the second new token over the whole vocabulary, and of one that a wrong acceptance gives."""
    model, params = tiny()
    batch, warm = 4096, Sampling(temperature=2.5)
    prompt = [3, 9, 4, 3, 9, 4, 3, 9]
    after = kvjax.forward(model, params, jnp.array([prompt]))[0, -1]
    first = jax.nn.softmax(after / 2.5)
    second = kvjax.forward(model, params, jnp.array([[*prompt, token] for token in range(61)]))[:, -1]
    exact = np.asarray((first[:, None] * jax.nn.softmax(second / 2.5)).sum(0), np.float64)

    def draws():
        tokens = jnp.tile(jnp.array([prompt]), (batch, 1))
        draft = Told(jnp.full((batch, 4), int(exact.argmax()), jnp.int32), jnp.full(batch, 99))
        settings = {"max_new": 4, "key": KEY, "sampling": warm, "costs": EAGER}
        out = run(speculate, tokens=tokens, lengths=None, capacity=16, draft=draft, **settings)
        assert 0 < out.speculated.accepted.sum() < out.speculated.proposed.sum()
        return np.bincount(np.asarray(out.tokens[:, 1]), minlength=61)

    assert p_value(draws(), exact) > 1e-3
    jax.clear_caches()
    right = rounds.emit_at
    with pytest.MonkeyPatch.context() as patch:  # a verifier that leans to likely tokens, as "typical" acceptance does
        patch.setattr(rounds, "emit_at", lambda s, rules, logits, *rest: right(s, rules, 1.6 * logits, *rest))
        assert p_value(draws(), exact) < 1e-6
    jax.clear_caches()


@pytest.mark.parametrize("strategy", [Quantized(4, residual=8), Ring(window=6, sinks=2)], ids=["quantized", "ring"])
def test_a_lossy_cache_loses_what_it_would_have_lost(strategy):
    """Guesses see what each token would see on its own: groups that are packed on the way, tokens that leave."""
    model, params = tiny()
    free = kvjax.generate(model, params, strategy.init(model, batch=1, capacity=96), TOKENS[:1], max_new=64)
    draft = told(free, wrong=[41], k=7)
    cache = strategy.init(model, batch=1, capacity=96)
    out = speculate(model, params, cache, TOKENS[:1], draft=draft, max_new=64, costs=[1.0] * 4)
    same(out, free)
    dense = kvjax.generate(model, params, Dense().init(model, batch=1, capacity=96), TOKENS[:1], max_new=64)
    assert (dense.tokens != free.tokens).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"draft": None}, "`draft` must be one of kvjax.draft's, got None"),
        ({"draft": PromptLookup}, "`draft` must be one of kvjax.draft's, got <class"),
        ({"costs": [1.0, 0.0, 2.0]}, r"`costs` must be above 0, got \[1.0, 0.0, 2.0\]"),
        ({"costs": [1.0, float("nan"), 2.0]}, "`costs` must be above 0"),
        ({"costs": [1.0]}, r"`costs` must have 3 entries, one for each of \(0, 1, 3\) guesses, got shape \(1,\)"),
        ({"max_new": 0}, "speculate: `max_new` must be at least 1"),
        ({"max_new": 99}, "speculate: held, prompt and new tokens need 111 slots"),
        ({"draft": PromptLookup(k=64)}, "`k` must be below the cache's capacity, 64, got 64"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, words, unchecked):
    with pytest.raises(ValueError, match=words):
        run(speculate, **{"draft": PromptLookup(k=3), "max_new": 4, **settings})


def test_a_draft_of_another_vocabulary_is_refused():
    model, params = tiny()
    other = kvjax.Transformer(replace(model.config, vocab=60))
    with pytest.raises(ValueError, match="its vocabulary must be the target's, 61 tokens, got 60"):
        run(speculate, draft=DraftModel(other, params), max_new=4)


@pytest.mark.parametrize(("capacity", "pool"), [(9, None), (10, None), (12, None), (40, 5), (40, 6)])
def test_a_cache_that_fills_up_inside_a_draft(capacity, pool):
    """In a `jit` of one's own nobody asks beforehand whether there is room: a row ends where `generate` ends it."""
    model, params = tiny()
    strategy = Dense() if pool is None else Paged(page=2, pool=pool)
    tokens = prompts(5, 1, 6)
    whole = run(kvjax.generate, tokens=tokens, lengths=None, max_new=16)

    @partial(jax.jit, static_argnames="decoder")
    def inside(cache, decoder):
        out = decoder(model, params, cache, tokens, max_new=16)
        return out.tokens, out.lengths, out.reason, out.cache.length

    for wrong in (99, 3):
        made = [strategy.init(model, batch=1, capacity=capacity) for _ in range(2)]
        guessing = partial(speculate, draft=told(whole, wrong), costs=EAGER)
        got, wanted = inside(made[0], guessing), inside(made[1], kvjax.generate)
        assert REASONS[int(wanted[2][0])] == "not finite" and 0 < int(wanted[1][0]) < 16
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("width", [1, 5])
def test_stream_brings_what_speculate_returns(width):
    model, params = tiny()
    tokens = prompts(0, 2, width)
    settings = {"max_new": 12, "key": KEY, "sampling": [Sampling(temperature=0.9), Sampling(limit=7)]}
    free = kvjax.generate(model, params, Dense().init(model, batch=2, capacity=32), tokens, **settings)
    draft, steps, cache = told(free, wrong=[5, 99]), [], Dense().init(model, batch=2, capacity=32)
    measured = list(
        kvjax.draft.stream(model, params, kvjax.fork(cache, jnp.arange(2)), tokens, draft=draft, **settings)
    )
    assert sum((step.tokens >= 0).sum() for step in measured) == free.lengths.sum()
    source = kvjax.draft.stream(model, params, cache, tokens, draft=draft, costs=EAGER, **settings)
    while True:
        try:
            steps.append(next(source))
        except StopIteration as end:
            out = end.value
            break
    same(out, free)
    for row in range(2):
        made = [(s.tokens[row], s.logprobs[row], s.reason[row]) for s in steps if s.tokens[row] >= 0]
        assert [token for token, *_ in made] == out.tokens[row, : int(out.lengths[row])].tolist()
        np.testing.assert_allclose([x for _, x, _ in made], out.logprobs[row, : len(made)])
        assert [bool(reason) for *_, reason in made] == [False] * (len(made) - 1) + [True]
    assert out.speculated.accepted.sum() > 0


def test_what_the_cache_holds_already_can_be_looked_up():
    model, params = tiny()
    text = [*range(1, 12), 1, 2]
    _, cache = kvjax.prefill(model, params, Dense().init(model, batch=1, capacity=64), [text[:-1]])
    settings = {"max_new": 6, "draft": PromptLookup(k=3), "costs": EAGER}
    blind = speculate(model, params, kvjax.fork(cache, jnp.array([0])), [text[-1:]], **settings)
    seeing = speculate(model, params, cache, [text[-1:]], before=[text[:-1]], **settings)
    np.testing.assert_array_equal(seeing.tokens, blind.tokens)
    assert seeing.speculated.proposed.sum() > blind.speculated.proposed.sum()
    with pytest.raises(ValueError, match="`before` must have 1 rows, one a prompt, got 2"):
        speculate(model, params, seeing.cache, [[3]], before=[[1], [2]], **settings)
