"""A request's way into a row and out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from kvjax.batch.rows import blank_row
from kvjax.batch.slots import (
    WAITING,
    Made,
    Slots,
    look,
    put_row_of_slots,
    row_of_slots,
    watch,
    with_cache,
)
from kvjax.cache.base import is_whole
from kvjax.cache.paged import Paged, release
from kvjax.decode import state as decoding
from kvjax.decode.generation import check_counts, seen_in
from kvjax.decode.grammars import follow, pack
from kvjax.decode.prompts import as_prompts
from kvjax.decode.sampling import GREEDY, Rules, Sampling, checked, rules
from kvjax.decode.stops import compile_stops
from kvjax.draft.base import Draft
from kvjax.draft.state import view_of
from kvjax.grammar.grammar import Grammar
from kvjax.model import Transformer


def check(
    model: Transformer, slots: Slots, tokens: Sequence[int], sampling: Sampling, max_new: int, where: str
) -> None:
    """Raise ValueError, begun with `where`, for a request that no slot could serve."""
    check_counts(where, max_new=max_new)
    as_prompts(model, None, [list(tokens)], None, where)
    room, most = slots.spec.state.tokens.shape[1], min(max_new, sampling.limit or max_new)
    if most > room:
        raise ValueError(f"{where}: `max_new` must be at most the slots' {room}, got {most}")
    need = len(tokens) + most - 1
    if need > slots.capacity:
        raise ValueError(
            f"{where}: prompt and new tokens need {need} slots, but a row's capacity is {slots.capacity}: make it "
            f"larger, or `max_new` smaller"
        )
    if isinstance(slots.cache.strategy, Paged):
        pool, page = slots.cache.shared.refs.shape[0], slots.cache.layers[0].k.shape[1]
        if (pages := -(-need // page)) > pool:
            raise ValueError(
                f"{where}: prompt and new tokens need {pages} pages of {page} tokens, but the pool has {pool}"
            )
    width = slots.rules.stop.shape[1]
    lists = {"bias": {**sampling.bias, **dict.fromkeys(sampling.banned)}, "forced": sampling.forced}
    for name, listed in (lists | {"stop": sampling.stop}).items():
        if len(listed) > width:
            raise ValueError(f"{where}: `{name}` has {len(listed)} token ids, but the slots were made for {width}")


def admit(
    model: Transformer,
    slots: Slots,
    row: int,
    tokens: Sequence[int],
    *,
    max_new: int,
    sampling: Sampling = GREEDY,
    key: Key[Array, ""] | None = None,
    draft: Draft | None = None,
    speculate: bool = True,
    made: Made | None = None,
) -> Slots:
    """Seat a request in a free row, which is emptied first; `feed` takes its prompt in.

    A row that samples draws by `sampling.seed`, or else by its index.

    Args:
        slots: donated: use the one returned.
        draft: that of `init`; `speculate` says whether it guesses for this request.
        made: what the request had made when it left its row, to go on from; its tokens are taken in again.
        sampling: its stop strings are for `heed` and its grammar is for `constrain`; neither holds before.
    Raises:
        ValueError: for a row that is not free, or a request that no slot could serve (`check`).
    """
    if not is_whole(row, 0) or row >= slots.goal.shape[0] or not watch(slots).free[row]:
        raise ValueError(f"admit: `row` must be a free one of {slots.goal.shape[0]}, got {row!r}")
    check(model, slots, tokens, sampling, max_new, "admit")
    seeded = sampling if sampling.seed is not None else replace(sampling, seed=row)
    settings = {"batch": 1, "vocab": model.config.vocab, "max_new": max_new, "key": key}
    (plain,) = checked(seeded, **settings)
    plain = replace(plain, stop_strings=(), grammar=None)
    own = rules(plain, **settings, width=slots.rules.stop.shape[1])
    own = replace(own, automaton=slots.rules.automaton, grammars=slots.rules.grammars)
    had = Made([], [], WAITING, 0, 0) if made is None else made
    whole = [*tokens, *had.tokens]
    text, new = (np.zeros((1, x.shape[1]), np.int32) for x in (slots.spec.text, slots.spec.state.tokens))
    text[0, : len(whole)] = whole
    new[:] = -1
    new[0, : len(had.tokens)] = had.tokens
    scores = np.zeros(new.shape, np.float32)
    scores[0, : len(had.tokens)] = had.logprobs
    seen = seen_in(np.array([whole]), np.array([len(whole)]), model.config.vocab)
    counts = np.bincount(np.array(had.tokens, np.int32), minlength=model.config.vocab).astype(np.int32)[None]
    one = {
        "text": text,
        "length": np.array([len(whole)], np.int32),
        "proposed": np.array([had.proposed], np.int32),
        "accepted": np.array([had.accepted], np.int32),
        "wanted": np.array([speculate]),
        "pending": np.array(whole[-1:], np.int32),
        "tokens": new,
        "logprobs": scores,
        "lengths": np.array([len(had.tokens)], np.int32),
        "reason": np.array([WAITING], np.int32),
        "seen": seen,
        "counts": counts,
        "goal": np.array([len(whole) - bool(had.tokens)], np.int32),
    }
    return _admit(slots, jnp.int32(row), one, own, draft, model=model)


@partial(jax.jit, static_argnames="model", donate_argnames="slots")
def _admit(slots: Slots, row, one: dict[str, Array], own: Rules, draft, *, model) -> Slots:
    slots, fresh = vacant(model, slots, row, draft)
    state, spec = fresh.spec.state, fresh.spec

    def named(tree):
        return {f.name: one[f.name] for f in fields(tree) if f.name in one}

    names = "guess", "count", "right", "checked", "fresh"
    zeros = {name: jnp.zeros_like(x) for name in names if (x := getattr(spec, name)) is not None}
    state = replace(state, **named(state), matched=jnp.zeros_like(state.matched), ruled=jnp.zeros_like(state.ruled))
    spec = replace(spec, **(named(spec) | zeros), state=state)
    return put_row_of_slots(slots, row, Slots(spec, own, one["goal"], slots.capacity))


def vacant(model: Transformer, slots: Slots, row: Int[Array, ""], draft: Draft | None) -> tuple[Slots, Slots]:
    """The slots once the draft has forgotten a row, and the row as slots of its own, with an empty cache."""
    spec = slots.spec
    if draft is not None:
        view = view_of(replace(spec, length=spec.length.at[row].set(0)), slots.rules)
        slots = replace(slots, spec=replace(spec, own=draft.observe(spec.own, view)))
    return slots, with_cache(row_of_slots(slots, row), blank_row(model, slots.cache, slots.capacity))


def heed(slots: Slots, strings: Sequence[Sequence[str]], tokenizer) -> Slots:
    """Have each row end at its stop strings, one list a row, from what it has made so far on.

    Raises:
        ValueError: for another number of lists than rows, more than 32 strings in all, or strings and no tokenizer.
    """
    if len(strings) != slots.goal.shape[0]:
        raise ValueError(f"heed: `strings` must be {slots.goal.shape[0]} lists, one a row, got {len(strings)}")
    bits, automaton = compile_stops(strings, slots.spec.state.seen.shape[1], tokenizer)
    settings = replace(slots.rules, strings=jnp.asarray(bits), automaton=automaton)
    state = slots.spec.state
    matched = _matched(state.tokens, state.lengths, settings)
    return replace(slots, rules=settings, spec=replace(slots.spec, state=replace(state, matched=matched)))


@jax.jit
def _matched(tokens, lengths, settings: Rules) -> Int[Array, "slots"]:
    """The automaton's states after what rows have made."""
    return _replayed(tokens, lengths, lambda state, token: decoding.follow(state, settings, token)[0])


