"""Expected attention: what queries to come are likely to look at, from those that came."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache.evict.score import Keys, Score
from kvjax.config import Rope
from kvjax.pytree import pytree, static
from kvjax.rope import frequencies, rotate


@pytree
class Queries:
    """Sums over all queries so far, rotated back to position 0, a query head apart.

    `weights` is the logarithm of the sum of the expected weights of all keys so far.
    """

    count: Float[Array, "rows"]
    total: Float[Array, "rows group head_dim"]
    square: Float[Array, "rows group head_dim"]
    weights: Float[Array, "rows group"]
    rope: Rope | None = static()


@dataclass(frozen=True)
class Expected(Score):
    """Attention that the next `horizon` queries are expected to give (Devoto et al. 2025, arXiv:2510.00636, eq. 8).

    Queries before rotation are taken as normal with the mean and the variances of those so far (the paper has their
    covariance); the mean is turned as it will be on average over the horizon. Each query head's expected weights are
    divided by their sum over all keys so far, averaged over the group, lifted by `floor` and multiplied by the norm
    of the value. Without the division one query head decides for all: it then keeps 17 % of pass-keys, not 100 %.
    """

    queries: ClassVar[bool] = True

    horizon: int = 512
    floor: float = 0.02

    def begin(self, spec):
        rows, shape = spec.batch * spec.kv_heads, (spec.batch * spec.kv_heads, spec.group, spec.head_dim)
        none = jnp.full(shape[:2], -jnp.inf)
        return Queries(jnp.zeros(rows), jnp.zeros(shape), jnp.zeros(shape), none, spec.rope)

    def observe(self, state, q, k, positions, valid):
        wide = q.astype(jnp.float32)
        if state.rope is not None:
            wide = rotate(wide, -positions, state.rope) / frequencies(state.rope, q.shape[-1])[1] ** 2
        wide = jnp.where(valid[..., None, None], wide, 0.0)
        state = replace(
            state,
            count=state.count + valid.sum(1).astype(jnp.float32),
            total=state.total + wide.sum(1),
            square=state.square + jnp.square(wide).sum(1),
        )
        new = jnp.where(valid[:, None], self._logits(state, k), -jnp.inf)
        peak = jax.lax.stop_gradient(jnp.maximum(jnp.max(new, axis=2), state.weights))
        peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
        total = jnp.exp(state.weights - peak) + jnp.exp(new - peak[..., None]).sum(2)
        return replace(state, weights=jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf))

    def rate(self, state, k, v, positions):
        base = jnp.where(jnp.isfinite(state.weights), state.weights, 0.0)
        share = jnp.exp(self._logits(state, k) - base[..., None]).mean(1)
        return (share + self.floor) * jnp.linalg.norm(v.astype(jnp.float32), axis=-1)

    def _logits(self, state: Queries, k: Keys) -> Float[Array, "rows group slots"]:
        count = jnp.maximum(state.count, 1.0)[:, None, None]
        mean = state.total / count
        spread = jnp.maximum(state.square / count - jnp.square(mean), 0.0)
        if state.rope is not None:
            mean, spread = _turned(mean, spread, state.count.astype(jnp.int32), self.horizon, state.rope)
        scale, wide = k.shape[-1] ** -0.5, k.astype(jnp.float32)
        logits = scale * jnp.einsum("rsd,rgd->rgs", wide, mean)
        return logits + 0.5 * scale**2 * jnp.einsum("rsd,rgd->rgs", jnp.square(wide), spread)


def _turned(mean, spread, at: Int[Array, "rows"], horizon: int, rope: Rope):
    """Mean and variances of a query after the average rotation of the `horizon` positions from `at` on."""
    turned = rotate(mean[:, None], at[:, None], rope)[:, 0]
    angles = np.outer(np.arange(horizon), frequencies(rope, mean.shape[-1])[0])
    cos, sin = (jnp.asarray(f(angles).mean(0), jnp.float32)[None, None] for f in (np.cos, np.sin))
    half = cos.shape[-1]
    a, b, rest = jnp.split(turned, (half, 2 * half), axis=-1)
    pair = 0.5 * (spread[..., :half] + spread[..., half : 2 * half])
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
    return turned, jnp.concatenate([pair, pair, spread[..., 2 * half :]], axis=-1)
