"""Beam search in one compiled loop: the prompt held once, and beams that change places by their page tables alone.

A hypothesis scores `total / length ** length_penalty`, where `total` is the sum of its tokens' logprobs and `length`
counts them, a stop token included. (Equation 14 of Wu et al. 2016, arXiv:1609.08144, has `((5 + length) / 6) ** alpha`
there, and a term for coverage.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.base import Cache, fork
from kvjax.cache.paged import Paged, release
from kvjax.decode.generation import Output, check_counts, check_number
from kvjax.decode.grammars import Grammars, allowed, complete, follow, targets
from kvjax.decode.prompts import Lengths, Tokens, as_prompts, traced
from kvjax.decode.sampling import Sampling, rules
from kvjax.decode.spread import check_room, spread
from kvjax.decode.state import COMPLETE, LIMIT, NOT_FINITE, STOP_TOKEN
from kvjax.decode.step import fill
from kvjax.decode.widths import power_of_two
from kvjax.grammar.grammar import Grammar
from kvjax.model import Params, Transformer, cached
from kvjax.pytree import pytree

PAGE = 16
"""Tokens a page: what a beam copies at most when another one goes on from the same parent."""


@pytree
class Hypotheses:
    """Continuations of one prompt: -1 and 0 past each one's `lengths`. `total` is -inf where there is none.

    `ruled` is the state in the grammar.
    """

    tokens: Int[Array, "count new"]
    logprobs: Float[Array, "count new"]
    lengths: Int[Array, "count"]
    total: Float[Array, "count"]
    ruled: Int[Array, "count"]


@pytree
class Search:
    """A search under way: `live` hypotheses of `made` tokens each, in the cache's order, and the best that `ended`."""

    cache: Cache
    live: Hypotheses
    ended: Hypotheses
    made: Int[Array, ""]
    finite: Bool[Array, ""]


