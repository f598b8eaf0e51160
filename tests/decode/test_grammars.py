"""Constrained decoding: the tokens of a plain host loop with masks by derivatives, and the exact distribution."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kvjax
from kvjax import Sampling
from kvjax.cache import Dense
from kvjax.decode import REASONS
from kvjax.grammar import json_schema, regex
from tests.chances import p_value
from tests.compiles import Compiles
from tests.grammar.expressions import END, NEVER, PIECES, after_text, expressions, may_end, pattern, small_tokenizer
from tests.tiny import prompts, tiny
from tests.tiny_model import bytes_tokenizer

TOKENIZER, KEY = small_tokenizer(), jax.random.key(5)
TOKENS = np.asarray(prompts(5, 3, 7))


def decode(rows, max_new=8, decoder=kvjax.generate, tokens=TOKENS, **settings):
    model, params = tiny()
    cache = Dense().init(model, batch=len(tokens), capacity=64)
    return decoder(model, params, cache, tokens, max_new=max_new, sampling=rows, key=KEY, **settings)


def made(out, row=0) -> list[int]:
    return out.tokens[row, : int(out.lengths[row])].tolist()


def text(ids) -> str:
    return "".join(PIECES[i] for i in ids if i != END)


def mask(e, ids, stops: bool) -> np.ndarray:
    """What may follow, without an automaton."""
    allowed = np.array([after_text(e, text(ids) + piece) != NEVER for piece in PIECES[:END]] + [False])
    allowed[END] = stops and may_end(after_text(e, text(ids)))
    return allowed


def greedy(e, prompt, max_new, stops: bool):
    """A forward pass a token, and the likeliest that may follow."""
    model, params = tiny()
    ids = []
    while len(ids) < max_new:
        allowed = mask(e, ids, stops)
        if not allowed.any():
            return ids, "grammar complete"
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(prompt) + len(ids)] = [*prompt, *ids]
        logits = np.asarray(kvjax.forward(model, params, padded))[0, len(prompt) + len(ids) - 1]
        ids.append(int(np.where(allowed, logits, -np.inf).argmax()))
        if ids[-1] == END:
            return ids, "stop token"
    return ids, "limit" if mask(e, ids, stops).any() else "grammar complete"


@settings(deadline=None, max_examples=30)
@given(e=expressions, stops=st.booleans(), warm=st.booleans())
def test_texts_match_and_other_rows_do_not_notice(e, stops, warm):
    assume(any(after_text(e, letter) != NEVER for letter in "abcd"))
    grammar = regex(pattern(e), TOKENIZER)
    assume(grammar.least[0] <= 8)
    temperature = 2.0 * warm
    ruled = Sampling(grammar=grammar, stop=[END] if stops else [], temperature=temperature)
    free = Sampling(temperature=temperature)
    other = Sampling(grammar=regex("[0-9]{3}", TOKENIZER), temperature=temperature)
    out, alone = decode([ruled, free, other]), decode([free, free, free])
    assert made(out, 1) == made(alone, 1)
    np.testing.assert_array_equal(out.logprobs[1], alone.logprobs[1])
    assert re.fullmatch("[0-9]{3}", text(made(out, 2))) and REASONS[int(out.reason[2])] == "grammar complete"
    ids, reason = made(out), REASONS[int(out.reason[0])]
    if reason == "limit":
        assert len(ids) == 8 and after_text(e, text(ids)) != NEVER
    else:
        assert reason == ("stop token" if stops else "grammar complete") and re.fullmatch(pattern(e), text(ids))
    if not warm:
        assert (ids, reason) == greedy(e, TOKENS[0].tolist(), 8, stops)


E = ("then", ("or", ("letter", "a"), ("then", ("letter", "b"), ("star", ("letter", "c")))), ("star", ("letter", "a")))


def test_draws_have_the_exactly_renormalised_distribution():
    """Chi-square of pairs of tokens; renormalising whole texts instead of each step is seen to be another thing."""
    model, params = tiny()
    prompt, heat, batch = TOKENS[0].tolist(), 2.5, 4096

    def chances(ids):
        logits = np.asarray(kvjax.forward(model, params, np.array([[*prompt, *ids]], np.int32)))[0, -1] / heat
        return np.exp(logits.astype(np.float64) - logits.max()), mask(E, ids, True)

    each, whole = {}, {}
    weight, first = chances([])
    for i in np.flatnonzero(first).tolist():
        after, second = chances([i])
        for j in np.flatnonzero(second).tolist():
            each[i, j] = weight[i] / weight[first].sum() * after[j] / after[second].sum()
            whole[i, j] = weight[i] / weight.sum() * after[j] / after.sum()
    rows = Sampling(grammar=regex(pattern(E), TOKENIZER), stop=[END], temperature=heat)
    out = decode(rows, max_new=2, tokens=np.tile(TOKENS[:1], (batch, 1)))
    pairs, counts = np.unique(np.asarray(out.tokens), axis=0, return_counts=True)
    seen = {tuple(pair): int(count) for pair, count in zip(pairs.tolist(), counts, strict=True)}
    assert set(seen) <= set(each) and len(each) > 8

    counts = [seen.get(pair, 0) for pair in each]
    assert p_value(counts, list(each.values())) > 1e-3
    assert p_value(counts, [whole[pair] for pair in each]) < 1e-6


def test_logprobs_are_the_models_own():
    model, params = tiny()
    out = decode(Sampling(grammar=regex("cab", TOKENIZER)))
    logits = kvjax.forward(model, params, TOKENS)[:, -1]
    wanted = jnp.take_along_axis(jax.nn.log_softmax(logits), out.tokens[:, :1], 1)
    np.testing.assert_allclose(out.logprobs[:, :1], wanted, atol=1e-4)


def test_another_grammar_of_the_same_padded_size_costs_no_compile():
    decode(Sampling(grammar=regex("ab*c", TOKENIZER), stop=[END]))
    with Compiles() as compiles:
        out = decode(Sampling(grammar=regex("cb*d", TOKENIZER), stop=[END]))
    assert compiles.of("_advance") == compiles.of("first") == 0
    assert text(made(out)).startswith("c")


def test_nothing_of_grammars_is_traced_without_one():
    settings = kvjax.decode.rules(Sampling(), batch=2, vocab=61, max_new=4)
    assert settings.grammars.none and sum(x.size for x in jax.tree.leaves(settings.grammars)) == 0


def test_bans_and_stops_that_are_text():
    """What is banned or stops is no text of the row, so that a row never gets stuck."""
    grammar = regex("(a|b)c|d", TOKENIZER)
    out = decode([Sampling(grammar=grammar, banned=[PIECES.index("d"), PIECES.index("bc"), PIECES.index("b")])] * 3)
    assert text(made(out)) == "ac" and REASONS[int(out.reason[0])] == "grammar complete"
    stop = PIECES.index("0")
    out = decode([Sampling(grammar=regex("a|[a0]b", TOKENIZER), stop=[stop], bias={stop: 50.0})] * 3)
    assert text(made(out)) == "a0" and REASONS[int(out.reason[0])] == "stop token"
    out = decode([Sampling(grammar=grammar, stop=[END], banned=[END])] * 3)
    assert REASONS[int(out.reason[0])] == "grammar complete" and END not in made(out)


def test_forced_tokens_and_several_grammars_side_by_side():
    a, c = PIECES.index("a"), PIECES.index("c")
    rows = [
        Sampling(grammar=regex("ab{3}", TOKENIZER), forced=[a]),
        Sampling(grammar=regex("c.d", TOKENIZER)),
        Sampling(),
    ]
    out = decode(rows)
    assert text(made(out)) == "abbb" and made(out)[0] == a and re.fullmatch("c.d", text(made(out, 1)))
    assert made(out, 2) == made(decode(Sampling()), 2)
    with pytest.raises(ValueError, match="`forced` must stay within the grammar: .*token 2 at index 0 may not follow"):
        decode(Sampling(grammar=regex("ab", TOKENIZER), forced=[c]))


def test_going_on_in_another_call():
    grammar, model, params = regex("(ab|cd){6}", TOKENIZER), *tiny()
    whole = decode(Sampling(grammar=grammar), max_new=12)
    first = kvjax.stream(
        model,
        params,
        Dense().init(model, batch=1, capacity=64),
        TOKENS[:1],
        max_new=12,
        sampling=Sampling(grammar=grammar),
    )
    ids = [int(next(first).tokens[0]) for _ in range(2)]
    cache = Dense().init(model, batch=1, capacity=64)
    prompt = np.array([[*TOKENS[0].tolist(), *ids]])
    rest = kvjax.generate(model, params, cache, prompt, max_new=10, sampling=Sampling(grammar=grammar.after(ids)))
    assert ids + made(rest) == made(whole)


@pytest.mark.parametrize("decoder", [kvjax.sample_n, kvjax.best_of, kvjax.beam], ids=lambda f: f.__name__)
def test_several_at_once(decoder):
    model, params = tiny()
    cache, grammar = Dense().init(model, batch=1, capacity=64), regex("(ab|cd){0,2}a", TOKENIZER)
    if decoder is kvjax.beam:
        settings = {"beams": 4, "grammar": grammar, "stop": [END]}
    else:
        settings = {"n": 4, "key": KEY, "sampling": Sampling(grammar=grammar, stop=[END], temperature=1.5)}
    out = decoder(model, params, cache, TOKENS[:1], max_new=8, **settings)
    for row in range(len(out.lengths)):
        assert REASONS[int(out.reason[row])] == "stop token" and made(out, row)[-1] == END
        assert re.fullmatch("(ab|cd){0,2}a", text(made(out, row)))


@pytest.mark.parametrize("stop", [[], [END]], ids=["no stop", "stop"])
def test_beams_find_the_best_of_all_texts(stop):
    """Every spelling of every text, scored by the model itself; and rows that do not exist are empty."""
    model, params = tiny()
    cache, grammar = Dense().init(model, batch=1, capacity=64), regex("abc|ba|cd[ab]", TOKENIZER)
    out = kvjax.beam(
        model, params, cache, TOKENS[:1], beams=12, max_new=6, stop=stop, grammar=grammar, length_penalty=0.0
    )
    spellings, open_ = [], [[]]
    while open_:
        ids = open_.pop()
        state = grammar.state(ids)
        spellings += [ids + stop] if grammar.accepts[state] else []
        open_ += [[*ids, i] for i in range(END) if grammar.next[state, grammar.classes[i]] >= 0]
    score = {}
    for ids in spellings:
        logits = kvjax.forward(model, params, np.array([[*TOKENS[0].tolist(), *ids]], np.int32))[
            0, TOKENS.shape[1] - 1 :
        ]
        score[tuple(ids)] = float(sum(jax.nn.log_softmax(logits[at])[i] for at, i in enumerate(ids)))
    best = sorted(score, key=score.get, reverse=True)
    assert 3 < len(best) < 12
    assert [tuple(made(out, row)) for row in range(len(best))] == best
    np.testing.assert_allclose(out.score[: len(best)], [score[ids] for ids in best], atol=1e-3)
    assert (out.lengths[len(best) :] == 0).all() and jnp.isneginf(out.score[len(best) :]).all()
    assert {REASONS[int(reason)] for reason in out.reason[: len(best)]} == {
        "stop token" if stop else "grammar complete"
    }


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            lambda: Sampling(grammar=regex("a{9}b", bytes_tokenizer())),
            "another vocabulary: it has 258 ids, the model 61",
        ),
        (lambda: Sampling(grammar=regex("0{9}", TOKENIZER)), "no text of fewer than 9 tokens, but the row may have 8"),
        (lambda: Sampling(grammar=regex("0{5}", TOKENIZER), limit=4), "fewer than 5 tokens, but the row may have 4"),
        (lambda: Sampling(grammar=regex("a", TOKENIZER), banned=[0]), "the vocabulary cannot spell any text"),
        (lambda: Sampling(grammar="a+"), "`grammar` must be None or one of kvjax.grammar's, got 'a\\+'"),
    ],
)
def test_bad_grammars_are_refused(row, words, unchecked):
    with pytest.raises(ValueError, match=words):
        decode(row())


def test_a_grammar_of_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="made with another tokenizer than the call's"):
        decode(Sampling(grammar=regex("a", TOKENIZER)), tokenizer=bytes_tokenizer())


@pytest.mark.real
def test_the_real_model_writes_json(smollm2):
    model, params, tokenizer = smollm2
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"enum": [7, 30, 42]},
            "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "minItems": 1, "maxItems": 2},
        },
        "required": ["name", "age", "likes"],
    }
    prompt = tokenizer.chat([{"role": "user", "content": "Anna is 30 and likes tea. Answer in JSON."}])
    grammar = json_schema(schema, tokenizer)
    assert grammar.nbytes < 2_000_000
    rows = [Sampling(grammar=grammar, stop=tokenizer.stop_ids, temperature=t) for t in (0.0, 1.0)]
    cache = Dense().init(model, batch=2, capacity=256)
    out = kvjax.generate(model, params, cache, [tokenizer.encode(prompt)] * 2, max_new=96, sampling=rows, key=KEY)
    for row in range(2):
        value = json.loads(tokenizer.decode(made(out, row), skip_special=True))
        assert REASONS[int(out.reason[row])] == "stop token" and set(value) == {"name", "age", "likes"}
        assert isinstance(value["name"], str) and len(value["name"]) <= 20 and value["age"] in (7, 30, 42)
        assert 1 <= len(value["likes"]) <= 2 and set(value["likes"]) <= {"tea", "coffee"}
