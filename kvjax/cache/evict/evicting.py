"""Keep the tokens that a score finds worth most, in fewer slots than tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.cache.base import LayerSpec, Strategy, check_dtype
from kvjax.cache.evict.budgets import Budget, plain, slots_of
from kvjax.cache.evict.coded import CodedLayer, encoded
from kvjax.cache.evict.knobs import Knobs, fitted
from kvjax.cache.evict.layer import EvictingLayer
from kvjax.cache.evict.score import Score
from kvjax.cache.evict.scores import SCORES
from kvjax.cache.quantized import Quantized


@dataclass(frozen=True)
class Evicting(Strategy):
    """At most `budget` tokens a K/V head, chosen by `score` as they come; rows may grow without end.

    A chunk is attended to in full, and cut down to the budget after; a single token takes the place of the token
    worth least. With a budget of the capacity or more nothing is lost before a row outgrows the capacity.

    Args:
        budget: tokens a head holds: one number, one a layer, or a tuple a layer with one a K/V head; a `float` is a
            share of the capacity. A layer has the slots of its largest head: only what layers differ by frees bytes.
        score: a name in `SCORES`, or a `Score`.
        sinks: the first tokens of a row, always kept.
        recent: the newest tokens, always kept.
        split: how one number is split over layers: "uniform", or "pyramid", from 1.5 of it down to 0.5.
        threshold, temperature: with a temperature, eviction is also soft: a held token's attention is multiplied
            by `sigmoid((worth - threshold) / temperature)`, which can be differentiated.
        dtype: of what is held in full; None means the model's cache dtype.
        inner: `Quantized`, or its bits, holds what is neither sink nor recent in `rotated` codes; of its settings only
            the bits count.
    """

    budget: Budget
    score: str | Score = "h2o"
    sinks: int = 4
    recent: int = 32
    split: str = "uniform"
    threshold: float = 0.0
    temperature: float | None = None
    dtype: str | None = None
    inner: Quantized | int | None = None

    def __post_init__(self):
        object.__setattr__(self, "budget", plain(self.budget))
        if not isinstance(self.score, Score) and (not isinstance(self.score, str) or self.score not in SCORES):
            raise ValueError(f"Evicting: `score` must be one of {', '.join(SCORES)}, or a `Score`, got {self.score!r}")
        for name in ("sinks", "recent"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise ValueError(f"Evicting: `{name}` must be a whole number, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.sinks < 0:
            raise ValueError(f"Evicting: `sinks` must not be negative, got {self.sinks}")
        if self.recent < 1:
            raise ValueError(f"Evicting: `recent` must be at least 1 token, got {self.recent}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"Evicting: `temperature` must be above 0, got {self.temperature}")
        check_dtype(self, self.dtype)
        if isinstance(self.inner, int):
            object.__setattr__(self, "inner", Quantized(self.inner))
        if self.inner is not None:
            self._check_inner(self.inner)

    def _check_inner(self, inner: Any) -> None:
        if not isinstance(inner, Quantized) or (inner.keys, inner.values) != ("rotated", "rotated"):
            raise ValueError(
                f"Evicting: `inner` must be `Quantized` with `rotated` keys and values, for a slot must be coded "
                f"without its neighbours, got {inner}"
            )
        if isinstance(inner.bits, tuple) or isinstance(inner.value_bits, tuple):
            raise ValueError(f"Evicting: `inner` must have the same bits in all layers, got {inner}")
        if self.temperature is not None:
            raise ValueError("Evicting: `temperature` must be None with an `inner`: codes have no gradient")

    def layer(self, spec: LayerSpec) -> EvictingLayer | CodedLayer:
        budgets = slots_of(self.budget, self.split, spec, self.sinks + self.recent)
        score = SCORES[self.score] if isinstance(self.score, str) else self.score
        spec = replace(spec, dtype=self.dtype or spec.dtype)
        rows, slots = spec.batch * spec.kv_heads, max(budgets)
        knobs = Knobs(
            jnp.array(budgets, jnp.int32),
            jnp.int32(self.sinks),
            jnp.int32(self.recent),
            jnp.float32(self.threshold),
            jnp.float32(1.0 if self.temperature is None else self.temperature),
        )
        knobs = fitted(knobs, slots)
        front = self.sinks + self.recent
        if self.inner is not None and slots > front:
            return self._coded(spec, slots, front, knobs, score)
        return EvictingLayer(
            spec.zeros(slots),
            spec.zeros(slots),
            jnp.full((rows, slots), -1, jnp.int32),
            jnp.zeros((rows, slots), jnp.float32),
            score.begin(spec),
            knobs,
            score,
            self.temperature is not None,
        )

    def _coded(self, spec: LayerSpec, slots: int, front: int, knobs: Knobs, score: Score) -> CodedLayer:
        inner: Any = self.inner
        value_bits = inner.bits if inner.value_bits is None else inner.value_bits
        k_codes, v_codes = (encoded(spec.zeros(slots - front), bits) for bits in (inner.bits, value_bits))
        rows = spec.batch * spec.kv_heads
        return CodedLayer(
            spec.zeros(front),
            spec.zeros(front),
            jnp.full((rows, slots), -1, jnp.int32),
            jnp.zeros((rows, slots), jnp.float32),
            score.begin(spec),
            knobs,
            score,
            k_codes,
            v_codes,
            self.sinks,
        )
