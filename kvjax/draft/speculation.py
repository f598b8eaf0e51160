"""Speculative decoding: a draft guesses, the model checks all guesses at once, and what is right is kept.

A guess counts as right where it is the token that `generate` would have chosen, drawn with the same key at the same
position, so that a row gets the very tokens of `generate`, whatever the draft says. A guess that is certain of itself
is kept as often as by rejection sampling (Leviathan et al. 2023, arXiv:2211.17192): with the token's probability.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kvjax.cache.base import Cache
from kvjax.decode import state as decoding
from kvjax.decode.generation import Begun, Output, Step, finish, start
from kvjax.decode.prompts import Lengths, Tokens, as_prompts, traced
from kvjax.decode.sampling import GREEDY, Rules, Sampling
from kvjax.decode.state import State
from kvjax.decode.widths import power_of_two
from kvjax.draft.base import Draft
from kvjax.draft.costs import can_time, check_costs, filled, paid_for, so_far, timed
from kvjax.draft.rounds import Run, runner
from kvjax.draft.state import Speculation, blank, grown, widths
from kvjax.model import Params, Transformer
from kvjax.pytree import pytree


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
            takes what was measured for this model, batch, cache and draft; the first calls measure it, on their first
            rounds.
        **others: as `generate` takes them.
    Returns:
        What `generate` returns; `speculated` says how it went.
    Raises:
        ValueError: for what `generate` refuses, a draft that is not for this model, or `costs` that do not fit.
    """
    begun, spec, run = _opened(
        model, params, cache, tokens, lengths, draft, max_new, key, sampling, tokenizer, store, before, costs
    )
    spec, paid = _paid(model, draft, spec, begun.rules, run, costs)
    spec = run(spec, begun.rules, paid, jnp.iinfo(jnp.int32).max)
    return _ended(begun, spec, draft, paid, max_new)


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

    Costs that are not known are measured as rounds go by.
    """
    begun, spec, run = _opened(
        model, params, cache, tokens, lengths, draft, max_new, key, sampling, tokenizer, store, before, costs
    )
    measuring = costs is None and can_time(model, draft, spec, begun.rules)
    seconds = so_far(model, draft, spec, begun.rules).seconds.copy()
    paid = paid_for(costs, model, draft, spec, begun.rules)
    spec = run(spec, begun.rules, paid, 0)  # compiled before the first token is seen
    had = np.zeros(spec.length.shape, np.int32)
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
            return _ended(begun, spec, draft, paid, max_new)
        rounds, started = np.array(spec.rounds), time.perf_counter()
        had, spec = made, run(spec, begun.rules, paid, 1)
        if measuring:
            which = np.asarray(spec.rounds) > rounds
            seconds = np.where(which, np.minimum(seconds, time.perf_counter() - started), seconds)
            paid = jnp.asarray(filled(seconds, widths(draft)))


def _opened(
    model, params, cache, tokens, lengths, draft, max_new, key, sampling, tokenizer, store, before, costs
) -> tuple[Begun, Speculation, Run]:
    """After the prompts and before the first round: also what runs rounds."""
    if not isinstance(draft, Draft) or isinstance(draft, type):
        raise ValueError(f"speculate: `draft` must be one of kvjax.draft's, got {draft!r}")
    draft.check(model.config)
    if isinstance(cache, Cache) and cache.capacity is not None and draft.most >= cache.capacity:
        raise ValueError(
            f"speculate: the draft's `k` must be below the cache's capacity, {cache.capacity}, got {draft.most}"
        )
    check_costs(costs, widths(draft), "speculate")
    begun = start(model, params, cache, tokens, lengths, max_new, key, sampling, tokenizer, store, "speculate")
    texts = begun.tokens, begun.lengths
    if before is not None:
        texts = _joined(model, before, *texts)
    spec = _begin(model, draft, begun.state, *texts, begun.ready is not None)
    return begun, spec, runner(model, params, draft)


def _paid(model, draft, spec: Speculation, rules: Rules, run, costs) -> tuple[Speculation, Array]:
    """Costs that are given, known or timed now; and what was made meanwhile."""
    going = costs is None
    while going and can_time(model, draft, spec, rules):
        spec, going = timed(model, draft, run, spec, rules)
    return spec, paid_for(costs, model, draft, spec, rules)


def _ended(begun: Begun, spec: Speculation, draft: Draft, paid, max_new: int) -> Output:
    how = Speculated(spec.proposed, spec.accepted, spec.rounds, jnp.asarray(widths(draft), jnp.int32), paid)
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
