"""Slots that requests come to and leave while others decode: a pytree of static shapes, and pure functions over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax.batch.rows import empty_row, put_row, row_of
from kvjax.cache.base import Cache, Strategy, is_whole
from kvjax.cache.paged import Paged, release
from kvjax.cache.shared import Shared
from kvjax.decode import state as decoding
from kvjax.decode.generation import check_counts, seen_in
from kvjax.decode.prompts import as_prompts
from kvjax.decode.sampling import GREEDY, Rules, Sampling, power_of_two, rules
from kvjax.decode.state import RUNNING, State
from kvjax.decode.stops import compile_stops
from kvjax.draft.base import Draft
from kvjax.draft.speculation import Speculation, blank, grown, paid_for, view_of, widths
from kvjax.draft.speculation import advance as speculating
from kvjax.model import Params, Transformer, cached
from kvjax.pytree import pytree, static

WAITING = -1
"""The reason, in `State.reason`, of a row that does not decode yet."""


NARROWEST = 16
"""Prompt tokens that a program takes in at once, at least."""


@pytree
class Slots:
    """Rows of a batch, each free or with a request in it.

    Args:
        spec: what is decoded; `spec.text` holds prompts, and new tokens where there is a draft.
        goal: tokens of its text that a row takes in before it decodes; 0 for a free one.
        capacity: tokens a row can take in.
    """

    spec: Speculation
    rules: Rules
    goal: Int[Array, "slots"]
    capacity: int = static()

    @property
    def cache(self) -> Cache:
        return self.spec.state.cache


class Watch(NamedTuple):
    """Where rows stand, on the host.

    Args:
        goal: as in `Slots`.
        reason: as in `State`, `WAITING` for a row that does not decode yet.
        held, made: tokens taken in, and new ones.
        limit: new tokens at most.
    """

    goal: Int[np.ndarray, "slots"]
    reason: Int[np.ndarray, "slots"]
    held: Int[np.ndarray, "slots"]
    made: Int[np.ndarray, "slots"]
    limit: Int[np.ndarray, "slots"]

    @property
    def free(self) -> Bool[np.ndarray, "slots"]:
        return self.goal == 0

    @property
    def filling(self) -> Bool[np.ndarray, "slots"]:
        """Rows that have not taken in their prompt yet."""
        return (self.goal > 0) & (self.reason == WAITING)

    @property
    def running(self) -> Bool[np.ndarray, "slots"]:
        return self.reason == RUNNING

    @property
    def ended(self) -> Bool[np.ndarray, "slots"]:
        return (self.goal > 0) & (self.reason != WAITING) & (self.reason != RUNNING)


def watch(slots: Slots) -> Watch:
    """Where rows stand; waits for what is under way."""
    state = slots.spec.state
    return Watch(*jax.device_get((slots.goal, state.reason, slots.cache.length, state.lengths, slots.rules.limit)))


class Made(NamedTuple):
    """What a row has made, on the host; `reason` as in `REASONS`, `WAITING` if it has not begun."""

    tokens: list[int]
    logprobs: list[float]
    reason: int
    proposed: int
    accepted: int


def init(
    model: Transformer,
    strategy: Strategy,
    *,
    slots: int,
    capacity: int,
    max_new: int,
    draft: Draft | None = None,
    key: Key[Array, ""] | None = None,
    ids: int = 16,
) -> Slots:
    """Free slots over an empty cache.

    Args:
        strategy: how keys and values are kept; with `Paged` and a `pool`, rows share the memory of fewer.
        capacity: tokens a row can take in: prompt and new ones, but for the last.
        max_new: new tokens of a request, at most.
        draft: what will guess in `decode`; None for nothing.
        key: one of the kind that requests will draw by; None for JAX's default kind.
        ids: token ids in each of a request's lists (`bias` with `banned`, `forced`, `stop`), at most.
    Raises:
        ValueError: for a count below 1, a `Shared` strategy, or a draft that is not for this model.
    """
    check_counts("batch.init", slots=slots, capacity=capacity, max_new=max_new, ids=ids)
    if isinstance(strategy, Shared):
        raise ValueError("batch.init: `strategy` must keep rows apart, but rows of Shared begin with one prefix")
    if draft is not None:
        draft.check(model.config)
        if draft.most >= capacity:
            raise ValueError(f"batch.init: the draft's `k` must be below `capacity`, {capacity}, got {draft.most}")
    cache = strategy.init(model, batch=slots, capacity=capacity)
    vocab = model.config.vocab
    settings = _widened(rules(GREEDY, batch=slots, vocab=vocab, max_new=max_new, key=key), power_of_two(ids))
    pending, seen = np.zeros(slots, np.int32), np.zeros((slots, vocab), bool)
    state = decoding.begin(cache, jnp.asarray(pending), jnp.asarray(seen), power_of_two(max_new))
    state = replace(state, reason=jnp.full(slots, WAITING, jnp.int32))
    text = jnp.asarray(np.zeros((slots, power_of_two(capacity + 1)), np.int32))
    spec = blank(draft, state, text, jnp.zeros(slots, jnp.int32))
    return Slots(spec, settings, jnp.zeros(slots, jnp.int32), capacity)


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
    if sampling.grammar is not None:
        raise ValueError(f"{where}: `grammar` is not for slots yet: use `generate` for this request")
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
    Raises:
        ValueError: for a row that is not free, or a request that no slot could serve (`check`), stop strings among
            them: those are for `heed`.
    """
    if not is_whole(row, 0) or row >= slots.goal.shape[0] or not watch(slots).free[row]:
        raise ValueError(f"admit: `row` must be a free one of {slots.goal.shape[0]}, got {row!r}")
    check(model, slots, tokens, sampling, max_new, "admit")
    seeded = sampling if sampling.seed is not None else replace(sampling, seed=row)
    plain = replace(seeded, stop_strings=())
    own = rules(plain, batch=1, vocab=model.config.vocab, max_new=max_new, key=key)
    own = _widened(own, slots.rules.stop.shape[1])
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
    own = replace(own, automaton=slots.rules.automaton, grammars=slots.rules.grammars)
    return _admit(slots, jnp.int32(row), one, own, draft, model=model)


