"""Guess the target's next hidden states by one trained layer, and from them its next tokens.

Sources: Li et al. 2024, "EAGLE" (arXiv:2401.15077); Zhang et al. 2024, "HASS" (arXiv:2408.15766) and Li et al. 2025,
"EAGLE-3" (arXiv:2503.01840) for training on its own states; Zhao et al. 2025 (arXiv:2502.14856) for the small head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax.block import Block, Linear, Norm
from kvjax.cache.base import Attends, Cache
from kvjax.cache.dense import Dense
from kvjax.config import Acceleration, ModelConfig, Precision
from kvjax.draft.base import View, check_most
from kvjax.draft.turns import Ids, InTurn, check_ids, check_target, head_rows, reduced
from kvjax.model import Params, Transformer
from kvjax.pytree import pytree, static


class HeadLayer(nn.Module):
    """From the hidden state at a token and the embedding of the one after it, the hidden state at that one."""

    config: ModelConfig
    precision: Precision
    accelerate: Acceleration = Acceleration()

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "batch width hidden"],
        embedded: Float[Array, "batch width hidden"],
        positions: Int[Array, "batch width"],
        valid: Bool[Array, "batch width"],
        layer: Attends | None,
    ) -> tuple[Float[Array, "batch width hidden"], Attends | None]:
        c, p = self.config, self.precision
        both = jnp.concatenate([Norm(c, name="hidden_norm")(hidden), Norm(c, name="embed_norm")(embedded)], axis=-1)
        x = Linear(c.hidden, False, p, name="fuse")(both)
        x, layer = Block(c, p, None, self.accelerate, name="block")(x, positions, valid, layer)
        return Norm(c, name="norm")(x), layer


@pytree
class HeadsState:
    """`cache` has a slot for each pair of a hidden state and the token after it, the first `sure` of checked tokens.

    `hidden` is by place in the text and known from `start` on, -1 where nothing is known yet; `last` is the layer's
    own newest state.
    """

    cache: Cache
    hidden: Float[Array, "batch size hidden"]
    start: Int[Array, "batch"]
    sure: Int[Array, "batch"]
    last: Float[Array, "batch hidden"]


@pytree
class Heads(InTurn):
    """A layer that goes on from the target's hidden states, and then from its own. Made by `Heads.of`.

    It sees no hidden state of the prompt but its last token's, and guesses from the second new token on.

    Args:
        target, precision: the model's.
        embed: the target's own array.
        trained: as `fresh` lays it out.
        k: guesses a row.
    """

    target: ModelConfig = static()
    precision: Precision = static()
    embed: Float[Array, "vocab hidden"]
    trained: dict[str, Any]
    k: int = static(default=4)
    accelerate: Acceleration = static(default=Acceleration())

    def __post_init__(self):
        check_most(self, self.k)

    @classmethod
    def of(cls, model: Transformer, params: Params, *, trained: dict[str, Any], k: int = 4) -> Heads:
        """The draft of a target and of what was trained for it: `trained` as `fresh` lays it out.

        Raises:
            ValueError: if `trained` is of another vocabulary.
        """
        check_ids("Heads", trained["ids"], model.config.vocab)
        return cls(model.config, model.precision, params["embed"], trained, k, model.accelerate.alone)

    @staticmethod
    def fresh(model: Transformer, params: Params, ids: Ids, key: Key[Array, ""]) -> dict[str, Any]:
        """What is trained, before training: a random layer, and the target's own head, of `ids` only."""
        check_ids("Heads", ids, model.config.vocab)
        x, at = jnp.zeros((1, 1, model.config.hidden), model.precision.compute), jnp.zeros((1, 1), jnp.int32)
        layer = head_layer(model.config, model.precision, model.accelerate.alone).init(key, x, x, at, at == 0, None)[
            "params"
        ]
        return {"layer": layer, "head": head_rows(params, model.config, ids), "ids": jnp.asarray(ids)}

    @property
    def wants_hidden(self) -> bool:
        return True

    @property
    def catch_up(self) -> tuple[int, ...]:  # as many tokens are new as guesses can have been right, and one
        return 64, self.k + 1

    def check(self, target: ModelConfig) -> None:
        check_target("Heads", self.target, target)

    def init(self, batch: int, size: int) -> HeadsState:
        layer, nothing = head_layer(self.target, self.precision, self.accelerate), jnp.zeros(batch, jnp.int32)
        cache = Dense().init(Transformer(layer.config, self.precision), batch=batch, capacity=size + self.k)
        hidden = jnp.zeros((batch, size, self.target.hidden), self.precision.compute)
        return HeadsState(cache, hidden, nothing - 1, nothing, hidden[:, 0])

    def observe(self, own: HeadsState, view: View) -> HeadsState:
        """Keep the hidden states of tokens that were checked, and forget what was taken in of guessed ones."""
        assert view.hidden is not None and view.fresh is not None
        anew = view.length == 0  # the row is given to another text
        fresh, sure = jnp.where(anew, 0, view.fresh), jnp.where(anew, 0, own.sure)
        size, at = own.hidden.shape[1], view.length - 1 - fresh
        nth = jnp.arange(view.hidden.shape[1], dtype=jnp.int32)[None]
        place = jnp.where(nth < fresh[:, None], at[:, None] + nth, size)
        rows = jnp.arange(at.shape[0])[:, None]
        hidden = own.hidden.at[rows, place].set(view.hidden, mode="drop")
        start = jnp.where((own.start < 0) & (fresh > 0), at, own.start)
        start = jnp.where(anew, -1, start)
        return replace(own, cache=replace(own.cache, length=sure), hidden=hidden, start=start, sure=sure)

    def able(self, own: HeadsState, view: View) -> Bool[Array, "batch"]:
        return view.running & (own.start >= 0)

    def behind(self, own: HeadsState, view: View) -> Int[Array, "batch"]:
        return view.length - 1 - own.start - own.sure

    def take(self, own: HeadsState, view: View, count: Int[Array, "batch"], width: int):
        at = (own.start + own.sure)[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        at = jnp.clip(at, 0, view.text.shape[1] - 2)
        hidden = jnp.take_along_axis(own.hidden, at[..., None], axis=1)
        tokens = jnp.take_along_axis(view.text, at + 1, axis=1)
        logits, own = self._step(own, hidden, tokens, count)
        return logits, replace(own, sure=own.sure + count)

    def feed(self, own: HeadsState, token: Int[Array, "batch"], count: Int[Array, "batch"]):
        return self._step(own, own.last[:, None], token[:, None], count)

    def _step(self, own: HeadsState, hidden, tokens, count):
        """Take in `count` pairs a row; the logits after its last, and the state with that."""
        cache, _ = own.cache.opened(count)
        offset = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions, valid = cache.length[:, None] + offset, offset < count[:, None]
        embedded = embed(self.embed, tokens, self.target, self.precision)
        out = head_layer(self.target, self.precision, self.accelerate).apply(
            {"params": self.trained["layer"]}, hidden, embedded, positions, valid, cache.layers[0]
        )
        new, layer = cast("tuple[Array, Attends]", out)
        new = jnp.take_along_axis(new, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        new = jnp.where((count > 0)[:, None], new, own.last)
        logits = reduced(new, self.trained["head"], self.trained["ids"], self.target)
        return logits, replace(own, cache=cache.closed((layer,), count), last=new)


def head_layer(config: ModelConfig, precision: Precision, accelerate: Acceleration) -> HeadLayer:
    """The layer of a target's sizes; it sees all that came before, however far."""
    return HeadLayer(replace(config, windows=(None,), max_positions=2**30), precision, accelerate)


def embed(
    table: Float[Array, "vocab hidden"], tokens: Int[Array, "batch width"], config: ModelConfig, precision: Precision
) -> Float[Array, "batch width hidden"]:
    """The target's embedding of tokens."""
    x = jnp.take(table, tokens, axis=0, mode="clip").astype(precision.compute)
    return x if config.embed_scale == 1.0 else x * jnp.asarray(config.embed_scale, precision.compute)


__all__ = ["HeadLayer", "Heads", "HeadsState", "embed", "head_layer"]
