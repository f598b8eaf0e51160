"""What drafts guess."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense
from kvjax.draft import Chain, DraftModel, PromptLookup
from kvjax.draft.base import View
from tests.tiny import prompts, tiny


def view(texts, vocab=61, size=32):
    batch = len(texts)
    table = np.zeros((batch, size), np.int32)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = text
    length = jnp.array([len(text) for text in texts])
    nothing = jnp.zeros((batch, vocab), jnp.int32)
    rules = kvjax.decode.rules(kvjax.Sampling(), batch=batch, vocab=vocab, max_new=16)
    made = jnp.zeros(batch, jnp.int32)
    return View(jnp.asarray(table), length, jnp.ones(batch, bool), length, made, nothing > 0, nothing, rules)


def guesses(draft, texts, want=9):
    guess, count, _ = draft.propose(draft.init(len(texts), 32), view(texts), jnp.int32(want))
    return [row[:n].tolist() for row, n in zip(np.asarray(guess), np.asarray(count), strict=True)]


def test_lookup_goes_on_as_the_longest_latest_match_did():
    draft = PromptLookup(k=3, longest=3, shortest=1)
    assert guesses(draft, [[1, 2, 3, 9, 8, 7, 2, 3, 5, 6, 4, 1, 2, 3]]) == [[9, 8, 7]]  # three match, not two
    assert guesses(draft, [[1, 2, 5, 6, 7, 1, 2, 8, 9, 4, 1, 2]]) == [[8, 9, 4]]  # the later of two
    assert guesses(draft, [[1, 2, 3]]) == [[]]
    assert guesses(draft, [[4]]) == [[]]
    assert guesses(PromptLookup(k=3, shortest=2), [[4, 5, 6, 4]]) == [[]]
    assert guesses(draft, [[4, 5, 6, 4]], want=2) == [[5, 6]]


def test_lookup_repeats_what_overlaps_the_end():
    assert guesses(PromptLookup(k=5, shortest=1), [[1, 7, 7]]) == [[7] * 5]
    assert guesses(PromptLookup(k=5, shortest=2), [[1, 2, 3, 1, 2, 3, 1, 2]]) == [[3, 1, 2, 3, 1]]


def test_lookup_sees_no_further_than_the_text():
    """Rows of the same tokens guess the same, whatever lies past their ends."""
    draft, text = PromptLookup(k=4, shortest=1), [5, 6, 5]
    one = view([text])
    garbage = replace(one, text=jnp.where(jnp.arange(32)[None] < 3, one.text, 5))
    a, b = (draft.propose(None, v, jnp.int32(4)) for v in (one, garbage))
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])


def test_a_model_guesses_what_it_would_say():
    model, params = tiny()
    tokens = np.asarray(prompts(1, 2, 9))
    free = kvjax.generate(model, params, kvjax.cache.Dense().init(model, batch=2, capacity=32), tokens, max_new=4)
    assert guesses(DraftModel(model, params, 4), tokens.tolist()) == free.tokens.tolist()


def test_a_model_takes_in_what_it_has_missed():
    """However much text came without a guess being asked, a long prompt among it."""
    model, params = tiny()
    draft, tokens = DraftModel(model, params, 2), np.asarray(prompts(2, 1, 150))
    own = draft.init(1, 256)
    for length in (3, 4, 110, 150):
        now = view([tokens[0, :length].tolist()], size=256)
        own = draft.observe(own, now)
        guess, count, own = jax.jit(draft.propose)(own, now, jnp.int32(2))
        free = kvjax.generate(
            model, params, kvjax.cache.Dense().init(model, batch=1, capacity=256), tokens[:, :length], max_new=2
        )
        np.testing.assert_array_equal(guess, free.tokens)
        own = draft.observe(own, view([tokens[0, : length + 1].tolist()], size=256))  # the guesses were wrong
        _, _, own = draft.propose(own, now, jnp.int32(0))


def test_a_chain_asks_the_next_where_one_has_no_guess():
    model, params = tiny()
    texts = [[1, 2, 3, 1, 2], [5, 6, 7, 8, 9]]
    alone = guesses(DraftModel(model, params, 2), texts)
    chain = Chain((PromptLookup(k=3), DraftModel(model, params, 2)))
    assert guesses(chain, texts) == [[3, 1, 2], alone[1]]
    assert chain.most == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PromptLookup(k=0), "`k` must be at least 1, a whole number, got 0"),
        (lambda: PromptLookup(shortest=0), r"`shortest` must be in \[1, longest=4\] tokens, got 0"),
        (lambda: PromptLookup(longest=2, shortest=3), "got 3"),
        (lambda: DraftModel(*tiny(), k=1.5), "`k` must be at least 1"),
        (lambda: Chain(()), "`drafts` must name at least one"),
    ],
)
def test_bad_settings_are_refused_by_name(make, words, unchecked):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_draft_guesses_up_to_the_last_position_it_has_learnt():
    """96 of them: six times four guesses and a token, and the last three tokens without."""
    model, params = tiny("gpt2")
    cache = [Dense().init(model, batch=1, capacity=96) for _ in range(2)]
    free = kvjax.generate(model, params, cache[0], prompts(1, 1, 62), max_new=34)
    guesses = {"draft": DraftModel(model, params, k=4), "costs": [1.0] * 4}
    out = kvjax.speculate(model, params, cache[1], prompts(1, 1, 62), max_new=34, **guesses)
    np.testing.assert_array_equal(out.tokens, free.tokens)
    assert out.speculated.rounds.tolist() == [3, 0, 0, 6] and out.speculated.accepted.tolist() == [24]
