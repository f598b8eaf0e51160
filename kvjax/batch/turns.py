"""What moves a serving on: requests are seated by rank, prompts taken in by chunks, and rows decode until they end.

Sources: Yu et al. 2022, "Orca" (OSDI) for scheduling by iteration; Kwon et al. 2023 (arXiv:2309.06180), section 4.5,
for preemption when pages run out; Agrawal et al. 2023 (arXiv:2308.16369) for prompts in chunks between steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from kvjax.batch.pages import alone, remember, reused, roomy, soon
from kvjax.batch.parking import park, unpark
from kvjax.batch.request import Request, Result
from kvjax.batch.seating import admit, check, constrain, heed, retire
from kvjax.batch.serving import Serving, Ticket, with_seat
from kvjax.batch.slots import Made, watch
from kvjax.batch.steps import decode, feed, feed_width, time_rounds
from kvjax.decode.grammars import table_bytes
from kvjax.decode.sampling import checked
from kvjax.decode.state import REASONS, RUNNING
from kvjax.decode.stops import too_many
from kvjax.draft.costs import can_time, longest_timed
from kvjax.grammar.grammar import MOST_BYTES, Grammar
from kvjax.model import Params, Transformer


def submit(model: Transformer, serving: Serving, request: Request, time: float) -> tuple[Serving, list[Result]]:
    """Put a request among those that wait; or, if no slot could serve it, its result, which says why."""
    number, name = serving.count, request.name
    serving = replace(serving, count=number + 1)
    try:
        if name in serving.names:
            raise ValueError(f"submit: `name` must be new, but {name!r} is on its way already")
        if request.sampling.temperature > 0 and serving.key is None:
            raise ValueError("submit: a request with a temperature above 0 needs the call's `key`")
        if request.sampling.stop_strings and serving.settings.tokenizer is None:
            raise ValueError("submit: `stop_strings` need the settings' `tokenizer`")
        check(model, serving.slots, request.tokens, request.sampling, request.max_new, "submit")
        (sampling,) = checked(
            request.sampling,
            batch=1,
            vocab=model.config.vocab,
            max_new=request.max_new,
            key=serving.key,
            tokenizer=serving.settings.tokenizer,
        )
    except (ValueError, TypeError) as error:
        refused = Result(name, [], [], "refused", str(error), arrived=time, done=time)
        return serving, [refused]
    ticket = Ticket(replace(request, sampling=sampling), number, time)
    return replace(serving, waiting=(*serving.waiting, ticket), names=serving.names | {name}), []


def cancel(serving: Serving, name: Hashable, time: float) -> tuple[Serving, list[Result]]:
    """Let a request go, wherever it is; its result has what it had made. Nothing happens if there is none."""
    for row, ticket in enumerate(serving.seated):
        if ticket is not None and ticket.request.name == name:
            serving, made = _leave(serving, row, time)
            return _gone(serving, name), [_result(ticket, made, time, "cancelled")]
    for ticket in serving.waiting:
        if ticket.request.name == name:
            serving = replace(serving, waiting=tuple(t for t in serving.waiting if t is not ticket))
            made = Made([], [], RUNNING, 0, 0) if ticket.kept is None else ticket.kept.made
            return _gone(serving, name), [_result(ticket, made, time, "cancelled")]
    return serving, []


def turn(model: Transformer, params: Params, serving: Serving, time: float) -> tuple[Serving, list[Result]]:
    """Seat who can be seated, take in a chunk of each new prompt, decode some steps, and let go who has ended."""
    serving = _seat(model, serving, time)
    serving, early = _fill(model, params, serving, time)
    serving = _decode(model, params, serving, time)
    serving, late = _finished(serving, time)
    return serving, early + late


def rank(serving: Serving, ticket: Ticket, time: float) -> tuple[float, int]:
    """The order of requests, smallest first: by priority and waiting, then as they came."""
    waited = (time - ticket.arrived) / serving.settings.patience
    return -(ticket.request.priority + waited), ticket.number


def _seat(model, serving: Serving, time: float) -> Serving:
    """Free rows for those that wait, by rank; one of higher priority may take the row of one of lower."""
    for ticket in sorted(serving.waiting, key=lambda t: rank(serving, t, time)):
        row = next((i for i, there in enumerate(serving.seated) if there is None), None)
        if row is None:
            row, below = _weakest(serving, time)
            ahead = rank(serving, ticket, time) < rank(serving, below, time)
            if not ahead or below.request.priority >= ticket.request.priority:
                break
            serving = _give_up(serving, row)
        serving, good = _fits(serving, ticket)
        if not good:
            break
        serving = _admit(model, serving, row, ticket)
    return serving


def _fits(serving: Serving, ticket: Ticket) -> tuple[Serving, bool]:
    """Whether what a request brings, or its first chunk, finds pages, or it would have to leave again at once.

    Also whether its grammar and stop strings find room beside the others'.
    """
    if not any(serving.seated):
        return serving, True
    vocab = serving.slots.spec.state.seen.shape[1]
    if too_many([*_strings(serving), ticket.request.sampling.stop_strings], vocab):
        return serving, False
    grammar = ticket.request.sampling.grammar
    if grammar is not None and table_bytes([*_grammars(serving), grammar], vocab) > MOST_BYTES:
        return serving, False
    need = min(len(ticket.request.tokens), serving.settings.chunk) if ticket.kept is None else ticket.kept.length + 1
    return roomy(serving, alone(serving, serving.seated.index(None), need))


def _admit(model, serving: Serving, row: int, ticket: Ticket) -> Serving:
    settings, request, kept = serving.settings, ticket.request, ticket.kept
    seed = ticket.number if request.sampling.seed is None else request.sampling.seed
    sampling = replace(request.sampling, seed=seed)
    if kept is not None and kept.row is not None:
        serving, _ = roomy(serving, alone(serving, row, kept.length))
        serving = replace(serving, slots=unpark(model, serving.slots, row, kept, draft=settings.draft))
    else:
        slots = admit(
            model,
            serving.slots,
            row,
            request.tokens,
            max_new=request.max_new,
            sampling=sampling,
            key=serving.key,
            draft=settings.draft,
            speculate=request.speculate,
            made=None if kept is None else kept.made,
        )
        serving = replace(serving, slots=slots)
    waiting = tuple(t for t in serving.waiting if t.number != ticket.number)
    serving = with_seat(replace(serving, waiting=waiting), row, replace(ticket, kept=None))
    if request.sampling.stop_strings:
        serving = replace(serving, slots=heed(serving.slots, _strings(serving), settings.tokenizer))
    grammars, idle = _grammars(serving), serving.slots.rules.grammars.none
    if request.sampling.grammar is not None or not (idle or any(grammars)):
        serving = replace(serving, slots=constrain(serving.slots, grammars))
    return serving


def _strings(serving: Serving) -> list[Sequence[str]]:
    """Stop strings of each row."""
    return [() if t is None else t.request.sampling.stop_strings for t in serving.seated]


def _grammars(serving: Serving) -> list[Grammar | None]:
    """That of each row."""
    return [None if t is None else t.request.sampling.grammar for t in serving.seated]


def _fill(model, params, serving: Serving, time: float) -> tuple[Serving, list[Result]]:
    """A chunk of each filling row's prompt, and results of requests that end with their first token."""
    settings, results = serving.settings, []
    with_model, with_params = settings.prefill or (model, params)
    now = watch(serving.slots)
    begun = set(np.flatnonzero(now.filling & (now.held > 0)).tolist())
    for row in np.flatnonzero(now.filling).tolist():
        if serving.seated[row] is None:  # it has given way to one before it
            continue
        left = int(now.goal[row] - now.held[row])
        if not now.held[row]:  # asked now, when prompts that were seated with it may be in the store already
            if soon(serving, row, begun):
                continue
            serving, had = reused(serving, row, left)
            left -= had
        taken = min(left, settings.chunk, feed_width(left, settings.chunk, serving.slots.capacity))
        lengths = alone(serving, row, taken)
        serving, good = roomy(serving, lengths)
        if not good:  # one that ended with its first token leaves before another has to
            serving, ended = _finished(serving, time)
            results += ended
            serving, good = roomy(serving, lengths)
        while not good and serving.seated[row] is not None:
            serving, good = roomy(_give_up(serving, _weakest(serving, time)[0]), lengths)
        ticket = serving.seated[row]
        if ticket is None:
            continue
        slots = feed(with_model, with_params, serving.slots, row, chunk=settings.chunk)
        serving = replace(serving, slots=slots)
        begun.add(row)
        if taken == left:
            begun.discard(row)
            serving = remember(serving, row, time)
    serving, ended = _finished(serving, time)
    return serving, results + ended


