"""What is asked of `serve`, and what comes back."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from kvjax.decode.generation import check_number
from kvjax.decode.sampling import GREEDY, Sampling


@dataclass(frozen=True)
class Request:
    """One prompt.

    Args:
        name: what its result is called; no two of a `serve` may share one.
        tokens: the prompt's ids.
        max_new: new tokens, at most.
        sampling: its settings. A request that samples draws by `sampling.seed`, or else by how many came before it.
        priority: the higher goes first; every `patience` seconds of waiting count for one more.
        arrival: seconds after the start.
        speculate: whether guesses are checked for it, where there is a draft.
    """

    name: Hashable
    tokens: Sequence[int]
    max_new: int
    sampling: Sampling = GREEDY
    priority: float | int = 0
    arrival: float | int = 0
    speculate: bool = True

    def __post_init__(self):
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"Request: `sampling` must be a Sampling, got {self.sampling!r}")
        check_number("Request", "priority", self.priority)
        check_number("Request", "arrival", self.arrival)
        if not isinstance(self.speculate, bool):
            raise ValueError(f"Request: `speculate` must be True or False, got {self.speculate!r}")


@dataclass(frozen=True)
class Result:
    """What became of a request.

    Args:
        tokens, logprobs: the new ones, as in `Output`.
        reason: one of `REASONS`, "cancelled", or "refused", and then `error` says why.
        arrived, first, done: seconds: when `serve` read it, had its first token (None if it never did), and left.
        reused: tokens of its prompt that the prefix store had, the most of any time it was seated.
        parked: how often it gave up its row to another.
        proposed, accepted: guesses checked, and right.
    """

    name: Hashable
    tokens: list[int]
    logprobs: list[float]
    reason: str
    error: str | None = None
    arrived: float = 0.0
    first: float | None = None
    done: float = 0.0
    reused: int = 0
    parked: int = 0
    proposed: int = 0
    accepted: int = 0
