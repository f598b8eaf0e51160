"""What moves slots on: a chunk of a prompt, and steps of all rows that decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.batch.slots import WAITING, Slots, put_row_of_slots, row_of_slots, watch
from kvjax.decode import state as decoding
from kvjax.decode.generation import check_counts
from kvjax.decode.state import RUNNING
from kvjax.decode.widths import power_of_two
from kvjax.draft.base import Draft
from kvjax.draft.costs import paid_for, timed
from kvjax.draft.rounds import runner
from kvjax.draft.state import grown
from kvjax.model import Params, Transformer, cached

NARROWEST = 16
"""Prompt tokens that a program takes in at once, at least."""


def feed(model: Transformer, params: Params, slots: Slots, row: int, *, chunk: int = 256) -> Slots:
    """Take in up to `chunk` tokens more of a filling row's prompt; after the last of them, its first token is chosen.

    Args:
        slots: donated: use the one returned.
        chunk: widths are powers of two, from 16 on, each a program of its own, and at most a quarter is padding.
    """
    check_counts("feed", chunk=chunk)
    now = watch(slots)
    width = feed_width(int(now.goal[row] - now.held[row]), chunk, slots.capacity)
    return _feed(model, params, slots, jnp.int32(row), jnp.int32(chunk), width=width)


def feed_width(left: int, chunk: int, capacity: int) -> int:
    """The width of the program by which `feed` takes in what is `left` of a prompt, or its beginning."""
    width = power_of_two(max(left, NARROWEST))
    if left < 3 * width // 4 and width > NARROWEST:
        width //= 2
    return min(width, power_of_two(chunk), capacity)


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
        costs: of each number of guesses in `widths(draft)`; None takes what was measured in this process, by `serve`
            or `speculate`, and a tenth of a step for each guess where nothing was.
    """
    if draft is None:
        return _decode(model, params, slots, jnp.int32(steps), jnp.int32(least))
    paid = paid_for(costs, model, draft, slots.spec, slots.rules)
    run = runner(model, params, draft, together=False)
    return replace(slots, spec=run(slots.spec, slots.rules, paid, steps, least))


def time_rounds(model: Transformer, params: Params, slots: Slots, draft: Draft) -> Slots:
    """`decode` for some rounds (`longest_timed`), which tell what a number of guesses costs.

    Args:
        slots: donated: use the one returned.
    """
    run = runner(model, params, draft, together=False)
    return replace(slots, spec=timed(model, draft, run, slots.spec, slots.rules)[0])


@partial(jax.jit, static_argnames="model", donate_argnames="slots")
def _decode(model, params, slots: Slots, steps, least) -> Slots:
    state = decoding.loop(model, params, slots.spec.state, slots.rules, steps, least)
    return replace(slots, spec=replace(slots.spec, state=state))


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
