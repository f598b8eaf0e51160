"""What is measured, and the two things an engine does about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parents[2]
"""The folder that holds the package `experiments`."""


@dataclass(frozen=True)
class Work:
    """One job: prompts of equal length, and how many tokens are decoded after them.

    Args:
        name: `decode-BATCH-CONTEXT` or `prefill-CONTEXT`.
        prompts: token ids, a list a row.
        new: tokens decoded a row after the first one; 0 for a prefill.
    """

    name: str
    prompts: list[list[int]]
    new: int

    @property
    def context(self) -> int:
        return len(self.prompts[0])

    @property
    def batch(self) -> int:
        return len(self.prompts)

    @property
    def counted(self) -> int:
        """The tokens that count: those decoded, or those taken in."""
        return self.batch * (self.new or self.context)


@dataclass(frozen=True)
class Timing:
    """Seconds for a work's counted tokens, the tokens of the first row, and the settings used."""

    seconds: float
    tokens: list[int]
    settings: str = ""


class Engine(Protocol):
    """An engine takes its options when made, and then measures."""

    def measure(self, work: Work) -> Timing:
        """Do the work once. For a decode the clock runs from each row's first new token to its last."""
        ...


def shape(name: str) -> tuple[int, int, int]:
    """Batch, context and whether tokens are decoded, from a work's name.

    Raises:
        ValueError: for a name that is none.
    """
    kind, *sizes = name.split("-")
    if not all(size.isdigit() and int(size) > 0 for size in sizes) or (kind, len(sizes)) not in {
        ("decode", 2),
        ("prefill", 1),
    }:
        raise ValueError(f"works: expected decode-BATCH-CONTEXT or prefill-CONTEXT, got {name!r}")
    numbers = [int(size) for size in sizes]
    return (numbers[0], numbers[1], 1) if kind == "decode" else (1, numbers[0], 0)


Options = dict[str, Any]
"""What an engine is made from: `model`, `threads` and its own settings; JSON values."""
