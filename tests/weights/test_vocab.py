"""Token ids against llama.cpp's; golden ids by tests/golden/make_tokens.py."""

import contextlib
import json
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvjax.weights.gguf_file import read_gguf
from kvjax.weights.vocab import PRE_TOKENIZERS, from_folder, from_gguf

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokens.json").read_text(encoding="utf-8"))
DECOMPOSED = "e\u0301"  # Qwen2's own tokenizer composes it first (NFC), llama.cpp does not: ours follows the model's


@pytest.fixture(scope="module")
def tokenizers(golden):
    return {path.stem: from_gguf(read_gguf(path)) for path in (golden / "tokens").glob("*.gguf")}


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "spm"])
def test_ids_are_those_of_llama_cpp(name, tokenizers):
    for text, ids in zip(GOLDEN["texts"], GOLDEN["ids"][name], strict=True):
        if ids is None or (name == "qwen2" and text.startswith(DECOMPOSED)):
            continue
        assert tokenizers[name].encode(text, add_bos=False) == ids, text


@pytest.mark.real
def test_ids_of_the_default_model_are_those_of_llama_cpp(smollm2):
    for text, ids in zip(GOLDEN["texts"], GOLDEN["ids"]["default model"], strict=True):
        assert smollm2[2].encode(text) == ids, text


def test_smollm_splits_digits_before_anything_else(tokenizers):
    """A reader that misses it joins the spaces with the digit, or digits with one another."""
    pieces = [tokenizers["smollm"].pieces[i] for i in tokenizers["smollm"].encode("Total:   12")]
    assert pieces[-2:] == [b"1", b"2"]
    assert b" 1" not in pieces


def test_special_ids_and_ends(tokenizers):
    tokenizer = tokenizers["smollm"]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop_ids, tokenizer.add_bos) == (1, 2, (0, 2), False)
    assert tokenizers["llama-bpe"].add_bos and tokenizers["spm"].add_bos


def vocabulary(path, **changes):
    out = gguf.GGUFWriter(path, "llama")
    settings = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "types": [1, 1, 1]}
    settings |= {"merges": ["a b"], "eos": 0} | changes
    out.add_tokenizer_model(settings["model"])
    out.add_tokenizer_pre(settings["pre"])
    out.add_token_list(settings["tokens"])
    out.add_token_types(settings["types"])
    out.add_token_merges(settings["merges"])
    out.add_eos_token_id(settings["eos"])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return read_gguf(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "klingon"}, "pre-tokenizer 'klingon' is not known; known are smollm"),
        ({"model": "bert"}, "tokenizer 'bert' is not supported"),
        ({"model": "llama"}, "one score a token"),
        ({"merges": ["a z"]}, "the vocabulary is corrupt"),
        ({"merges": ["ab"]}, "the vocabulary is corrupt"),
        ({"types": [1, 1]}, "lists of one length"),
        ({"eos": 3}, r"eos_token_id` must be in 0\.\.2, got 3"),
    ],
)
def test_a_bad_vocabulary_is_a_value_error(changes, message, tmp_path):
    assert from_gguf(vocabulary(tmp_path / "good.gguf")).encode("ab") == [2]
    with pytest.raises(ValueError, match=message):
        from_gguf(vocabulary(tmp_path / "bad.gguf", **changes))


@pytest.mark.parametrize("name", ["llama-bpe", "spm"])
def test_tokenizer_json_gives_the_same(name, tokenizers, tmp_path):
    made = tokenizers[name]
    (tmp_path / "tokenizer.json").write_text(made.inner.to_str(), encoding="utf-8")
    names = {"bos_token": made.inner.id_to_token(1), "eos_token": {"content": made.inner.id_to_token(2)}}
    settings = names | {"add_bos_token": True, "chat_template": [{"name": "default", "template": "hi"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    read = from_folder(tmp_path)
    assert (read.bos, read.eos, read.add_bos, read.byte_level) == (1, 2, True, made.byte_level)
    assert set(read.stop_ids) == {*made.stop_ids, 5}
    assert (read.special, read.strip_space, read.template) == (made.special, made.strip_space, "hi")
    for text in GOLDEN["texts"]:
        assert read.encode(text) == made.encode(text)
        assert read.decode(read.encode(text)) == made.decode(made.encode(text))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["smollm", "spm"]), at=st.integers(0, 13_000), value=st.integers(0, 255))
def test_a_changed_byte_is_a_vocabulary_or_a_value_error(name, at, value, golden, tmp_path):
    content = bytearray((golden / "tokens" / f"{name}.gguf").read_bytes())
    content[at % len(content)] = value
    (tmp_path / "bad.gguf").write_bytes(content)
    with contextlib.suppress(ValueError):
        tokenizer = from_gguf(read_gguf(tmp_path / "bad.gguf"))
        assert tokenizer is None or len(tokenizer.token_bytes()) >= tokenizer.vocab


def test_a_corrupt_tokenizer_json_names_the_file(tmp_path):
    assert from_folder(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        from_folder(tmp_path)
