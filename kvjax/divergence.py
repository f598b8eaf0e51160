"""How far one distribution over next tokens is from another: what a cache that loses something costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def divergence(reference: Float[Array, "*lead vocab"], logits: Float[Array, "*lead vocab"]) -> Float[Array, "*lead"]:
    """KL divergence of the tokens that `logits` predict from those of `reference`, in nats, 0 where they are the same.

    In float32, and not symmetric: `sum(p * log(p / q))` with `p` the reference's. A token that the reference rules
    out (-inf) adds nothing; one that only `logits` rules out makes it infinite.
    Source: Kullback & Leibler 1951, "On Information and Sufficiency", eq. 2.4.
    """
    full, ours = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (reference, logits))
    return (jnp.exp(full) * jnp.where(jnp.isneginf(full), 0.0, full - ours)).sum(-1)