@partial(jax.jit, static_argnames="model", donate_argnames="slots")
def _admit(slots: Slots, row, one: dict[str, Array], own: Rules, draft, *, model) -> Slots:
    spec = slots.spec
    if draft is not None:
        view = view_of(replace(spec, length=spec.length.at[row].set(0)), slots.rules)
        spec = replace(spec, own=draft.observe(spec.own, view))
    cache = empty_row(model, slots.cache, row, slots.capacity)
    slots = replace(slots, spec=replace(spec, state=replace(spec.state, cache=cache)))
    fresh = row_of_slots(slots, row)
    state, spec = fresh.spec.state, fresh.spec

    def named(tree):
        return {f.name: one[f.name] for f in fields(tree) if f.name in one}

    zeros = {name: jnp.zeros_like(getattr(spec, name)) for name in ("guess", "count", "right", "checked")}
    state = replace(state, **named(state), matched=jnp.zeros_like(state.matched), ruled=jnp.zeros_like(state.ruled))
    spec = replace(spec, **(named(spec) | zeros), state=state)
    return put_row_of_slots(slots, row, Slots(spec, own, one["goal"], slots.capacity))


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

    def step(i, matched):
        return jnp.where(i < lengths, decoding.follow(matched, settings, jnp.maximum(tokens[:, i], 0))[0], matched)

    return jax.lax.fori_loop(0, lengths.max(), step, jnp.zeros_like(lengths))


def feed(model: Transformer, params: Params, slots: Slots, row: int, *, chunk: int = 256) -> Slots:
    """Take in up to `chunk` tokens more of a filling row's prompt; after the last of them, its first token is chosen.

    Args:
        slots: donated: use the one returned.
        chunk: what is left is padded to a power of two, from 16 on, each a program of its own.
    """
    check_counts("feed", chunk=chunk)
    now = watch(slots)
    left = int(now.goal[row] - now.held[row])
    width = min(power_of_two(max(left, NARROWEST)), power_of_two(chunk), slots.capacity)
    return _feed(model, params, slots, jnp.int32(row), jnp.int32(chunk), width=width)


@partial(jax.jit, static_argnames=("model", "width"), donate_argnames="slots")
def _feed(model, params, slots: Slots, row, chunk, *, width: int) -> Slots:
    one = row_of_slots(slots, row)
    spec, cache = one.spec, one.cache
    had, start = spec.state.lengths, cache.length
    filling = (one.goal > 0) & (spec.state.reason == WAITING)
    count = jnp.where(filling, jnp.clip(one.goal - start, 0, jnp.minimum(chunk, width)), 0)
    at = jnp.minimum(start[:, None] + jnp.arange(width)[None], spec.text.shape[1] - 1)
    tokens = jnp.take_along_axis(spec.text, at, axis=1)
    logits, cache = cached(model, params, tokens, count, cache)
    done = filling & (cache.length >= one.goal)
    state = replace(spec.state, cache=cache, reason=jnp.where(done, RUNNING, spec.state.reason))
    state = decoding.emit_at(state, one.rules, logits, cache.length, done & (had == 0))
    spec = grown(replace(spec, state=state), state.pending[:, None], state.lengths - had)
    return put_row_of_slots(slots, row, replace(one, spec=spec))


