"""Several drafts, of which the first that has a guess is asked."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.draft.base import View
from kvjax.draft.several import Several
from kvjax.pytree import pytree


@pytree
class Chain(Several):
    """Each row has the guesses of the first of `drafts` that has any for it.

    Raises:
        ValueError: if there is none, or one that makes trees.
    """

    drafts: tuple[Any, ...]

    @property
    def most(self) -> int:
        return max(draft.most for draft in self.drafts)

    def propose(self, own: tuple[Any, ...], view: View, want: Int[Array, ""]):
        guess = jnp.full((view.length.shape[0], self.most), -1, jnp.int32)
        count, after = jnp.zeros(view.length.shape, jnp.int32), []
        for draft, state in zip(self.drafts, own, strict=True):
            without = view.running & (count == 0)
            new, found, state = draft.propose(state, view, jnp.where(without.any(), want, 0))
            new = jnp.pad(new, ((0, 0), (0, self.most - new.shape[1])), constant_values=-1)
            guess = jnp.where((count == 0)[:, None], new, guess)
            count = jnp.where(count == 0, found, count)
            after.append(state)
        return guess, count, tuple(after)
