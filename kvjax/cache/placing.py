"""Layers whose next token goes to one slot, in place: a step writes it and attends to all slots at once."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.ahead import InOrder
from kvjax.cache.attention import Mask, append, by_head
from kvjax.pytree import pytree


class Place(NamedTuple):
    """Where the next token of each row goes.

    Args:
        slots: the position that each slot holds before, -1 where it is empty.
        to: the slot it goes to, -1 for none.
        mask: what its queries see, of what was asked for.
        after: the layer that holds it, but for its keys and values.
    """

    slots: Int[Array, "batch slots"]
    to: Int[Array, "batch"]
    mask: Mask
    after: Placing


@pytree
class Placing(InOrder):
    """What such layers share: keys and values, with a row's K/V heads after each other."""

    k: Float[Array, "rows slots head_dim"]
    v: Float[Array, "rows slots head_dim"]

    def place(self, positions: Int[Array, "batch 1"], valid: Bool[Array, "batch 1"], mask: Mask) -> Place:
        """Of the token at `positions`, where it is `valid`."""
        raise NotImplementedError

    def attend_one(self, q, k, v, positions: Int[Array, "batch 1"], valid: Bool[Array, "batch 1"], mask: Mask):
        """What `attend` gives for one token a row."""
        place = self.place(positions, valid, mask)
        new = (by_head(x).astype(self.k.dtype) for x in (k, v))
        out, lse, k, v = append(q, *new, self.k, self.v, positions, place.slots, place.to, place.mask)
        return out, lse, replace(place.after, k=k, v=v)
