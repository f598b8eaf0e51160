"""Stop strings inside the compiled loop: an automaton over bytes, run a token at a time.

Source: Aho & Corasick 1975, "Efficient string matching".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from kvjax.decode.widths import power_of_two
from kvjax.pytree import pytree

MOST = 32
"""Distinct stop strings in one batch: a bit each."""

MOST_BYTES = 1 << 28
"""Of the tables of one batch, which have two numbers for each letter of the strings and each token."""


@pytree
class Automaton:
    """Where each token leads from each state, and which strings it completes on the way (a bit each)."""

    next: Int[Array, "states vocab"]
    hits: UInt32[Array, "states vocab"]


def compile_stops(
    rows: Sequence[Sequence[str]], vocab: int, tokenizer
) -> tuple[UInt32[np.ndarray, "batch"], Automaton]:
    """One automaton for every stop string of a batch, and which of them each row heeds.

    A string may begin and end inside tokens. Without any the tables are empty, and cost nothing.
    """
    texts = _distinct(rows)
    if not texts:
        empty = Automaton(jnp.zeros((0, 0), jnp.int32), jnp.zeros((0, 0), jnp.uint32))
        return np.zeros(len(rows), np.uint32), empty
    if tokenizer is None:
        raise ValueError("Sampling: `stop_strings` need the call's `tokenizer`, to know each token's text")
    if why := too_many(rows, vocab):
        raise ValueError(f"Sampling: {why}")
    heeded = np.array([sum(1 << texts.index(text) for text in set(row)) for row in rows], np.uint32)
    goto, ends = _byte_automaton([text.encode() for text in texts])
    return heeded, _over_tokens(goto, ends, tokenizer.token_bytes(), vocab)


def too_many(rows: Sequence[Sequence[str]], vocab: int) -> str | None:
    """Why the stop strings of a batch cannot be heeded together, if so."""
    texts = _distinct(rows)
    if len(texts) > MOST:
        return f"a batch may have at most {MOST} distinct stop strings, got {len(texts)}"
    begun: dict[tuple[int, int], int] = {}
    for text in texts:
        state = 0
        for byte in text.encode():
            state = begun.setdefault((state, byte), len(begun) + 1)
    if (size := power_of_two(len(begun) + 1) * vocab * 8) > MOST_BYTES:
        return (
            f"the tables of the batch's stop strings would take {size >> 20} MiB, more than {MOST_BYTES >> 20}: use "
            "fewer or shorter ones"
        )
    return None


def _distinct(rows: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(text for row in rows for text in row))


def _byte_automaton(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """`goto[state, byte]`, and the strings that end in each state. The number of states is a power of two."""
    children: list[dict[int, int]] = [{}]
    own = [0]
    for bit, text in enumerate(texts):
        state = 0
        for byte in text:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                own.append(0)
            state = children[state][byte]
        own[state] |= 1 << bit
    states = power_of_two(len(children))
    goto, ends = np.zeros((states, 256), np.int32), np.zeros(states, np.uint32)
    fallback, queue = [0] * len(children), deque([0])
    while queue:
        state = queue.popleft()
        ends[state] = own[state] | int(ends[fallback[state]])
        goto[state] = goto[fallback[state]] if state else 0
        for byte, child in children[state].items():
            fallback[child] = int(goto[state, byte])
            goto[state, byte] = child
            queue.append(child)
    return goto, ends


def _over_tokens(goto: np.ndarray, ends: np.ndarray, tokens: Sequence[bytes], vocab: int) -> Automaton:
    tokens = tokens[:vocab]  # a tokenizer may know more than the model
    lengths = np.zeros(vocab, np.int64)
    lengths[: len(tokens)] = [len(token) for token in tokens]
    table = np.zeros((vocab, max(int(lengths.max()), 1)), np.uint8)
    for row, token in zip(table, tokens, strict=False):
        row[: len(token)] = np.frombuffer(token, np.uint8)
    state = np.repeat(np.arange(len(goto), dtype=np.int32)[:, None], vocab, axis=1)
    hits = np.zeros(state.shape, np.uint32)
    for at in range(table.shape[1]):
        long = np.flatnonzero(lengths > at)
        state[:, long] = goto[state[:, long], table[long, at][None]]
        hits[:, long] |= ends[state[:, long]]
    return Automaton(jnp.asarray(state), jnp.asarray(hits))
