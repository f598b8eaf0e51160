"""Automata as arrays on the host: state 0 is the start, and -1 is where a symbol leads that no match goes on with."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int

END = 0
"""The byte that stands for the end of a text while an expression is compiled. No text has it."""

MARK = b'"\x01"'
"""A JSON string that no text has, for what is put in its place later."""

MOST_STATES = 1 << 15
"""Of an automaton over bytes. Its table is made of Python's dictionaries, which take about 100 bytes a transition."""

Next = Int[np.ndarray, "states symbols"]
Accepts = Bool[np.ndarray, "states"]
Kept = tuple[Int[np.ndarray, "kept symbols"], Bool[np.ndarray, "kept"]]


def over_bytes(pattern: str, *, alone: bool = True) -> tuple[Next, Accepts]:
    """The smallest automaton over UTF-8 bytes that accepts the texts which `pattern` matches from end to end.

    Args:
        pattern: what to match.
        alone: see first that it is one expression, which takes as long again.
    Raises:
        ImportError: without `outlines-core`.
        ValueError: for what is no regular expression, or matches no text, or needs too many states.
    """
    try:
        from outlines_core import Index, Vocabulary
    except ImportError as error:
        raise ImportError("a grammar needs outlines-core: pip install 'kvjax[grammar]'") from error
    units = Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    pattern = without_anchors(pattern)
    try:  # alone first: what is wrong on its own must not become right between the parentheses below
        if alone:
            Index(pattern, units)
    except ValueError as error:
        if "incompatible" not in str(error):
            raise ValueError(
                f"regex: `pattern` must be an expression of Rust's regex syntax without anchors inside, "
                f"got {pattern!r}: {error}"
            ) from error
    try:  # an end that is read keeps `a|ab` from ending at its first branch, as a search would
        index = Index(f"(?:{pattern})\\x{END:02x}", units)
    except ValueError as error:
        raise ValueError(f"regex: `pattern` matches no text, got {pattern!r}") from error
    moves, finals, begin = index.get_transitions(), index.get_final_states(), index.get_initial_state()
    if len(moves) > MOST_STATES:
        raise ValueError(f"regex: `pattern` needs {len(moves)} states over bytes, more than {MOST_STATES}")
    number = {state: i for i, state in enumerate({begin: None, **moves, **dict.fromkeys(finals)})}
    table = np.full((len(number), 256), -1, np.int32)
    for state, row in moves.items():
        for byte, to in row.items():
            if byte < 256:
                table[number[state], byte] = number[to]
    final = np.zeros(len(number), bool)
    final[[number[state] for state in finals]] = True
    accepts = (table[:, END] >= 0) & final[table[:, END]]
    table[:, END] = -1
    table, accepts = trimmed(table, accepts)
    if not len(table):
        raise ValueError(f"regex: `pattern` matches no text, got {pattern!r}")
    return table, accepts


def trimmed(table: Next, accepts: Accepts, start: int = 0) -> Kept:
    """The same language from `start` on, without useless moves and states, equal states as one, in order of discovery.

    No state is left if nothing is accepted.
    """
    alive = accepts.copy()
    while True:
        more = alive | ((table >= 0) & alive[table]).any(1)
        if (more == alive).all():
            break
        alive = more
    if not alive[start]:
        return table[:0], accepts[:0]
    table = np.where((table >= 0) & alive[table], table, -1)
    table, accepts = _discovered(table, accepts, start)
    part = _equal(table, accepts)
    _, first = np.unique(part, return_index=True)
    return _discovered(np.where(table >= 0, part[table], -1)[first], accepts[first], int(part[0]))


