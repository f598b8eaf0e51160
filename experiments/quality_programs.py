"""The compiled programs of `cache_quality`: two a strategy, whatever the number of texts, prompts and lengths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.passkey import PassKey
from kvjax.cache import Cache, Dense, Strategy
from kvjax.divergence import divergence
from kvjax.model import Params, Transformer


class Programs:
    """Programs of all strategies, compiled ahead in as many threads as there are cores, and what they run on.

    All pass-key prompts share one shape, that of the longest. A cache that has knobs gets those of a cache made for
    the prompt's own length, so a budget that is a share is a share of that.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params,
        strategies: Sequence[Strategy],
        texts: Int[np.ndarray, "texts width"],
        prompts: Sequence[PassKey],
        config: Any,
    ):
        self.model, self.params, self.config = model, params, config
        self.batch = min(config.batch, max(len(texts), len(prompts), 1))
        self.texts = [rows for _, rows in _batches(texts, self.batch)]
        self.counted = [keep for keep, _ in _batches(texts, self.batch)]
        self.prompts = prompts
        self.reference: list[Array] = []
        self.pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))
        self.full = self.pool.submit(self._compile_full) if len(texts) else None
        self.text: dict[Strategy, Future] = {}
        self.key: dict[Strategy, Future] = {}
        for strategy in strategies:  # in the order of the rows, so that the first are ready while others compile
            if len(texts):
                self.text[strategy] = self.pool.submit(self._compile_text, strategy)
            if len(prompts):
                self.key[strategy] = self.pool.submit(self._compile_key, strategy)

    def agreement(self, strategy: Strategy) -> dict[str, float]:
        """Top-1 agreement with the full cache, KL from it in nats a token, and the change of perplexity."""
        if not self.reference:
            full = _result(self.full)
            self.reference = [full(self.params, self._empty(Dense(), self.capacity), rows) for rows in self.texts]
        program, sums = _result(self.text[strategy]), np.zeros(4)
        for rows, keep, reference in zip(self.texts, self.counted, self.reference, strict=True):
            each = program(self.params, self._empty(strategy, self.capacity), rows, reference)
            sums += np.asarray(each, np.float64)[:, keep].sum(1)
        same, kl, ours, full = sums / (self.config.texts * self.config.scored)
        return {"top1": float(same), "kl": float(kl), "ppl_change": float(np.expm1(ours - full))}

    def retrieved(self, strategy: Strategy, seen: bool) -> Bool[np.ndarray, "prompts"]:
        """Which prompts it answers, every digit the most likely one, the question compressed too if `seen`."""
        program, found = _result(self.key[strategy]), np.zeros(len(self.prompts), bool)
        for length in self.config.lengths:
            mine = np.array([i for i, prompt in enumerate(self.prompts) if len(prompt.context) == length], int)
            for keep, which in _batches(mine, self.batch):
                cache = resized(self._empty(strategy, self.room), strategy, self.model, self._room(length))
                parts = [self._parts(self.prompts[i], seen) for i in which]
                args = [_padded(rows, width) for rows, width in zip(zip(*parts, strict=True), self.widths, strict=True)]
                best = np.asarray(program(self.params, cache, *args[0], *args[1]))
                for row, i in enumerate(which):
                    if keep[row]:
                        answer, end = self.prompts[i].answer, len(parts[row][1])
                        found[i] = best[row, end - 1 - len(answer) : end - 1].tolist() == answer
        return found

    @property
    def capacity(self) -> int:
        return self.config.context + self.config.scored

    @property
    def room(self) -> int:
        return self._room(max(self.config.lengths))

    @property
    def widths(self) -> tuple[int, int]:
        """Tokens of the context and the question; of the question, the answer's start and the answer."""
        one = self.prompts[0]
        rest = max(len(p.question + p.start + p.answer) for p in self.prompts)
        return max(self.config.lengths) + len(one.question), rest

    def _room(self, length: int) -> int:
        return length + self.widths[1]

    def _parts(self, prompt: PassKey, seen: bool) -> tuple[list[int], list[int]]:
        if seen:
            return prompt.context + prompt.question, prompt.start + prompt.answer
        return prompt.context, prompt.question + prompt.start + prompt.answer

    def _empty(self, strategy: Strategy, capacity: int) -> Cache:
        return strategy.init(self.model, batch=self.batch, capacity=capacity)

    def _compile_full(self):
        return self._lower(reference_logits, Dense(), self.capacity, self.texts[0]).compile()

    def _compile_text(self, strategy: Strategy):
        steps = self.config.scored // self.config.step
        shape = (steps, self.batch, self.config.step, self.model.config.vocab)
        reference = jax.ShapeDtypeStruct(shape, self.model.precision.logits)
        return self._lower(compared, strategy, self.capacity, self.texts[0], reference).compile()

    def _compile_key(self, strategy: Strategy):
        count = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        rows = [jax.ShapeDtypeStruct((self.batch, width), jnp.int32) for width in self.widths]
        return self._lower(answered, strategy, self.room, rows[0], count, rows[1], count).compile()

    def _lower(self, function, strategy: Strategy, capacity: int, *data):
        shapes = strategy.shapes(self.model, batch=self.batch, capacity=capacity)
        settings = {} if function is answered else {"context": self.config.context, "step": self.config.step}
        bound = partial(function, self.model, **settings)
        return jax.jit(bound).lower(self.params, shapes, *data)


