"""Train a draft on what its target says: cross entropy to the target's own distribution, on the target's own text.

Sources: Li et al. 2024, "EAGLE" (arXiv:2401.15077); Zhang et al. 2024, "HASS" (arXiv:2408.15766), for steps on the
layer's own states; Chen et al. 2016 (arXiv:1604.06174) for checkpoints in the backward pass. Needs Optax, the extra
`train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import Mask
from kvjax.draft.heads import embed, head_layer
from kvjax.draft.turns import capped, head_rows
from kvjax.model import Norm, Params, Transformer, with_hidden
from kvjax.pytree import pytree

try:
    import optax
except ImportError as error:
    raise ImportError("kvjax.draft.distill needs Optax: pip install 'kvjax[train]'") from error


class Text(NamedTuple):
    """What a target said, from each row's last prompt token on, and what it was about to say at each of `length`.

    `hidden` is what its head saw, `early` a layer's output (of no width if none was asked for), both in float16;
    `mass` the log-sum-exp of its logits, `best` its likeliest next token.
    """

    tokens: Int[np.ndarray, "rows width"]
    hidden: Float[np.ndarray, "rows width hidden"]
    early: Float[np.ndarray, "rows width features"]
    mass: Float[np.ndarray, "rows width"]
    best: Int[np.ndarray, "rows width"]
    length: Int[np.ndarray, "rows"]

    def take(self, rows: Any) -> Text:
        return Text(*(x[rows] for x in self))


def harvest(
    model: Transformer,
    params: Params,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    width: int,
    layer: int | None = None,
) -> Text:
    """Run the target over whole texts and keep what drafts learn from.

    Args:
        prompts, answers: a row each.
        width: tokens kept of a row, its last prompt token included.
        layer: keep what this many layers give, for `EarlyExit`.
    """
    rows = [[*p, *a][: len(p) - 1 + width] for p, a in zip(prompts, answers, strict=True)]
    size = max(map(len, rows))
    tokens = np.zeros((len(rows), -(-size // 32) * 32), np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    start = np.array([len(p) - 1 for p in prompts], np.int32)
    length = np.array([len(row) for row in rows], np.int32) - start
    seen = _harvest(model, params, jnp.asarray(tokens), jnp.asarray(start), width, layer)
    at = np.minimum(start[:, None] + np.arange(width)[None], tokens.shape[1] - 1)
    return Text(np.take_along_axis(tokens, at, 1), *(np.asarray(x) for x in seen), length)


@partial(jax.jit, static_argnames=("model", "width", "layer"))
def _harvest(model, params, tokens, start, width: int, layer: int | None):
    _, _, hidden, layers = with_hidden(model, params, tokens, None, None)
    at = jnp.minimum(start[:, None] + jnp.arange(width, dtype=jnp.int32)[None], tokens.shape[1] - 1)[..., None]
    hidden = jnp.take_along_axis(hidden, at, axis=1)
    early = hidden[..., :0] if layer is None else jnp.take_along_axis(layers[layer - 1], at, axis=1)
    head = head_rows(params, model.config, jnp.arange(model.config.vocab))

    def one(row):
        logits = _logits(model, row, head)
        return jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1).astype(jnp.int32)

    mass, best = jax.lax.map(one, hidden)
    return hidden.astype(jnp.float16), early.astype(jnp.float16), mass, best


def frequent(answers: Sequence[Sequence[int]], size: int, vocab: int, always: Sequence[int] = ()) -> np.ndarray:
    """The `size` most frequent tokens of a text, `always` among them, in order (arXiv:2502.14856)."""
    counts = np.bincount(np.concatenate([np.asarray(a, np.int64) for a in answers]), minlength=vocab).astype(np.int64)
    counts[list(always)] = counts.sum() + 1
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


@pytree
class Unrolled:
    """The attention of a layer's steps on its own states, all places at once (arXiv:2408.15766, fig. 3).

    In step `n` a place sees what was checked up to `n` places before it, and then one of each step, its own last.
    `past` are keys and values of the steps so far.
    """

    past: tuple[tuple[Array, Array], ...] = ()

    def attend(self, q, k, v, positions, valid, mask: Mask):
        group, step = q.shape[2] // k.shape[2], len(self.past)
        past = (*self.past, (k, v))
        keys, values = (jnp.repeat(x, group, axis=2) for x in past[0])
        place = jnp.arange(q.shape[1])
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, keys).astype(jnp.float32)
        seen = place[None] <= place[:, None] - step
        logits = jnp.where(seen[None, None], logits, -jnp.inf)
        own = []
        for n, pair in enumerate(past[1:], 1):
            key, value = (jnp.repeat(jnp.roll(x, step - n, axis=1), group, axis=2) for x in pair)
            logits = jnp.concatenate([logits, jnp.einsum("bqhd,bqhd->bhq", q, key)[..., None]], axis=-1)
            own.append(value)
        logits = logits * mask.scale
        if mask.softcap is not None:
            logits = jnp.where(jnp.isfinite(logits), jnp.tanh(logits / mask.softcap) * mask.softcap, logits)
        weight = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weight[..., : q.shape[1]], values)
        for n, value in enumerate(own):
            out += weight[..., q.shape[1] + n].swapaxes(1, 2)[..., None] * value
        return out, jax.nn.logsumexp(logits, axis=-1).swapaxes(1, 2), Unrolled(past)


@dataclass(frozen=True)
class HeadsLesson:
    """How `Heads` learns: `steps` of its layer, on the target's hidden states and then on its own.

    Args:
        feature: weight of the distance to the target's next hidden states, beside the cross entropy.
        decay: weight of each step to the one before.
    """

    model: Transformer
    steps: int = 3
    feature: float = 0.1
    decay: float = 0.8

    def states(self, weights: Params, table: Array, text: Text, steps: int) -> list[Float[Array, "rows pairs hidden"]]:
        """What the layer gives at each pair of a hidden state and the token after, for each step."""
        c, p = self.model.config, self.model.precision
        layer, tokens = head_layer(c, p), jnp.asarray(text.tokens)[:, 1:]
        embedded = embed(table, tokens, c, p)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)

        @jax.checkpoint
        def run(weights, hidden, embedded, past):
            return layer.apply({"params": weights}, hidden, embedded, positions, positions >= 0, Unrolled(past))

        hidden, past, made = jnp.asarray(text.hidden)[:, :-1].astype(p.compute), (), []
        for _ in range(steps):
            out, seen = run(weights["layer"], hidden, embedded, past)
            made.append(out)
            hidden, past = jnp.pad(out, ((0, 0), (1, 0), (0, 0)))[:, :-1], seen.past
        return made

    def loss(self, weights: Params, fixed: dict[str, Array], text: Text) -> Float[Array, ""]:
        wanted, total, weight = _wanted(self.model, fixed, text), jnp.zeros((), jnp.float32), 1.0
        hidden = jnp.asarray(text.hidden)[:, 1:].astype(jnp.float32)
        for step, out in enumerate(self.states(weights, fixed["embed"], text, self.steps)):
            real = _real(text, step)
            loss = _cross_entropy(self.model, out, weights["head"], wanted)
            far = jnp.abs(out.astype(jnp.float32) - hidden)
            loss += self.feature * jnp.where(far < 1, far * far / 2, far - 0.5).mean(-1)
            total += weight * _mean(loss, real)
            weight *= self.decay
        return total

    def guesses(self, weights: Params, fixed: dict[str, Array], text: Text, steps: int) -> list[Array]:
        states = self.states(weights, fixed["embed"], text, steps)
        return [fixed["ids"][jnp.argmax(_logits(self.model, out, weights["head"]), axis=-1)] for out in states]


@dataclass(frozen=True)
class ExitLesson:
    """How `EarlyExit` learns its norm and head; the layers are the target's and stay."""

    model: Transformer
    steps: int = 1

    def loss(self, weights: Params, fixed: dict[str, Array], text: Text) -> Float[Array, ""]:
        real = _real(text, 0)
        loss = _cross_entropy(self.model, self._out(weights, text), weights["head"], _wanted(self.model, fixed, text))
        return _mean(loss, real)

    def guesses(self, weights: Params, fixed: dict[str, Array], text: Text, steps: int) -> list[Array]:
        """The same at each step: it goes by the text alone."""
        best = fixed["ids"][jnp.argmax(_logits(self.model, self._out(weights, text), weights["head"]), axis=-1)]
        return [best] * steps

    def _out(self, weights: Params, text: Text) -> Float[Array, "rows pairs hidden"]:
        early = jnp.asarray(text.early)[:, 1:].astype(self.model.precision.compute)
        out = Norm(self.model.config).apply({"params": weights["norm"]}, early)
        assert isinstance(out, jax.Array)
        return out


