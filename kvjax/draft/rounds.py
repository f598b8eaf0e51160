"""Rounds of speculation in one compiled loop: a plan, then a step, or a call that checks guesses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.ahead import ahead, picked, settle
from kvjax.compact import Compact, compact
from kvjax.decode.sampling import Rules
from kvjax.decode.state import emit, emit_at
from kvjax.draft.base import Draft
from kvjax.draft.plan import left_of, plan_of, room_of
from kvjax.draft.state import LONGEST, Speculation, grown, tokens_checked, widths
from kvjax.draft.tree import paths
from kvjax.model import Params, Transformer, with_hidden

Run = Callable[..., Speculation]
"""Takes a speculation, rules, costs, how many rounds at most, and how many rows must run for another."""

MEMORY = 0.9
"""What a row's record of right guesses keeps with each round of more."""

PATIENCE = 4
"""After so many steps without guesses there is another before the draft is asked again, up to `LONGEST` of them."""

FORGIVING = 1 - 1 / 256
"""What it keeps with each round without a guess: a draft that was of no use is tried again, seldom."""


def runner(model: Transformer, params: Params, draft: Draft, *, together: bool = True) -> Run:
    """`advance` but for what it is to go on from, always as the one program: counts are int32."""

    def run(spec: Speculation, rules: Rules, costs, rounds: int, least: int = 1) -> Speculation:
        counts = jnp.asarray(rounds, jnp.int32), jnp.asarray(least, jnp.int32)
        return advance(model, params, draft, spec, rules, costs, *counts, widths=widths(draft), together=together)

    return run


