"""Build a `Tokenizer` from a GGUF's own vocabulary, or from `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.weights.gguf_file import GGUF
from kvjax.weights.safetensors_file import read_json
from kvjax.weights.tokenizer import Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""By `tokenizer.ggml.pre`: each expression splits the pieces of the one before, as in llama.cpp's `llama-vocab.cpp`."""

_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2", "deepseek-r1-qwen": "qwen2"}
_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6
_ENDS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>", "</s>",
    "<eos>",
)  # fmt: skip


def from_gguf(file: GGUF) -> Tokenizer | None:
    """The tokenizer of a GGUF, or None if the file has no vocabulary.

    Raises:
        ValueError: if the vocabulary is of an unknown kind, or contradicts itself.
    """
    from tokenizers import AddedToken

    tokens = file.tokenizer("tokens")
    if tokens is None:
        return None
    kind, pre = file.tokenizer("model"), file.tokenizer("pre", "default")
    pre = _ALIASES.get(pre, pre)
    types = np.asarray(file.tokenizer("token_type", np.ones(len(tokens), np.int32)))
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens) or types.shape != (len(tokens),):
        raise ValueError("the vocabulary is corrupt: `tokens` and `token_type` must be lists of one length")
    if kind == "gpt2":
        inner = _byte_level(file, tokens, pre)
    elif kind == "llama":
        inner = _sentencepiece(file, tokens, types)
    else:
        raise ValueError(f"tokenizer {kind!r} is not supported; known are gpt2 and llama")
    special = frozenset(np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL))).tolist())
    user = np.flatnonzero(types == _USER).tolist()
    inner.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in sorted(special)])
    inner.add_tokens([AddedToken(tokens[i], normalized=False) for i in user])
    bos, eos, eot, eom = (_id(file, f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "eot", "eom"))
    return Tokenizer(
        inner=inner,
        byte_level=kind == "gpt2",
        special=special,
        added=special | frozenset(user),
        bos=bos,
        eos=eos,
        stop_ids=_stops((eos, eot, eom), inner, special),
        add_bos=bool(file.tokenizer("add_bos_token", kind == "llama" or pre == "llama-bpe")) and bos is not None,
        strip_space=kind == "llama" and bool(file.tokenizer("add_space_prefix", True)),
        template=file.metadata.get("tokenizer.chat_template"),
    )


def _byte_level(file: GGUF, tokens: list[str], pre: str) -> Any:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"pre-tokenizer {pre!r} is not known; known are {', '.join(PRE_TOKENIZERS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in file.tokenizer("merges", [])]
    try:
        model = models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"the vocabulary is corrupt: {error}") from error
    inner = Inner(model)
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, spell])
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(file: GGUF, tokens: list[str], types: np.ndarray) -> Any:
    """SentencePiece's BPE joins the pair with the best score: the same as merges ranked by score."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers

    scores = np.asarray(file.tokenizer("scores", ()), np.float32)
    if scores.shape != (len(tokens),):
        raise ValueError("the vocabulary is corrupt: a 'llama' tokenizer needs one score a token")
    ids = {t: i for i, t in enumerate(tokens)}
    plain = {t: i for t, i in ids.items() if types[i] not in (_UNKNOWN, _CONTROL, _BYTE)}
    pairs = [
        (-float(scores[i]), len(token), token[:cut], token[cut:])
        for token, i in plain.items()
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    unknown = next((tokens[i] for i in np.flatnonzero(types == _UNKNOWN)), None)
    inner = Inner(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if file.tokenizer("add_space_prefix", True) else []
    inner.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner


def _id(file: GGUF, name: str, size: int) -> int | None:
    value = file.tokenizer(name)
    if value is not None and not (isinstance(value, int) and 0 <= value < size):
        raise ValueError(f"`tokenizer.ggml.{name}` must be in 0..{size - 1}, got {value!r}")
    return value


def _stops(ids: Iterable[int | None], inner: Any, special: frozenset[int]) -> tuple[int, ...]:
    """The given ends, and special tokens that end a turn by their name (as llama.cpp has it)."""
    named = (inner.token_to_id(token) for token in _ENDS)
    return tuple(sorted({i for i in ids if i is not None} | {i for i in named if i in special}))


def from_folder(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, or None if it has no `tokenizer.json`.

    Raises:
        ValueError: naming the file, if one is corrupt or the tokenizer is of an unknown kind.
    """
    from tokenizers import Tokenizer as Inner

    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    raw = read_json(path)
    try:
        inner = Inner.from_str(json.dumps(raw))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{path}: not a tokenizer: {error}") from error
    inner.no_truncation()
    inner.no_padding()
    added = {entry["id"]: bool(entry.get("special")) for entry in raw.get("added_tokens") or ()}
    special = frozenset(i for i, marker in added.items() if marker)
    steps = _steps(raw.get("decoder"))
    if not steps.keys() & {"ByteLevel", "Metaspace", "ByteFallback", "Replace"}:
        raise ValueError(f"{path}: decoder {sorted(steps)} is not supported; known are byte-level and SentencePiece's")
    settings, generation, model = (
        read_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    bos = _named(settings.get("bos_token"), inner, model.get("bos_token_id"))
    eos = _named(settings.get("eos_token"), inner, model.get("eos_token_id"))
    ends = [eos, *_as_list(generation.get("eos_token_id")), *_as_list(model.get("eos_token_id"))]
    starts = bos is not None and inner.encode("", add_special_tokens=True).ids[:1] == [bos]
    return Tokenizer(
        inner=inner,
        byte_level="ByteLevel" in steps,
        special=special,
        added=frozenset(added),
        bos=bos,
        eos=eos,
        stop_ids=_stops(ends, inner, special),
        add_bos=starts or (bos is not None and settings.get("add_bos_token") is True),
        strip_space="Strip" in steps or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never",
        template=_template(folder, settings),
    )


def _steps(decoder: dict | None) -> dict[str, dict]:
    """The decoder's steps by type, a sequence laid flat."""
    if decoder is None:
        return {}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return {str(step["type"]): step for step in steps}


def _named(token: Any, inner: Any, otherwise: Any) -> int | None:
    """The id of a token that `tokenizer_config.json` gives as text or as an object; else the model's own."""
    text = token.get("content") if isinstance(token, dict) else token
    found = inner.token_to_id(text) if isinstance(text, str) else None
    return found if found is not None else next(iter(_as_list(otherwise)), None)


def _as_list(value: Any) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _template(folder: Path, settings: dict) -> str | None:
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    if isinstance(template, list):
        template = next(
            (row.get("template") for row in template if isinstance(row, dict) and row.get("name") == "default"), None
        )
    return template if isinstance(template, str) else None