class Course(NamedTuple):
    """A training under way: what `kvjax.save` writes and `kvjax.restore` reads, so that it can go on."""

    weights: Params
    moments: Any
    step: Int[Array, ""]


def fixed(model: Transformer, params: Params, trained: dict[str, Any]) -> dict[str, Array]:
    """What a lesson reads and does not change; the target's head is that of the draft's tokens."""
    ids = trained["ids"]
    return {"embed": params["embed"], "ids": ids, "head": head_rows(params, model.config, ids)}


def optimizer(rate: float, total: int) -> optax.GradientTransformation:
    """AdamW with a warm-up over a twentieth of `total` updates and a cosine to a fiftieth of `rate`."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(total // 20, 1), max(total, 2), rate / 50)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))


def begin(trained: dict[str, Any], rate: float, total: int) -> Course:
    """Before the first update; `trained` is what a draft's `fresh` gives."""
    weights = {name: jax.tree.map(jnp.array, x) for name, x in trained.items() if name != "ids"}
    return Course(weights, optimizer(rate, total).init(weights), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames=("lesson", "rate", "total"), donate_argnames="course")
def update(lesson, course: Course, fixed: dict[str, Array], text: Text, *, rate: float, total: int):
    """One update on a batch of rows; also the loss before it, in nats."""
    loss, slope = jax.value_and_grad(lesson.loss)(course.weights, fixed, text)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as Optax is written
        change, moments = optimizer(rate, total).update(slope, course.moments, course.weights)
        weights = optax.apply_updates(course.weights, change)
    return Course(weights, moments, course.step + 1), loss


