"""Train a draft on what its target says: cross entropy to the target's own distribution, on the target's own text.

Sources: Li et al. 2024, "EAGLE" (arXiv:2401.15077); Zhang et al. 2024, "HASS" (arXiv:2408.15766), for steps on the
layer's own states; Chen et al. 2016 (arXiv:1604.06174) for checkpoints in the backward pass. Needs Optax, the extra
`train`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.block import Norm
from kvjax.cache.attention import Mask
from kvjax.config import ModelConfig
from kvjax.draft.answers import Text, answers, frequent
from kvjax.draft.heads import embed, head_layer
from kvjax.draft.turns import capped, head_rows
from kvjax.model import Params, Transformer
from kvjax.pytree import pytree

try:
    import optax
except ImportError as error:
    raise ImportError("kvjax.draft.distill needs Optax: pip install 'kvjax[train]'") from error


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
        layer, tokens = head_layer(c, p, self.model.accelerate.alone), jnp.asarray(text.tokens)[:, 1:]
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

    def loss(self, weights: Params, fixed: dict[str, Any], text: Text) -> Float[Array, ""]:
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

    def guesses(self, weights: Params, fixed: dict[str, Any], text: Text, steps: int) -> list[Array]:
        states = self.states(weights, fixed["embed"], text, steps)
        return [fixed["ids"][jnp.argmax(_logits(self.model, out, weights["head"]), axis=-1)] for out in states]


def fitted(model: Transformer, trained: dict[str, Any], fixed: dict[str, Any], text: Text) -> dict[str, Any]:
    """What `Heads.fresh` gives, with a layer that begins as the best linear guess, by least squares on a text.

    Its block adds nothing at first. SmolLM2's next token but one is guessed right at 35 % of unseen text this way,
    before any training.
    """
    c, p = model.config, model.precision
    real = np.asarray(_real(text, 0))
    layer, ridge = trained["layer"], 1e-3
    hidden, wanted = (jnp.asarray(x[real], jnp.float32) for x in (text.hidden[:, :-1], text.hidden[:, 1:]))
    embedded = embed(fixed["embed"], jnp.asarray(text.tokens[:, 1:][real])[None], c, p)[0]
    seen = _normed(c, layer["hidden_norm"], hidden), _normed(c, layer["embed_norm"], embedded.astype(jnp.float32))
    both = jnp.concatenate(seen, axis=-1)
    norm = fixed["norm"]
    wanted = (wanted - norm.get("bias", 0.0)) / jnp.where(jnp.abs(norm["scale"]) > 1e-6, norm["scale"], 1.0)[None]
    square = both.T @ both + ridge * both.shape[0] * jnp.eye(both.shape[1])
    fuse = jnp.linalg.solve(square, both.T @ wanted).T
    block = {
        name: jax.tree.map(jnp.zeros_like, x) if name in ("out", "down") else x for name, x in layer["block"].items()
    }
    layer = layer | {"fuse": {"kernel": fuse.astype(layer["fuse"]["kernel"].dtype)}, "block": block}
    return trained | {"layer": layer | {"norm": norm}}


@dataclass(frozen=True)
class ExitLesson:
    """How `EarlyExit` learns its norm and head; the layers are the target's and stay."""

    model: Transformer
    steps: int = 1

    def loss(self, weights: Params, fixed: dict[str, Any], text: Text) -> Float[Array, ""]:
        real = _real(text, 0)
        loss = _cross_entropy(self.model, self._out(weights, text), weights["head"], _wanted(self.model, fixed, text))
        return _mean(loss, real)

    def guesses(self, weights: Params, fixed: dict[str, Any], text: Text, steps: int) -> list[Array]:
        """The same at each step: it goes by the text alone."""
        best = fixed["ids"][jnp.argmax(_logits(self.model, self._out(weights, text), weights["head"]), axis=-1)]
        return [best] * steps

    def _out(self, weights: Params, text: Text) -> Float[Array, "rows pairs hidden"]:
        early = jnp.asarray(text.early)[:, 1:].astype(self.model.precision.compute)
        return _normed(self.model.config, weights["norm"], early)


