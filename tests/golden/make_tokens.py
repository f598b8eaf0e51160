"""Make the golden token ids: small vocabularies as GGUF files, and llama.cpp's ids for a range of texts.

Run it in an environment with llama-cpp-python, gguf and tokenizers:

    python tests/golden/make_tokens.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

It writes `tests/golden/tokens/PRE.gguf` for each pre-tokenizer (one small BPE vocabulary, trained here on `TEXTS`;
`spm.gguf` in SentencePiece's way), and `tests/golden/tokens.json` with llama.cpp's ids for each, and for the default
model's own vocabulary under "default model".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
from llama_cpp import Llama
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

OUT = Path(__file__).parent / "tokens"
TEXTS = [
    "", " ", "\n", "a", "Hello, world!", "  two  spaces   three", "tabs\t\tand\nnew\n\n\nlines\r\n  ",
    "Total:   1", "Total:   1234567 and 3.14159, 1,000,000", "x = [1, 22, 333, 4444]", "in 2024, 12:30:59.001",
    "I'm you're HE'S they'll don't I'D we've", "def f(x):\n    return x ** 2  # square\n\n\n",
    "if (a<=b && c!=d) { e++; }", "https://example.org/a?b=c&d=%20#frag",
    "snake_case camelCase SCREAMING_CASE kebab-case", "$100 + €50 = ~£130^2 | <tag/>",
    "Straße naïve café Ünïcödé Ωmega", "日本語のテキスト 中文字符 한국어 문장",
    "Привет, мир! שלום עולם مرحبا بالعالم", "emoji 🙂🚲👩‍👩‍👧 ✓", "½ ² ³ Ⅷ ١٢٣ ४५",
    "\u00a0non-breaking\u2003em space\u3000", "e\u0301 combining \u200b zero", "\x00\x01\x7f control",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>b <|im_end|> c", "<|im_end|",
    "ends with space ", "ThE QuIcK bRoWn FoX jumps over the lazy dog " * 3, "!!!???...---===", " lead",
    "\n\n  indented\n", "1", "12 3", "a</s>b </s> c<s>d",
]  # fmt: skip
MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ODD = ("\x00", "<|im_")  # llama.cpp ends a token at NUL, and takes these names for markers in any vocabulary
PRES = ("smollm", "gpt-2", "llama-bpe", "qwen2", "default")


def writer(name: str) -> gguf.GGUFWriter:
    """A GGUF with a vocabulary and no tensors."""
    OUT.mkdir(exist_ok=True)
    out = gguf.GGUFWriter(OUT / f"{name}.gguf", "llama")
    for add in (out.add_block_count, out.add_context_length, out.add_embedding_length, out.add_head_count):
        add(1)
    out.add_feed_forward_length(1)
    out.add_layer_norm_rms_eps(1e-5)
    return out


def finish(out: gguf.GGUFWriter) -> None:
    """Write and close."""
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def byte_level() -> None:
    """One vocabulary, written once for each pre-tokenizer."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=520, special_tokens=MARKERS, initial_alphabet=alphabet)
    )
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    for pre in PRES:
        out = writer(pre)
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre(pre)
        out.add_token_list(tokens)
        out.add_token_types([3 if token in MARKERS else 1 for token in tokens])
        out.add_token_merges([" ".join(pair) for pair in model["merges"]])
        out.add_bos_token_id(1)
        out.add_eos_token_id(2)
        finish(out)


def sentencepiece() -> None:
    """A BPE vocabulary with scores, byte tokens and the space prefix."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    texts = [text for text in TEXTS if not any(odd in text for odd in ODD)]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=620, special_tokens=specials + pieces))
    vocab = json.loads(trained.to_str())["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    out = writer("spm")
    out.add_tokenizer_model("llama")
    out.add_token_list(tokens)
    out.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)])
    out.add_token_types(types)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    finish(out)


def ids(path: Path) -> list[list[int]]:
    """What llama.cpp makes of each text."""
    tokenizer = Llama(str(path), vocab_only=True, verbose=False)
    return [tokenizer.tokenize(text.encode(), add_bos=False, special=True) if text else [] for text in TEXTS]


if __name__ == "__main__":
    byte_level()
    sentencepiece()
    made = {name: ids(OUT / f"{name}.gguf") for name in (*PRES, "spm")}
    made["spm"] = [None if any(odd in t for odd in ODD) else row for t, row in zip(TEXTS, made["spm"], strict=True)]
    made["default model"] = ids(Path(sys.argv[1]))
    golden = {"made_by": "tests/golden/make_tokens.py", "texts": TEXTS, "ids": made}
    target = Path(__file__).parent / "tokens.json"
    target.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
