"""A grammar: which token may follow which text, as a table small enough for the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from kvjax.grammar.automaton import Accepts, Next, numbered, over_bytes, steps_to_end, trimmed

MOST_BYTES = 1 << 28
"""Of a grammar's table, and of all the tables of a batch together."""


@runtime_checkable
class Vocabulary(Protocol):
    """What a grammar asks of a tokenizer."""

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id; none for what is no text."""
        ...


@dataclass(frozen=True)
class Grammar:
    """An automaton over tokens, whose start is state 0. Tokens that every state treats alike share a class.

    Two are equal if they accept the same texts of the same vocabulary in the same tokens.

    Args:
        source: what it was made of, for people.
        digest: of the tables.
        vocabulary: digest of the bytes of every token.
        classes: the class of each token id.
        next: the state that a class leads to, or -1 where it may not follow.
        accepts: the text may end here.
    """

    source: str = field(compare=False)
    digest: bytes = field(repr=False)
    vocabulary: bytes = field(repr=False)
    classes: Int[np.ndarray, "vocab"] = field(repr=False, compare=False)
    next: Int[np.ndarray, "states classes"] = field(repr=False, compare=False)
    accepts: Bool[np.ndarray, "states"] = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its tables, before they are padded for the device."""
        return self.classes.nbytes + self.next.nbytes + self.accepts.nbytes

    @cached_property
    def least(self) -> Int[np.ndarray, "states"]:
        """The fewest tokens from each state to one where the text may end."""
        return steps_to_end(self.next, self.accepts)

    def state(self, tokens: Iterable[int]) -> int:
        """The state after these tokens.

        Raises:
            ValueError: naming the first that may not follow.
        """
        state = 0
        for at, token in enumerate(tokens):
            to = self.next[state, self.classes[token]] if 0 <= token < len(self.classes) else -1
            if to < 0:
                raise ValueError(f"Grammar: token {token} at index {at} may not follow in {self.source!r:.80}")
            state = int(to)
        return state

    def after(self, tokens: Iterable[int]) -> Grammar:
        """What may follow these tokens, to go on from them in another call.

        Raises:
            ValueError: if the tokens leave the grammar, or nothing can follow them.
        """
        return _made(self.source, self.vocabulary, self.classes, self.next, self.accepts, self.state(tokens))

    def without(self, ids: Iterable[int]) -> Grammar:
        """The same without these tokens.

        Raises:
            ValueError: if what is left cannot spell a text of the grammar.
        """
        out = [i for i in ids if 0 <= i < len(self.classes) and (self.next[:, self.classes[i]] >= 0).any()]
        if not out:
            return self
        classes = self.classes.copy()
        classes[out] = self.next.shape[1]
        none = np.full((len(self.next), 1), -1, np.int32)
        return _made(self.source, self.vocabulary, classes, np.concatenate([self.next, none], axis=1), self.accepts)


def regex(pattern: str, tokenizer: Vocabulary) -> Grammar:
    r"""Texts that a regular expression matches from end to end, in any tokens that spell them.

    Args:
        pattern: in the syntax of Rust's `regex` crate, so without look-around and references to groups. It is matched
            with the whole text: anchors are needless, and refused inside. U+0000 never matches.
        tokenizer: of the model that will write, as `kvjax.load` gives it. Special tokens spell nothing.
    Raises:
        ImportError: without `outlines-core`, the extra `grammar`.
        ValueError: for an invalid pattern, one that matches no text or only the empty one, one that the vocabulary
            cannot spell, or one whose table would be larger than `MOST_BYTES`.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"regex: `pattern` must be a text, got {pattern!r:.80}")
    return over_tokens(pattern, *over_bytes(pattern), vocabulary_of(tokenizer, "regex"))


def vocabulary_of(tokenizer: Vocabulary, where: str) -> list[bytes]:
    """The bytes of every token.

    Raises:
        ValueError: for what is no tokenizer of kvjax.
    """
    if not hasattr(tokenizer, "token_bytes"):
        raise ValueError(f"{where}: `tokenizer` must be as kvjax.load gives it, got {type(tokenizer).__name__}")
    return tokenizer.token_bytes()


def digest_of(pieces: Sequence[bytes]) -> bytes:
    """What tells vocabularies apart."""
    sizes = np.array([len(piece) for piece in pieces], np.int64)
    return hashlib.sha256(sizes.tobytes() + b"".join(pieces)).digest()


def over_tokens(source: str, table: Next, accepts: Accepts, pieces: Sequence[bytes]) -> Grammar:
    """The grammar of an automaton over bytes.

    Tokens are walked in alphabetical order, so that a beginning that many share is walked once, from all states at a
    time; and bytes that the automaton treats alike are one letter of that alphabet.
    """
    letters, distinct = numbered(table.T)
    moves = np.full((len(distinct), len(table) + 1), len(table), np.int32)  # the last state is none
    moves[:, :-1] = np.where(table[:, distinct].T >= 0, table[:, distinct].T, len(table))
    alphabet = letters.astype(np.uint8).tobytes()
    words: dict[bytes, list[int]] = {}
    for i, piece in enumerate(pieces):
        words.setdefault(piece.translate(alphabet), []).append(i)
    classes = np.zeros(len(pieces), np.int32)  # class 0: of tokens that may never follow
    none = np.full(len(table), len(table), np.int32)
    number, columns = {none.tobytes(): 0}, [none]
    walked, before = [np.arange(len(table), dtype=np.int32)], b""
    for word in sorted(filter(None, words)):
        shared = 0
        while shared < min(len(word), len(before)) and word[shared] == before[shared]:
            shared += 1
        del walked[shared + 1 :]
        for letter in word[len(walked) - 1 :]:
            walked.append(moves[letter][walked[-1]])
        before, column = word, walked[-1]
        key = column.tobytes()
        if key not in number:
            number[key] = len(columns)
            columns.append(column)
            _check_size(source, 4 * len(columns) * len(table))
        classes[words[word]] = number[key]
    columns = np.stack(columns, axis=1)
    return _made(source, digest_of(pieces), classes, np.where(columns == len(table), -1, columns), accepts)


def _made(source: str, vocabulary: bytes, classes, table: Next, accepts: Accepts, start: int = 0) -> Grammar:
    """The smallest tables of the language from `start` on: classes and states in one order, whatever they came from."""
    used, classes = np.unique(classes, return_inverse=True)
    table, accepts = trimmed(np.ascontiguousarray(table[:, used]), accepts, start)
    if not len(table):
        raise ValueError(f"Grammar: the vocabulary cannot spell any text of {source!r:.80}")
    if not (table[0] >= 0).any():
        raise ValueError(f"Grammar: nothing but the empty text is left of {source!r:.80}")
    kinds = numbered(table.T)[0][classes]
    kinds, firsts = numbered(kinds[:, None])
    table, accepts = trimmed(np.ascontiguousarray(table[:, classes[firsts]]), accepts)
    _check_size(source, table.nbytes)
    parts = (np.array([*table.shape, len(kinds)], np.int64), kinds, table, accepts)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts) + vocabulary).digest()
    return Grammar(source, digest, vocabulary, kinds, table, accepts)


def _check_size(source: str, size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(
            f"Grammar: the table of {source!r:.80} would be larger than {MOST_BYTES >> 20} MiB: make it simpler, such "
            "as by smaller counts of repetition"
        )