@partial(jax.jit, static_argnames=("lesson", "k"))
def accepted(lesson, weights: Params, fixed: dict[str, Array], text: Text, *, k: int) -> Float[Array, "k"]:
    """The shares of places in a greedy text where the first 1, 2, … `k` guesses are all right.

    Their sum is the mean number of right guesses a round, had every place one round.
    """
    best, held = jnp.asarray(text.best)[:, 1:], []
    agreeing = jnp.ones(best.shape, bool)
    for step, guess in enumerate(lesson.guesses(weights, fixed, text, k)):
        right = jnp.roll(guess == best, -step, axis=1)
        agreeing &= right
        real = jnp.roll(_real(text, step), -step, axis=1)
        held.append(_mean(agreeing.astype(jnp.float32), real))
    return jnp.stack(held)


def _real(text: Text, step: int) -> Bool[Array, "rows pairs"]:
    """Places where a guess in this step comes after the first checked pair, and is of a token that was checked."""
    place = jnp.arange(text.tokens.shape[1] - 1)[None]
    return (place >= step) & (place + 1 < jnp.asarray(text.length)[:, None])


def _mean(x: Float[Array, "rows pairs"], real: Bool[Array, "rows pairs"]) -> Float[Array, ""]:
    return jnp.where(real, x, 0.0).sum() / jnp.maximum(real.sum(), 1).astype(jnp.float32)


def _wanted(model: Transformer, fixed: dict[str, Array], text: Text) -> Float[Array, "rows pairs some"]:
    """The target's probabilities of the draft's tokens; they need not sum to one."""
    hidden = jnp.asarray(text.hidden)[:, 1:].astype(model.precision.compute)
    return jnp.exp(_logits(model, hidden, fixed["head"]) - jnp.asarray(text.mass)[:, 1:, None])


def _logits(model: Transformer, hidden, head) -> Float[Array, "*places some"]:
    return capped((hidden @ head.T.astype(hidden.dtype)).astype(jnp.float32), model.config)


def _cross_entropy(model: Transformer, out, head, wanted) -> Float[Array, "rows pairs"]:
    return -(wanted * jax.nn.log_softmax(_logits(model, out, head), axis=-1)).sum(-1)