def decode(
    model: Transformer,
    params: Params,
    slots: Slots,
    *,
    steps: int = 1,
    least: int = 1,
    draft: Draft | None = None,
    costs: Sequence[float] | Float[Array, "choices"] | None = None,
) -> Slots:
    """Up to `steps` steps of the rows that decode, in one compiled loop, while at least `least` of them do.

    Args:
        slots: donated: use the one returned.
        draft: that of `init`; each step is then a round of guesses, as in `speculate`.
        costs: of each number of guesses in `widths(draft)`; None takes a tenth of a step for each guess.
    """
    most, least_ = jnp.int32(steps), jnp.int32(least)
    if draft is None:
        return _decode(model, params, slots, most, least_)
    choices = widths(draft)
    paid = paid_for(costs, choices)
    return _speculate(model, params, draft, slots, paid, most, least_, choices=choices)


@partial(jax.jit, static_argnames="model", donate_argnames="slots")
def _decode(model, params, slots: Slots, steps, least) -> Slots:
    state = decoding.loop(model, params, slots.spec.state, slots.rules, steps, least)
    return replace(slots, spec=replace(slots.spec, state=state))


@partial(jax.jit, static_argnames=("model", "choices"), donate_argnames="slots")
def _speculate(model, params, draft, slots: Slots, costs, steps, least, *, choices) -> Slots:
    spec = speculating(model, params, draft, slots.spec, slots.rules, costs, steps, least, widths=choices)
    return replace(slots, spec=spec)


def step(
    model: Transformer,
    params: Params,
    slots: Slots,
    *,
    chunk: int = 256,
    steps: int = 1,
    draft: Draft | None = None,
    costs: Sequence[float] | Float[Array, "choices"] | None = None,
) -> Slots:
    """A chunk of each filling row's prompt, then `steps` steps of all that decode: no prompt holds the others up."""
    for row in np.flatnonzero(watch(slots).filling).tolist():
        slots = feed(model, params, slots, row, chunk=chunk)
    return decode(model, params, slots, steps=steps, draft=draft, costs=costs)


def look(slots: Slots, rows: Sequence[int]) -> list[Made]:
    """What rows have made so far."""
    spec = slots.spec
    leaves = (spec.state.lengths, spec.state.tokens, spec.state.logprobs, spec.state.reason)
    lengths, tokens, scores, reason, *guesses = jax.device_get((*leaves, spec.proposed, spec.accepted))
    return [
        Made(
            tokens[row, : lengths[row]].tolist(),
            scores[row, : lengths[row]].tolist(),
            int(reason[row]),
            *(int(x[row]) for x in guesses),
        )
        for row in rows
    ]


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


def with_cache(slots: Slots, cache: Cache) -> Slots:
    """The same slots over another cache of the same rows."""
    return replace(slots, spec=replace(slots.spec, state=replace(slots.spec.state, cache=cache)))


def row_of_slots(slots: Slots, row: Int[Array, ""]) -> Slots:
    """One row as slots of their own; the draft's state, the automaton and the counts of rounds are not of a row."""

    def cut(x):
        return jax.lax.dynamic_slice_in_dim(x, row, 1)

    return _by_row(slots, lambda x, _: cut(x), slots, lambda cache: row_of(cache, row))


def put_row_of_slots(slots: Slots, row: Int[Array, ""], one: Slots) -> Slots:
    """The slots with `one`, made by `row_of_slots`, in a row's place."""

    def put(x, new):
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.asarray(new, x.dtype), row, 0)

    return _by_row(slots, put, one, lambda cache: put_row(cache, row, one.cache))


def _by_row(slots: Slots, of: Any, other: Slots, cache: Any) -> Slots:
    """Each array with a row for every slot changed by `of`, and the cache by `cache`."""

    def each(tree: Any, second: Any, leave: tuple[str, ...]) -> Any:
        names = [f.name for f in fields(tree) if f.name not in leave]
        return replace(tree, **{name: of(getattr(tree, name), getattr(second, name)) for name in names})

    state: State = each(slots.spec.state, other.spec.state, ("cache", "step"))
    state = replace(state, cache=cache(slots.cache))
    spec = each(slots.spec, other.spec, ("state", "own", "choice", "rounds"))
    settings = each(slots.rules, other.rules, ("automaton", "keys", "grammars"))
    words = of(jax.random.key_data(slots.rules.keys), jax.random.key_data(other.rules.keys))
    settings = replace(settings, keys=jax.random.wrap_key_data(words, impl=jax.random.key_impl(slots.rules.keys)))
    return Slots(replace(spec, state=state), settings, of(slots.goal, other.goal), slots.capacity)


def _widened(settings: Rules, width: int) -> Rules:
    """Id lists padded to `width`."""
    pads = {"bias_ids": -1, "bias": 0.0, "forced": -1, "stop": -1}

    def pad(name: str, fill: float | int) -> Array:
        x = getattr(settings, name)
        return jnp.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=fill)

    return replace(settings, **{name: pad(name, fill) for name, fill in pads.items()})
