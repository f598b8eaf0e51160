"""Slots that requests come to and leave while others decode: a pytree of static shapes, and pure functions over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from kvjax.batch.rows import put_row, row_of
from kvjax.cache.base import Cache, Strategy
from kvjax.cache.shared import Shared
from kvjax.decode import state as decoding
from kvjax.decode.generation import check_counts
from kvjax.decode.sampling import GREEDY, Rules, rules
from kvjax.decode.state import RUNNING, State
from kvjax.decode.widths import power_of_two
from kvjax.draft.base import Draft
from kvjax.draft.state import Speculation, blank
from kvjax.model import Transformer
from kvjax.pytree import pytree, static

WAITING = -1
"""The reason, in `State.reason`, of a row that does not decode yet."""


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
    settings = rules(GREEDY, batch=slots, vocab=vocab, max_new=max_new, key=key, width=power_of_two(ids))
    pending, seen = np.zeros(slots, np.int32), np.zeros((slots, vocab), bool)
    state = decoding.begin(cache, jnp.asarray(pending), jnp.asarray(seen), power_of_two(max_new))
    state = replace(state, reason=jnp.full(slots, WAITING, jnp.int32))
    text = jnp.asarray(np.zeros((slots, power_of_two(capacity + 1)), np.int32))
    spec = blank(model, draft, state, text, jnp.zeros(slots, jnp.int32))
    return Slots(spec, settings, jnp.zeros(slots, jnp.int32), capacity)


def with_cache(slots: Slots, cache: Cache) -> Slots:
    """The same slots over another cache of the same rows."""
    return replace(slots, spec=replace(slots.spec, state=replace(slots.spec.state, cache=cache)))


def row_of_slots(slots: Slots, row: Int[Array, ""]) -> Slots:
    """One row as slots of their own; what all share is left as it is."""

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
        names = [f.name for f in fields(tree) if f.name not in leave and getattr(tree, f.name) is not None]
        return replace(tree, **{name: of(getattr(tree, name), getattr(second, name)) for name in names})

    state: State = each(slots.spec.state, other.spec.state, ("cache", "step"))
    state = replace(state, cache=cache(slots.cache))
    spec = each(slots.spec, other.spec, ("state", "own", "choice", "idle", "rounds"))
    settings = each(slots.rules, other.rules, ("automaton", "keys", "grammars"))
    words = of(jax.random.key_data(slots.rules.keys), jax.random.key_data(other.rules.keys))
    settings = replace(settings, keys=jax.random.wrap_key_data(words, impl=jax.random.key_impl(slots.rules.keys)))
    return Slots(replace(spec, state=state), settings, of(slots.goal, other.goal), slots.capacity)
