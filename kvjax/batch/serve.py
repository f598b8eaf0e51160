"""Replay requests against slots: results come as they are done."""

from __future__ import annotations

import time
from collections.abc import Generator, Hashable, Iterable
from dataclasses import dataclass, replace

from kvjax.batch.request import Request, Result
from kvjax.batch.serving import Serving
from kvjax.batch.turns import cancel, submit, turn
from kvjax.decode.generation import check_number
from kvjax.model import Params, Transformer


@dataclass(frozen=True)
class Cancel:
    """Among requests: let the one of this name go, `arrival` seconds after the start."""

    name: Hashable
    arrival: float | int = 0

    def __post_init__(self):
        check_number("Cancel", "arrival", self.arrival)


def serve(
    model: Transformer,
    params: Params,
    serving: Serving,
    requests: Iterable[Request | Cancel],
    *,
    pace: float | int | None = None,
) -> Generator[Result, None, Serving]:
    """Serve requests, and yield the result of each as soon as it is done; the return value serves more.

    A request that no slot could serve, or with settings that are wrong, is refused alone, in its result. Each other one
    gets the tokens that `generate` gives it alone, up to rounding in the logits, whatever comes beside it.

    Args:
        serving: what `batch.open` makes, or an earlier `serve` returned; its arrays are donated. It is lost if this
            is left before its end: to stop early, send a `Cancel` for each request.
        requests: any iterable, in order of arrival; it is read as far as needed. `Cancel`s may stand among them.
        pace: how much faster than by their `arrival` requests come: 1 is as it says. None takes no notice of it: the
            next comes when there are fewer waiting than slots.
    Raises:
        ValueError: for a `pace` that is not above 0.
    """
    if pace is not None:
        check_number("serve", "pace", pace, above=0)
    source, started, slots = iter(requests), time.perf_counter(), len(serving.seated)
    ahead = next(source, None)
    while True:
        while ahead is not None and _due(ahead, serving, time.perf_counter() - started, pace, slots):
            serving, results = _take(model, serving, ahead, time.perf_counter() - started)
            yield from results
            ahead = next(source, None)
        if not serving.idle:
            serving, results = turn(model, params, serving, time.perf_counter() - started)
            yield from (_left(result, time.perf_counter() - started) for result in results)
        elif ahead is None:
            return serving
        elif pace is not None:
            time.sleep(max(0.0, ahead.arrival / pace - (time.perf_counter() - started)))


def _due(ahead, serving: Serving, now: float, pace: float | None, slots: int) -> bool:
    if isinstance(ahead, Cancel) and pace is None:
        return True
    if pace is None or not isinstance(ahead, Request | Cancel):
        return len(serving.waiting) < slots
    return ahead.arrival / pace <= now


def _take(model: Transformer, serving: Serving, ahead, now: float) -> tuple[Serving, list[Result]]:
    if isinstance(ahead, Cancel):
        return cancel(serving, ahead.name, now)
    if isinstance(ahead, Request):
        return submit(model, serving, ahead, now)
    why = f"serve: `requests` must be Requests or Cancels, got {type(ahead).__name__}"
    return serving, [Result(None, [], [], "refused", why, arrived=now, done=now)]


def _left(result: Result, now: float) -> Result:
    """A turn's results are done at its end."""
    return replace(result, done=now, first=now if result.first == result.done else result.first)
