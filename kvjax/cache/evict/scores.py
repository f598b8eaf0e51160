"""The scores that an evicting cache compares, by name; `kvjax/cache/evict/score.py` says what a score is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import Mask, received
from kvjax.cache.evict.expected import Expected
from kvjax.cache.evict.score import Keys, Score, Worth
from kvjax.pytree import pytree


@dataclass(frozen=True)
class Attention(Score):
    """Attention received from the last `window` queries, summed over them and over the head's group.

    None counts all queries: H2O (arXiv:2306.14048). 1 counts only the newest: TOVA (arXiv:2401.06104), a head
    at a time. With a `pool` of neighbours, 32 or so is SnapKV (arXiv:2404.14469). Between chunks and in decoding,
    where a window would need its old queries again, what was summed fades by `1 / window` a token instead. It
    costs a second product of queries and keys.

    Args:
        near: queries less than this many tokens later do not count: a token that only its neighbours need can go.
        peak: the largest attention from any one query, instead of the sum, so that one later use is enough.
        value: times the norm of the token's value (Guo et al. 2024, arXiv:2406.12335).
    """

    queries: ClassVar[bool] = True

    window: int | None = None
    pool: int = 1
    near: int = 0
    peak: bool = False
    value: bool = False

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"Attention: `window` must be at least 1 query, got {self.window}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"Attention: `pool` must be an odd number of tokens, got {self.pool}")

    def joined(self, old: Worth, more: Worth) -> Worth:
        """Worth from earlier queries, and from new ones."""
        return jnp.maximum(old, more) if self.peak else old + more

    def kept(self, fresh: Int[Array, "rows"]) -> Float[Array, "rows"]:
        """The share of what was summed before that is left after `fresh` more tokens."""
        if self.window is None:
            return jnp.ones(fresh.shape, jnp.float32)
        return jnp.maximum(0.0, 1.0 - fresh.astype(jnp.float32) / self.window)

    def weights(self, valid: Bool[Array, "rows width"]) -> Float[Array, "rows width"]:
        """How much each new query counts."""
        if self.window is None:
            return valid.astype(jnp.float32)
        age = valid.sum(1, keepdims=True) - 1 - jnp.arange(valid.shape[1])[None]
        return (valid & (age < self.window)).astype(jnp.float32)

    def received(self, q, k: Keys, v: Keys, positions, slots, lse, weight, mask: Mask, *, pool: bool = False) -> Worth:
        """Worth of slots by these queries, pooled over neighbours if the slots are tokens in order."""
        worth = received(q, k, positions, slots, lse, weight, mask, near=self.near, peak=self.peak)
        worth = self.pooled(worth) if pool else worth
        return worth * jnp.linalg.norm(v.astype(jnp.float32), axis=-1) if self.value else worth

    def pooled(self, worth: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
        """The largest of each new token's neighbours, so that what stands together stays together."""
        if self.pool == 1 or worth.shape[1] == 1:
            return worth
        return jax.lax.reduce_window(worth, -jnp.inf, jax.lax.max, (1, self.pool), (1, 1), "SAME")


@dataclass(frozen=True)
class KeyNorm(Score):
    """Keys of small norm draw attention (Devoto et al. 2024, arXiv:2406.11430)."""

    def rate(self, state, k, v, positions):
        return -jnp.linalg.norm(k.astype(jnp.float32), axis=-1)


@pytree
class Heads:
    """Which of all the model's K/V heads each row is."""

    index: Int[Array, "rows"]


@dataclass(frozen=True)
class Random(Score):
    """A hash of seed, head and position: the control that any score should beat."""

    seed: int = 0

    def begin(self, spec):
        return Heads(jnp.tile(jnp.arange(spec.kv_heads) + spec.kv_heads * spec.index, spec.batch))

    def rate(self, state, k, v, positions):
        mixed = positions.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
        mixed += (state.index.astype(jnp.uint32) + jnp.uint32(self.seed * 8191 + 1))[:, None] * jnp.uint32(0x85EBCA6B)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # a 32-bit finaliser: every bit decides every bit
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return (mixed ^ (mixed >> 16)).astype(jnp.float32) / 2.0**32


@pytree
class Sums:
    """Running sums over a row's tokens."""

    count: Float[Array, "rows"]
    total: Float[Array, "rows head_dim"]


@dataclass(frozen=True)
class KeyDiff(Score):
    """Keys unlike the mean direction of all keys so far (Park et al. 2025, arXiv:2504.15364)."""

    def begin(self, spec):
        rows = spec.batch * spec.kv_heads
        return Sums(jnp.zeros(rows), jnp.zeros((rows, spec.head_dim)))

    def observe(self, state, q, k, positions, valid):
        unit = jnp.where(valid[..., None], _unit(k), 0.0)
        return Sums(state.count + valid.sum(1).astype(jnp.float32), state.total + unit.sum(1))

    def rate(self, state, k, v, positions):
        return -jnp.einsum("rsd,rd->rs", _unit(k), _unit(state.total[:, None])[:, 0])


def _unit(x: Float[Array, "*lead head_dim"]) -> Float[Array, "*lead head_dim"]:
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.maximum(jnp.square(wide).sum(-1, keepdims=True), 1e-12))


SCORES: dict[str, Score] = {
    "h2o": Attention(),
    "snapkv": Attention(window=32, pool=7),
    "tova": Attention(window=1),
    "peak": Attention(pool=7, near=8, peak=True, value=True),
    "key_norm": KeyNorm(),
    "key_diff": KeyDiff(),
    "expected": Expected(),
    "random": Random(),
}
"""Every score by the name that `Evicting(score=…)` takes."""
