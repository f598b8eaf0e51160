"""Guesses that branch: what several drafts say, as one tree that the model checks in one call.

Sources: Miao et al. 2023, "SpecInfer" (arXiv:2305.09781), section 4, for token trees, their merging and their mask;
Cai et al. 2024, "Medusa" (arXiv:2401.10774), section 2.1.2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.decode.prompts import traced
from kvjax.draft.base import View
from kvjax.draft.several import Several
from kvjax.pytree import pytree


@pytree
class Tree:
    """Guesses, each after the one whose index is its `parent`, or, where that is -1, after the row's newest token.

    Parents come before their children, and those worth most come first: fewer guesses are the first so many.
    """

    guess: Int[Array, "batch most"]
    parent: Int[Array, "batch most"]


def paths(parent: Int[Array, "batch most"]) -> Int[Array, "batch nodes nodes"]:
    """The way to each node, from the row's newest token, node 0, to itself, and -1 after it; guess `i` is node `i + 1`.

    Raises:
        ValueError: for a parent that does not come before its child, if values are known on the host.
        Inside `jit` nothing is raised: `speculate` takes the guess before for one that comes later.
    """
    batch, most = parent.shape
    node = jnp.arange(most + 1, dtype=jnp.int32)
    if not traced(parent) and bool(((parent < -1) | (parent >= node[None, :-1])).any()):
        raise ValueError(f"paths: `parent` must be -1 or the index of an earlier guess, got {parent.tolist()}")

    def add(seen, i):
        before = jnp.take_along_axis(seen, parent[:, i, None, None] + 1, axis=1)[:, 0]
        return seen.at[:, i + 1].set(before | (node == i + 1)[None]), None

    seen = jnp.zeros((batch, most + 1, most + 1), bool).at[:, 0, 0].set(True)
    seen, _ = jax.lax.scan(add, seen, node[:-1])
    way = jnp.sort(jnp.where(seen, node[None, None], most + 1), axis=2)
    return jnp.where(way > most, -1, way)


def hopes(
    chance: Float[Array, "batch"], parent: Int[Array, "batch most"], path: Int[Array, "batch nodes nodes"]
) -> Float[Array, "batch most"]:
    """How likely each guess is kept, if `chance` is that of each of a node's children that no sister before has met."""
    older = jnp.tril(jnp.ones((parent.shape[1],) * 2, bool), -1)[None]
    rank = ((parent[:, None] == parent[:, :, None]) & older).sum(2)
    each = chance[:, None] * (1 - chance[:, None]) ** rank.astype(jnp.float32)
    each = jnp.pad(each, ((0, 0), (1, 0)), constant_values=1.0)
    along = jnp.take_along_axis(each[:, None], jnp.maximum(path, 0), axis=2)
    return jnp.where(path < 0, 1.0, along).prod(2)[:, 1:]


@pytree
class Branches(Several):
    """The guesses of all `drafts` at once, those of the first first; equal beginnings are merged.

    `Branches((PromptLookup(k=4), PromptLookup(k=3, skip=1)))` has the latest match and the latest that differs from it.

    Raises:
        ValueError: if there is no draft, or one that makes trees itself.
    """

    drafts: tuple[Any, ...]

    @property
    def most(self) -> int:
        return sum(draft.most for draft in self.drafts)

    @property
    def makes_trees(self) -> bool:
        return True

    def propose(self, own: tuple[Any, ...], view: View, want: Int[Array, ""]):
        blank = jnp.full((view.length.shape[0], self.most), -1, jnp.int32)
        tree, count, after = Tree(blank, blank), jnp.zeros(view.length.shape, jnp.int32), []
        for draft, state in zip(self.drafts, own, strict=True):
            guess, found, state = draft.propose(state, view, want)
            tree, count = merged(tree, count, guess, found)
            after.append(state)
        return tree, count, tuple(after)


def merged(
    tree: Tree, count: Int[Array, "batch"], guess: Int[Array, "batch some"], found: Int[Array, "batch"]
) -> tuple[Tree, Int[Array, "batch"]]:
    """A tree of `count` guesses with the first `found` of a chain's put in, and its count; there is room for them."""
    nth, rows = jnp.arange(tree.guess.shape[1], dtype=jnp.int32)[None], jnp.arange(count.shape[0])

    def put(carry: tuple[Tree, Array, Array], i):
        tree, count, at = carry
        token, real = guess[:, i], i < found
        same = (tree.guess == token[:, None]) & (tree.parent == at[:, None]) & (nth < count[:, None])
        known = same.any(1)
        place = jnp.where(real & ~known, count, nth.shape[1])
        tree = Tree(
            tree.guess.at[rows, place].set(token, mode="drop"), tree.parent.at[rows, place].set(at, mode="drop")
        )
        at = jnp.where(known, jnp.argmax(same, axis=1).astype(jnp.int32), count)
        return (tree, count + (real & ~known).astype(jnp.int32), at), None

    begun = tree, count, jnp.full_like(count, -1)
    return jax.lax.scan(put, begun, jnp.arange(guess.shape[1], dtype=jnp.int32))[0][:2]