def _decode(model, params, serving: Serving, time: float) -> Serving:
    """Some steps of all rows that decode, fewer where one ends for which another waits."""
    settings, steps = serving.settings, serving.settings.steps
    guesses = 0 if settings.draft is None else settings.draft.most
    while True:
        now = watch(serving.slots)
        if not now.running.any():
            return serving
        ahead = np.minimum(now.limit - now.made, steps * (1 + guesses))
        serving, good = roomy(serving, np.where(now.running, ahead, 0))
        if good:
            break
        if steps > 1:  # fewer steps ask for fewer pages, before anyone has to leave
            steps //= 2
        else:
            serving = _give_up(serving, _weakest(serving, time)[0])
    draft, slots = settings.draft, serving.slots
    if draft is not None and settings.costs is None:
        roomy_enough = longest_timed(draft) <= steps * (1 + guesses)
        if roomy_enough and can_time(model, draft, slots.spec, slots.rules):
            return replace(serving, slots=time_rounds(model, params, slots, draft))
    waits = bool(serving.waiting) or bool(now.filling.any())
    least = int(now.running.sum()) if waits else 1
    slots = decode(model, params, slots, steps=steps, least=least, draft=draft, costs=settings.costs)
    return replace(serving, slots=slots)


def _weakest(serving: Serving, time: float) -> tuple[int, Ticket]:
    """The seated request that comes last by rank, and its row."""
    seated = [(i, ticket) for i, ticket in enumerate(serving.seated) if ticket is not None]
    return max(seated, key=lambda pair: rank(serving, pair[1], time))


