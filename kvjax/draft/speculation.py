"""Speculative decoding: a draft guesses, the model checks all guesses at once, and what is right is kept.

A guess counts as right where it is the token that `generate` would have chosen, drawn with the same key at the same
position, so that a row gets the very tokens of `generate`, whatever the draft says. A guess that is certain of itself
is kept as often as by rejection sampling (Leviathan et al. 2023, arXiv:2211.17192): with the token's probability.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kvjax.cache.ahead import ahead, picked, settle, steady
from kvjax.cache.base import Cache
from kvjax.compact import compact
from kvjax.decode import state as decoding
from kvjax.decode.generation import Begun, Output, Step, finish, start
from kvjax.decode.prompts import Lengths, Tokens, as_prompts, traced
from kvjax.decode.sampling import GREEDY, Rules, Sampling, power_of_two
from kvjax.decode.state import NOT_FINITE, State, emit, emit_at
from kvjax.draft.base import Draft, wants_hidden
from kvjax.draft.hidden import kept, scored
from kvjax.draft.state import Speculation, blank, grown, tokens_checked, view_of, widths
from kvjax.draft.tree import hopes, paths
from kvjax.model import Params, Transformer
from kvjax.pytree import pytree

PRIOR = 2.0, 3.0
"""Guesses that a row is taken to have had right, and to have had, before any was checked."""

MEMORY = 0.9
"""What a row's record of right guesses keeps with each round of more."""

PATIENCE, LONGEST = 4, 8
"""After so many steps without guesses there is another before the draft is asked again, up to `LONGEST` of them."""

FORGIVING = 1 - 1 / 256
"""What it keeps with each round without a guess: a draft that was of no use is tried again, seldom."""


@pytree
class Speculated:
    """How speculation went.

    Args:
        proposed, accepted: guesses checked, and those of them that were right, a row.
        rounds: model calls with each number of guesses in `widths`.
        costs: seconds of one such call, as measured; where nothing was, in steps. Give them to the next call.
    """

    proposed: Int[Array, "batch"]
    accepted: Int[Array, "batch"]
    rounds: Int[Array, "choices"]
    widths: Int[Array, "choices"]
    costs: Float[Array, "choices"]


def speculate(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens: Tokens,
    lengths: Lengths | None = None,
    *,
    draft: Draft,
    max_new: int,
    key: Key[Array, ""] | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    tokenizer=None,
    store=None,
    before: Sequence[Sequence[int]] | None = None,
    costs: Sequence[float] | Float[Array, "choices"] | None = None,
) -> Output:
    """`generate`, with fewer calls of the model: the same tokens, up to rounding in its logits.

    How many guesses are checked at once, none included, is chosen anew each time, for the most tokens a second by
    how often a row's guesses were right and by what each number costs.

    Args:
        draft: what guesses, such as `kvjax.draft.PromptLookup()`.
        before: what the cache holds of each row already, for the draft to look at: earlier turns of a chat, say.
        costs: what a call of the model with each number of guesses of `widths(draft)` takes, in any unit. None
            measures it, on the first rounds.
        **others: as `generate` takes them.
    Returns:
        What `generate` returns; `speculated` says how it went.
    Raises:
        ValueError: for what `generate` refuses, a draft that is not for this model, or `costs` that do not fit.
    """
    begun, spec, run, choices = _opened(
        model, params, cache, tokens, lengths, draft, max_new, key, sampling, tokenizer, store, before, costs
    )
    paid = paid_for(costs, choices)
    if costs is None and not traced(begun.state.reason):
        spec, paid = _measured(run, spec, begun.rules, choices)
    spec = run(spec, begun.rules, paid, jnp.iinfo(jnp.int32).max)
    return _ended(begun, spec, paid, choices, max_new)


