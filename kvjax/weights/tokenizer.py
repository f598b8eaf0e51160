"""Text to token ids and back, chat templates, and the bytes of every token."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from kvjax.weights.chat import render


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what a model needs to know about its vocabulary.

    Args:
        inner: the tokenizer itself.
        byte_level: ordinary tokens are spelt in GPT-2's byte alphabet; else in SentencePiece's way (`▁` for a space,
            `<0x0A>` for a byte).
        special: ids that are markers and no text.
        added: ids outside the byte alphabet, whose spelling is their text; the special ones are among them.
        bos: the beginning-of-text id, or None.
        eos: the end-of-text id, or None.
        stop_ids: ids after which a continuation ends: end of text, end of turn.
        add_bos: `encode` starts with `bos` unless told otherwise.
        strip_space: a text's first token has a space that is not part of the text (SentencePiece's prefix).
        template: the chat template in Jinja, or None.
    """

    inner: Any = field(repr=False)
    byte_level: bool
    special: frozenset[int] = field(repr=False)
    added: frozenset[int] = field(repr=False)
    bos: int | None
    eos: int | None
    stop_ids: tuple[int, ...]
    add_bos: bool = False
    strip_space: bool = False
    template: str | None = field(default=None, repr=False)

    @property
    def vocab(self) -> int:
        """The number of ids; the model's own vocabulary may be padded beyond it."""
        return self.inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids of `text`; special tokens spelt out in it become their ids.

        Args:
            text: any text, also empty.
            add_bos: start with `bos`; None asks the model's own habit. A text that already begins with it (as some
                chat templates do) gets no second one.
        Raises:
            ValueError: for text that is no Unicode (as a command line's stray bytes), or a missing `bos`.
        """
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise ValueError(f"Tokenizer.encode: `text` must be valid Unicode text, got {text!r:.60}") from error
        ids = self.inner.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos is None:
            raise ValueError("Tokenizer.encode: `add_bos` is set, but the vocabulary has no beginning-of-text token")
        wanted = self.add_bos if add_bos is None else add_bos
        return [self.bos, *ids] if wanted and self.bos is not None and ids[:1] != [self.bos] else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. Same text as `TextStream` gives.

        Raises:
            ValueError: naming an id outside the vocabulary.
        """
        stream, text = TextStream(self, skip_special).extend(ids)
        return text + stream.flush()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **settings: Any,
    ) -> str:
        """The text of a conversation as the model was trained on it.

        Args:
            messages: `{"role": …, "content": …}` each.
            add_generation_prompt: end with the opening of the assistant's turn.
            settings: further names the template may read.
        Raises:
            ValueError: if the model has no chat template, or the template refuses the messages.
        """
        if self.template is None:
            raise ValueError("Tokenizer.chat: this model has no chat template; give it plain text")
        names = {"bos_token": self._spelling(self.bos), "eos_token": self._spelling(self.eos)} | settings
        return render(self.template, messages, add_generation_prompt=add_generation_prompt, **names)

    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for, in order of id; `b""` for special tokens and for gaps in the ids."""
        return [b"" if i in self.special else piece for i, piece in enumerate(self.pieces)]

    @cached_property
    def pieces(self) -> list[bytes]:
        """As `token_bytes`, with special tokens spelt out. Made at first use, in 30 ms for 49,152 tokens."""
        pieces = [b""] * (max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1)
        unit = {char: bytes([byte]) for byte, char in enumerate(byte_alphabet())}
        for token, i in self.inner.get_vocab(with_added_tokens=True).items():
            if i in self.added:
                pieces[i] = token.encode()
            elif self.byte_level:
                pieces[i] = b"".join([unit.get(char) or char.encode() for char in token])
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                pieces[i] = bytes.fromhex(token[3:5])
            else:
                pieces[i] = token.replace("▁", " ").encode()
        return pieces

    def _spelling(self, i: int | None) -> str:
        return "" if i is None else self.inner.id_to_token(i)


@dataclass(frozen=True)
class TextStream:
    """Decodes tokens as they come: push a token, get a new stream and the text that is now certain.

    A character whose bytes are spread over tokens is held back until it is whole. Pushing costs what the new
    token costs, however long the text is.

    Args:
        tokenizer: whose tokens come.
        skip_special: leave special tokens out of the text.
        pending: bytes of a character that is not whole yet, at most three.
        started: some text or special token went before, so a leading space is text. Start with True to go on after
            a prompt.
    """

    tokenizer: Tokenizer
    skip_special: bool = False
    pending: bytes = b""
    started: bool = False

    def push(self, token: int) -> tuple[TextStream, str]:
        """The stream after one more token, and the text it brought (often none).

        Raises:
            ValueError: if `token` is outside the vocabulary.
        """
        pieces = self.tokenizer.pieces
        if not 0 <= token < len(pieces):
            raise ValueError(
                f"TextStream: `token` must be in 0..{len(pieces) - 1}, got {token}: where the model has more ids than "
                "its tokenizer, give those to `Sampling(banned=…)`"
            )
        piece, special = pieces[token], token in self.tokenizer.special
        if special and self.skip_special:
            piece = b""
        if self.tokenizer.strip_space and not self.started and token not in self.tokenizer.added:
            piece = piece.removeprefix(b" ")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(self.pending + piece)
        started = self.started or not special
        return replace(self, pending=decoder.getstate()[0], started=started), text

    def extend(self, tokens: Sequence[int]) -> tuple[TextStream, str]:
        """`push` for several tokens."""
        stream, parts = self, []
        for token in tokens:
            stream, text = stream.push(int(token))
            parts.append(text)
        return stream, "".join(parts)

    def flush(self) -> str:
        """What is held back, at the end: U+FFFD for a character that never became whole, or nothing."""
        return self.pending.decode("utf-8", "replace")


def byte_alphabet() -> str:
    """GPT-2's 256 printable characters, one for each byte in order.

    Source: `bytes_to_unicode` of https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = iter(range(256, 512))
    return "".join(chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256))
