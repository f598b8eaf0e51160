"""What a target says, with what drafts learn from beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kvjax.cache.dense import Dense
from kvjax.decode.generation import check_counts, seen_in
from kvjax.decode.prompts import as_prompts
from kvjax.decode.sampling import GREEDY, Rules, Sampling, rules
from kvjax.decode.state import State, begin, emit
from kvjax.model import Params, Transformer, with_hidden


class Text(NamedTuple):
    """What a target said, from each row's last prompt token on, and what it was about to say at the first `length`.

    The token behind these is a row's newest, which the target has said and not looked at.

    `hidden` is what its head saw, `early` a layer's output (of no width if none was asked for), both in float16;
    `mass` the log-sum-exp of its logits, `best` its likeliest next token.
    """

    tokens: Int[np.ndarray, "rows width"]
    hidden: Float[np.ndarray, "rows width hidden"]
    early: Float[np.ndarray, "rows width features"]
    mass: Float[np.ndarray, "rows width"]
    best: Int[np.ndarray, "rows width"]
    length: Int[np.ndarray, "rows"]

    def take(self, rows: Any) -> Text:
        return Text(*(x[rows] for x in self))


def answers(
    model: Transformer,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    new: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    key: Key[Array, ""] | None = None,
    layer: int | None = None,
) -> Text:
    """Let the target answer, and keep what drafts learn from: the tokens are those of `generate`.

    Args:
        prompts: a row each.
        new: tokens an answer, at most; the text is as wide, and one more for the prompt's last.
        sampling, key: as `generate` takes them.
        layer: keep what this many layers give, for `EarlyExit`.
    Raises:
        ValueError: for what `generate` refuses.
    """
    check_counts("distill.answers", new=new)
    tokens, lengths = as_prompts(model, None, prompts, None, "distill.answers")
    batch, vocab, width = len(prompts), model.config.vocab, -(-tokens.shape[1] // 32) * 32
    settings = rules(sampling, batch=batch, vocab=vocab, max_new=new, key=key)
    cache = Dense().init(model, batch=batch, capacity=-(-(width + new) // 64) * 64)
    state = begin(cache, jnp.zeros(batch, jnp.int32), jnp.asarray(seen_in(tokens, lengths, vocab)), new)
    padded = jnp.asarray(np.pad(tokens, [(0, 0), (0, width - tokens.shape[1])]))
    said, length, kept = _answers(model, params, state, settings, padded, jnp.asarray(lengths), layer)
    last = np.take_along_axis(np.asarray(tokens), np.asarray(lengths)[:, None] - 1, 1)
    said = np.concatenate([last, np.maximum(said, 0)], axis=1, dtype=np.int32)
    return Text(said, *(np.asarray(x) for x in kept), np.asarray(length))


@partial(jax.jit, static_argnames=("model", "layer"))
def _answers(model, params, state: State, rules: Rules, tokens, lengths, layer: int | None):
    """Answers, their lengths, and `Text`'s fields between: a place for the prompt's last token, and one a step."""
    batch, new = state.tokens.shape

    def turn(i, state: State, kept, tokens, lengths):
        logits, cache, hidden, layers = with_hidden(model, params, tokens, lengths, state.cache, last=True)
        early = hidden[:, 0, :0]
        if layer is not None:
            early = jnp.take_along_axis(layers[layer - 1], jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        wide = logits.astype(jnp.float32)
        best = jnp.argmax(wide, axis=-1).astype(jnp.int32)
        fresh = hidden[:, 0].astype(jnp.float16), early.astype(jnp.float16), jax.nn.logsumexp(wide, axis=-1), best
        kept = tuple(x.at[:, i].set(y) for x, y in zip(kept, fresh, strict=True))
        return i + 1, emit(replace(state, cache=cache), rules, logits), kept

    def step(carry):
        i, state, kept = carry
        return turn(i, state, kept, state.pending[:, None], state.running.astype(jnp.int32))

    features = 0 if layer is None else model.config.hidden
    room = (
        jnp.zeros((batch, new + 1, model.config.hidden), jnp.float16),
        jnp.zeros((batch, new + 1, features), jnp.float16),
    )
    room = *room, jnp.zeros((batch, new + 1), jnp.float32), jnp.zeros((batch, new + 1), jnp.int32)
    begun = turn(jnp.zeros((), jnp.int32), state, room, tokens, lengths)
    _, state, kept = jax.lax.while_loop(lambda carry: carry[1].running.any(), step, begun)
    return state.tokens, state.lengths, kept


def frequent(answers: Sequence[Any], size: int, vocab: int, always: Sequence[int] = ()) -> np.ndarray:
    """The `size` most frequent tokens of texts, `always` among them, in order (arXiv:2502.14856)."""
    counts = np.bincount(np.concatenate([np.asarray(a, np.int64) for a in answers]), minlength=vocab).astype(np.int64)
    counts[list(always)] = counts.sum() + 1
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)
