"""One answer: tokens from `kvjax.stream` to text on the screen, with the times that matter."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from kvjax.decode import REASONS, Output, Step
from kvjax.decode.state import RUNNING
from kvjax.terminal.stops import Cut
from kvjax.weights import TextStream, Tokenizer


@dataclass(frozen=True)
class Answer:
    """What was said, and what it took.

    Args:
        text: without stop texts and special tokens.
        tokens: every token chosen.
        reason: why it ended: one of `kvjax.decode.REASONS`, or "interrupted".
        first_s: seconds to the first token, the prompt's prefill and any compilation included.
        rest_s: seconds from the first token to the last.
        output: what the decoder returned; None if it was interrupted, and then the cache is lost.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    first_s: float
    rest_s: float
    output: Output | None

    @property
    def ms_per_token(self) -> float | None:
        return self.rest_s / (len(self.tokens) - 1) * 1e3 if len(self.tokens) > 1 else None


def speak(
    steps: Generator[Step, None, Output],
    tokenizer: Tokenizer,
    stops: tuple[str, ...],
    write: Callable[[str], object],
    *,
    started: bool,
    interrupted: Callable[[], bool] = lambda: False,
) -> Answer:
    """Write an answer's text as its tokens come, whole characters only; the batch has one row.

    Args:
        started: the answer goes on in the middle of a text, so a leading space is part of it.
        interrupted: asked after each token; True ends the answer there.
    """
    text, cut, shown = TextStream(tokenizer, skip_special=True, started=started), Cut(stops), []
    tokens: list[int] = []
    begun = first = last = time.perf_counter()

    def show(piece: str) -> None:
        if piece:
            shown.append(piece)
            write(piece)

    output, reason = None, "interrupted"
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            output = end.value
            reason = REASONS[int(output.reason[0])]
            break
        last = time.perf_counter()
        first = first if tokens else last
        tokens.append(int(step.tokens[0]))
        text, piece = text.push(tokens[-1])
        cut, piece = cut.push(piece)
        show(piece)
        if interrupted() and step.reason[0] == RUNNING:
            steps.close()
            break
    cut, piece = cut.push(text.flush())
    show(piece + cut.held)
    return Answer("".join(shown), tuple(tokens), reason, first - begun, last - first, output)
