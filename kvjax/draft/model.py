"""Guess what a smaller model would say.

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.base import Cache
from kvjax.cache.dense import Dense
from kvjax.config import ModelConfig
from kvjax.draft.base import View, check_most
from kvjax.draft.turns import InTurn
from kvjax.model import Params, Transformer, cached
from kvjax.pytree import pytree, static


class ByText(InTurn):
    """A draft that reads the text with a `model` and a dense cache of its own; `score` is its step."""

    def init(self: Any, batch: int, size: int) -> Cache:
        most = size + self.k
        if self.model.config.rope is None:  # it guesses up to the last position that it has learnt
            most = min(most, self.model.config.max_positions)
        return Dense().init(self.model, batch=batch, capacity=most)

    def able(self: Any, own: Cache, view: View) -> Bool[Array, "batch"]:
        assert own.capacity is not None, "dense"
        return view.running & (view.length + self.k <= own.capacity)

    def observe(self, own: Cache, view: View) -> Cache:
        """Guesses that were wrong are forgotten: their slots are written again before they are seen."""
        return replace(own, length=jnp.clip(own.length, 0, jnp.maximum(view.length - 1, 0)))

    def behind(self, own: Cache, view: View) -> Int[Array, "batch"]:
        return view.length - own.length

    def take(self: Any, own: Cache, view: View, count: Int[Array, "batch"], width: int):
        at = own.length[:, None] + jnp.arange(width)[None]
        tokens = jnp.take_along_axis(view.text, jnp.minimum(at, view.text.shape[1] - 1), axis=1)
        return self.score(tokens, count, own)

    def feed(self: Any, own: Cache, token: Int[Array, "batch"], count: Int[Array, "batch"]):
        return self.score(token[:, None], count, own)


@pytree
class DraftModel(ByText):
    """A second model of the same vocabulary, with a dense cache of its own.

    Args:
        model, params: as `kvjax.load` gives them.
        k: guesses a row.
    """

    model: Transformer = static()
    params: Params
    k: int = static(default=4)

    def __post_init__(self):
        check_most(self, self.k)

    def check(self, target: ModelConfig) -> None:
        if self.model.config.vocab != target.vocab:
            raise ValueError(
                f"DraftModel: its vocabulary must be the target's, {target.vocab} tokens, got {self.model.config.vocab}"
            )

    def score(
        self, tokens: Int[Array, "batch width"], count: Int[Array, "batch"], cache: Cache
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        logits, cache = cached(self.model, self.params, tokens, count, cache)
        return logits.astype(jnp.float32), cache