def beam(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens: Tokens,
    lengths: Lengths | None = None,
    *,
    beams: int,
    max_new: int,
    length_penalty: float = 1.0,
    stop: Sequence[int] = (),
    banned: Sequence[int] = (),
    capacity: int | None = None,
    grammar: Grammar | None = None,
) -> Output:
    """The `beams` best continuations of one prompt that beam search finds, best first, with their `score`.

    At each step every live hypothesis is continued by every token. Those that meet a stop token, whatever their rank
    in the step, may enter the pool of the `beams` best that have ended; the `beams` likeliest others live on. At
    `max_new` tokens they end too. The search ends before that once no continuation of a live hypothesis can score
    above the worst of a full pool, which is proven late if `length_penalty` is large.

    Args:
        cache: of one row, donated; takes in the prompt, and needs no room for what follows.
        beams: from 1 to as many tokens as are not banned.
        length_penalty: the power of the length that divides the sum of logprobs: 0 for the sum, 1 for the mean.
        stop: token ids that end a hypothesis; the one met is part of it.
        banned: token ids that no hypothesis has.
        capacity: own tokens that a row of the cache returned can hold, and at least the `max_new` of this call.
        grammar: what a hypothesis may be, as `Sampling` takes it: one without a stop token ends once it is whole and
            nothing can follow. Of fewer than `beams` possible ones the rest are empty, with a score of -inf.
    Returns:
        The cache holds the prompt once, as `Shared`, and is filled anew with the hypotheses that are returned.
    Raises:
        ValueError: for what `prefill` refuses, more than one prompt, `beams` or `max_new` out of range, a
            `length_penalty` that is not finite or too large, a stop or banned token outside the vocabulary, or a
            grammar that `rules` refuses.
        FloatingPointError: if logits were not finite.
    """
    tokens, lengths = as_prompts(model, cache, tokens, lengths, "beam")
    vocab = model.config.vocab
    stops = _check(vocab, tokens.shape[0], beams, max_new, length_penalty, stop, banned, capacity)
    row = Sampling(stop=stops[stops >= 0].tolist(), banned=banned, grammar=grammar)
    ruling = rules(row, batch=1, vocab=vocab, max_new=max_new)
    new = power_of_two(max_new)
    capacity = max(new, capacity or 0)
    if model.config.rope is None:
        capacity = min(capacity, model.config.max_positions)
    inner = Paged(PAGE, beams * -(-capacity // PAGE) + beams // 2)  # a shared page stays until all have their copies
    check_room(model, cache, lengths, np.full(beams, max_new), inner, capacity, "beam")
    logits, cache = fill(model, params, cache, tokens, lengths)
    cache = spread(model, cache, beams, capacity, inner)
    settings = jnp.asarray(stops), jnp.asarray(np.float32(length_penalty)), jnp.asarray(np.int32(max_new))
    bans = ruling.bias_ids[0], ruling.grammars
    cache, found, score, reason = _search(model, params, cache, logits, *settings, *bans, new=new)
    if not traced(reason) and (np.asarray(reason) == NOT_FINITE).any():
        raise FloatingPointError(f"beam: logits were not finite after {int(found.lengths.max())} new tokens")
    if max_new > 1:
        held = jnp.maximum(found.lengths - 1, 0)
        _, cache = fill(model, params, cache, jnp.maximum(found.tokens, 0), held)
    new_tokens, logprobs = found.tokens, found.logprobs
    if new != max_new:
        new_tokens, logprobs = new_tokens[:, :max_new], logprobs[:, :max_new]
    return Output(new_tokens, found.lengths, logprobs, cache, reason, score=score)


def _check(vocab: int, rows: int, beams, max_new, length_penalty, stop, banned, capacity) -> Int[np.ndarray, "stops"]:
    """The stop tokens, each once, padded with -1 to a power of two."""
    check_counts("beam", beams=beams, max_new=max_new, **({} if capacity is None else {"capacity": capacity}))
    if rows != 1:
        raise ValueError(f"beam: `tokens` must be one prompt, got {rows}: search one at a time")
    if beams > vocab:
        raise ValueError(f"beam: `beams` must be at most the vocabulary's {vocab} tokens, got {beams}")
    if beams > (left := vocab - len(set(banned))):
        raise ValueError(f"beam: `beams` must be at most the {left} tokens that are not `banned`, got {beams}")
    check_number("beam", "length_penalty", length_penalty)
    if abs(length_penalty) * np.log2(max_new) > 120:  # or scores would be 0, or infinite, in float32
        raise ValueError(
            f"beam: `length_penalty` must leave `max_new` to its power between 1e-36 and 1e36, got {length_penalty} "
            f"with `max_new` {max_new}"
        )
    ids = list(dict.fromkeys(stop))
    if wrong := [i for i in ids if not isinstance(i, Integral) or not 0 <= i < vocab]:
        raise ValueError(f"beam: `stop` must be token ids in [0, {vocab}), got {wrong}")
    return np.array(ids + [-1] * (power_of_two(len(ids)) - len(ids)), np.int32)


@partial(jax.jit, static_argnames=("model", "new"), donate_argnames="cache")
def _search(model, params, cache: Cache, logits, stop, penalty, limit, banned, ruling: Grammars, *, new: int):
    """From the prompt's logits to the cache, back at the prompt, and the best hypotheses, their scores and reasons."""
    beams, vocab = cache.batch, logits.shape[1]
    none = Hypotheses(
        tokens=jnp.full((beams, new), -1, jnp.int32),
        logprobs=jnp.zeros((beams, new)),
        lengths=jnp.zeros(beams, jnp.int32),
        total=jnp.full(beams, -jnp.inf),
        ruled=jnp.zeros(beams, jnp.int32),
    )
    start = replace(none, total=none.total.at[0].set(0.0))
    search = Search(cache, start, none, jnp.zeros((), jnp.int32), jnp.ones((), bool))
    search = _turn(search, jnp.broadcast_to(logits, (beams, vocab)), stop, penalty, banned, ruling)

    def going(search: Search):
        at_most = _at_most(search.live.total, search.made, limit, penalty)
        better = at_most.max() > _score(search.ended, penalty).min()
        return search.finite & (search.made < limit) & better

    def body(search: Search) -> Search:
        newest = jax.lax.dynamic_index_in_dim(search.live.tokens, search.made - 1, axis=1)
        logits, cache = cached(model, params, newest, None, search.cache)
        return _turn(replace(search, cache=cache), logits, stop, penalty, banned, ruling)

    search = jax.lax.while_loop(going, body, search)
    whole = replace(search.live, total=jnp.where(search.made == limit, search.live.total, -jnp.inf))
    found = _best(search.ended, whole, penalty)
    last = jnp.take_along_axis(found.tokens, jnp.maximum(found.lengths - 1, 0)[:, None], axis=1)
    met = ((last == stop[None]) & (last >= 0)).any(1)
    reason = jnp.where(met, STOP_TOKEN, LIMIT)
    if not ruling.none:
        whole = complete(ruling, jnp.zeros(beams, jnp.int32), _each(stop, beams), found.ruled)
        there = found.total > -jnp.inf
        reason = jnp.where(whole | ~there, COMPLETE, reason)
        found = replace(
            found,
            tokens=jnp.where(there[:, None], found.tokens, -1),
            logprobs=jnp.where(there[:, None], found.logprobs, 0.0),
            lengths=jnp.where(there, found.lengths, 0),
        )
    reason = jnp.where(search.finite, reason, NOT_FINITE).astype(jnp.int32)
    found = replace(found, lengths=jnp.where(search.finite, found.lengths, search.made - 1))
    return release(search.cache), found, _score(found, penalty), reason


def _turn(
    search: Search,
    logits: Float[Array, "beams vocab"],
    stop: Int[Array, "stops"],
    penalty,
    banned: Int[Array, "bans"],
    ruling: Grammars,
) -> Search:
    """Continue every live hypothesis by every token, from the logits after each."""
    live, (beams, vocab) = search.live, logits.shape
    logits = logits.astype(jnp.float32)
    logprobs = jax.nn.log_softmax(logits, axis=-1)  # never above 0, rounding included, as `_at_most` needs
    logprobs = logprobs.at[:, jnp.where(banned < 0, vocab, banned)].set(-jnp.inf, mode="drop")
    if not ruling.none:
        which = jnp.zeros(beams, jnp.int32)
        logprobs = jnp.where(allowed(ruling, which, _each(stop, beams), live.ruled), logprobs, -jnp.inf)
    ending = jnp.where(stop[None] >= 0, jnp.take(logprobs, jnp.maximum(stop, 0), axis=1), -jnp.inf)
    parents = jnp.repeat(jnp.arange(beams), stop.shape[0])
    ended = _grown(live, parents, jnp.tile(stop, beams), ending.reshape(-1), search.made, ruling)
    pool = _best(search.ended, ended, penalty)
    staying = logprobs.at[:, jnp.where(stop < 0, vocab, stop)].set(-jnp.inf, mode="drop")
    if not ruling.none:  # without a stop token a text ends where nothing can follow
        to = targets(ruling, which, live.ruled)
        whole = (to >= 0) & ruling.done[jnp.maximum(to, 0)] & (stop < 0).all()
        sums, chosen = jax.lax.top_k(jnp.where(whole, live.total[:, None] + staying, -jnp.inf).reshape(-1), beams)
        added = jnp.where(sums > -jnp.inf, staying.reshape(-1)[chosen], -jnp.inf)
        ended = _grown(live, chosen // vocab, chosen % vocab, added, search.made, ruling)
        pool, staying = _best(pool, ended, penalty), jnp.where(whole, -jnp.inf, staying)
    _, chosen = jax.lax.top_k((live.total[:, None] + staying).reshape(-1), beams)
    parents, token = chosen // vocab, chosen % vocab
    return Search(
        cache=fork(search.cache, parents),
        live=_grown(live, parents, token, staying.reshape(-1)[chosen], search.made, ruling),
        ended=pool,
        made=search.made + 1,
        finite=jnp.isfinite(logits).all(),
    )


def _grown(
    old: Hypotheses,
    parents: Int[Array, "count"],
    token: Int[Array, "count"],
    logprob: Float[Array, "count"],
    at: Int[Array, ""],
    ruling: Grammars,
) -> Hypotheses:
    """Hypotheses `parents` of `old`, each with one token more, at index `at`."""
    tokens, logprobs, lengths, total, ruled = (
        jnp.take(x, parents, axis=0) for x in (old.tokens, old.logprobs, old.lengths, old.total, old.ruled)
    )
    if not ruling.none:
        ruled = follow(ruling, jnp.zeros_like(ruled), ruled, jnp.maximum(token, 0))
    here = (jnp.arange(tokens.shape[1]) == at)[None]
    return Hypotheses(
        tokens=jnp.where(here, token[:, None], tokens),
        logprobs=jnp.where(here, logprob[:, None], logprobs),
        lengths=lengths + 1,
        total=total + logprob,
        ruled=ruled,
    )


def _each(stop: Int[Array, "stops"], beams: int) -> Int[Array, "beams stops"]:
    return jnp.broadcast_to(stop[None], (beams, stop.shape[0]))


def _best(pool: Hypotheses, more: Hypotheses, penalty: Float[Array, ""]) -> Hypotheses:
    """As many as the pool has, of both, best first; of equals those of the pool."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pool, more)
    _, order = jax.lax.top_k(_score(both, penalty), pool.total.shape[0])
    return jax.tree.map(lambda x: jnp.take(x, order, axis=0), both)


def _score(of: Hypotheses, penalty: Float[Array, ""]) -> Float[Array, "count"]:
    return of.total / jnp.maximum(of.lengths, 1).astype(jnp.float32) ** penalty


def _at_most(
    total: Float[Array, "beams"], made: Int[Array, ""], limit: Int[Array, ""], penalty: Float[Array, ""]
) -> Float[Array, "beams"]:
    """No continuation of a hypothesis of `made` tokens scores more, since its total, at most 0, can only fall.

    Of lengths from `made + 1` to `limit` the one whose power is largest brings the total nearest to 0: the last if
    the penalty is positive, the next if it is negative.
    """
    powers = jnp.stack([made + 1, limit]).astype(jnp.float32) ** penalty
    return total / powers.max()
