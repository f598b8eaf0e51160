"""Generate text: the whole of it in one compiled loop, or a token at a time as it comes."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kvjax.cache.base import Cache, check, is_whole
from kvjax.cache.prefix import PrefixStore, keep, reuse
from kvjax.decode import state as decoding
from kvjax.decode.prompts import Lengths, Tokens, as_prompts, traced
from kvjax.decode.sampling import GREEDY, Rules, Sampling, rules
from kvjax.decode.state import REASONS, State
from kvjax.decode.step import fill
from kvjax.decode.widths import power_of_two
from kvjax.model import Params, Transformer


class Output(NamedTuple):
    """What every decoder returns.

    `tokens` are the new ones, -1 past each row's `lengths`; `logprobs` are of the model's own distribution,
    in nats; `reason` says by its number in `REASONS` why the row ended. The cache holds all but each row's
    last token: to go on, give that one (`last`) as the next prompt, alone or with more after it. `store` is the prefix
    store that now keeps these rows too, if one was given; `speculated` says how speculation went, if there was any;
    `score` is what the rows were chosen by, if they were chosen among more.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, "batch"]
    logprobs: Float[Array, "batch new"]
    cache: Cache
    reason: Int[Array, "batch"]
    store: PrefixStore | None = None
    speculated: Any = None
    score: Float[Array, "batch"] | Int[Array, "batch"] | None = None

    @property
    def last(self) -> Int[Array, "batch one"]:
        return jnp.take_along_axis(self.tokens, jnp.maximum(self.lengths - 1, 0)[:, None], axis=1)


class Step(NamedTuple):
    """One token a row, as `stream` yields it: -1 in a row that has ended; `reason` is 0 while a row runs."""

    tokens: Int[np.ndarray, "batch"]
    logprobs: Float[np.ndarray, "batch"]
    reason: Int[np.ndarray, "batch"]


def generate(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens: Tokens,
    lengths: Lengths | None = None,
    *,
    max_new: int,
    key: Key[Array, ""] | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    tokenizer=None,
    store: PrefixStore | None = None,
) -> Output:
    """Take in prompts and decode up to `max_new` tokens a row, ending early when every row has ended.

    Args:
        cache: donated: use the one returned. Rows go on from what it holds.
        tokens: prompts, as `prefill` takes them. A width of 1 starts the loop directly, so that going on
            from `Output.last` gives, bit for bit, the tokens of one longer call.
        key: needed when a row samples. Same key and row (or `Sampling.seed`): same tokens.
        sampling: for all rows, or one each.
        tokenizer: needed for stop strings only.
        store: keys of earlier texts in this `Paged` cache, donated. Prompts are then whole texts for empty rows
            (`kvjax.cache.release`): only what the store does not have of them is taken in, and the store that the
            output brings keeps these texts as well.
    Raises:
        ValueError: for what `prefill` refuses, `max_new` below 1, too small a cache, or a store that is not its.
        FloatingPointError: if a row's logits were not finite, with the row and the step.
    """
    begun = start(model, params, cache, tokens, lengths, max_new, key, sampling, tokenizer, store, "generate")
    state = decoding.advance(model, params, begun.state, begun.rules, max_new)
    return finish(begun, state, max_new, "generate")


def stream(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens: Tokens,
    lengths: Lengths | None = None,
    *,
    max_new: int,
    key: Key[Array, ""] | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    tokenizer=None,
    store: PrefixStore | None = None,
) -> Generator[Step, None, Output]:
    """`generate`, yielding each step's tokens as they come; the generator's return value is the `Output`.

    The same tokens by the same compiled loop. The next step is under way while the caller has the last.
    """
    begun = start(model, params, cache, tokens, lengths, max_new, key, sampling, tokenizer, store, "stream")
    state, ready = begun.state, begun.ready
    while True:
        state, *ahead = decoding.step(model, params, state, begun.rules)
        if ready is not None:
            now = Step(*(np.asarray(x) for x in ready))
            if (now.tokens >= 0).any():
                yield now
            if (now.reason != decoding.RUNNING).all():
                return finish(begun, state, max_new, "stream")
        ready = ahead


class Begun(NamedTuple):
    """A generation after its prompts, `tokens` and `lengths` of them; `ready` is the first `Step`, if there is one."""

    state: State
    rules: Rules
    ready: tuple[Array, ...] | None
    store: PrefixStore | None
    tokens: Tokens
    lengths: Lengths


