"""Generate text: the whole of it in one compiled loop, or a token at a time as it comes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kvjax.cache.base import Cache
from kvjax.decode import state as decoding
from kvjax.decode.prompts import Lengths, Tokens, as_prompts, traced
from kvjax.decode.sampling import GREEDY, Rules, Sampling, power_of_two, rules
from kvjax.decode.state import REASONS, State
from kvjax.decode.step import fill
from kvjax.model import Params, Transformer


class Output(NamedTuple):
    """What every decoder returns.

    `tokens` are the new ones, -1 past each row's `lengths`; `logprobs` are of the model's own distribution,
    in nats; `reason` says by its number in `REASONS` why the row ended. The cache holds all but each row's
    last token: to go on, give that one (`last`) as the next prompt, alone or with more after it.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, "batch"]
    logprobs: Float[Array, "batch new"]
    cache: Cache
    reason: Int[Array, "batch"]

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
) -> Output:
    """Take in prompts and decode up to `max_new` tokens a row, ending early when every row has ended.

    Args:
        cache: donated: use the one returned. Rows go on from what it holds.
        tokens: prompts, as `prefill` takes them. A width of 1 starts the loop directly, so that going on
            from `Output.last` gives, bit for bit, the tokens of one longer call.
        key: needed when a row samples. Same key and row (or `Sampling.seed`): same tokens.
        sampling: for all rows, or one each.
        tokenizer: needed for stop strings only.
    Raises:
        ValueError: for what `prefill` refuses, `max_new` below 1, or too small a cache.
        FloatingPointError: if a row's logits were not finite, with the row and the step.
    """
    state, settings, _ = _start(model, params, cache, tokens, lengths, max_new, key, sampling, tokenizer)
    state = decoding.advance(model, params, state, settings, max_new)
    return _finish(state, max_new)


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
) -> Generator[Step, None, Output]:
    """`generate`, yielding each step's tokens as they come; the generator's return value is the `Output`.

    The same tokens by the same compiled loop. The next step is under way while the caller has the last.
    """
    state, settings, ready = _start(model, params, cache, tokens, lengths, max_new, key, sampling, tokenizer)
    while True:
        state, *ahead = decoding.step(model, params, state, settings)
        if ready is not None:
            now = Step(*(np.asarray(x) for x in ready))
            if (now.tokens >= 0).any():
                yield now
            if (now.reason != decoding.RUNNING).all():
                return _finish(state, max_new)
        ready = ahead


def _start(
    model, params, cache, tokens, lengths, max_new, key, sampling, tokenizer
) -> tuple[State, Rules, tuple[Array, ...] | None]:
    """Prefill and the first token; a prompt of one token is left to the loop. The third is the first `Step`."""
    if not isinstance(max_new, (int, np.integer)) or max_new < 1:
        raise ValueError(f"generate: `max_new` must be at least 1, a whole number, got {max_new!r}")
    tokens, lengths = as_prompts(model, cache, tokens, lengths, "generate")
    batch, vocab = tokens.shape[0], model.config.vocab
    settings = rules(sampling, batch=batch, vocab=vocab, max_new=max_new, key=key, tokenizer=tokenizer)
    _check_room(cache, lengths, settings)
    seen = _seen(tokens, lengths, vocab)
    room = power_of_two(max_new)
    if tokens.shape[1] == 1:
        return decoding.begin(cache, jnp.asarray(tokens[:, 0]), seen, room), settings, None
    logits, cache = fill(model, params, cache, tokens, lengths)
    state = decoding.begin(cache, jnp.asarray(np.zeros(batch, np.int32)), seen, room)
    state, *ready = decoding.first(state, settings, logits)
    return state, settings, tuple(ready)


def _finish(state: State, max_new: int) -> Output:
    if not traced(state.reason):
        failed = np.flatnonzero(np.asarray(state.reason) == decoding.NOT_FINITE)
        if failed.size:
            row = int(failed[0])
            raise FloatingPointError(
                f"generate: the logits of row {row} were not finite at step {int(state.lengths[row])} "
                f"(position {int(state.cache.length[row])}); rows concerned: {failed.tolist()}"
            )
    tokens, logprobs = state.tokens, state.logprobs
    if tokens.shape[1] != max_new:
        tokens, logprobs = tokens[:, :max_new], logprobs[:, :max_new]
    return Output(tokens, state.lengths, logprobs, state.cache, state.reason)


def _check_room(cache: Cache, lengths, settings: Rules) -> None:
    """All but the last new token go into the cache."""
    if traced(cache.length, lengths, settings.limit):
        return
    if why := cache.strategy.need(cache, np.asarray(lengths) + np.asarray(settings.limit) - 1):
        raise ValueError(f"generate: held, prompt and new tokens {why}: make it larger, or `max_new` smaller")


def _seen(tokens, lengths, vocab: int):
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
