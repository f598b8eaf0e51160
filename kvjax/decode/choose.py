"""From logits to a token, on the device: penalties, filters and the draw, without a sort."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from kvjax.decode.grammars import allowed
from kvjax.decode.sampling import Rules

Logits = Float[Array, "batch vocab"]


def choose(
    logits: Logits,
    rules: Rules,
    positions: Int[Array, "batch"],
    made: Int[Array, "batch"],
    seen: Bool[Array, "batch vocab"],
    counts: Int[Array, "batch vocab"],
    ruled: Int[Array, "batch"] | None = None,
) -> Int[Array, "batch"]:
    """Choose each row's next token from float32 logits.

    The draw depends on the row's key and the token's `positions`, and on nothing else in the batch.
    `made` counts the tokens that a row has; `seen` marks those of prompt and output, `counts` those of the output.
    `ruled` is each row's state in its grammar; without it grammars are left aside.
    """
    logits = penalise(logits, rules, seen, counts)
    if ruled is not None and not rules.grammars.none:
        logits = jnp.where(allowed(rules.grammars, rules.grammar, rules.stop, ruled), logits, -jnp.inf)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = jax.lax.cond(
        (rules.temperature > 0).any(), lambda: _draw(logits, rules, positions), lambda: jnp.zeros_like(best)
    )
    token = jnp.where(rules.temperature > 0, drawn, best)
    width = rules.forced.shape[1]
    forced = jnp.take_along_axis(rules.forced, jnp.minimum(made, width - 1)[:, None], axis=1)[:, 0]
    forced = jnp.where(made < width, forced, -1)
    return jnp.where(forced >= 0, forced, token)


def penalise(
    logits: Logits, rules: Rules, seen: Bool[Array, "batch vocab"], counts: Int[Array, "batch vocab"]
) -> Logits:
    """Repetition, presence and frequency penalties, then biases; a banned token has a bias of -inf."""
    factor = rules.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    times = counts.astype(jnp.float32)
    logits -= rules.presence[:, None] * jnp.minimum(times, 1.0) + rules.frequency[:, None] * times
    rows = jnp.arange(logits.shape[0])[:, None]
    ids = jnp.where(rules.bias_ids < 0, logits.shape[1], rules.bias_ids)
    return logits.at[rows, ids].add(rules.bias, mode="drop")


def keep(logits: Logits, rules: Rules) -> Logits:
    """Top-k, then top-p, then min-p, as a mask of -inf. The most likely token always stays."""
    order = _ordered(logits)
    everything = jnp.full(rules.top_k.shape, logits.shape[1], jnp.int32)
    k = jnp.where(rules.top_k > 0, rules.top_k, everything).astype(jnp.float32)
    floor = _threshold(order, jnp.ones_like(logits), k)
    logits = jnp.where(order >= floor[:, None], logits, -jnp.inf)
    mass = jax.nn.softmax(logits, axis=-1)
    floor = jnp.where(rules.top_p < 1, _threshold(order, mass, rules.top_p), 0)
    logits = jnp.where(order >= floor[:, None], logits, -jnp.inf)
    best = logits.max(-1, keepdims=True)
    return jnp.where(logits >= best + jnp.log(rules.min_p)[:, None], logits, -jnp.inf)


def _draw(logits: Logits, rules: Rules, positions: Int[Array, "batch"]) -> Int[Array, "batch"]:
    warm = jnp.where(rules.temperature > 0, rules.temperature, 1.0)
    logits = logits / warm[:, None]
    filtered = ((rules.top_k > 0) | (rules.top_p < 1) | (rules.min_p > 0)).any()
    logits = jax.lax.cond(filtered, lambda: keep(logits, rules), lambda: logits)
    keys = jax.vmap(jax.random.fold_in)(rules.keys, positions)

    def gumbel_max(key: Key[Array, ""], row: Float[Array, "vocab"]):
        return jnp.argmax(row + jax.random.gumbel(key, row.shape)).astype(jnp.int32)

    return jax.vmap(gumbel_max)(keys, logits)


def _ordered(x: Logits) -> UInt32[Array, "batch vocab"]:
    """Unsigned integers in the order of the floats: -inf is smallest, and no two floats collide."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 is 0.0
    top = jnp.uint32(1 << 31)
    return jnp.where(bits >= top, ~bits, bits | top)


def _threshold(
    order: UInt32[Array, "batch vocab"], weight: Logits, limit: Float[Array, "batch"]
) -> UInt32[Array, "batch"]:
    """The smallest value above which the weights sum to less than `limit`, found bit by bit.

    With unit weights and `limit = k` what reaches it is the top k; with probabilities, the top p.
    """

    def bit(i, low):
        probe = low + (jnp.uint32(1 << 31) >> i.astype(jnp.uint32)) - 1
        above = jnp.where(order > probe[:, None], weight, 0.0).sum(-1)
        return jnp.where(above < limit, low, probe + 1)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(order.shape[0], jnp.uint32))
