"""Pass-key prompts: five digits hidden in ordinary text, and asked for at its end.

Source: Mohtashami & Jaggi 2023 (arXiv:2305.16300), with text in place of its one repeated filler.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.text import help_pages

HEAD = "There is an important pass key hidden in the text below. Find it and memorize it.\n\n"
QUESTION = "\n\nWhat is the pass key?"
START = " The pass key is "
DIGITS = 5


@dataclass(frozen=True)
class PassKey:
    """Token ids: a context that holds the key, the question, the start of an answer, and the key's digits."""

    context: list[int]
    question: list[int]
    start: list[int]
    answer: list[int]


def text(tokenizer) -> list[int]:
    """Python's own help pages as prose, without their markup: ordinary text that every machine has."""
    return tokenizer.encode(re.sub(r"[ \t]+", " ", re.sub(r"\*\*.*?\*\*|[*`\"=+|^-]{2,}", " ", help_pages())))


def pass_key(tokenizer, filler: Sequence[int], length: int, depth: float, seed: int) -> PassKey:
    """A context of exactly `length` tokens whose key stands at `depth` of it, 0 to 1.

    Raises:
        ValueError: if the key and its frame do not fit into `length`.
    """
    rng = np.random.default_rng(seed)
    key = "".join(str(digit) for digit in rng.integers(0, 10, DIGITS))
    head = tokenizer.encode(HEAD)
    needle = tokenizer.encode(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
    room = length - len(head) - len(needle)
    if room < 1:
        raise ValueError(f"pass_key: `length` must be over {length - room} tokens, got {length}")
    at = int(rng.integers(0, len(filler) - room))
    hay, cut = list(filler[at : at + room]), round(depth * room)
    question, start, answer = (tokenizer.encode(part) for part in (QUESTION, START, key))
    return PassKey(head + hay[:cut] + needle + hay[cut:], question, start, answer)
