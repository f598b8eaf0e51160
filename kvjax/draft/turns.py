"""What drafts have in common that guess one token after the other, each from the ones before."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.config import ModelConfig, differing
from kvjax.decode.choose import choose
from kvjax.decode.grammars import follow
from kvjax.draft.base import View
from kvjax.product import product

Ids = Int[Array, "some"] | Int[np.ndarray, "some"]

CATCH_UP = 64, 2
"""Widths that new text is taken in by: a prompt's, and that of the two tokens that are new after right guesses."""


class InTurn:
    """`propose` for a draft of `k` guesses that says what it is behind by, and how it takes in text and guesses.

    Its draws have the noise that the target will draw with, so that where the two agree on the distribution they agree
    on the token (Daliri et al. 2024, arXiv:2408.07978).
    """

    @property
    def catch_up(self) -> tuple[int, ...]:
        """Widths that new text is taken in by."""
        return CATCH_UP

    @property
    def most(self: Any) -> int:
        return self.k

    def able(self: Any, own: Any, view: View) -> Bool[Array, "batch"]:
        """Rows that it can guess for."""
        return view.running

    def propose(self: Any, own: Any, view: View, want: Int[Array, ""]):
        want, able = jnp.minimum(want, self.k), self.able(own, view)
        logits, own = self._caught_up(own, view, able & (want > 0))

        def guess_one(carry: tuple[Any, ...]):
            i, logits, guess, own, ruled = carry
            token = choose(logits, view.rules, view.position + i, view.made + i, view.seen, view.counts, ruled)
            if ruled is not None and not view.rules.grammars.none:
                ruled = follow(view.rules.grammars, view.rules.grammar, ruled, token)
            guess = jax.lax.dynamic_update_slice_in_dim(guess, token[:, None], i, axis=1)
            logits, own = self.feed(own, token, (able & (i + 1 < want)).astype(jnp.int32))
            return i + 1, logits, guess, own, ruled

        guess = jnp.full((view.length.shape[0], self.k), -1, jnp.int32)
        start = jnp.zeros((), jnp.int32), logits, guess, own, view.ruled
        going = partial(_any_left, want=jnp.where(able.any(), want, 0))
        _, _, guess, own, _ = jax.lax.while_loop(going, guess_one, start)
        return guess, jnp.where(able, want, 0), own

    def _caught_up(self: Any, own: Any, view: View, able: Bool[Array, "batch"]):
        """Take in what is new in the text of rows that are `able`; the logits after each one's newest token."""

        def behind(own: Any):
            return jnp.where(able, self.behind(own, view), 0)

        def more(carry: tuple[Any, ...], width: int):
            logits, own = carry
            count = jnp.minimum(behind(own), width)
            new, own = self.take(own, view, count, width)
            return jnp.where((count > 0)[:, None], new, logits), own

        carry = jnp.zeros(view.seen.shape, jnp.float32), own
        for i, width in enumerate(self.catch_up):
            left = self.catch_up[i + 1] if i + 1 < len(self.catch_up) else 0
            carry = jax.lax.while_loop(
                lambda carry, left=left: (behind(carry[1]) > left).any(), partial(more, width=width), carry
            )
        return carry


def _any_left(carry: tuple[Any, ...], want: Int[Array, ""]) -> Bool[Array, ""]:
    return carry[0] < want


def reduced(
    hidden: Float[Array, "batch hidden"],
    head: Float[Array, "some hidden"],
    ids: Int[Array, "some"],
    config: ModelConfig,
) -> Float[Array, "batch vocab"]:
    """Logits over a vocabulary of which only `ids` can be guessed, -inf elsewhere: most of a small model is its head.

    Source: Zhao et al. 2025, "FR-Spec" (arXiv:2502.14856).
    """
    logits = capped(product(hidden[:, None], head.astype(hidden.dtype))[:, 0].astype(jnp.float32), config)
    full = jnp.full((hidden.shape[0], config.vocab), -jnp.inf, jnp.float32)
    return full.at[:, ids].set(logits)


def capped(logits: Float[Array, "*batch some"], config: ModelConfig) -> Float[Array, "*batch some"]:
    """Logits under the target's soft cap, if it has one."""
    cap = config.logit_softcap
    return logits if cap is None else jnp.tanh(logits / cap) * cap


def head_rows(params: Any, config: ModelConfig, ids: Ids) -> Float[Array, "some hidden"]:
    """The target's own head, of `ids` only."""
    return (params["embed"] if config.tied else params["head"])[ids]


def check_ids(draft: str, ids: Ids, vocab: int) -> None:
    """Raise ValueError for a draft vocabulary that is no part of the target's."""
    if ids.ndim != 1 or not ids.size or int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise ValueError(f"{draft}: `ids` must be a list of tokens in [0, {vocab}), got shape {ids.shape}")


def check_target(draft: str, mine: ModelConfig, target: ModelConfig) -> None:
    """Raise ValueError, naming what differs, for a target other than the one that a draft was trained on."""
    if mine != target:
        raise ValueError(f"{draft}: it was trained for another model: {differing(target, mine)}")