class Course(NamedTuple):
    """A training under way: what `kvjax.save` writes and `kvjax.restore` reads, so that it can go on."""

    weights: Params
    moments: Any
    step: Int[Array, ""]


def fixed(model: Transformer, params: Params, trained: dict[str, Any]) -> dict[str, Any]:
    """What a lesson reads and does not change; the target's head is that of the draft's tokens."""
    ids = trained["ids"]
    head = head_rows(params, model.config, ids)
    return {"embed": params["embed"], "norm": params["norm"], "ids": ids, "head": head}


def optimizer(rate: float, total: int) -> optax.GradientTransformation:
    """AdamW with a warm-up over a twentieth of `total` updates and a cosine to a fiftieth of `rate`."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(total // 20, 1), max(total, 2), rate / 50)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))


def begin(trained: dict[str, Any], rate: float, total: int) -> Course:
    """Before the first update; `trained` is what a draft's `fresh` gives."""
    weights = {name: jax.tree.map(jnp.array, x) for name, x in trained.items() if name != "ids"}
    return Course(weights, optimizer(rate, total).init(weights), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames=("lesson", "rate", "total"), donate_argnames="course")
def update(lesson, course: Course, fixed: dict[str, Any], text: Text, *, rate: float, total: int):
    """One update on a batch of rows; also the loss before it, in nats."""
    loss, slope = jax.value_and_grad(lesson.loss)(course.weights, fixed, text)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as Optax is written
        change, moments = optimizer(rate, total).update(slope, course.moments, course.weights)
        weights = optax.apply_updates(course.weights, change)
    return Course(weights, moments, course.step + 1), loss


@partial(jax.jit, static_argnames=("lesson", "k"))
def accepted(lesson, weights: Params, fixed: dict[str, Any], text: Text, *, k: int) -> Float[Array, "k"]:
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


def _normed(config: ModelConfig, weights: Params, x: Float[Array, "*places hidden"]) -> Float[Array, "*places hidden"]:
    out = Norm(config).apply({"params": weights}, x)
    assert isinstance(out, jax.Array)
    return out


def _real(text: Text, step: int) -> Bool[Array, "rows pairs"]:
    """Places where a guess in this step comes after the first checked pair, and is of a token that was checked."""
    place = jnp.arange(text.tokens.shape[1] - 1)[None]
    return (place >= step) & (place + 1 < jnp.asarray(text.length)[:, None])


def _mean(x: Float[Array, "rows pairs"], real: Bool[Array, "rows pairs"]) -> Float[Array, ""]:
    return jnp.where(real, x, 0.0).sum() / jnp.maximum(real.sum(), 1).astype(jnp.float32)


def _wanted(model: Transformer, fixed: dict[str, Any], text: Text) -> Float[Array, "rows pairs some"]:
    """The target's probabilities of the draft's tokens; they need not sum to one."""
    hidden = jnp.asarray(text.hidden)[:, 1:].astype(model.precision.compute)
    return jnp.exp(_logits(model, hidden, fixed["head"]) - jnp.asarray(text.mass)[:, 1:, None])


def _logits(model: Transformer, hidden, head) -> Float[Array, "*places some"]:
    return capped((hidden @ head.T.astype(hidden.dtype)).astype(jnp.float32), model.config)


def _cross_entropy(model: Transformer, out, head, wanted) -> Float[Array, "rows pairs"]:
    return -(wanted * jax.nn.log_softmax(_logits(model, out, head), axis=-1)).sum(-1)


__all__ = [
    "Course",
    "ExitLesson",
    "HeadsLesson",
    "Text",
    "accepted",
    "answers",
    "begin",
    "fitted",
    "fixed",
    "frequent",
    "optimizer",
    "update",
]
