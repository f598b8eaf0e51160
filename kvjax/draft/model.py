"""Guess what a smaller model would say.

Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192); Daliri
et al. 2024 (arXiv:2408.07978) for draws that draft and target make with the same noise.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.cache.base import Cache
from kvjax.cache.dense import Dense
from kvjax.config import ModelConfig
from kvjax.decode.choose import choose
from kvjax.decode.grammars import follow
from kvjax.draft.base import View, check_most
from kvjax.model import Params, Transformer, cached
from kvjax.pytree import pytree, static

CATCH_UP = 64, 2
"""Widths that new text is taken in by: a prompt's, and that of the two tokens that are new after right guesses."""


@pytree
class DraftModel:
    """A second model of the same vocabulary, with a dense cache of its own.

    A row that samples draws its guesses with the noise that the target will draw with, so that where the two models
    agree on the distribution they agree on the token.

    Args:
        model, params: as `kvjax.load` gives them.
        k: guesses a row.
    """

    model: Transformer = static()
    params: Params
    k: int = static(default=4)

    def __post_init__(self):
        check_most(self, self.k)

    @property
    def most(self) -> int:
        return self.k

    def check(self, target: ModelConfig) -> None:
        if self.model.config.vocab != target.vocab:
            raise ValueError(
                f"DraftModel: its vocabulary must be the target's, {target.vocab} tokens, got {self.model.config.vocab}"
            )

    def init(self, batch: int, size: int) -> Cache:
        if self.model.config.rope is None and size + self.k > self.model.config.max_positions:
            raise ValueError(
                f"DraftModel: prompt, new tokens and guesses need {size + self.k} positions, but the draft has learnt "
                f"{self.model.config.max_positions}"
            )
        return Dense().init(self.model, batch=batch, capacity=size + self.k)

    def propose(self, own: Cache, view: View, want: Int[Array, ""]):
        want = jnp.minimum(want, self.k)
        logits, own = self._catch_up(own, view, want)

        def guess_one(carry: tuple[Any, ...]):
            i, logits, guess, cache, ruled = carry
            token = choose(logits, view.rules, view.position + i, view.made + i, view.seen, view.counts, ruled)
            if ruled is not None and not view.rules.grammars.none:
                ruled = follow(view.rules.grammars, view.rules.grammar, ruled, token)
            guess = jax.lax.dynamic_update_slice_in_dim(guess, token[:, None], i, axis=1)
            feed = (view.running & (i + 1 < want)).astype(jnp.int32)
            logits, cache = cached(self.model, self.params, token[:, None], feed, cache)
            return i + 1, logits.astype(jnp.float32), guess, cache, ruled

        guess = jnp.full((view.length.shape[0], self.k), -1, jnp.int32)
        start = jnp.zeros((), jnp.int32), logits, guess, own, view.ruled
        _, _, guess, own, _ = jax.lax.while_loop(lambda carry: carry[0] < want, guess_one, start)
        return guess, jnp.where(view.running, want, 0), own

    def observe(self, own: Cache, view: View) -> Cache:
        """Guesses that were wrong are forgotten: their slots are written again before they are seen."""
        return replace(own, length=jnp.clip(own.length, 0, jnp.maximum(view.length - 1, 0)))

    def _catch_up(self, own: Cache, view: View, want: Int[Array, ""]):
        """Take in what is new in the text, if guesses are wanted; the logits after each row's newest token."""

        def behind(cache: Cache):
            return jnp.where(view.running & (want > 0), view.length - cache.length, 0)

        def more(carry: tuple[Any, ...], width: int):
            logits, cache = carry
            count = jnp.minimum(behind(cache), width)
            at = cache.length[:, None] + jnp.arange(width)[None]
            tokens = jnp.take_along_axis(view.text, jnp.minimum(at, view.text.shape[1] - 1), axis=1)
            new, cache = cached(self.model, self.params, tokens, count, cache)
            return jnp.where((count > 0)[:, None], new.astype(jnp.float32), logits), cache

        carry = jnp.zeros((view.length.shape[0], self.model.config.vocab), jnp.float32), own
        for i, width in enumerate(CATCH_UP):
            left = CATCH_UP[i + 1] if i + 1 < len(CATCH_UP) else 0
            carry = jax.lax.while_loop(
                lambda carry, left=left: (behind(carry[1]) > left).any(), partial(more, width=width), carry
            )
        return carry