def constrain(slots: Slots, grammars: Sequence[Grammar | None]) -> Slots:
    """Have each row keep to its grammar, if it has one, from what it has made so far on.

    Args:
        grammars: one a row, as `fitted` leaves them.
    Raises:
        ValueError: for another number of grammars than rows, or tables that are too large together.
    """
    if len(grammars) != slots.goal.shape[0]:
        raise ValueError(f"constrain: `grammars` must be {slots.goal.shape[0]}, one a row, got {len(grammars)}")
    which, tables = pack(grammars, slots.spec.state.seen.shape[1])
    settings = replace(slots.rules, grammar=jnp.asarray(which), grammars=tables)
    state = slots.spec.state
    ruled = jnp.zeros_like(state.ruled) if tables.none else _ruled(state.tokens, state.lengths, settings)
    return replace(slots, rules=settings, spec=replace(slots.spec, state=replace(state, ruled=ruled)))


@jax.jit
def _ruled(tokens, lengths, settings: Rules) -> Int[Array, "slots"]:
    """The grammars' states after what rows have made."""
    return _replayed(tokens, lengths, lambda *now: follow(settings.grammars, settings.grammar, *now))


def _replayed(tokens, lengths, follow: Callable) -> Int[Array, "slots"]:
    """States after each row's first tokens, from state 0 on."""

    def step(i, state):
        return jnp.where(i < lengths, follow(state, jnp.maximum(tokens[:, i], 0)), state)

    return jax.lax.fori_loop(0, lengths.max(), step, jnp.zeros_like(lengths))


def retire(slots: Slots, rows: Sequence[int]) -> tuple[Slots, list[Made]]:
    """Free rows, and give their pages back; also what they have made. `slots` is donated."""
    made = look(slots, rows)
    mask = np.zeros(slots.goal.shape[0], bool)
    mask[list(rows)] = True
    return _retire(slots, jnp.asarray(mask)), made


@partial(jax.jit, donate_argnames="slots")
def _retire(slots: Slots, rows: Bool[Array, "slots"]) -> Slots:
    state = slots.spec.state
    cache = release(state.cache, rows) if isinstance(state.cache.strategy, Paged) else state.cache
    state = replace(state, cache=cache, reason=jnp.where(rows, WAITING, state.reason))
    return replace(slots, goal=jnp.where(rows, 0, slots.goal), spec=replace(slots.spec, state=state))
