"""Milliseconds of a decode step with each cache, beside `Dense` with the same tokens in it.

Every cache takes in the same prompts, and then the same tokens, a few steps a turn, all caches by turns. The first turn
warms up and is thrown away; of the others' steps the median counts, and the range of the turns' own medians is shown.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from experiments.registry import Progress, Row
from experiments.text import help_pages
from kvjax.cache import Cache, Dense
from kvjax.terminal.session import parse_strategy

DENSE = "dense"


@dataclass(frozen=True)
class Config:
    """The fields of `cache_speed.yaml`.

    Args:
        model: as `kvjax.load` takes it.
        caches: strategies, written as for `--cache`; dense is always measured.
        contexts: tokens that a row holds before the first step that counts.
        batches: rows.
        steps: decode steps of a turn.
        turns: of each cache, after one that warms up.
    """

    model: str = "smollm2"
    caches: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    steps: int = 8
    turns: int = 5

    def __post_init__(self):
        for name in ("steps", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"cache_speed: `{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("contexts", "batches"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"cache_speed: `{name}` must be at least 1, got {list(getattr(self, name))}")
        for text in self.caches:
            parse_strategy(text)


def run(config: Config, progress: Progress) -> list[Row]:
    """Every cache at every context and batch."""
    model, params, tokenizer = kvjax.load(config.model)
    names = list(dict.fromkeys((DENSE, *config.caches)))
    works = [(context, batch) for context in config.contexts for batch in config.batches]
    rows: list[Row] = []
    for i, (context, batch) in enumerate(works):

        def tell(doing: str, done: float, i=i, context=context, batch=batch) -> None:
            progress(f"{doing}, {batch} x {context} tokens", (i + done) / len(works))

        prompts = _prompts(tokenizer, batch, context)
        caches: dict[str, Cache] = {}
        for name in names:
            tell(f"filling {name}", 0.5 * len(caches) / len(names))
            strategy = Dense() if name == DENSE else parse_strategy(name)
            room = context + config.steps * (config.turns + 1)
            caches[name] = kvjax.prefill(model, params, strategy.init(model, batch=batch, capacity=room), prompts)[1]
        times: dict[str, list[list[float]]] = {name: [] for name in names}
        for turn in range(config.turns + 1):
            tell("decoding", 0.5 + 0.5 * turn / (config.turns + 1))
            for name in names:
                taken, caches[name] = _turn(model, params, caches[name], prompts[:, : config.steps])
                if turn:
                    times[name].append(taken)
        rows += [row(name, context, batch, times, kvjax.nbytes(caches[name])) for name in names]
    return rows


def row(name: str, context: int, batch: int, times: dict[str, list[list[float]]], size: int) -> Row:
    """A line of the table; `ratio` is to dense's median, below 1 where the cache is faster."""
    turns = [1e3 * median(taken) for taken in times[name]]
    dense = median(x for taken in times[DENSE] for x in taken)
    mine = median(x for taken in times[name] for x in taken)
    return {
        "strategy": name,
        "context": context,
        "batch": batch,
        "ms": 1e3 * mine,
        "range": [min(turns), max(turns)],
        "ratio": mine / dense,
        "cache_mb": size / 1e6,
    }


def _turn(model, params: Any, cache: Cache, tokens: np.ndarray) -> tuple[list[float], Cache]:
    """Seconds of each step of a turn; the step's compile, if any, is not among them in a turn that counts."""
    taken = []
    for token in jnp.asarray(tokens.T):
        start = time.perf_counter()
        logits, cache = kvjax.decode_step(model, params, cache, token)
        jax.block_until_ready((logits, cache))
        taken.append(time.perf_counter() - start)
    return taken, cache


def _prompts(tokenizer, batch: int, context: int) -> np.ndarray:
    """Rows of real text, each its own."""
    ids = np.asarray(tokenizer.encode(help_pages()[: 12 * batch * context + 1000]), np.int32)
    return np.resize(ids, (batch, context))
