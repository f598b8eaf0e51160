"""Grammars on the device: which tokens may follow in each row, and where a token leads."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax.decode.widths import power_of_two
from kvjax.grammar.grammar import MOST_BYTES, Grammar
from kvjax.pytree import pytree


@pytree
class Grammars:
    """The distinct grammars of a batch, their states one after another; without any the tables are empty.

    Sizes are rounded up to powers of two, so that other grammars of about the same size cost no compile.

    Args:
        classes: of each token, in each grammar.
        next: the state that a class leads to, counted from the first of its grammar; -1 where it may not follow.
        accepts, done: whether the text may end in a state, and whether it must.
        first: of each grammar's states.
    """

    classes: Int[Array, "grammars vocab"]
    next: Int[Array, "states classes"]
    accepts: Bool[Array, "states"]
    done: Bool[Array, "states"]
    first: Int[Array, "grammars"]

    @property
    def none(self) -> bool:
        """Known while tracing: nothing of grammars is compiled then."""
        return self.next.shape[0] == 0


def pack(rows: Sequence[Grammar | None], vocab: int) -> tuple[Int[np.ndarray, "batch"], Grammars]:
    """Which grammar each row has, -1 for none, and the tables of all.

    Raises:
        ValueError: as `check_size`.
    """
    check_size(rows, vocab)
    distinct, count, states, symbols = _sizes(rows, vocab)
    number = {grammar: i for i, grammar in enumerate(distinct)}
    which = np.array([-1 if grammar is None else number[grammar] for grammar in rows], np.int32)
    classes, first = np.zeros((count, vocab if count else 0), np.int32), np.zeros(count, np.int32)
    table, accepts = np.full((states, symbols), -1, np.int32), np.zeros(states, bool)
    at = 0
    for i, grammar in enumerate(distinct):
        end, known = at + len(grammar.next), len(grammar.classes)
        classes[i, :known] = grammar.classes
        classes[i, known:] = grammar.next.shape[1]  # a class that leads nowhere
        table[at:end, : grammar.next.shape[1]] = grammar.next
        accepts[at:end], first[i], at = grammar.accepts, at, end
    done = accepts & (table < 0).all(1)
    return which, Grammars(*(jnp.asarray(x) for x in (classes, table, accepts, done, first)))


def check_size(rows: Sequence[Grammar | None], vocab: int) -> None:
    """Raise ValueError if the tables of these grammars would be larger than `MOST_BYTES`."""
    if (size := table_bytes(rows, vocab)) > MOST_BYTES:
        raise ValueError(
            f"Sampling: the `grammar` tables of the batch would take {size >> 20} MiB, more than {MOST_BYTES >> 20}: "
            "use fewer or simpler ones"
        )


def table_bytes(rows: Sequence[Grammar | None], vocab: int) -> int:
    """What the tables of these grammars take on the device."""
    _, count, states, symbols = _sizes(rows, vocab)
    return 4 * (states * symbols + count * vocab)


def _sizes(rows: Sequence[Grammar | None], vocab: int) -> tuple[list[Grammar], int, int, int]:
    """The distinct grammars, and how many of them, of states and of classes there is room for."""
    distinct = list(dict.fromkeys(grammar for grammar in rows if grammar is not None))
    widest = max((grammar.next.shape[1] + (len(grammar.classes) < vocab) for grammar in distinct), default=0)
    states = sum(len(grammar.next) for grammar in distinct)
    return distinct, _rounded(len(distinct)), _rounded(states), _rounded(widest)


def targets(grammars: Grammars, which: Int[Array, "batch"], ruled: Int[Array, "batch"]) -> Int[Array, "batch vocab"]:
    """Where each token leads from each row's state: -1 where it may not follow."""
    which = jnp.maximum(which, 0)
    rows = jnp.take(grammars.next, grammars.first[which] + ruled, axis=0)
    return jnp.take_along_axis(rows, jnp.take(grammars.classes, which, axis=0), axis=1)


def allowed(
    grammars: Grammars, which: Int[Array, "batch"], stop: Int[Array, "batch stops"], ruled: Int[Array, "batch"]
) -> Bool[Array, "batch vocab"]:
    """Tokens that may follow: those that the grammar leads on with, and a row's stop tokens where its text may end."""
    follow = targets(grammars, which, ruled) >= 0
    ids = jnp.where(stop < 0, follow.shape[1], stop)
    end = grammars.accepts[_state(grammars, which, ruled)]
    follow = follow.at[jnp.arange(ids.shape[0])[:, None], ids].set(end[:, None], mode="drop")
    return follow | (which < 0)[:, None]


def follow(
    grammars: Grammars, which: Int[Array, "batch"], ruled: Int[Array, "batch"], token: Int[Array, "batch"]
) -> Int[Array, "batch"]:
    """Each row's state after one more token; a token that may not follow, such as one that stops, changes nothing."""
    symbol = grammars.classes[jnp.maximum(which, 0), token]
    to = grammars.next[_state(grammars, which, ruled), symbol]
    return jnp.where((which >= 0) & (to >= 0), to, ruled)


def complete(
    grammars: Grammars, which: Int[Array, "batch"], stop: Int[Array, "batch stops"], ruled: Int[Array, "batch"]
) -> Bool[Array, "batch"]:
    """Rows whose text is whole and cannot go on, and that have no stop token to say so."""
    return (which >= 0) & grammars.done[_state(grammars, which, ruled)] & (stop < 0).all(-1)


def _state(grammars: Grammars, which: Int[Array, "batch"], ruled: Int[Array, "batch"]) -> Int[Array, "batch"]:
    return grammars.first[jnp.maximum(which, 0)] + ruled


def _rounded(n: int) -> int:
    """To a power of two; 0 stays."""
    return n and power_of_two(n)