def stream(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens: Tokens,
    lengths: Lengths | None = None,
    *,
    draft: Draft,
    max_new: int,
    key: Key[Array, ""] | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    tokenizer=None,
    store=None,
    before: Sequence[Sequence[int]] | None = None,
    costs: Sequence[float] | Float[Array, "choices"] | None = None,
) -> Generator[Step, None, Output]:
    """`speculate`, yielding tokens as they come, as `kvjax.stream` does: several at once where guesses were right.

    Without `costs` they are taken to be a tenth of a step for each guess.
    """
    begun, spec, run, choices = _opened(
        model, params, cache, tokens, lengths, draft, max_new, key, sampling, tokenizer, store, before, costs
    )
    paid, had = paid_for(costs, choices), np.zeros(spec.length.shape, np.int32)
    while True:
        made, table, scores, reason = (
            np.array(x) for x in (spec.state.lengths, spec.state.tokens, spec.state.logprobs, spec.state.reason)
        )
        for n in range(int((made - had).max())):
            at, fresh = np.minimum(had + n, table.shape[1] - 1)[:, None], had + n < made
            token, score = (np.take_along_axis(x, at, 1)[:, 0] for x in (table, scores))
            ended = np.where(had + n + 1 < made, decoding.RUNNING, reason)
            yield Step(np.where(fresh, token, -1), np.where(fresh, score, np.float32(0)), ended)
        if (reason != decoding.RUNNING).all():
            return _ended(begun, spec, paid, choices, max_new)
        had, spec = made, run(spec, begun.rules, paid, 1)


def _opened(
    model, params, cache, tokens, lengths, draft, max_new, key, sampling, tokenizer, store, before, costs
) -> tuple[Begun, Speculation, Callable, tuple[int, ...]]:
    """After the prompts and before the first round: also what runs rounds, and the numbers of guesses it can check."""
    if not isinstance(draft, Draft):
        raise ValueError(f"speculate: `draft` must be one of kvjax.draft's, got {draft!r}")
    draft.check(model.config)
    choices = widths(draft)
    if isinstance(cache, Cache) and cache.capacity is not None and draft.most >= cache.capacity:
        raise ValueError(
            f"speculate: the draft's `k` must be below the cache's capacity, {cache.capacity}, got {draft.most}"
        )
    if costs is not None and np.shape(costs) != (len(choices),):
        raise ValueError(
            f"speculate: `costs` must have {len(choices)} entries, one for each of {choices} guesses, "
            f"got shape {np.shape(costs)}"
        )
    begun = start(model, params, cache, tokens, lengths, max_new, key, sampling, tokenizer, store, "speculate")
    texts = begun.tokens, begun.lengths
    if before is not None:
        texts = _joined(model, before, *texts)
    spec = _begin(model, draft, begun.state, *texts, begun.ready is not None)
    return begun, spec, partial(advance, model, params, draft, widths=choices), choices


def paid_for(costs, choices: tuple[int, ...]) -> Float[Array, "choices"]:
    """`costs` as an array; where None are given, those that are taken for granted."""
    return jnp.asarray(_guessed(choices) if costs is None else costs, jnp.float32)


def _ended(begun: Begun, spec: Speculation, paid, choices: tuple[int, ...], max_new: int) -> Output:
    how = Speculated(spec.proposed, spec.accepted, spec.rounds, jnp.asarray(choices, jnp.int32), paid)
    return finish(begun, spec.state, max_new, "speculate")._replace(speculated=how)


def _joined(model: Transformer, before: Sequence[Sequence[int]], tokens, lengths):
    """Rows of what was before and what is new, as one array, and their lengths."""
    if traced(tokens, lengths):
        raise ValueError("speculate: `before` is put together on the host, and cannot be used inside `jit`")
    if len(before) != len(tokens):
        raise ValueError(f"speculate: `before` must have {len(tokens)} rows, one a prompt, got {len(before)}")
    rows = [[*old, *row[:length].tolist()] for old, row, length in zip(before, tokens, lengths, strict=True)]
    return as_prompts(model, None, rows, None, "speculate")


