"""Speculating as a value: what a half-finished generation is that is guessed for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.decode.sampling import Rules
from kvjax.decode.state import State
from kvjax.draft.base import Draft, View, makes_trees, wants_hidden
from kvjax.model import Transformer
from kvjax.pytree import pytree


@pytree
class Speculation:
    """A speculating generation under way: what `State` is for `generate`, the draft's state and the next guesses.

    `text` holds each row's prompt and new tokens, `length` of them; rows that are not `wanted` are guessed nothing.
    `idle` is the steps without guesses since some were checked.
    `parent` is as in `Tree`, None where the draft makes none.
    `hidden` and `fresh` are as in `View`, None where the draft does not ask for them.
    """

    state: State
    own: Any
    text: Int[Array, "batch size"]
    length: Int[Array, "batch"]
    guess: Int[Array, "batch most"]
    parent: Int[Array, "batch most"] | None
    count: Int[Array, "batch"]
    choice: Int[Array, ""]
    idle: Int[Array, ""]
    right: Float[Array, "batch"]
    checked: Float[Array, "batch"]
    proposed: Int[Array, "batch"]
    accepted: Int[Array, "batch"]
    rounds: Int[Array, "choices"]
    wanted: Bool[Array, "batch"]
    hidden: Float[Array, "batch checked hidden"] | None
    fresh: Int[Array, "batch"] | None

    @property
    def running(self) -> Bool[Array, "batch"]:
        return self.state.running


def widths(draft: Draft) -> tuple[int, ...]:
    """The numbers of guesses that are checked at once: none, those that make a power of two with the token before, all.

    Each is a program of its own inside the compiled loop.
    """
    return 0, *(n for n in (2**i - 1 for i in range(1, 16)) if n < draft.most), draft.most


LONGEST = 8
"""Steps that may go by between two plans."""

TILE = 16
"""Rows that XLA's products on a CPU take in at once: 12 took longer than 16."""


def tokens_checked(batch: int, width: int) -> int:
    """The tokens that a call with up to `width` guesses a row has places for.

    On a CPU a large call's cost grows with its tokens, and seldom have all rows good guesses: there is place for one a
    row, or half of `width`, which go where they are worth most. Elsewhere more are as good as free.
    """
    all_of_them = batch * (width + 1)
    if jax.default_backend() != "cpu":
        return all_of_them
    some = batch * max(2, (width + 1) // 2)
    return min(all_of_them, -(-some // TILE) * TILE)


def blank(
    model: Transformer, draft: Draft | None, state: State, text: Int[Array, "batch size"], length: Int[Array, "batch"]
) -> Speculation:
    """Before the first round of a draft, or, with None, of no draft at all."""
    batch, size = text.shape
    seen = (
        None if draft is None or not wants_hidden(draft) else (batch, max(draft.most + 1, LONGEST), model.config.hidden)
    )
    zeros = partial(np.zeros, dtype=np.int32)
    return Speculation(
        state=state,
        own=None if draft is None else draft.init(batch, size),
        text=text,
        length=length,
        guess=jnp.asarray(zeros((batch, 0 if draft is None else draft.most))),
        parent=jnp.asarray(zeros((batch, draft.most)) - 1) if draft is not None and makes_trees(draft) else None,
        count=jnp.asarray(zeros(batch)),
        choice=jnp.asarray(zeros(())),
        idle=jnp.asarray(zeros(())),
        right=jnp.asarray(np.zeros(batch, np.float32)),
        checked=jnp.asarray(np.zeros(batch, np.float32)),
        proposed=jnp.asarray(zeros(batch)),
        accepted=jnp.asarray(zeros(batch)),
        rounds=jnp.asarray(zeros(1 if draft is None else len(widths(draft)))),
        wanted=jnp.asarray(np.ones(batch, bool)),
        hidden=None if seen is None else jnp.asarray(np.zeros(seen, model.precision.compute)),
        fresh=None if seen is None else jnp.asarray(zeros(batch)),
    )


def grown(spec: Speculation, new: Int[Array, "batch width"], count: Int[Array, "batch"]) -> Speculation:
    """With each row's first `count` of `new` at the end of its text."""
    nth = jnp.arange(spec.text.shape[1])[None] - spec.length[:, None]
    put = jnp.take_along_axis(new, jnp.clip(nth, 0, new.shape[1] - 1), axis=1)
    text = jnp.where((nth >= 0) & (nth < count[:, None]), put, spec.text)
    return replace(spec, text=text, length=spec.length + count)


def view_of(spec: Speculation, rules: Rules) -> View:
    """What a draft may look at."""
    state = spec.state
    return View(
        text=spec.text,
        length=spec.length,
        running=state.running,
        position=state.cache.length + 1,
        made=state.lengths,
        seen=state.seen,
        counts=state.counts,
        rules=rules,
        hidden=spec.hidden,
        fresh=spec.fresh,
        ruled=state.ruled,
    )
