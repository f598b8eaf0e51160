"""Measure over how many tokens each head's attention spreads: what `budgets.adaptive` divides a budget by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import Mask, attend, by_head, queries_by_head
from kvjax.cache.base import LayerSpec, Strategy
from kvjax.pytree import pytree

if TYPE_CHECKING:
    from kvjax.model import Params, Transformer


def attention_entropy(
    model: Transformer, params: Params, tokens: Int[Array, "batch width"], lengths: Int[Array, "batch"] | None = None
) -> Float[Array, "layers kv_heads"]:
    """Mean entropy, in nats, of each K/V head's attention over prompts, its query heads averaged.

    `exp` of it is the number of tokens that an even attention would spread over.

    Raises:
        ValueError: for a model with capped attention logits, whose entropy is not that of `q @ k`.
    """
    if model.config.attention_softcap is not None:
        raise ValueError("attention_entropy: `model` must not cap its attention logits, got one with a softcap")
    return _entropy(model, params, jnp.asarray(tokens), lengths)


@partial(jax.jit, static_argnames="model")
def _entropy(model, params, tokens, lengths):
    cache = _Measuring().init(model, batch=tokens.shape[0], capacity=tokens.shape[1])
    _, cache = model.apply({"params": params}, tokens, lengths, cache, last=True)
    return jnp.stack([layer.mean for layer in cache.layers])


@pytree
class _Measured:
    """A layer that keeps no tokens, only the mean entropy of the one prompt that it is given."""

    mean: Float[Array, "kv_heads"]

    limit = None

    def attend(self, q, k, v, positions, valid, mask: Mask):
        heads = k.shape[2]
        keys, held = by_head(k), jnp.where(valid, positions, -1)
        out, lse = attend(q, keys, by_head(v), positions, held, mask)
        mixed, _ = attend(q, keys, keys, positions, held, mask)  # sum of p * k, so q times it is the mean logit
        nats = lse - mask.scale * (q.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1)
        nats = queries_by_head(jnp.where(valid[..., None], nats, 0.0), heads).mean(2)
        each = nats.reshape(q.shape[0], heads, -1).sum((0, 2)) / jnp.maximum(valid.sum(), 1).astype(jnp.float32)
        return out, lse, replace(self, mean=each)


@dataclass(frozen=True)
class _Measuring(Strategy):
    def layer(self, spec: LayerSpec) -> Any:  # no cache, but all that the model asks of one
        return _Measured(jnp.zeros(spec.kv_heads))
