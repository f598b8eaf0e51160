"""Stop strings found by the automaton, against searching the text."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax import Sampling
from kvjax.cache import Dense
from kvjax.decode.stops import MOST, compile_stops
from tests.tiny import tiny


@dataclass(frozen=True)
class Pieces:
    """A tokenizer's byte table: every string of up to three of the letters a, b, é."""

    pieces: tuple[bytes, ...]

    def token_bytes(self):
        return list(self.pieces)


LETTERS = ("a", "b", "é")
TEXTS = [""] + [x for x in LETTERS] + [x + y for x in LETTERS for y in LETTERS]
HALVES = [b"\xc3", b"\xa9"]  # é may come in two tokens
PIECES = Pieces(tuple([text.encode() for text in TEXTS] + HALVES))
VOCAB = len(PIECES.pieces)


@settings(deadline=None, max_examples=200)
@given(
    strings=st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=4),
    tokens=st.lists(st.integers(0, VOCAB - 1), max_size=12),
)
def test_every_string_is_met_when_the_text_holds_it(strings, tokens):
    heeded, automaton = compile_stops([strings], VOCAB, PIECES)
    next_state, hits = np.asarray(automaton.next), np.asarray(automaton.hits)
    state, text, met = 0, b"", 0
    for token in tokens:
        met |= int(hits[state, token])
        state = next_state[state, token]
        text += PIECES.pieces[token]
        for i, string in enumerate(dict.fromkeys(strings)):
            assert bool(met >> i & 1) == (string.encode() in text)
    assert heeded[0] == (1 << len(set(strings))) - 1


def test_rows_heed_their_own_strings_in_the_loop():
    model, params = tiny()
    tokenizer = Pieces(tuple(bytes([65 + i % 26]) + bytes([97 + i // 26]) for i in range(61)))
    tokens = jnp.array([[1, 2, 3]] * 3)
    free = kvjax.generate(model, params, Dense().init(model, batch=3, capacity=64), tokens, max_new=20)
    made = free.tokens[0].tolist()
    text = b"".join(tokenizer.pieces[t] for t in made).decode()
    inside = text[7:10]  # from the second letter of a token to the first of the one after the next
    rows = [Sampling(stop_strings=[inside]), Sampling(), Sampling(stop_strings=["never", inside[::-1] + "#"])]
    cache = Dense().init(model, batch=3, capacity=64)
    out = kvjax.generate(model, params, cache, tokens, max_new=20, sampling=rows, tokenizer=tokenizer)
    ended = (text.index(inside) + len(inside) + 1) // 2
    assert out.lengths.tolist() == [ended, 20, 20]
    assert kvjax.decode.REASONS[int(out.reason[0])] == "stop string"


def test_too_many_strings_are_refused():
    with pytest.raises(ValueError, match=f"at most {MOST}"):
        compile_stops([[str(i) for i in range(MOST + 1)]], VOCAB, PIECES)


def test_a_tokenizer_may_know_more_than_the_model():
    _, small = compile_stops([["ab"]], VOCAB - 2, PIECES)
    _, whole = compile_stops([["ab"]], VOCAB, PIECES)
    np.testing.assert_array_equal(small.next, whole.next[:, : VOCAB - 2])
