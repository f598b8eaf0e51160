"""The registries that the tests cross: every cache strategy with every decoder.

A new strategy or decoder is one row here. A pair that cannot work is a row of UNSUPPORTED with its reason.
`python -m tests.strategies` prints the compatibility table that the README shows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import batch
from kvjax.cache import Dense, Evicting, Paged, Quantized, Ring, Shared
from kvjax.draft import DraftModel, EarlyExit, Heads, PromptLookup, widths

CACHES = {
    "Dense()": Dense(),
    "Ring()": Ring(),
    "Ring(window=6, sinks=2)": Ring(window=6, sinks=2),
    "Evicting(budget=64)": Evicting(64),
    "Evicting(budget=9, score='key_diff', sinks=1, recent=3)": Evicting(9, "key_diff", sinks=1, recent=3),
    "Evicting(budget=64, sinks=2, recent=6, inner=Quantized(8))": Evicting(64, sinks=2, recent=6, inner=Quantized(8)),
    "Paged(page=4, pool=24)": Paged(page=4, pool=24),
    "Quantized(8, residual=8)": Quantized(8, residual=8),
    "Shared(Dense())": Shared(Dense()),
    "Shared(Paged(page=4))": Shared(Paged(page=4)),
}

CHUNKED = {"Evicting(budget=9, score='key_diff', sinks=1, recent=3)"}
"""Strategies that forget by what they saw at once: a prompt in one chunk and token by token differ."""

CORE = {"Dense()", "Ring(window=6, sinks=2)", "Paged(page=4, pool=24)", "Quantized(8, residual=8)", *CHUNKED}
"""Those that CI crosses; the others are marked slow."""

LOSSLESS = set(CACHES) - {"Ring(window=6, sinks=2)", "Evicting(budget=9, score='key_diff', sinks=1, recent=3)"}
"""Strategies that keep everything the model can see: their logits are those of a full forward pass."""


def crossed(names: Iterable[str], *rest: Any, core: Collection[str] = CORE) -> list:
    """Parameters of a test: each cache's name, and the `rest`; slow where it is not among the `core`."""
    return [pytest.param(name, *rest, marks=() if name in core else pytest.mark.slow) for name in names]


def _decode_step(model, params, cache, tokens, lengths, new):
    logits, cache = kvjax.prefill(model, params, cache, tokens, lengths)
    made = []
    for _ in range(new):
        made.append(logits.argmax(-1).astype(jnp.int32))
        logits, cache = kvjax.decode_step(model, params, cache, made[-1])
    return np.stack(made, 1)


def _generate(model, params, cache, tokens, lengths, new):
    return np.asarray(kvjax.generate(model, params, cache, tokens, lengths, max_new=new).tokens)


def _stream(model, params, cache, tokens, lengths, new):
    return np.stack([step.tokens for step in kvjax.stream(model, params, cache, tokens, lengths, max_new=new)], 1)


def _traced(model, params, cache, tokens, lengths, new):
    whole = jax.jit(
        lambda params, cache, tokens, lengths: kvjax.generate(model, params, cache, tokens, lengths, max_new=new).tokens
    )
    return np.asarray(whole(params, cache, tokens, lengths))


def _sampled(model, params, cache, tokens, lengths, new):
    only_best = kvjax.Sampling(temperature=0.7, top_k=1)
    out = kvjax.generate(model, params, cache, tokens, lengths, max_new=new, key=jax.random.key(0), sampling=only_best)
    return np.asarray(out.tokens)


def _looked_up(model, params, cache, tokens, lengths, new):
    return _speculated(PromptLookup(k=2, shortest=1), model, params, cache, tokens, lengths, new)


def _drafted(model, params, cache, tokens, lengths, new):
    """By a model that is often right, and often wrong."""
    off = jax.tree.map(lambda x: x + 0.03 * x.std() * jax.random.normal(jax.random.key(1), x.shape), params)
    return _speculated(DraftModel(model, off, k=1), model, params, cache, tokens, lengths, new)


SOME = np.array([3, 8, 9, 17, 24, 25, 33, 40, 52, 60], np.int32)


def _headed(model, params, cache, tokens, lengths, new):
    """By heads that were never trained, of a few tokens only: wrong as a rule."""
    trained = Heads.fresh(model, params, SOME, jax.random.key(2))
    return _speculated(Heads.of(model, params, trained=trained, k=2), model, params, cache, tokens, lengths, new)


def _left_early(model, params, cache, tokens, lengths, new):
    exit = EarlyExit.fresh(model, params, np.arange(61, dtype=np.int32))
    draft = EarlyExit.of(model, params, layers=1, exit=exit, k=2)
    return _speculated(draft, model, params, cache, tokens, lengths, new)


def _speculated(draft, model, params, cache, tokens, lengths, new):
    same_costs = [1.0] * len(widths(draft))  # as many guesses as there are, whatever they cost here
    out = kvjax.speculate(model, params, cache, tokens, lengths, draft=draft, max_new=new, costs=same_costs)
    assert (out.speculated.proposed > 0).any()
    return np.asarray(out.tokens)


def _resumed(model, params, cache, tokens, lengths, new):
    first = kvjax.generate(model, params, cache, tokens, lengths, max_new=new // 2)
    rest = kvjax.generate(model, params, first.cache, first.last, max_new=new - new // 2)
    return np.concatenate([first.tokens, rest.tokens], 1)


def _served(model, params, cache, tokens, lengths, new):
    """Three requests for two slots, taken in a chunk at a time where what is kept does not depend on it."""
    chunk = 64 if cache.strategy in [CACHES[name] for name in CHUNKED] else 5
    serving = batch.open(
        model, cache.strategy, slots=2, capacity=64, max_new=new, settings=batch.Settings(chunk=chunk, steps=3)
    )
    rows = [row[:length].tolist() for row, length in zip(np.asarray(tokens), lengths, strict=True)]
    requests = [batch.Request(name, row, new) for name, row in enumerate(rows)]
    results = {result.name: result.tokens for result in batch.serve(model, params, serving, requests)}
    return np.array([results[name] for name in range(len(rows))])


DECODERS = {
    "`decode_step`": _decode_step,
    "`generate`": _generate,
    "`generate`, sampling": _sampled,
    "`generate`, in your own `jit`": _traced,
    "`generate`, resumed": _resumed,
    "`stream`": _stream,
    "`speculate`, `PromptLookup`": _looked_up,
    "`speculate`, `DraftModel`": _drafted,
    "`speculate`, `Heads`": _headed,
    "`speculate`, `EarlyExit`": _left_early,
    "`serve`": _served,
}

UNSUPPORTED: dict[tuple[str, str], str] = {
    (cache, "`serve`"): "`strategy` must keep rows apart, but rows of Shared begin with one prefix"
    for cache in CACHES
    if cache.startswith("Shared")
}
"""(cache, decoder) to the sentence that says why not."""


def table() -> str:
    """The compatibility table, as Markdown."""
    lines = ["| | " + " | ".join(DECODERS) + " |", "| --- |" + " :-: |" * len(DECODERS)]
    lines += [
        f"| `{cache}` | " + " | ".join("no" if (cache, d) in UNSUPPORTED else "yes" for d in DECODERS) + " |"
        for cache in CACHES
    ]
    lines += [f"\n`{cache}` with {decoder}: {why}" for (cache, decoder), why in UNSUPPORTED.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