@partial(jax.jit, static_argnames=("model", "widths", "together"), donate_argnames="spec")
def advance(
    model,
    params,
    draft,
    spec: Speculation,
    rules: Rules,
    costs,
    rounds,
    least,
    *,
    widths: tuple[int, ...],
    together: bool = True,
):
    """Up to `rounds` rounds, while at least `least` rows run; `spec` is donated.

    If rows are wanted `together` guesses of those that will take longest count for more; else every token is worth
    the same.

    Each is planned, and then made in the loop of its number of guesses, which turns once: XLA writes a cache in place
    in a loop, and copies it in a branch. The longer no guess was worth checking, the more steps go by between plans.
    """
    most = spec.rounds.sum() + jnp.minimum(rounds, jnp.iinfo(jnp.int32).max - spec.rounds.sum())

    def going(spec: Speculation):
        return (spec.running.sum() >= least) & (spec.rounds.sum() < most)

    def turn(spec: Speculation) -> Speculation:
        worth = left_of(spec.state, rules) if together else jnp.ones(spec.right.shape)
        spec = plan_of(draft, spec, rules, costs, widths, worth)
        until = spec.idle + jnp.clip(spec.idle // PATIENCE, 1, LONGEST)

        def step(spec: Speculation) -> Speculation:
            return replace(_plain(model, params, rules, spec), rounds=spec.rounds.at[0].add(1), idle=spec.idle + 1)

        spec = jax.lax.while_loop(lambda spec: (spec.choice == 0) & (spec.idle < until) & going(spec), step, spec)
        for i, width in enumerate(widths[1:], 1):

            def check(spec: Speculation, i=i, width=width) -> Speculation:
                spec = replace(spec, choice=jnp.full_like(spec.choice, -1), rounds=spec.rounds.at[i].add(1))
                return replace(_round(model, params, rules, width, spec), idle=jnp.zeros_like(spec.idle))

            spec = jax.lax.while_loop(lambda spec, i=i: spec.choice == i, check, spec)
        return spec

    return jax.lax.while_loop(going, turn, spec)


def _plain(model, params, rules: Rules, spec: Speculation) -> Speculation:
    """A step as `generate` makes it."""
    state, had = spec.state, spec.state.lengths
    tokens, lengths = state.pending[:, None], state.running.astype(jnp.int32)
    logits, cache, hidden = _scored(model, params, spec, tokens, lengths, state.cache, last=True)
    state = emit(replace(state, cache=cache), rules, logits)
    idle = jnp.full_like(spec.right, FORGIVING)
    spec = replace(spec, state=state, right=spec.right * idle, checked=spec.checked * idle)
    return _with_hidden(grown(spec, state.pending[:, None], state.lengths - had), hidden, state.lengths - had)


def _round(model, params, rules: Rules, width: int, spec: Speculation) -> Speculation:
    """Check up to `width` guesses a row, and keep those that are what would have been chosen, and the token after.

    None are checked in a row whose cache has no room for all of them.
    What would have been chosen after a node of the tree is looked for among its children; a chain has one each.
    """
    state, cache, had = spec.state, spec.state.cache, spec.state.lengths
    guess, count, nth = spec.guess[:, :width], jnp.minimum(spec.count, width), jnp.arange(width, dtype=jnp.int32)
    _, crowded = cache.opened(jnp.where(state.running, 1 + count, 0))
    count = jnp.where(crowded, 0, count)
    _, full = cache.opened(jnp.where(state.running, 1 + count, 0))
    real, above = nth[None] < count[:, None], nth[None]
    path = None
    if spec.parent is not None:
        above = spec.parent[:, :width] + 1
        path = paths(spec.parent[:, :width])
    tokens = jnp.concatenate([state.pending[:, None], jnp.where(real, guess, 0)], axis=1)
    taken = jnp.where(state.running, 1 + count, 0)
    total = tokens_checked(count.shape[0], width)
    places = None if total == tokens.size else compact(taken, width + 1, total)
    logits, seen, hidden = _scored(model, params, spec, tokens, taken, ahead(cache, path), last=False, places=places)
    if places is not None and hidden is not None:
        hidden = places.spread(hidden)
    room = room_of(spec, rules)

    def after(at: Int[Array, "batch"]) -> Float[Array, "batch vocab"]:
        if places is None:
            next_one = picked(logits, at[:, None])[:, 0]
        else:
            next_one = jnp.take(logits[0], picked(places.place, at[:, None])[:, 0], axis=0, mode="clip")
        return jnp.where(full[:, None], jnp.nan, next_one)  # as where a token is taken in for which there is no room

    def follow(carry: tuple[Any, ...]):
        j, at, way, tried, agreeing, state = carry
        new = emit_at(state, rules, after(at), cache.length + 1 + j, agreeing)
        children = real & (above == at[:, None]) & (agreeing & (j < room))[:, None]
        right = children & (guess == new.pending[:, None])
        next_one = jnp.where(right.any(1), jnp.argmax(right, axis=1).astype(jnp.int32), width)
        tried += (children & (nth[None] <= next_one[:, None])).sum(1, dtype=jnp.int32)
        agreeing &= (new.lengths > state.lengths) & new.running & right.any(1)
        at = jnp.where(agreeing, next_one + 1, at)
        way = jax.lax.dynamic_update_slice_in_dim(way, at[:, None], j + 1, axis=1)
        return j + 1, at, way, tried, agreeing, new

    nothing = jnp.zeros_like(count)
    way = jnp.zeros((*count.shape, width + 2), jnp.int32)  # a place more than is used, for the end to be written to
    begun = jnp.zeros((), jnp.int32), nothing, way, nothing, state.running, replace(state, cache=None)
    _, _, way, tried, _, ended = jax.lax.while_loop(lambda carry: carry[4].any(), follow, begun)
    way, made = way[:, : width + 1], ended.lengths - had
    if path is not None:
        guess = picked(guess, way[:, 1:] - 1)
        hidden = None if hidden is None else picked(hidden, way)
    cache, _ = settle(cache, seen, made, None if path is None else way)
    state = replace(ended, cache=cache, step=state.step + 1)
    hit = jnp.maximum(made - 1, 0)
    keep = jnp.where(count > 0, MEMORY, FORGIVING)
    spec = replace(
        spec,
        state=state,
        right=spec.right * keep + hit.astype(jnp.float32),
        checked=spec.checked * keep + tried.astype(jnp.float32),
        proposed=spec.proposed + count,
        accepted=spec.accepted + hit,
    )
    last = jnp.arange(width + 1)[None] == (made - 1)[:, None]
    new = jnp.where(last, state.pending[:, None], jnp.pad(guess, ((0, 0), (0, 1))))
    return _with_hidden(grown(spec, new, made), hidden, made)


def _scored(model, params, spec: Speculation, tokens, lengths, cache, *, last: bool, places: Compact | None = None):
    """Logits, the cache after, and what the head saw, None where no draft asks."""
    if spec.hidden is not None:
        return with_hidden(model, params, tokens, lengths, cache, last=last, places=places)[:3]
    return *model.apply({"params": params}, tokens, lengths, cache, last=last, places=places), None


def _with_hidden(spec: Speculation, hidden, made: Int[Array, "batch"]) -> Speculation:
    """With `hidden` of each row's first `made` checked tokens behind those that the draft has not looked at yet."""
    if hidden is None:
        return spec
    assert spec.hidden is not None and spec.fresh is not None, "a draft that asked"
    nth = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
    at = jnp.where(nth < made[:, None], spec.fresh[:, None] + nth, spec.hidden.shape[1])
    held = spec.hidden.at[jnp.arange(made.shape[0])[:, None], at].set(hidden, mode="drop")
    return replace(spec, hidden=held, fresh=spec.fresh + made)
