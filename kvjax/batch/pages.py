"""Room for rows that share pages, and texts that the prefix store has, or should have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvjax.batch.serving import Serving, with_seat
from kvjax.batch.slots import look, watch, with_cache
from kvjax.cache.paged import Paged
from kvjax.cache.prefix import find, keep, make_room, reuse
from kvjax.decode.state import NOT_FINITE


def alone(serving: Serving, row: int, tokens: int) -> np.ndarray:
    """Tokens a row, where one alone takes any in."""
    return np.where(np.arange(len(serving.seated)) == row, tokens, 0)


def roomy(serving: Serving, lengths: np.ndarray) -> tuple[Serving, bool]:
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


def soon(serving: Serving, row: int, begun: set[int]) -> bool:
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


def reused(serving: Serving, row: int, goal: int) -> tuple[Serving, int]:
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
    had = len(text) - len(rest[row])
    serving = replace(serving, store=store, slots=with_cache(serving.slots, cache))
    most = max(ticket.reused, min(had, len(ticket.request.tokens)))
    return with_seat(serving, row, replace(ticket, reused=most)), had


def remember(serving: Serving, row: int, time: float) -> Serving:
    """Keep a row's text so far, which it has taken in, in the store."""
    if serving.store is None:
        return serving
    ticket, slots = serving.seated[row], serving.slots
    assert ticket is not None, "a row with a request"
    (made,), length = look(slots, [row]), int(watch(slots).held[row])
    if made.reason == NOT_FINITE:  # nobody should go on from such keys
        return serving
    text = [*ticket.request.tokens, *made.tokens][:length]
    asked = alone(serving, row, min(len(ticket.request.tokens), len(text))).tolist()
    store, cache = keep(serving.store, serving.slots.cache, _only(serving, row, text), prompts=asked, time=time)
    return replace(serving, store=store, slots=with_cache(serving.slots, cache))


def _only(serving: Serving, row: int, text: list[int]) -> list[list[int]]:
    """Texts a row, where one alone has any."""
    return [text if i == row else [] for i in range(len(serving.seated))]
