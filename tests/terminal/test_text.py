"""Showing text: stop texts, sizes, an answer's times."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.decode import Output, Step
from kvjax.terminal.answer import speak
from kvjax.terminal.status import size
from kvjax.terminal.stops import Cut
from tests.tiny_model import END, bytes_tokenizer


@given(
    pieces=st.lists(st.text("abc", max_size=3), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_cut_shows_what_cutting_the_whole_text_shows(pieces, stops):
    cut, shown = Cut(stops), ""
    for i, piece in enumerate(pieces):
        cut, new = cut.push(piece)
        shown += new
        so_far = "".join(pieces[: i + 1])
        assert so_far.startswith(shown)
        assert not any(stop in shown for stop in stops)
    whole = "".join(pieces)
    ends = [at for at in (whole.find(stop) for stop in stops) if at >= 0]
    assert cut.met == bool(ends)
    if ends:  # the earliest moment a stop text was whole decides, as in the compiled loop
        assert whole.startswith(shown) and len(shown) <= max(ends)
    else:
        assert shown + cut.held == whole


def test_cut_shows_at_once_what_cannot_become_a_stop():
    cut, shown = Cut(("END",)).push("abcE")
    assert shown == "abc"
    cut, shown = cut.push("N")
    assert shown == "" and cut.held == "EN"
    cut, shown = cut.push("x")
    assert shown == "ENx" and cut.held == ""


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (11_300_000, "11.3 MB"), (5e12, "5000.0 GB")])
def test_size(count, text):
    assert size(int(count)) == text


def steps_of(tokens, reason=1):
    for i, token in enumerate(tokens):
        last = i == len(tokens) - 1
        yield Step(np.array([token]), np.array([0.0], np.float32), np.array([reason if last else 0]))
    row = np.array([tokens])
    return Output(row, np.array([len(tokens)]), np.zeros(row.shape, np.float32), None, np.array([reason]))


def test_speak_never_writes_half_a_character():
    written = []
    text = "hé→🙂"
    answer = speak(steps_of([*text.encode(), END]), bytes_tokenizer(), (), written.append, started=False)
    assert written == list(text) and answer.text == text
    assert answer.reason == "limit" and len(answer.tokens) == len(text.encode()) + 1


def test_speak_writes_what_was_held_back_at_the_end():
    written = []
    answer = speak(steps_of([*b"abE", *"é".encode()[:1]]), bytes_tokenizer(), ("END",), written.append, started=False)
    assert answer.text == "".join(written) == "abE\ufffd"


def test_speak_stops_when_interrupted():
    answer = speak(
        steps_of(list(b"abcdef")), bytes_tokenizer(), (), lambda _: None, started=False, interrupted=lambda: True
    )
    assert (answer.text, answer.reason, answer.output) == ("a", "interrupted", None)