def start(model, params, cache, tokens, lengths, max_new, key, sampling, tokenizer, store, where: str) -> Begun:
    """Prefill and the first token; a prompt of one token is left to the loop."""
    check_counts(where, max_new=max_new)
    tokens, lengths = as_prompts(model, cache if store is None else None, tokens, lengths, where)
    batch, vocab = tokens.shape[0], model.config.vocab
    settings = rules(sampling, batch=batch, vocab=vocab, max_new=max_new, key=key, tokenizer=tokenizer)
    seen, texts = seen_in(tokens, lengths, vocab), (tokens, lengths)
    if store is not None:
        check(cache, model, batch, where)
        if traced(tokens, lengths, cache.length, settings.limit):
            raise ValueError(f"{where}: `store` is an index on the host, and cannot be used inside `jit`")
        store, cache, rest = reuse(store, cache, _rows(tokens, lengths), np.asarray(settings.limit) - 1)
        tokens, lengths = as_prompts(model, cache, rest, None, where)
    _check_room(cache, lengths, settings, where)
    room = power_of_two(max_new)
    if tokens.shape[1] == 1:
        state = decoding.begin(cache, jnp.asarray(tokens[:, 0]), seen, room)
        return Begun(state, settings, None, store, *texts)
    logits, cache = fill(model, params, cache, tokens, lengths)
    state = decoding.begin(cache, jnp.asarray(np.zeros(batch, np.int32)), seen, room)
    state, *ready = decoding.first(state, settings, logits)
    return Begun(state, settings, tuple(ready), store, *texts)


def finish(begun: Begun, state: State, max_new: int, where: str) -> Output:
    if not traced(state.reason):
        failed = np.flatnonzero(np.asarray(state.reason) == decoding.NOT_FINITE)
        if failed.size:
            row = int(failed[0])
            raise FloatingPointError(
                f"{where}: the logits of row {row} were not finite at step {int(state.lengths[row])} "
                f"(position {int(state.cache.length[row])}); rows concerned: {failed.tolist()}"
            )
    tokens, logprobs = state.tokens, state.logprobs
    if tokens.shape[1] != max_new:
        tokens, logprobs = tokens[:, :max_new], logprobs[:, :max_new]
    store, cache = begun.store, state.cache
    if store is not None:
        prompts, ends = _rows(begun.tokens, begun.lengths), np.asarray(cache.length).tolist()
        texts = [(a + b)[:end] for a, b, end in zip(prompts, np.asarray(tokens).tolist(), ends, strict=True)]
        store, cache = keep(store, cache, texts, prompts=[len(prompt) for prompt in prompts])
    return Output(tokens, state.lengths, logprobs, cache, state.reason, store)


def _rows(tokens, lengths) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def _check_room(cache: Cache, lengths, settings: Rules, where: str) -> None:
    """All but the last new token go into the cache."""
    if traced(cache.length, lengths, settings.limit):
        return
    if why := cache.strategy.need(cache, np.asarray(lengths) + np.asarray(settings.limit) - 1):
        raise ValueError(f"{where}: held, prompt and new tokens {why}: make it larger, or `max_new` smaller")


def check_counts(where: str, **counts) -> None:
    """Raise ValueError for a count that is no whole number of at least 1."""
    for name, value in counts.items():
        if not is_whole(value, 1):
            raise ValueError(f"{where}: `{name}` must be at least 1, a whole number, got {value!r}")


def check_number(where: str, name: str, value: Any, *, above: float | int | None = None) -> None:
    """Raise ValueError for what is no finite number, or, where there is a bound, no number above it."""
    number: Any = value if isinstance(value, Real) else math.nan
    if not (abs(number) < math.inf if above is None else number > above):
        what = "a finite number" if above is None else f"above {above}"
        raise ValueError(f"{where}: `{name}` must be {what}, got {value!r}")


def seen_in(tokens, lengths, vocab: int):
    """Which tokens each prompt has; on the host where it can be, so that a new width costs no compile."""
    xp = np if isinstance(tokens, np.ndarray) and isinstance(lengths, np.ndarray) else jnp
    rows = xp.arange(tokens.shape[0])[:, None]
    real = xp.where(xp.arange(tokens.shape[1])[None] < lengths[:, None], tokens, vocab)
    if xp is jnp:
        return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, real].set(True, mode="drop")
    seen = np.zeros((tokens.shape[0], vocab + 1), bool)
    seen[rows, np.clip(real, 0, vocab)] = True
    return jnp.asarray(seen[:, :vocab])


__all__ = ["REASONS", "Output", "Step", "generate", "stream"]
