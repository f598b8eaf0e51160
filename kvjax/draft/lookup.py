"""Guess that the text goes on as it did where it last read the same.

Source: Saxena 2023, "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.cache.base import is_whole
from kvjax.config import ModelConfig
from kvjax.draft.base import View, check_most
from kvjax.pytree import pytree, static


@pytree
class PromptLookup:
    """Up to `k` tokens that followed the longest earlier match of the newest tokens, the latest such match.

    Where the match overlaps the end of the text, what it repeats goes on in turns.

    Args:
        k: guesses a row.
        longest, shortest: tokens of a match, at most and at least.
        skip: other next tokens to pass over: 1 is for the best match that does not go on as the best of all does.
    Raises:
        ValueError: for a `k` below 1, a `skip` below 0, or lengths that are not `1 <= shortest <= longest`.
    """

    k: int = static(default=7)
    longest: int = static(default=4)
    shortest: int = static(default=2)
    skip: int = static(default=0)

    def __post_init__(self):
        check_most(self, self.k)
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"PromptLookup: `shortest` must be in [1, longest={self.longest}] tokens, got {self.shortest}"
            )
        if not is_whole(self.skip, 0):
            raise ValueError(f"PromptLookup: `skip` must be at least 0, a whole number, got {self.skip!r}")

    @property
    def most(self) -> int:
        return self.k

    def check(self, target: ModelConfig) -> None:
        """It can guess for any."""

    def init(self, batch: int, size: int) -> None:
        return None

    def propose(self, own: None, view: View, want: Int[Array, ""]):
        text, last = view.text, view.length[:, None] - 1
        size = text.shape[1]
        at = jnp.arange(size, dtype=jnp.int32)[None]
        same, matched = jnp.ones(text.shape, bool), jnp.zeros(text.shape, jnp.int32)
        for back in range(self.longest):
            token = jnp.take_along_axis(text, jnp.maximum(last - back, 0), axis=1)
            before = jnp.pad(text, ((0, 0), (back, 0)), constant_values=-1)[:, :size]
            same &= (before == token) & (last >= back)
            matched += same.astype(jnp.int32)
        value = jnp.where((at < last) & (matched >= self.shortest), matched * size + at, -1)
        follows = jnp.roll(text, -1, axis=1)
        for _ in range(self.skip):
            best = jnp.take_along_axis(follows, jnp.argmax(value, axis=1)[:, None], axis=1)
            value = jnp.where(follows == best, -1, value)
        end = jnp.argmax(value, axis=1).astype(jnp.int32)[:, None]
        ahead = end + 1 + jnp.arange(self.k, dtype=jnp.int32)[None] % jnp.maximum(last - end, 1)
        guess = jnp.take_along_axis(text, jnp.minimum(ahead, size - 1), axis=1)
        found = value.max(1) >= 0
        return guess, jnp.where(found, jnp.minimum(want, self.k), 0), None

    def observe(self, own: None, view: View) -> None:
        return None