def _give_up(serving: Serving, row: int) -> Serving:
    """Put a row's request among those that wait, with what it has."""
    ticket = serving.seated[row]
    assert ticket is not None, "a row with a request"
    slots, kept = park(serving.slots, row, serving.settings.preempt)
    back = replace(ticket, kept=kept, parked=ticket.parked + 1)
    return with_seat(replace(serving, slots=slots, waiting=(*serving.waiting, back)), row, None)


def _leave(serving: Serving, row: int, time: float) -> tuple[Serving, Made]:
    """Free a row for good."""
    serving = remember(serving, row, time)
    slots, (made,) = retire(serving.slots, [row])
    return with_seat(replace(serving, slots=slots), row, None), made


def _finished(serving: Serving, time: float) -> tuple[Serving, list[Result]]:
    """Results of those that have ended, and when others had their first token."""
    now, results = watch(serving.slots), []
    seated = tuple(
        replace(t, first=time) if t is not None and t.first is None and now.made[i] else t
        for i, t in enumerate(serving.seated)
    )
    serving = replace(serving, seated=seated)
    for row in np.flatnonzero(now.ended).tolist():
        ticket = serving.seated[row]
        assert ticket is not None, "a row with a request"
        serving, had = _leave(serving, row, time)
        serving = _gone(serving, ticket.request.name)
        results.append(_result(ticket, had, time, REASONS[had.reason]))
    return serving, results


def _gone(serving: Serving, name: Hashable) -> Serving:
    return replace(serving, names=serving.names - {name})


def _result(ticket: Ticket, made: Made, time: float, reason: str) -> Result:
    return Result(
        ticket.request.name,
        made.tokens,
        made.logprobs,
        reason,
        arrived=ticket.arrived,
        first=ticket.first,
        done=time,
        reused=ticket.reused,
        parked=ticket.parked,
        proposed=made.proposed,
        accepted=made.accepted,
    )
