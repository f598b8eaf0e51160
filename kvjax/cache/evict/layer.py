"""A layer whose slots hold the tokens worth most, each K/V head its own choice.

Sources: Zhang et al. 2023, "H2O" (arXiv:2306.14048), for a budget kept while decoding; Xiao et al. 2023
(arXiv:2309.17453) for sinks and a recent window. Positions stay the tokens' own: nothing is rotated anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvjax.cache.ahead import one_by_one, picked
from kvjax.cache.attention import Mask, attend, by_head, merge, queries_by_head, queries_together, write
from kvjax.cache.evict.knobs import Knobs, budgets, ranked, safe, vacant
from kvjax.cache.evict.score import Score
from kvjax.cache.evict.scores import SCORES, Attention
from kvjax.cache.slots import take_rows
from kvjax.pytree import pytree, static


@pytree
class ByHead(ABC):
    """What evicting layers have in common: a row a K/V head, each with its own choice of tokens.

    Slots are in no order; `positions` says what each head's slot holds, -1 where it is empty.
    """

    k: Float[Array, "rows full head_dim"]
    v: Float[Array, "rows full head_dim"]
    positions: Int[Array, "rows slots"]
    worth: Float[Array, "rows slots"]
    state: Any
    knobs: Knobs
    score: Score = static()

    @abstractmethod
    def _take_one(self, q, k, v, positions, valid, mask: Mask) -> Any:
        """`attend` to one token a row, by head."""

    @abstractmethod
    def _take_chunk(self, q, k, v, positions, valid, mask: Mask) -> Any:
        """`attend` to more, by head."""

    @abstractmethod
    def _cut(self, k, v, fresh: Int[Array, "rows width"], old, new, mask: Mask) -> Any:
        """The layer with the best of what is held and of new tokens, at positions `fresh`, by the worth of each."""

    @abstractmethod
    def _look(self, q, positions, mask: Mask) -> Any:
        """`look`, by head."""

    @abstractmethod
    def _received(self, score: Attention, q, positions, lse, weight, mask: Mask) -> Float[Array, "rows slots"]:
        """The worth that these queries' attention gives each slot."""

    @abstractmethod
    def tokens(self) -> tuple[Float[Array, "rows slots head_dim"], Float[Array, "rows slots head_dim"]]:
        """Keys and values of all slots."""

    @property
    def limit(self) -> None:
        return None

    def attend(self, q, k, v, positions, valid, mask: Mask):
        heads = k.shape[2]
        q, k, v = queries_by_head(q, heads), by_head(k).astype(self.k.dtype), by_head(v).astype(self.v.dtype)
        positions, valid = jnp.repeat(positions, heads, axis=0), jnp.repeat(valid, heads, axis=0)
        layer = replace(self, state=self.score.observe(self.state, q, k, positions, valid))
        take = layer._take_one if q.shape[1] == 1 else layer._take_chunk
        out, lse, layer = take(q, k, v, positions, valid, mask)
        return queries_together(out, heads), queries_together(lse, heads), layer

    def look(self, q, positions, mask: Mask):
        heads = self.knobs.budget.shape[0]
        found = self._look(queries_by_head(q, heads), jnp.repeat(positions, heads, axis=0), mask)
        return tuple(queries_together(part, heads) for part in found)

    def ahead(self, q, k, v, positions, valid, mask: Mask, path=None):
        """A node of a tree after the other, each from the start: what is held depends on the way to it."""
        if path is None:
            return one_by_one(self, q, k, v, positions, valid, mask)[:2]

        def last(way: Int[Array, "batch width"]):
            *new, real = (picked(x, way) for x in (q, k, v, positions, valid))
            seen = one_by_one(self, *new, real & (way >= 0), mask)[:2]
            end = (way >= 0).sum(1, keepdims=True) - 1
            return tuple(picked(x, end)[:, 0] for x in seen)

        out, lse = jax.lax.map(last, path.swapaxes(0, 1))
        return out.swapaxes(0, 1), lse.swapaxes(0, 1)

    def steady(self) -> None:
        return None

    @property
    def by_token(self) -> bool:
        return True

    def held(self, length: Int[Array, "batch"]) -> Int[Array, "rows slots"]:
        length = jnp.repeat(length, self.knobs.budget.shape[0])[:, None]
        return jnp.where(self.positions < length, self.positions, -1)

    def fork(self, rows: Int[Array, "new_batch"]) -> ByHead:
        batch = self.k.shape[0] // self.knobs.budget.shape[0]
        forked = jax.tree.map(lambda x: take_rows(x, rows, batch), replace(self, knobs=None))
        return replace(forked, knobs=jax.tree.map(jnp.copy, self.knobs))  # or one fork's donation would end the other

    @property
    def assured(self) -> tuple[int, int]:
        """None: heads differ, and the sinks and recent tokens that none evicts may be set anew."""
        return 0, 0

    def take(self, k, v, positions, mask: Mask, old):
        """The best by what their keys and values alone say, or by what `old` knows, if it has the same score."""
        positions = jnp.repeat(positions, k.shape[0] // positions.shape[0], axis=0)
        k, v = k.astype(self.k.dtype), v.astype(self.v.dtype)
        if isinstance(old, ByHead) and old.score == self.score:
            state = old.state
        elif self.score.queries:
            names = ", ".join(name for name, score in SCORES.items() if not score.queries)
            raise ValueError(
                f"compress: `strategy` must have a score that needs no queries, for those of what is held are gone: "
                f"{names}, or the one that `cache` has, got {self.score}"
            )
        else:
            state = self.score.observe(self.state, jnp.zeros_like(k)[:, :, None], k, positions, positions >= 0)
        known = isinstance(self.score, Attention)
        worth = old.worth if known else self.score.rate(state, k, v, positions)
        return replace(self, state=state)._cut(k, v, positions, jnp.zeros_like(self.worth), worth, mask)

    def best(self, old, new, fresh, mask: Mask) -> Bool[Array, "rows slots_and_width"]:
        """Which of what is held and what is new the budget has room for."""
        both = jnp.concatenate([self.positions, fresh], axis=1)
        rank = ranked(self.knobs, jnp.concatenate([old, new], axis=1), both, both.max(1, keepdims=True), mask)
        rank = jnp.where(both < 0, -jnp.inf, rank)
        place = jnp.argsort(jnp.argsort(-rank, axis=1, stable=True), axis=1)
        return (place < budgets(self.knobs, both)) & (both >= 0)

    def trimmed(self, mask: Mask) -> ByHead:
        """The layer without the tokens that its budgets, lowered since, have no room for."""
        none = jnp.zeros((self.positions.shape[0], 0))
        kept = self.best(self.worth, none, none.astype(self.positions.dtype), mask)
        return replace(self, positions=jnp.where(kept, self.positions, -1))

    def _seen(self, q, positions, valid, mask: Mask):
        """Attention to the slots, and the layer whose slots are worth what that makes them."""
        out, lse = self._look(q, positions, mask)
        if not isinstance(self.score, Attention):
            return out, lse, self
        more = self._received(self.score, q, positions, lse, self.score.weights(valid), mask)
        worth = self.score.joined(self.worth * self.score.kept(valid.sum(1))[:, None], more)
        return out, lse, replace(self, worth=worth)


@pytree
class EvictingLayer(ByHead):
    """Every slot is held in full, in `k` and `v`."""

    soft: bool = static()

    def _take_one(self, q, k, v, positions, valid, mask: Mask):
        """Overwrite the slot worth least, then attend."""
        rank = ranked(self.knobs, self.worth, self.positions, positions[:, :1], mask)
        slot = jnp.argmin(jnp.where(self.positions < 0, vacant(self.knobs, self.positions), rank), axis=1)
        worth = self.score.rate(self.state, k, v, positions)
        layer = replace(
            self,
            k=write(self.k, k, slot, valid),
            v=write(self.v, v, slot, valid),
            positions=write(self.positions, positions, slot, valid),
            worth=write(self.worth, worth, slot, valid),
        )
        return layer._seen(q, positions, valid, mask)

    def _take_chunk(self, q, k, v, positions, valid, mask: Mask):
        """Attend to all that is held and all that is new, then keep the best of both."""
        out, lse, old, new = self.compared(q, k, v, positions, valid, mask)
        return out, lse, self._cut(k, v, jnp.where(valid, positions, -1), old, new, mask)

    def _cut(self, k, v, fresh, old, new, mask: Mask):
        kept, slots = self.best(old, new, fresh, mask), self.positions.shape[1]
        taken, index = placed(kept[:, :slots], kept[:, slots:])
        held = jnp.where(kept[:, :slots], self.positions, -1)
        k, v, held, worth = (
            blend(x, y, taken, index) for x, y in ((self.k, k), (self.v, v), (held, fresh), (old, new))
        )
        return replace(self, k=k, v=v, positions=held, worth=worth)

    def tokens(self) -> tuple[Float[Array, "rows slots head_dim"], Float[Array, "rows slots head_dim"]]:
        return self.k, self.v

    def compared(self, q, k, v, positions, valid, mask: Mask):
        """A chunk's attention to what is held and to itself, and the worth of what is held and of what is new."""
        fresh = jnp.where(valid, positions, -1)
        out, lse = merge(self._look(q, positions, mask), attend(q, k, v, positions, fresh, mask))
        if not isinstance(self.score, Attention):
            old = self.score.rate(self.state, self.k, self.v, self.positions)
            return out, lse, old, self.score.rate(self.state, k, v, positions)
        weight = self.score.weights(valid)
        old = self._received(self.score, q, positions, lse, weight, mask)
        old = self.score.joined(self.worth * self.score.kept(valid.sum(1))[:, None], old)
        return out, lse, old, self.score.received(q, k, v, positions, fresh, lse, weight, mask, pool=True)

    def _look(self, q, positions, mask: Mask):
        """Attention over the slots; soft eviction weighs each slot's share of it and normalises again."""
        out, lse = attend(q, self.k, self.v, positions, self.positions, mask)
        if not self.soft:
            return out, lse
        return _weighed(q, self, positions, lse, self._share(positions), mask)

    def _received(self, score: Attention, q, positions, lse, weight, mask: Mask) -> Float[Array, "rows slots"]:
        more = score.received(q, self.k, self.v, positions, self.positions, lse, weight, mask)
        return more * self._share(positions) if self.soft else more

    def _share(self, positions) -> Float[Array, "rows slots"]:
        share = jax.nn.sigmoid((self.worth - self.knobs.threshold) / self.knobs.temperature)
        return jnp.where(safe(self.knobs, self.positions, positions.max(1, keepdims=True)), 1.0, share)


def placed(
    stays: Bool[Array, "rows slots"], enters: Bool[Array, "rows tokens"]
) -> tuple[Bool[Array, "rows slots"], Int[Array, "rows slots"]]:
    """Which freed slots take one of the tokens that enter, in order, and its index; a token that stays never moves."""
    source = jnp.argsort(~enters, axis=1, stable=True)
    nth = jnp.cumsum(~stays, axis=1) - 1
    taken = ~stays & (nth < enters.sum(1, keepdims=True))
    return taken, jnp.take_along_axis(source, jnp.clip(nth, 0, enters.shape[1] - 1), axis=1)


def blend(
    held: Shaped[Array, "rows slots *rest"],
    new: Shaped[Array, "rows tokens *rest"],
    taken: Bool[Array, "rows slots"],
    index: Int[Array, "rows slots"],
) -> Shaped[Array, "rows slots *rest"]:
    """`held`, but the new token `index` in each slot that is `taken`."""
    where, at = (x.reshape(*x.shape, *(1,) * (held.ndim - 2)) for x in (taken, index))
    return jnp.where(where, jnp.take_along_axis(new, at, axis=1), held)


def _weighed(q, layer: EvictingLayer, positions, lse, share, mask: Mask):
    """Attention whose probabilities are multiplied by `share` a slot: `softmax(logits + log share)`."""
    room = ((0, 0),) * 2 + ((0, 1),)  # one more feature, of value 1, counts what is left of the probabilities
    values = jnp.pad(layer.v.astype(jnp.float32), room, constant_values=1.0) * share[..., None]
    wide = jnp.pad(q.astype(jnp.float32), ((0, 0), *room)), jnp.pad(layer.k.astype(jnp.float32), room)
    mixed, _ = attend(*wide, values, positions, layer.positions, replace(mask, backend="xla"))
    total = mixed[..., -1:]
    safe = jnp.where(total > 0, total, 1.0)
    return (mixed[..., :-1] / safe).astype(q.dtype), lse + jnp.log(safe)[..., 0]
