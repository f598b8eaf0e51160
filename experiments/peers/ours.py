"""kvjax through its public API."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

import kvjax
from experiments.peers.work import Timing, Work
from kvjax.compiler.flags import prefer_wide_vectors


class Ours:
    """Float32, dense cache. `stream` decodes through `kvjax.stream` in place of the loop inside the program."""

    def __init__(self, model: str, stream: bool):
        self.model, self.params, self.tokenizer = kvjax.load(model)
        self.stream = stream

    def tokens(self, text: str) -> list[int]:
        assert self.tokenizer is not None
        return self.tokenizer.encode(text)

    def measure(self, work: Work) -> Timing:
        cache = kvjax.cache.Dense().init(self.model, batch=work.batch, capacity=work.context + work.new + 1)
        prompts = jnp.asarray(work.prompts, jnp.int32)
        if not work.new:
            jax.block_until_ready(cache)
            begun = time.perf_counter()
            logits, _ = jax.block_until_ready(kvjax.prefill(self.model, self.params, cache, prompts))
            return Timing(time.perf_counter() - begun, [int(logits[0].argmax())])
        if self.stream:
            return self._streamed(cache, prompts, work)
        first = kvjax.generate(self.model, self.params, cache, prompts, max_new=1)
        last = jax.block_until_ready(first.last)
        begun = time.perf_counter()
        rest = kvjax.generate(self.model, self.params, first.cache, last, max_new=work.new)
        tokens = jax.block_until_ready(rest.tokens)
        return Timing(time.perf_counter() - begun, [int(last[0, 0]), *tokens[0].tolist()])

    def _streamed(self, cache: kvjax.Cache, prompts: jax.Array, work: Work) -> Timing:
        times, tokens = [], []
        for step in kvjax.stream(self.model, self.params, cache, prompts, max_new=work.new + 1):
            times.append(time.perf_counter())
            tokens.append(int(step.tokens[0]))
        return Timing(times[-1] - times[0], tokens)


def make(model: str, threads: int, stream: bool = False) -> Ours:
    """The engine; it takes as many threads as it has cores."""
    prefer_wide_vectors()  # as the command line does
    return Ours(model, stream)
