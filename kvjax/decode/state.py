"""Decoding as a value: everything a half-finished generation is, and the compiled loop that moves it on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.base import Cache
from kvjax.decode.choose import choose
from kvjax.decode.grammars import complete
from kvjax.decode.grammars import follow as ruled_after
from kvjax.decode.sampling import Rules
from kvjax.model import Params, Transformer, cached
from kvjax.pytree import pytree

RUNNING, LIMIT, STOP_TOKEN, STOP_STRING, NOT_FINITE, COMPLETE = range(6)
REASONS = ("running", "limit", "stop token", "stop string", "not finite", "grammar complete")
"""Why a row ended, by its number in `State.reason`.

With a grammar, "stop token" and "grammar complete" say that the text is whole: the second where there is no stop token.
"""


@pytree
class State:
    """A generation under way. The cache holds every token but each row's newest, `pending`.

    `tokens` and `logprobs` fill from the left, -1 and 0 past a row's `lengths`; `logprobs` are of the
    model's own distribution, before penalties and filters, in nats. `step` counts the loop's turns.
    `matched` and `ruled` are where stop strings and grammar stand: the second is `Grammar.state` of a row's tokens,
    without a stop token.
    """

    cache: Cache
    pending: Int[Array, "batch"]
    tokens: Int[Array, "batch new"]
    logprobs: Float[Array, "batch new"]
    lengths: Int[Array, "batch"]
    reason: Int[Array, "batch"]
    step: Int[Array, ""]
    seen: Bool[Array, "batch vocab"]
    counts: Int[Array, "batch vocab"]
    matched: Int[Array, "batch"]
    ruled: Int[Array, "batch"]

    @property
    def running(self) -> Bool[Array, "batch"]:
        return self.reason == RUNNING


def begin(cache: Cache, pending: Int[Array, "batch"], seen: Bool[Array, "batch vocab"], new: int) -> State:
    """A state with no token generated yet and room for `new` a row; `seen` marks the prompt's tokens."""
    batch = seen.shape[0]

    def zeros(shape):
        return jnp.asarray(np.zeros(shape, np.int32))  # from the host: each `jnp.zeros` of a new shape is a compile

    return State(
        cache=cache,
        pending=pending,
        tokens=jnp.asarray(np.full((batch, new), -1, np.int32)),
        logprobs=jnp.asarray(np.zeros((batch, new), np.float32)),
        lengths=zeros(batch),
        reason=zeros(batch),
        step=zeros(()),
        seen=seen,
        counts=zeros(seen.shape),
        matched=zeros(batch),
        ruled=zeros(batch),
    )


def emit(state: State, rules: Rules, logits: Float[Array, "batch vocab"]) -> State:
    """Choose a token for each running row from the logits after its last one, and end rows that are done.

    A row whose logits are not all finite ends without a token.
    """
    state = emit_at(state, rules, logits, state.cache.length, state.running)
    return replace(state, step=state.step + 1)


def emit_at(
    state: State,
    rules: Rules,
    logits: Float[Array, "batch vocab"],
    positions: Int[Array, "batch"],
    wanted: Bool[Array, "batch"],
) -> State:
    """`emit` for the rows `wanted`, where the new tokens will be at `positions`; looks at no cache."""
    logits = logits.astype(jnp.float32)
    finite = jnp.isfinite(logits).all(-1)
    running = state.running & wanted
    active = running & finite
    token = choose(logits, rules, positions, state.lengths, state.seen, state.counts, state.ruled)
    logprob = jnp.take_along_axis(logits, token[:, None], -1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    here = (jnp.arange(state.tokens.shape[1])[None] == state.lengths[:, None]) & active[:, None]
    rows = jnp.arange(token.shape[0])
    lengths = state.lengths + active.astype(jnp.int32)
    matched, met = follow(state.matched, rules, token)
    reason = jnp.where(lengths >= rules.limit, LIMIT, RUNNING)
    reason = jnp.where(met, STOP_STRING, reason)
    ruled = state.ruled
    if not rules.grammars.none:
        ruled = jnp.where(active, ruled_after(rules.grammars, rules.grammar, ruled, token), ruled)
        reason = jnp.where(complete(rules.grammars, rules.grammar, rules.stop, ruled), COMPLETE, reason)
    reason = jnp.where((token[:, None] == rules.stop).any(-1), STOP_TOKEN, reason)
    return replace(
        state,
        pending=jnp.where(active, token, state.pending),
        tokens=jnp.where(here, token[:, None], state.tokens),
        logprobs=jnp.where(here, logprob[:, None], state.logprobs),
        lengths=lengths,
        reason=jnp.where(running, jnp.where(finite, reason, NOT_FINITE), state.reason),
        seen=state.seen.at[rows, token].max(active),
        counts=state.counts.at[rows, token].add(active.astype(jnp.int32)),
        matched=jnp.where(active, matched, state.matched),
        ruled=ruled,
    )


def advance(model: Transformer, params: Params, state: State, rules: Rules, steps: Int[Array, ""] | int) -> State:
    """Feed each row its pending token and choose the next, up to `steps` times, until all rows have ended.

    One compiled `while_loop`; `state` is donated. A row that has ended changes nothing any more.
    """
    return _advance(model, params, state, rules, jnp.asarray(steps, jnp.int32))[0]


def loop(
    model: Transformer, params: Params, state: State, rules: Rules, steps: Int[Array, ""], least: Int[Array, ""]
) -> State:
    """`advance`, to be traced: goes on while at least `least` rows run, 1 or more."""
    begun = state.step

    def unfinished(state: State):
        return (state.running.sum() >= least) & (state.step < begun + steps)

    def body(state: State):
        lengths = state.running.astype(jnp.int32)
        logits, cache = cached(model, params, state.pending[:, None], lengths, state.cache)
        return emit(replace(state, cache=cache), rules, logits)

    return jax.lax.while_loop(unfinished, body, state)


def step(
    model: Transformer, params: Params, state: State, rules: Rules
) -> tuple[State, Int[Array, "batch"], Float[Array, "batch"], Int[Array, "batch"]]:
    """One turn of `advance`'s loop, by the same program; also the new tokens, their logprobs and the reasons.

    A row that had already ended gives -1. These three outlive the state's next donation.
    """
    return _advance(model, params, state, rules, jnp.int32(1))


@partial(jax.jit, donate_argnames="state")
def first(state: State, rules: Rules, logits: Float[Array, "batch vocab"]):
    """Choose the first tokens, from the prompt's logits; returns what `step` does."""
    return _report(emit(state, rules, logits), state.lengths)


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def _advance(model, params, state: State, rules: Rules, steps):
    had = state.lengths
    return _report(loop(model, params, state, rules, steps, jnp.int32(1)), had)


def _report(state: State, had: Int[Array, "batch"]):
    """The state, and copies of each row's newest token and its logprob, -1 and 0 if it had as many before."""
    at, fresh = jnp.maximum(state.lengths - 1, 0)[:, None], state.lengths > had
    token, logprob = (jnp.take_along_axis(x, at, 1)[:, 0] for x in (state.tokens, state.logprobs))
    return state, jnp.where(fresh, token, -1), jnp.where(fresh, logprob, 0.0), state.reason + 0


def follow(matched: Int[Array, "batch"], rules: Rules, token: Int[Array, "batch"]):
    """Run each row's stop-string automaton over its new token: its state then, and whether a string was met."""
    if rules.automaton.next.shape[0] == 0:
        return matched, jnp.zeros(matched.shape, bool)
    hits = rules.automaton.hits[matched, token]
    return rules.automaton.next[matched, token], (hits & rules.strings) != 0
