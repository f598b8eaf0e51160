"""What a call of the model with each number of guesses costs: given, or measured once in a process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.decode.prompts import traced
from kvjax.decode.sampling import Rules
from kvjax.draft.base import Draft
from kvjax.draft.rounds import PATIENCE
from kvjax.draft.state import LONGEST, Speculation, widths
from kvjax.model import Transformer

SOME = 2
"""Rounds with guesses that are timed at once; of steps there are `LONGEST`."""


@dataclass
class Timed:
    """Seconds a call with each number of guesses, infinite where none was timed, after so many `turns` of timing."""

    seconds: np.ndarray
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


def paid_for(costs, model: Transformer, draft: Draft, spec: Speculation) -> Float[Array, "choices"]:
    """`costs` as an array; where None are given, what was timed so far, and a tenth of a step more for each guess."""
    if costs is None:
        costs = filled(_timed(model, draft, spec).seconds, widths(draft))
    return jnp.asarray(costs, jnp.float32)


def known(model: Transformer, draft: Draft, spec: Speculation) -> bool:
    """Whether calls of this model, draft, batch and cache were timed twice with each number of guesses."""
    return _timed(model, draft, spec).turns == len(_order(widths(draft)))


def timed(model: Transformer, draft: Draft, run: Callable, spec: Speculation, rules: Rules) -> tuple[Speculation, bool]:
    """Some rounds with the number of guesses that is next to be timed, on the host; what they make counts.

    The first of all is not timed. Steps without guesses are made as where guesses do not pay: many between two plans.
    What a call of no rounds takes is not counted.

    Args:
        run: `advance` but for what it is to go on from; makes up to `LONGEST` tokens, or `SOME` calls with guesses.
    Returns:
        What there is then, and whether such rounds were made: not where no row was long enough.
    """
    choices, so_far = widths(draft), _timed(model, draft, spec)
    i = _order(choices)[so_far.turns]
    only = jnp.asarray(np.where(np.arange(len(choices)) == i, 1.0, np.inf).astype(np.float32))
    before = np.asarray(spec.rounds)
    if i == 0:
        spec = replace(spec, idle=jnp.full_like(spec.idle, PATIENCE * LONGEST))
    started = time.perf_counter()
    spec = jax.block_until_ready(run(spec, rules, only, 0))
    called = time.perf_counter()
    spec = jax.block_until_ready(run(spec, rules, only, LONGEST if i == 0 else SOME))
    taken = (time.perf_counter() - called) - (called - started)
    made = np.asarray(spec.rounds) - before
    good = bool(made[i] == made.sum() > 0)
    if good and so_far.turns == 0:
        so_far.turns = 1
    elif good and taken > 0:
        so_far.seconds[i] = min(so_far.seconds[i], taken / made[i])
        so_far.turns += 1
    return spec, good


def filled(seconds: np.ndarray, choices: tuple[int, ...]) -> np.ndarray:
    """Costs that are infinite by the others: a tenth of a step more for each guess."""
    there, model = np.isfinite(seconds), np.array([1 + n / 10 for n in choices])
    scale = (seconds[there] / model[there]).mean() if there.any() else 1.0
    return np.where(there, seconds, model * scale).astype(np.float32)


def _order(choices: tuple[int, ...]) -> tuple[int, ...]:
    return 0, *range(len(choices)), *range(len(choices))


def _timed(model: Transformer, draft: Draft, spec: Speculation) -> Timed:
    cache = spec.state.cache
    kind = model, jax.tree.structure((draft, cache)), cache.batch, cache.capacity
    return _TIMED.setdefault(kind, Timed(np.full(len(widths(draft)), np.inf)))
