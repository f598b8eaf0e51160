"""Who sits in which slot: requests that wait, decode, or have given up their row, as a value that turns move on.

Sources: Yu et al. 2022, "Orca" (OSDI) for scheduling by iteration; Kwon et al. 2023 (arXiv:2309.06180), section 4.5,
for preemption when pages run out; Agrawal et al. 2023 (arXiv:2308.16369) for prompts in chunks between steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Array, Key

from kvjax.batch.parking import Parked, check_way, park, unpark
from kvjax.batch.request import Request, Result
from kvjax.batch.seating import admit, check, constrain, heed, retire
from kvjax.batch.slots import Made, Slots, init, look, watch, with_cache
from kvjax.batch.steps import decode, feed, feed_width
from kvjax.cache.base import Strategy
from kvjax.cache.paged import Paged
from kvjax.cache.prefix import Policy, PrefixStore, find, keep, make_room, open_store, reuse
from kvjax.decode.generation import check_counts
from kvjax.decode.grammars import table_bytes
from kvjax.decode.sampling import checked
from kvjax.decode.state import NOT_FINITE, REASONS, RUNNING
from kvjax.decode.stops import too_many
from kvjax.draft.base import Draft
from kvjax.draft.speculation import check_costs
from kvjax.draft.state import widths
from kvjax.grammar.grammar import MOST_BYTES, Grammar
from kvjax.model import Params, Transformer


@dataclass(frozen=True)
class Settings:
    """How slots are served.

    Args:
        chunk: prompt tokens that a filling row takes in at once, at most, while others wait to decode on.
        steps: of decoding between two looks at who waits, at most.
        patience: seconds of waiting that count for one of priority.
        preempt: what becomes of a row's keys when it must give it up: `"recompute"`, `"offload"` or `"compress"`.
            What is kept in 8 bits is no longer exact; a lossy cache may come to keep other tokens when recomputed.
        draft, costs: as `batch.decode` takes them.
        prefill: model and parameters that prompts are taken in by, of the same config, such as one of less precision.
    """

    chunk: int = 256
    steps: int = 16
    patience: float | int = 10
    preempt: str = "recompute"
    draft: Draft | None = None
    costs: Sequence[float] | None = None
    prefill: tuple[Transformer, Params] | None = None
    tokenizer: Any = None

    def __post_init__(self):
        check_counts("Settings", chunk=self.chunk, steps=self.steps)
        if not self.patience > 0:
            raise ValueError(f"Settings: `patience` must be above 0 seconds, got {self.patience}")
        if self.prefill is not None and not (
            isinstance(self.prefill, tuple) and len(self.prefill) == 2 and isinstance(self.prefill[0], Transformer)
        ):
            raise ValueError(
                f"Settings: `prefill` must be a model and its parameters, got {type(self.prefill).__name__}"
            )


@dataclass(frozen=True)
class Ticket:
    """A request on its way: `number` came before it; `kept` is what it left its row with, if it has had one."""

    request: Request
    number: int
    arrived: float
    first: float | None = None
    reused: int = 0
    parked: int = 0
    kept: Parked | None = None


@dataclass(frozen=True)
class Serving:
    """Slots, who is in them, and who waits. A value: what takes it gives a new one, and its arrays are donated."""

    slots: Slots
    settings: Settings
    key: Key[Array, ""] | None
    store: PrefixStore | None = None
    seated: tuple[Ticket | None, ...] = ()
    waiting: tuple[Ticket, ...] = ()
    count: int = 0
    names: frozenset[Hashable] = frozenset()

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.waiting and not any(self.seated)


def open(
    model: Transformer,
    strategy: Strategy,
    *,
    slots: int,
    capacity: int,
    max_new: int,
    key: Key[Array, ""] | None = None,
    store: Policy[Any] | None = None,
    settings: Settings | None = None,
    ids: int = 16,
) -> Serving:
    """Free slots, and nobody waiting.

    Args:
        store: the policy of a prefix store; None for no store. Needs a `Paged` strategy.
        **others: as `batch.init` takes them.
    Raises:
        ValueError: for what `batch.init` refuses, or a way to preempt or a store that does not go with the strategy.
    """
    settings = Settings() if settings is None else settings
    made = init(
        model, strategy, slots=slots, capacity=capacity, max_new=max_new, draft=settings.draft, key=key, ids=ids
    )
    check_way(made, settings.preempt, "batch.open")
    if settings.prefill is not None and settings.prefill[0].config != model.config:
        raise ValueError("batch.open: `prefill` must be of the model's config; only its precision may differ")
    if settings.draft is not None:
        check_costs(settings.costs, widths(settings.draft), "batch.open")
    kept = None if store is None else open_store(made.cache, store)
    return Serving(made, settings, key, kept, (None,) * slots)


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
    return _roomy(serving, _alone(serving, serving.seated.index(None), need))


def _admit(model, serving: Serving, row: int, ticket: Ticket) -> Serving:
    settings, request, kept = serving.settings, ticket.request, ticket.kept
    seed = ticket.number if request.sampling.seed is None else request.sampling.seed
    sampling = replace(request.sampling, seed=seed)
    if kept is not None and kept.row is not None:
        serving, _ = _roomy(serving, _alone(serving, row, kept.length))
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
    serving = _with_seat(replace(serving, waiting=waiting), row, replace(ticket, kept=None))
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


def _soon(serving: Serving, row: int, begun: set[int]) -> bool:
    """Whether the store will soon have more of a row's prompt: one that begins like it is being taken in."""
    ticket = serving.seated[row]
    if serving.store is None or ticket is None:
        return False
    text, page = np.array(ticket.request.tokens), serving.slots.cache.layers[0].k.shape[1]
    most = 0
    for other in begun:
        if (there := serving.seated[other]) is not None:
            size = min(text.size, len(there.request.tokens))
            same = text[:size] == np.array(there.request.tokens[:size])
            most = max(most, size if same.all() else int(same.argmin()))
    return most // page * page > find(serving.store, text.tolist())[1]