def resized(cache: Cache, strategy: Strategy, model: Transformer, capacity: int) -> Cache:
    """The cache with the knobs that one of this capacity would have."""
    if not hasattr(cache.layers[0], "knobs"):
        return cache
    own = strategy.init(model, batch=1, capacity=capacity)
    layers = tuple(replace(layer, knobs=other.knobs) for layer, other in zip(cache.layers, own.layers, strict=True))
    return replace(cache, layers=layers)


def _taken(model, params, cache: Cache, tokens, context: int, step: int, visit):
    """Take in `context` tokens, then `step` at a time; stacks what `visit(logits, i)` says of each step."""
    _, cache = model.apply({"params": params}, tokens[:, :context], None, cache, last=True)

    def scored(cache, i):
        part = jax.lax.dynamic_slice_in_dim(tokens, context + i * step, step, axis=1)
        logits, cache = model.apply({"params": params}, part, None, cache)
        return cache, visit(logits, i)

    return jax.lax.scan(scored, cache, jnp.arange((tokens.shape[1] - 1 - context) // step))[1]


def reference_logits(
    model: Transformer, params: Params, cache: Cache, tokens: Int[Array, "batch width"], *, context: int, step: int
) -> Float[Array, "steps batch step vocab"]:
    """What follows each token after the context."""
    return _taken(model, params, cache, tokens, context, step, lambda logits, i: logits)


def compared(
    model: Transformer,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "batch width"],
    reference: Float[Array, "steps batch step vocab"],
    *,
    context: int,
    step: int,
) -> Float[Array, "4 batch"]:
    """Sums over a row's scored tokens: same most likely token, KL from the reference, and both negative likelihoods."""

    def visit(logits, i):
        there = jax.lax.dynamic_index_in_dim(reference, i, keepdims=False)
        targets = jax.lax.dynamic_slice_in_dim(tokens, context + i * step + 1, step, axis=1)
        ours, full = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, there))
        same = (logits.argmax(-1) == there.argmax(-1)).astype(jnp.float32)
        nll = [-jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0] for x in (ours, full)]
        return jnp.stack([same, divergence(there, logits), *nll]).sum(-1)

    return _taken(model, params, cache, tokens, context, step, visit).sum(0)


def answered(
    model: Transformer,
    params: Params,
    cache: Cache,
    before: Int[Array, "batch width"],
    lengths: Int[Array, "batch"],
    after: Int[Array, "batch rest"],
    rest: Int[Array, "batch"],
) -> Int[Array, "batch rest"]:
    """The most likely token after each of `after`, once `before` was taken in."""
    _, held = model.apply({"params": params}, before, lengths, cache, last=True)
    logits, _ = model.apply({"params": params}, after, rest, held)
    return logits.argmax(-1)


def _batches(rows: np.ndarray, size: int):
    """Which rows of each batch count, and the batch: the last is filled up with its first row."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
        yield np.arange(size) < len(part), filled


def _padded(rows: Sequence[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    return tokens, np.array([len(row) for row in rows], np.int32)


def _result(future: Future | None):
    assert future is not None
    return future.result()
