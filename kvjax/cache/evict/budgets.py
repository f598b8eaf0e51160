"""How many tokens each layer and head may keep: uniform, pyramid, or by measured attention entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from kvjax.cache.base import LayerSpec

Share = int | float
"""Tokens; a `float` is a share of the capacity, in (0, 1]."""

Budget = Share | tuple[Share | tuple[Share, ...], ...]
"""Tokens a K/V head: for all, or one entry a layer, itself for all heads or one number a head."""

SPLITS = ("uniform", "pyramid")


def pyramid(budget: int, layers: int, *, least: int = 1, slope: float = 0.5) -> tuple[int, ...]:
    """Budgets falling in a line from `(1 + slope) * budget` at the first layer to `(1 - slope) * budget`.

    Their sum is `layers * budget`, unless `least` lifts the last ones. Source: Cai et al. 2024, "PyramidKV"
    (arXiv:2406.02069).
    """
    shares = np.linspace(slope, -slope, layers)
    shares += 1 - shares.mean()
    return tuple(int(x) for x in np.maximum(_whole(shares * budget, layers * budget), least))


def adaptive(
    entropy: np.ndarray | Sequence[Sequence[float]], budget: int, *, least: int = 1
) -> tuple[tuple[int, ...], ...]:
    """Budgets a layer and head in proportion to the tokens its attention spreads over, `exp(entropy)`.

    `entropy` is [layers, kv_heads], in nats. Budgets sum to `budget` a head; none gets fewer than `least`. A
    layer's slots are those of its largest head. Source of budgets a head: Feng et al. 2024 (arXiv:2407.11550).

    Raises:
        ValueError: if `entropy` is not [layers, kv_heads] of finite nats, or `budget` is below `least`.
    """
    nats = np.asarray(entropy, np.float64)
    if nats.ndim != 2 or not np.isfinite(nats).all():
        raise ValueError(f"adaptive: `entropy` must be finite nats [layers, kv_heads], got {nats.dtype} {nats.shape}")
    if budget < least:
        raise ValueError(f"adaptive: `budget` must be at least {least} tokens, got {budget}")
    spread = np.exp(nats - nats.max()).ravel()
    extra = _whole(spread / spread.sum() * (budget - least) * spread.size, (budget - least) * spread.size)
    return tuple(tuple(int(x) + least for x in row) for row in extra.reshape(nats.shape))


def plain(budget: Any, *, depth: int = 2) -> Budget:
    """The budget in Python's own numbers, tuples at most `depth` deep.

    Raises:
        ValueError: if it is no `Budget`.
    """
    if isinstance(budget, tuple) and budget and depth:
        parts: Any = tuple(plain(part, depth=depth - 1) for part in budget)
        return parts
    number = budget.item() if isinstance(budget, np.generic) else budget
    if isinstance(number, bool) or not isinstance(number, Share):
        raise ValueError(
            f"Evicting: `budget` must be tokens, a share of the capacity, or a tuple of these, one a layer, "
            f"got {budget!r}"
        )
    return number


def slots_of(budget: Budget, split: str, spec: LayerSpec, least: int) -> tuple[int, ...]:
    """Tokens that each K/V head of one layer may hold, at most the capacity.

    Raises:
        ValueError: for a split that does not exist, budgets that are not one a layer or head, or below `least`.
    """
    if split not in SPLITS:
        raise ValueError(f"Evicting: `split` must be one of {', '.join(SPLITS)}, got {split!r}")
    if isinstance(budget, tuple):
        if split != "uniform" or len(budget) != spec.layers:
            raise ValueError(f"Evicting: `budget` must be one number or {spec.layers}, one a layer, got {budget}")
        here = budget[spec.index]
    else:
        here = _tokens(budget, spec)
        if split == "pyramid" and here >= least:
            here = pyramid(here, spec.layers, least=least)[spec.index]
    heads = tuple(_tokens(head, spec) for head in (here if isinstance(here, tuple) else (here,) * spec.kv_heads))
    if len(heads) != spec.kv_heads:
        raise ValueError(
            f"Evicting: `budget` of layer {spec.index} must have one number for each of its {spec.kv_heads} K/V "
            f"heads, got {heads}"
        )
    if min(heads) < least:
        raise ValueError(
            f"Evicting: `budget` must be at least `sinks` + `recent`, {least} tokens, got {min(heads)} "
            f"in layer {spec.index}"
        )
    return tuple(min(head, spec.capacity) for head in heads)


def _tokens(budget: Share, spec: LayerSpec) -> int:
    if isinstance(budget, int):
        return budget
    if not 0 < budget <= 1:
        raise ValueError(f"Evicting: `budget` as a share of the capacity must be in (0, 1], got {budget}")
    return round(budget * spec.capacity)


def _whole(shares: Float[np.ndarray, "n"], total: int) -> Float[np.ndarray, "n"]:
    """Whole numbers nearest to `shares` that sum to `total`: the largest remainders are rounded up."""
    floor = np.floor(shares)
    order = np.argsort(floor - shares, kind="stable")
    floor[order[: int(round(total - floor.sum()))]] += 1
    return floor
