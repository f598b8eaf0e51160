"""What a call of the model with each number of guesses costs: given, or measured once in a process."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.decode.prompts import traced
from kvjax.decode.sampling import Rules
from kvjax.draft.base import Draft
from kvjax.draft.rounds import PATIENCE, Run
from kvjax.draft.state import LONGEST, Speculation, widths
from kvjax.model import Transformer

SOME = 2
"""Rounds with guesses that are timed at once; of steps there are `LONGEST`."""


@dataclass
class Timed:
    """What was timed so far: seconds a call with each number of guesses, infinite where none was, in so many turns.

    `empty` is the least that a call of no rounds took.
    """

    seconds: np.ndarray
    empty: float = math.inf
    turns: int = 0


_TIMED: dict[Any, Timed] = {}
"""What was timed in this process, as programs are compiled once in it."""


def check_costs(costs, choices: tuple[int, ...], where: str) -> None:
    """Raise ValueError for costs that are not one number above 0 for each number of guesses; None is good."""
    if costs is None:
        return
    if np.shape(costs) != (len(choices),):
        raise ValueError(
            f"{where}: `costs` must have {len(choices)} entries, one for each of {choices} guesses, "
            f"got shape {np.shape(costs)}"
        )
    if not traced(costs) and not (np.asarray(costs) > 0).all():
        raise ValueError(f"{where}: `costs` must be above 0, got {np.asarray(costs).tolist()}")


def paid_for(costs, model: Transformer, draft: Draft, spec: Speculation, rules: Rules) -> Float[Array, "choices"]:
    """`costs` as an array; where None are given, what was timed so far, and a tenth of a step more for each guess."""
    if costs is None:
        costs = filled(so_far(model, draft, spec, rules).seconds, widths(draft))
    return jnp.asarray(costs, jnp.float32)


def can_time(model: Transformer, draft: Draft, spec: Speculation, rules: Rules) -> bool:
    """Whether calls with some number of guesses were not timed twice yet, and can be.

    Not while traced, nor by several processes, which would not agree.
    """
    if traced(spec.state.reason) or jax.process_count() > 1:
        return False
    return so_far(model, draft, spec, rules).turns < 2 * len(widths(draft))


def timed(model: Transformer, draft: Draft, run: Run, spec: Speculation, rules: Rules) -> tuple[Speculation, bool]:
    """Some rounds with the number of guesses that is next to be timed, on the host; what they make counts.

    The first is not timed: it may compile, and the draft take in what it has missed. Steps without guesses are made as
    where guesses do not pay: many between two plans. What a call of no rounds takes is not counted.

    Args:
        run: of `runner`; makes up to `longest_timed` tokens a row.
    Returns:
        What there is then, and whether such rounds were made: not where no row was long enough.
    """
    choices, was = widths(draft), so_far(model, draft, spec, rules)
    i = was.turns % len(choices)
    only = jnp.asarray(np.where(np.arange(len(choices)) == i, 1.0, np.inf).astype(np.float32))
    if i == 0:
        spec = replace(spec, idle=jnp.full_like(spec.idle, PATIENCE * LONGEST))
    spec = jax.block_until_ready(run(spec, rules, only, 1))
    before, started = np.asarray(spec.rounds), time.perf_counter()
    spec = jax.block_until_ready(run(spec, rules, only, 0))
    called = time.perf_counter()
    spec = jax.block_until_ready(run(spec, rules, only, LONGEST if i == 0 else SOME))
    taken, made = time.perf_counter() - called, np.asarray(spec.rounds) - before
    was.empty = min(was.empty, called - started)
    good = bool(made[i] == made.sum() > 0)
    if good and taken > was.empty:
        was.seconds[i] = min(was.seconds[i], (taken - was.empty) / made[i])
        was.turns += 1
    return replace(spec, idle=jnp.zeros_like(spec.idle)), good


def longest_timed(draft: Draft) -> int:
    """Tokens a row that `timed` makes, at most."""
    return max(1 + LONGEST, (1 + SOME) * (1 + draft.most))


def filled(seconds: np.ndarray, choices: tuple[int, ...]) -> np.ndarray:
    """Costs that are infinite by the others: a tenth of a step more for each guess."""
    there, model = np.isfinite(seconds), np.array([1 + n / 10 for n in choices])
    scale = (seconds[there] / model[there]).mean() if there.any() else 1.0
    return np.where(there, seconds, model * scale).astype(np.float32)


def so_far(model: Transformer, draft: Draft, spec: Speculation, rules: Rules) -> Timed:
    """What was timed for such a model, draft, cache, rules and device."""
    none = Timed(np.full(len(widths(draft)), np.inf))
    if traced(spec.state.reason):
        return none
    cache = spec.state.cache
    kind = model, jax.tree.structure((draft, cache, rules)), cache.batch, cache.capacity
    return _TIMED.setdefault((*kind, frozenset(cache.length.devices())), none)