def inlined(
    table: Next, accepts: Accepts, moves: Int[np.ndarray, "others symbols"], ends: Bool[np.ndarray, "others"]
) -> Kept:
    """The language in which each `MARK` stands for any text that `moves` and `ends` accept.

    By the subset construction (Rabin and Scott 1959).
    """
    size = len(table)
    leads = np.arange(size)  # where a mark leads from each state
    for byte in MARK:
        leads = np.where(leads >= 0, table[leads, byte], -1)
    copies = {int(to): size + i * len(moves) for i, to in enumerate(np.unique(leads[leads >= 0]))}
    back = {begin: to for to, begin in copies.items()}
    table = np.where(np.arange(256) == MARK[1], -1, table)
    both = np.concatenate([table, *(np.where(moves >= 0, moves + begin, -1) for begin in back)])
    kinds, firsts = numbered(both.T)
    both = both[:, firsts].tolist()

    def closed(states: Iterable[int]) -> frozenset[int]:
        """With the states that are reached without a byte: the other's start, and a mark's target at its ends."""
        found, new = set(), list(states)
        while new:
            state = new.pop()
            if state < 0 or state in found:
                continue
            found.add(state)
            if state < size:
                new.append(copies.get(int(leads[state]), -1))
            elif ends[(state - size) % len(moves)]:
                new.append(back[state - (state - size) % len(moves)])
        return frozenset(found)

    order = [closed([0])]
    number, rows = {order[0]: 0}, []
    for states in order:  # it grows on the way
        rows.append([])
        for targets in zip(*(both[state] for state in states), strict=True):
            to = closed(targets)
            if to and to not in number:
                number[to] = len(order)
                order.append(to)
            rows[-1].append(number[to] if to else -1)
    accepted = np.array([any(state < size and accepts[state] for state in states) for states in order])
    return trimmed(np.array(rows, np.int32)[:, kinds], accepted)


def steps_to_end(table: Next, accepts: Accepts) -> Int[np.ndarray, "states"]:
    """The fewest symbols from each state to one that accepts."""
    far = np.iinfo(np.int32).max - 1
    steps = np.where(accepts, 0, far)
    while True:
        nearer = np.minimum(steps, np.where(table >= 0, steps[table], far).min(1, initial=far) + 1)
        if (nearer == steps).all():
            return steps.astype(np.int32)
        steps = nearer


def numbered(rows: np.ndarray) -> tuple[Int[np.ndarray, "rows"], Int[np.ndarray, "distinct"]]:
    """A number for each row, the same for equal ones, in order of appearance; and where each number appears first."""
    whole = np.ascontiguousarray(rows).reshape(len(rows), -1)
    _, first, number = np.unique(
        whole.view(np.dtype((np.void, whole.dtype.itemsize * whole.shape[1]))).ravel(),
        return_index=True,
        return_inverse=True,
    )
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[number].astype(np.int32), first[order].astype(np.int32)


def _equal(table: Next, accepts: Accepts) -> Int[np.ndarray, "states"]:
    """Moore's refinement (1956): states stay together while no text tells them apart."""
    symbols = numbered(table.T)[1]  # one of each kind is enough
    table, part, parts = table[:, symbols], accepts.astype(np.int32), 0
    while True:
        part, first = numbered(np.concatenate([part[:, None], np.where(table >= 0, part[table], -1)], axis=1))
        if len(first) == parts:
            return part
        parts = len(first)


def _discovered(table: Next, accepts: Accepts, start: int) -> Kept:
    """The states that `start` leads to, in the order of a breadth-first search."""
    order, found = [start], {start}
    for state in order:  # it grows on the way
        row = table[state]
        targets, at = np.unique(row[row >= 0], return_index=True)
        new = [int(to) for to in targets[np.argsort(at)] if int(to) not in found]
        order += new
        found.update(new)
    number = np.full(len(table) + 1, -1, np.int32)  # the last is what -1 picks
    number[order] = np.arange(len(order))
    return number[table[order]], accepts[order]


def without_anchors(pattern: str) -> str:
    """The whole text is matched anyway."""
    pattern = pattern.removeprefix("^")
    body = pattern.removesuffix("$")
    slashes = len(body) - len(body.rstrip("\\"))
    return pattern if slashes % 2 else body
