"""Levels by name, each with something that the one below lacks: presets of `kvjax.batch.open`, and of acceleration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Array, Key

from kvjax.batch import Serving, Settings
from kvjax.batch import open as open_slots
from kvjax.cache import Dense, Paged, Strategy
from kvjax.cache.prefix import POLICIES, Policy
from kvjax.config import Acceleration
from kvjax.draft import Draft, PromptLookup
from kvjax.model import Transformer


@dataclass(frozen=True)
class Level:
    """One preset.

    Args:
        adds: what it has that the level below lacks.
        rows: requests at once.
        cache: how keys and values are kept; a `Paged` one gets a pool of `memory` rows.
        memory: rows of full length that the cache has room for.
        draft: what guesses; None for nothing.
        store: the policy of the prefix store; None for no store.
        preempt: what becomes of a request's keys when it must give up its row.
    """

    adds: str
    rows: int
    cache: Strategy
    memory: int
    draft: Draft | None = None
    store: Policy[Any] | None = None
    preempt: str = "recompute"

    def open(
        self, model: Transformer, *, capacity: int, max_new: int, key: Key[Array, ""] | None = None, tokenizer=None
    ) -> Serving:
        """Slots for `kvjax.serve`, of `capacity` tokens a row and `max_new` new ones a request, at most.

        Raises:
            ValueError: for what `kvjax.batch.open` refuses.
        """
        cache = self.cache
        if isinstance(cache, Paged):
            cache = replace(cache, pool=self.memory * -(-capacity // cache.page))
        return open_slots(
            model,
            cache,
            slots=self.rows,
            capacity=capacity,
            max_new=max_new,
            key=key,
            store=self.store,
            settings=Settings(draft=self.draft, preempt=self.preempt, tokenizer=tokenizer),
        )


BASIC = Level("one request at a time, as `generate` decodes it", 1, Dense(), 1)
ADVANCED = replace(BASIC, adds="guesses, checked several at once: fewer calls of the model", draft=PromptLookup())
EXPERT = replace(
    ADVANCED,
    adds="pages and a prefix store: fewer prompt tokens taken in",
    cache=Paged(16),
    memory=4,
    store=POLICIES["workload_adaptive"],
)
MASTER = replace(EXPERT, adds="many rows in the same pages: more tokens for each call of the model", rows=16)
LEGENDARY = replace(
    MASTER,
    adds="pages in bfloat16, and rows that leave keep their keys on the host: half the bytes, nothing taken in twice",
    cache=Paged(16, dtype="bfloat16"),
    preempt="offload",
)

LEVELS = {"basic": BASIC, "advanced": ADVANCED, "expert": EXPERT, "master": MASTER, "legendary": LEGENDARY}
"""From one request at a time to many in little memory. All but the last give the tokens of `generate`."""

ACCELERATIONS = {
    "basic": Acceleration(attention="xla", layers="xla"),
    "advanced": Acceleration(layers="xla"),
    "expert": Acceleration(layers="products"),
    "master": Acceleration(),
}
"""A step on a Hopper GPU, for `model.clone(accelerate=…)`: XLA alone; attention and the write before it in one kernel a
layer; a layer's four products, norms and gate in another; and all of a layer in one."""
