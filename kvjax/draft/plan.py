"""How many guesses of which row are worth checking: the most tokens for what a call costs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.ahead import steady
from kvjax.decode.sampling import Rules
from kvjax.decode.state import State
from kvjax.draft.base import Draft
from kvjax.draft.state import Speculation, tokens_checked, view_of
from kvjax.draft.tree import hopes, paths

PRIOR = 2.0, 3.0
"""Guesses that a row is taken to have had right, and to have had, before any was checked."""


def plan_of(draft: Draft, spec: Speculation, rules: Rules, costs, widths: tuple[int, ...], worth) -> Speculation:
    """The next guesses, and how many of them are worth checking; `worth` is that of a row's tokens."""
    state, view, room = spec.state, view_of(spec, rules), room_of(spec, rules)
    own = draft.observe(spec.own, view)
    spec = replace(spec, fresh=None if spec.fresh is None else jnp.zeros_like(spec.fresh))
    chance = (spec.right + PRIOR[0]) / (spec.checked + PRIOR[1])
    sizes, nth = jnp.array(widths, jnp.int32), jnp.arange(draft.most)[None]
    chain = jnp.cumprod(jnp.broadcast_to(chance[:, None], (*chance.shape, draft.most)), axis=1)
    chosen = partial(_best, worth=worth, running=state.running, costs=costs, widths=widths)
    want = sizes[chosen(jnp.where(nth < room[:, None], chain, 0.0), draft.most)[0]]
    guess, count, own = draft.propose(own, view, want)
    parent, hope, deep = None, chain, nth + 1
    if spec.parent is not None:
        guess, parent = guess.guess, jnp.clip(guess.parent, -1, nth - 1)  # or a way would miss its parent
        path = paths(parent)
        hope, deep = hopes(chance, parent, path), (path >= 0).sum(2)[:, 1:] - 1
    none = (guess < 0) | (guess >= state.seen.shape[1])
    count = jnp.minimum(count, jnp.where(none.any(1), jnp.argmax(none, axis=1).astype(jnp.int32), draft.most))
    count = jnp.where(state.running & (room > 0), count, 0)
    if parent is None:
        count = jnp.minimum(count, room)
    able = (nth < count[:, None]) & (deep <= room[:, None])
    choice, count = chosen(jnp.where(able, hope, 0.0), count)
    return replace(spec, own=own, guess=guess, parent=parent, count=count, choice=choice)


def _best(hope: Float[Array, "batch most"], count, *, worth, running, costs, widths: tuple[int, ...]):
    """The call that makes the most for its cost, if a guess is kept as often as `hope` says, and its counts."""
    hope, worth = hope * worth[:, None], jnp.where(running, worth, 0.0)
    counts = jnp.stack([fitting(hope, jnp.minimum(count, width), running, width) for width in widths])
    chosen = jnp.arange(hope.shape[1])[None, None] < counts[..., None]
    expected = worth.sum() + jnp.where(chosen, hope[None], 0.0).sum((1, 2))
    choice = jnp.argmax(expected / costs).astype(jnp.int32)
    return choice, counts[choice]


def fitting(hope: Float[Array, "batch most"], count, running, width: int) -> Int[Array, "batch"]:
    """How many of each row's first `count` guesses fit in a call, where those worth most go first."""
    batch, most = hope.shape
    total = tokens_checked(batch, width)
    count = jnp.broadcast_to(jnp.where(running, count, 0), batch)
    if total == batch * (width + 1):
        return count
    worth = jax.lax.cummin(hope, axis=1)  # none goes before one that it comes after
    worth = jnp.where(jnp.arange(most)[None] < count[:, None], worth, -1.0).reshape(-1)
    nth = jnp.arange(worth.size)
    first = (worth[None] > worth[:, None]) | ((worth[None] == worth[:, None]) & (nth[None] < nth[:, None]))
    fits = (worth >= 0) & (first.sum(1) < total - running.sum())
    return fits.reshape(batch, most).sum(1, dtype=jnp.int32)


def left_of(state: State, rules: Rules) -> Float[Array, "batch"]:
    """How much a token of each row is worth, for all to end soon: 1 in the row furthest from its limit for its speed.

    The square is what served best when the rounds of recorded texts were played through (0 to 3 were tried).
    """
    made = jnp.maximum(state.lengths, 1).astype(jnp.float32)
    rounds = jnp.where(state.running, (rules.limit - state.lengths).astype(jnp.float32) / made, 0.0)
    return jnp.square(rounds / jnp.maximum(rounds.max(), 1e-6))


def room_of(spec: Speculation, rules: Rules) -> Int[Array, "batch"]:
    """Guesses one after the other that a row can have right."""
    state = spec.state
    room = jnp.where(state.running & spec.wanted, rules.limit - state.lengths - 1, 0)  # none after the last token
    if (bound := steady(state.cache)) is not None:
        room = jnp.minimum(room, bound - 1)
    return jnp.maximum(room, 0)
