"""What may change in an evicting cache without a recompile, and how its slots rank by that."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import Mask
from kvjax.pytree import pytree


@pytree
class Knobs:
    """What may change without a recompile; each leaf can be `vmap`ped over, the floats differentiated.

    Args:
        budget: tokens each K/V head may hold, at most the layer's slots.
        sinks: the first tokens, never evicted.
        recent: the newest tokens, never evicted; at least 1.
        threshold: of soft eviction: the worth at which a token counts half.
        temperature: of soft eviction: how gradual that is, in units of worth.
    """

    budget: Int[Array, "kv_heads"]
    sinks: Int[Array, ""]
    recent: Int[Array, ""]
    threshold: Float[Array, ""]
    temperature: Float[Array, ""]


def fitted(knobs: Knobs, slots: int) -> Knobs:
    """The knobs moved to what a layer can keep: sinks first, then recent tokens, as many as it has slots for.

    A budget below these counts as their sum, so that a full layer always holds a token that may go.
    """
    sinks = jnp.clip(knobs.sinks, 0, slots - 1)
    recent = jnp.clip(knobs.recent, 1, slots - sinks)
    return replace(knobs, budget=jnp.clip(knobs.budget, sinks + recent, slots), sinks=sinks, recent=recent)


def ranked(knobs: Knobs, worth: Float[Array, "rows slots"], held: Int[Array, "rows slots"], newest, mask: Mask):
    """Worth, infinite for what must stay, least for what the model's own window has left behind."""
    worth = jnp.where(safe(knobs, held, newest), jnp.inf, worth)
    if mask.window is None:
        return worth
    return jnp.where(held <= newest - mask.window, jnp.finfo(jnp.float32).min, worth)


def safe(knobs: Knobs, held: Int[Array, "rows slots"], newest: Int[Array, "rows 1"]) -> Bool[Array, "rows slots"]:
    """Which tokens are sinks or recent."""
    return (held < knobs.sinks) | (held > newest - knobs.recent)


def budgets(knobs: Knobs, held: Int[Array, "rows slots"]) -> Int[Array, "rows 1"]:
    """Each row's budget."""
    return jnp.tile(knobs.budget, held.shape[0] // knobs.budget.shape[0])[:, None]


def vacant(knobs: Knobs, held: Int[Array, "rows slots"], front: int = 0) -> Float[Array, "rows 1"]:
    """The rank of an empty slot: below all others while the budget has room, above them once it has none."""
    full = (held >= 0).sum(1, keepdims=True) >= budgets(knobs, held) - front
    return jnp.where(full, jnp.inf, -jnp.inf)
