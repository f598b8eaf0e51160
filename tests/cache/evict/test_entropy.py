"""Measured entropy against probabilities by hand, and the budgets made of it."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Evicting
from kvjax.cache.evict.budgets import adaptive
from kvjax.cache.evict.entropy import attention_entropy
from kvjax.pytree import pytree
from tests.tiny import prompts, tiny


@pytree
class Spy:
    """A layer that shows the queries and keys it was given."""

    inner: Any
    seen: Any = None

    limit = None
    assured = 0, 0
    look = held = fork = tokens = take = lambda self, *_: self

    def attend(self, q, k, v, positions, valid, mask):
        out, lse, _ = self.inner.attend(q, k, v, positions, valid, mask)
        return out, lse, Spy(self.inner, (q, k, jnp.float32(mask.scale)))


def test_entropy_is_that_of_the_probabilities():
    model, params = tiny("qwen2")  # one K/V head
    tokens, lengths = prompts(0, 2, 12), jnp.array([12, 7])
    got = attention_entropy(model, params, tokens, lengths)
    assert got.shape == (2, 1)
    cache = Dense().init(model, batch=2, capacity=12)
    cache = replace(cache, layers=tuple(map(Spy, cache.layers)))
    _, cache = jax.jit(model.apply)({"params": params}, tokens, lengths, cache)
    for layer in (0, 1):
        q, k, scale = (np.asarray(x, np.float64) for x in cache.layers[layer].seen)
        nats = []
        for row, at, head in np.ndindex(2, 12, 4):
            if at < lengths[row]:
                logits = k[row, : at + 1, 0] @ q[row, at, head] * scale
                p = np.exp(logits - logits.max())
                p /= p.sum()
                nats.append(-(p * np.log(p)).sum())
        np.testing.assert_allclose(got[layer, 0], np.mean(nats), rtol=1e-4)


def test_adaptive_budgets_decode():
    model, params = tiny()
    tokens = prompts(1, 2, 24)
    budget = adaptive(np.asarray(attention_entropy(model, params, tokens)), 12, least=6)
    assert sum(map(sum, budget)) == 12 * 4
    cache = Evicting(budget, sinks=2, recent=4).init(model, batch=2, capacity=24)
    logits, _ = kvjax.prefill(model, params, cache, tokens)
    assert jnp.isfinite(logits).all()


def test_capped_logits_are_refused():
    model, params = tiny("gemma2")
    with pytest.raises(ValueError, match="must not cap"):
        attention_entropy(model, params, prompts(0, 1, 4))
