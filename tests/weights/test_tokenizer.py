"""Bytes of tokens, decoding, and text as it streams."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.weights import TextStream
from kvjax.weights.gguf_file import read_gguf
from kvjax.weights.tokenizer import byte_alphabet
from kvjax.weights.vocab import from_gguf

FOLDER = Path(__file__).parents[1] / "golden" / "tokens"
TOKENIZERS = {name: from_gguf(read_gguf(FOLDER / f"{name}.gguf")) for name in ("smollm", "llama-bpe", "spm")}
TEXTS = json.loads((FOLDER.parent / "tokens.json").read_text(encoding="utf-8"))["texts"]
NAMES = st.sampled_from(sorted(TOKENIZERS))
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40).filter(lambda text: "▁" not in text)


def stream(tokenizer, ids, **settings):
    state, parts = TextStream(tokenizer, **settings), []
    for i in ids:
        state, text = state.push(i)
        assert len(state.pending) <= 3
        parts.append(text)
    return parts, state.flush()


@given(name=NAMES, text=TEXT | st.sampled_from(TEXTS))
def test_any_text_survives_the_round_trip(name, text):
    tokenizer = TOKENIZERS[name]
    if name == "spm" and "<" in text:
        return  # a SentencePiece prefix space goes in after each marker, and stays
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


@given(name=NAMES, ids=st.lists(st.integers(0, 500), max_size=30), skip=st.booleans())
def test_streaming_any_ids_gives_the_decoded_text(name, ids, skip):
    parts, rest = stream(TOKENIZERS[name], ids, skip_special=skip)
    whole = TOKENIZERS[name].decode(ids, skip_special=skip)
    assert "".join(parts) + rest == whole
    if TOKENIZERS[name].byte_level:
        assert whole == TOKENIZERS[name].inner.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", ["\udcff\udcfe", None, 7])
def test_what_is_no_text_is_refused(text, unchecked):
    with pytest.raises(ValueError, match="`text` must be valid Unicode text, got"):
        TOKENIZERS["smollm"].encode(text)


def test_half_a_character_is_held_back():
    tokenizer = TOKENIZERS["smollm"]
    ids = [tokenizer.pieces.index(bytes([byte])) for byte in "🚲".encode()]
    assert stream(tokenizer, ids) == (["", "", "", "🚲"], "")
    assert stream(tokenizer, ids[:2]) == (["", ""], "\ufffd")


def test_a_stream_is_a_value():
    tokenizer = TOKENIZERS["smollm"]
    ids = [tokenizer.pieces.index(bytes([byte])) for byte in "é".encode()]
    half, _ = TextStream(tokenizer).push(ids[0])
    assert half.push(ids[1])[1] == half.push(ids[1])[1] == "é"


def test_sentencepiece_prefix_space_goes_only_at_the_start():
    tokenizer = TOKENIZERS["spm"]
    ids = tokenizer.encode("a b", add_bos=True)
    assert tokenizer.decode(ids, skip_special=True) == "a b"
    going_on = TextStream(tokenizer, started=True)
    assert "".join([going_on.extend(ids[1:])[1]]) == " a b"


def test_token_bytes_cover_every_byte_and_hide_markers():
    for name in ("smollm", "spm"):
        pieces = TOKENIZERS[name].token_bytes()
        assert len(pieces) == TOKENIZERS[name].vocab
        assert {bytes([byte]) for byte in range(256)} <= set(pieces)
        assert all(pieces[i] == b"" for i in TOKENIZERS[name].special)
    assert len(set(byte_alphabet())) == 256


def test_beginning_of_text_comes_once():
    tokenizer = TOKENIZERS["llama-bpe"]
    assert tokenizer.encode("a")[0] == tokenizer.bos
    assert tokenizer.encode("<|im_start|>a") == tokenizer.encode("a")
    assert tokenizer.encode("a", add_bos=False) == tokenizer.encode("a")[1:]
    assert tokenizer.encode("") == [tokenizer.bos]


@pytest.mark.parametrize("token", [-1, 10_000])
def test_an_id_outside_the_vocabulary_is_a_value_error(token):
    with pytest.raises(ValueError, match=rf"`token` must be in 0\.\.\d+, got {token}"):
        TOKENIZERS["smollm"].decode([token])
