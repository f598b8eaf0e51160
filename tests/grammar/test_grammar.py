"""Grammars on the host: what follows what, against derivatives, and what is refused."""

import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvjax.grammar import grammar as grammars
from kvjax.grammar import regex
from tests.grammar.expressions import END, NEVER, PIECES, after_text, expressions, may_end, pattern, small_tokenizer
from tests.tiny_model import bytes_tokenizer

SMALL, BYTES = small_tokenizer(), bytes_tokenizer()


@settings(deadline=None, max_examples=80)
@given(e=expressions, picks=st.lists(st.integers(0, 10**6), max_size=8))
def test_a_walk_sees_what_derivatives_see(e, picks):
    assume(any(after_text(e, letter) != NEVER for letter in "abcd"))
    grammar, state, text = regex(pattern(e), SMALL), 0, ""
    for pick in picks:
        allowed = np.flatnonzero(grammar.next[state, grammar.classes] >= 0).tolist()
        assert allowed == [i for i, piece in enumerate(PIECES[:END]) if after_text(e, text + piece) != NEVER]
        assert bool(grammar.accepts[state]) == may_end(after_text(e, text)) == bool(re.fullmatch(pattern(e), text))
        if not allowed:
            break
        text += PIECES[allowed[pick % len(allowed)]]
        state = int(grammar.next[state, grammar.classes[allowed[pick % len(allowed)]]])


def test_equal_languages_are_equal_grammars():
    assert regex("a(b|c)", SMALL) == regex("ab|ac", SMALL) != regex("ab|a", SMALL)
    assert hash(regex("^(ab)+$", SMALL)) == hash(regex("ab(ab)*", SMALL))
    assert regex("ab", SMALL) != regex("ab", BYTES)


def test_any_branch_may_be_taken():
    """A search for `a|ab` ends at its first branch; a text that is matched whole does not."""
    grammar = regex("a|ab", BYTES)
    assert grammar.accepts[grammar.state(b"ab")] and grammar.accepts[grammar.state(b"a")]


def test_characters_of_several_bytes_and_the_fewest_tokens():
    assert regex("é+", BYTES).state("éé".encode()) > 0 and regex("é{3}", BYTES).least[0] == 6
    assert regex("abcab", SMALL).least[0] == 2 and regex("abcab", BYTES).least[0] == 5


def test_going_on_and_leaving_out():
    grammar = regex("ab*c", BYTES)
    assert grammar.after(b"abb") == regex("b*c", BYTES)
    assert grammar.without(b"b") == regex("ac", BYTES) and grammar.without([256]) is grammar
    with pytest.raises(ValueError, match="token 99 at index 2 may not follow"):
        grammar.state(b"acc")
    with pytest.raises(ValueError, match="the vocabulary cannot spell any text"):
        grammar.without(b"c")
    with pytest.raises(ValueError, match="nothing but the empty text"):
        grammar.after(b"ac")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(", "must be an expression of Rust's regex syntax"),
        ("a)|(b", "must be an expression of Rust's regex syntax"),
        ("a(?=b)", "must be an expression of Rust's regex syntax"),
        (r"[^\x00-\x{10FFFF}]", "matches no text"),
        ("a^b", "matches no text"),
        ("a{0}", "nothing but the empty text"),
        ("-+", "the vocabulary cannot spell any text"),
        (5, "`pattern` must be a text, got 5"),
    ],
)
def test_bad_patterns_are_refused_by_name(text, words, unchecked):
    with pytest.raises(ValueError, match=words):
        regex(text, SMALL)


def test_no_tokenizer_is_refused(unchecked):
    with pytest.raises(ValueError, match="`tokenizer` must be as kvjax.load gives it, got NoneType"):
        regex("a", None)


def test_a_table_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(grammars, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="would be larger than"):
        regex("[a-d]{40}", SMALL)