def _begin(model: Transformer, draft: Draft, state: State, tokens, lengths, has_first: bool) -> Speculation:
    """Before the first round: the text is the prompt and, if there is one already, the first new token."""
    batch, width = tokens.shape
    size = power_of_two(width + state.tokens.shape[1])
    if isinstance(tokens, np.ndarray):
        text = np.zeros((batch, size), np.int32)
        text[:, :width] = tokens
        text = jnp.asarray(text)
    else:
        text = jnp.pad(tokens, ((0, 0), (0, size - width)))
    spec = blank(model, draft, state, text, jnp.asarray(lengths, jnp.int32))
    return _first(spec) if has_first else spec


@partial(jax.jit, donate_argnames="spec")
def _first(spec: Speculation) -> Speculation:
    return grown(spec, spec.state.pending[:, None], spec.state.lengths)


def _measured(run, spec: Speculation, rules: Rules, choices: tuple[int, ...]) -> tuple[Speculation, Array]:
    """Rounds of each kind, timed on the host: what they make counts, and the first compiles and is not timed.

    Steps without guesses are timed as they are made where guesses do not pay: many between two plans. What a call of
    no rounds takes is not counted.
    """
    seconds = np.full(len(choices), np.inf)
    for i in (0, *range(len(choices)), *range(len(choices))):
        only = jnp.asarray(np.where(np.arange(len(choices)) == i, 1.0, np.inf).astype(np.float32))
        before = np.asarray(spec.rounds)
        if i == 0:
            spec = replace(spec, idle=jnp.full_like(spec.idle, PATIENCE * LONGEST))
        started = time.perf_counter()
        spec = jax.block_until_ready(run(spec, rules, only, 0))
        called = time.perf_counter()
        spec = jax.block_until_ready(run(spec, rules, only, LONGEST if i == 0 else 2))
        taken = (time.perf_counter() - called) - (called - started)
        made = np.asarray(spec.rounds) - before
        if made[i] == made.sum() > 0 and before.sum() > 0 and taken > 0:
            seconds[i] = min(seconds[i], taken / made[i])
    return spec, jnp.asarray(_filled(seconds, choices))


def _filled(seconds: np.ndarray, choices: tuple[int, ...]) -> np.ndarray:
    """Measured costs; those that no row was long enough for, by `_guessed` from the measured ones."""
    known, model = np.isfinite(seconds), np.array(_guessed(choices))
    scale = (seconds[known] / model[known]).mean() if known.any() else 1.0
    return np.where(known, seconds, model * scale).astype(np.float32)


def _guessed(choices: tuple[int, ...]) -> list[float]:
    """Costs in steps where none can be measured: a tenth of a step more for each guess."""
    return [1 + n / 10 for n in choices]