def _reused(serving: Serving, row: int, goal: int) -> tuple[Serving, int]:
    """A row that holds nothing yet with what the store has of its text, and how much that is."""
    ticket = serving.seated[row]
    if serving.store is None or ticket is None:
        return serving, 0
    (made,) = look(serving.slots, [row])
    text = [*ticket.request.tokens, *made.tokens][:goal]
    try:
        store, cache, rest = reuse(serving.store, serving.slots.cache, _only(serving, row, text))
    except ValueError:  # too little room for all of the rest: the row takes it in as it comes
        return serving, 0
    reused = len(text) - len(rest[row])
    serving = replace(serving, store=store, slots=with_cache(serving.slots, cache))
    most = max(ticket.reused, min(reused, len(ticket.request.tokens)))
    return _with_seat(serving, row, replace(ticket, reused=most)), reused


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
            if _soon(serving, row, begun):
                continue
            serving, reused = _reused(serving, row, left)
            left -= reused
        taken = min(left, settings.chunk, feed_width(left, settings.chunk, serving.slots.capacity))
        lengths = _alone(serving, row, taken)
        serving, good = _roomy(serving, lengths)
        if not good:  # one that ended with its first token leaves before another has to
            serving, ended = _finished(serving, time)
            results += ended
            serving, good = _roomy(serving, lengths)
        while not good and serving.seated[row] is not None:
            serving, good = _roomy(_give_up(serving, _weakest(serving, time)[0]), lengths)
        ticket = serving.seated[row]
        if ticket is None:
            continue
        slots = feed(with_model, with_params, serving.slots, row, chunk=settings.chunk)
        serving = replace(serving, slots=slots)
        begun.add(row)
        if taken == left:
            begun.discard(row)
            serving = _remember(serving, row, time)
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
        serving, good = _roomy(serving, np.where(now.running, ahead, 0))
        if good:
            break
        if steps > 1:  # fewer steps ask for fewer pages, before anyone has to leave
            steps //= 2
        else:
            serving = _give_up(serving, _weakest(serving, time)[0])
    waits = bool(serving.waiting) or bool(now.filling.any())
    slots = decode(
        model,
        params,
        serving.slots,
        steps=steps,
        least=int(now.running.sum()) if waits else 1,
        draft=settings.draft,
        costs=settings.costs,
    )
    return replace(serving, slots=slots)


def _alone(serving: Serving, row: int, tokens: int) -> np.ndarray:
    """Tokens a row, where one alone takes any in."""
    return np.where(np.arange(len(serving.seated)) == row, tokens, 0)


def _only(serving: Serving, row: int, text: list[int]) -> list[list[int]]:
    """Texts a row, where one alone has any."""
    return [text if i == row else [] for i in range(len(serving.seated))]


def _roomy(serving: Serving, lengths: np.ndarray) -> tuple[Serving, bool]:
    """Whether `lengths` more tokens a row find pages; for them the store gives up what it must."""
    cache = serving.slots.cache
    if not isinstance(cache.strategy, Paged) or cache.strategy.need(cache, lengths) is None:
        return serving, True
    if serving.store is None:
        return serving, False
    try:
        store, cache = make_room(serving.store, cache, lengths)
    except ValueError:
        return serving, False
    return replace(serving, store=store, slots=with_cache(serving.slots, cache)), True


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
    return _with_seat(replace(serving, slots=slots, waiting=(*serving.waiting, back)), row, None)


def _with_seat(serving: Serving, row: int, ticket: Ticket | None) -> Serving:
    return replace(serving, seated=tuple(ticket if i == row else t for i, t in enumerate(serving.seated)))


def _remember(serving: Serving, row: int, time: float) -> Serving:
    """Keep a row's text so far, which it has taken in, in the store."""
    if serving.store is None:
        return serving
    ticket, slots = serving.seated[row], serving.slots
    assert ticket is not None, "a row with a request"
    (made,), length = look(slots, [row]), int(watch(slots).held[row])
    if made.reason == NOT_FINITE:  # nobody should go on from such keys
        return serving
    text = [*ticket.request.tokens, *made.tokens][:length]
    asked = _alone(serving, row, min(len(ticket.request.tokens), len(text))).tolist()
    store, cache = keep(serving.store, serving.slots.cache, _only(serving, row, text), prompts=asked, time=time)
    return replace(serving, store=store, slots=with_cache(serving.slots, cache))


def _leave(serving: Serving, row: int, time: float) -> tuple[Serving, Made]:
    """Free a row for good."""
    serving = _remember(serving, row, time)
    slots, (made,) = retire(serving.slots, [row])
    return _with_seat(replace(serving, slots=slots), row, None), made


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
