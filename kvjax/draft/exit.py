"""Guess what the target's first layers would say, by a norm and a head that were trained for it.

Sources: Elhoushi et al. 2024, "LayerSkip" (arXiv:2404.16710); Zhao et al. 2025 (arXiv:2502.14856) for the small head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.base import Cache
from kvjax.config import ModelConfig
from kvjax.draft.base import check_most
from kvjax.draft.model import ByText
from kvjax.draft.turns import Ids, check_ids, check_target, head_rows, reduced
from kvjax.model import Params, Transformer, with_hidden
from kvjax.pytree import pytree, static


@pytree
class EarlyExit(ByText):
    """The target's first layers, with a dense cache of their own. Made by `EarlyExit.of`; parameters are shared.

    Args:
        target: the whole model's config.
        model, params: of the first layers; the embedding and the layers are the target's own arrays.
        head, ids: a row for each token that can be guessed, and which those are.
        k: guesses a row.
    """

    target: ModelConfig = static()
    model: Transformer = static()
    params: Params
    head: Float[Array, "some hidden"]
    ids: Int[Array, "some"]
    k: int = static(default=3)

    def __post_init__(self):
        check_most(self, self.k)

    @classmethod
    def of(cls, model: Transformer, params: Params, *, layers: int, exit: dict[str, Any], k: int = 3) -> EarlyExit:
        """The draft of a target and of what was trained for it: `exit` as `fresh` lays it out.

        Raises:
            ValueError: if `layers` is not below the target's, or `exit` is of another vocabulary.
        """
        c = model.config
        if not 1 <= layers < c.layers:
            raise ValueError(f"EarlyExit: `layers` must be in [1, {c.layers - 1}], below the target's, got {layers}")
        check_ids("EarlyExit", exit["ids"], c.vocab)
        first = model.clone(config=replace(c, windows=c.windows[:layers], tied=True))  # its own head is never used
        held = {name: params[name] for name in ("embed", "positions") if name in params}
        held |= {"layers": params["layers"][:layers], "norm": exit["norm"]}
        return cls(c, first, held, exit["head"], exit["ids"], k)

    @staticmethod
    def fresh(model: Transformer, params: Params, ids: Ids) -> dict[str, Any]:
        """What is trained, before training: the target's own norm and head, of `ids` only."""
        check_ids("EarlyExit", ids, model.config.vocab)
        return {"norm": params["norm"], "head": head_rows(params, model.config, ids), "ids": jnp.asarray(ids)}

    @property
    def trained(self) -> dict[str, Any]:
        """What `of` takes as `exit`."""
        return {"norm": self.params["norm"], "head": self.head, "ids": self.ids}

    def check(self, target: ModelConfig) -> None:
        check_target("EarlyExit", self.target, target)

    def score(
        self, tokens: Int[Array, "batch width"], count: Int[Array, "batch"], cache: Cache
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        _, after, hidden, _ = with_hidden(self.model, self.params, tokens, count, cache, last=True)
        assert after is not None
        return reduced(hidden[:, 0], self.head, self.ids, self.target), after