@partial(jax.jit, static_argnames=("model", "widths", "together"), donate_argnames="spec")
def advance(
    model,
    params,
    draft,
    spec: Speculation,
    rules: Rules,
    costs,
    rounds,
    least=1,
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
        worth = _left(spec.state, rules) if together else jnp.ones(spec.right.shape)
        spec = _plan(draft, spec, rules, costs, widths, worth)
        until = spec.idle + (1 if wants_hidden(draft) else jnp.clip(spec.idle // PATIENCE, 1, LONGEST))

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
    logits, cache, hidden = scored(model, params, spec, tokens, lengths, state.cache, last=True)
    state = emit(replace(state, cache=cache), rules, logits)
    idle = jnp.full_like(spec.right, FORGIVING)
    spec = replace(spec, state=state, right=spec.right * idle, checked=spec.checked * idle)
    return kept(grown(spec, state.pending[:, None], state.lengths - had), hidden, state.lengths - had)


def _round(model, params, rules: Rules, width: int, spec: Speculation) -> Speculation:
    """Check up to `width` guesses a row, and keep those that are what would have been chosen, and the token after.

    What would have been chosen after a node of the tree is looked for among its children; a chain has one each.
    """
    state, cache, had = spec.state, spec.state.cache, spec.state.lengths
    guess, count, nth = spec.guess[:, :width], jnp.minimum(spec.count, width), jnp.arange(width, dtype=jnp.int32)
    real, above = nth[None] < count[:, None], nth[None]
    path = None
    if spec.parent is not None:
        above = spec.parent[:, :width] + 1
        path = paths(spec.parent[:, :width])
    tokens = jnp.concatenate([state.pending[:, None], jnp.where(real, guess, 0)], axis=1)
    taken = jnp.where(state.running, 1 + count, 0)
    total = tokens_checked(count.shape[0], width)
    places = None if total == tokens.size else compact(taken, width + 1, total)
    logits, seen, hidden = scored(model, params, spec, tokens, taken, ahead(cache, path), last=False, places=places)
    if places is not None and hidden is not None:
        hidden = places.spread(hidden)
    room = _room(spec, rules)

    def after(at: Int[Array, "batch"]) -> Float[Array, "batch vocab"]:
        if places is None:
            return picked(logits, at[:, None])[:, 0]
        return jnp.take(logits[0], picked(places.place, at[:, None])[:, 0], axis=0, mode="clip")

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
    cache, full = settle(cache, seen, made, None if path is None else way)
    reason = jnp.where(full & state.running, NOT_FINITE, ended.reason)
    state = replace(ended, cache=cache, reason=reason, step=state.step + 1)
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
    return kept(grown(spec, new, made), hidden, made)


def _room(spec: Speculation, rules: Rules) -> Int[Array, "batch"]:
    """Guesses one after the other that a row can have right."""
    state = spec.state
    room = jnp.where(state.running & spec.wanted, rules.limit - state.lengths - 1, 0)  # none after the last token
    if (bound := steady(state.cache)) is not None:
        room = jnp.minimum(room, bound - 1)
    return jnp.maximum(room, 0)


def _left(state: State, rules: Rules) -> Float[Array, "batch"]:
    """How much a token of each row is worth, for all to end soon: 1 in the row furthest from its limit for its speed.

    The square is what served best when the rounds of recorded texts were played through (0 to 3 were tried).
    """
    made = jnp.maximum(state.lengths, 1).astype(jnp.float32)
    rounds = jnp.where(state.running, (rules.limit - state.lengths).astype(jnp.float32) / made, 0.0)
    return jnp.square(rounds / jnp.maximum(rounds.max(), 1e-6))


def _plan(draft: Draft, spec: Speculation, rules: Rules, costs, widths: tuple[int, ...], worth) -> Speculation:
    """The next guesses, and how many of them are worth checking; `worth` is that of a row's tokens."""
    state, view, room = spec.state, view_of(spec, rules), _room(spec, rules)
    own = draft.observe(spec.own, view)
    chance = (spec.right + PRIOR[0]) / (spec.checked + PRIOR[1])
    sizes, nth = jnp.array(widths, jnp.int32), jnp.arange(draft.most)[None]
    chain = jnp.cumprod(jnp.broadcast_to(chance[:, None], (*chance.shape, draft.most)), axis=1)
    plan = partial(_best, worth=worth, running=state.running, costs=costs, widths=widths)
    want = sizes[plan(jnp.where(nth < room[:, None], chain, 0.0), draft.most)[0]]
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
    choice, count = plan(jnp.where(able, hope, 0.0), count)
    return replace(spec, own=own, guess=guess, parent=parent, count=count, choice=choice)


def _best(hope: Float[Array, "batch most"], count, *, worth, running, costs, widths: tuple[int, ...]):
    """The call that makes the most for its cost, if a guess is kept as often as `hope` says, and its counts."""
    hope, worth = hope * worth[:, None], jnp.where(running, worth, 0.0)
    counts = jnp.stack([_fitting(hope, jnp.minimum(count, width), running, width) for width in widths])
    chosen = jnp.arange(hope.shape[1])[None, None] < counts[..., None]
    expected = worth.sum() + jnp.where(chosen, hope[None], 0.0).sum((1, 2))
    choice = jnp.argmax(expected / costs).astype(jnp.int32)
    return choice, counts[choice]


def _fitting(hope: Float[Array, "batch most"], count, running, width: int) -> Int[Array, "batch"]:
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
