"""Products with packed keys and values that never unpack them: sums of codes, written out channel by channel.

Scales are folded into the queries, the logits, the weights or the sums of a group, wherever they are few. The sum is
written out, so that XLA makes one loop of it that unpacks in registers; a product that waits for unpacked keys took
twenty times as long. Slots come first in what is summed, so that XLA shares them out evenly among cores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt8

from kvjax.cache.attention import Mask, finish, full_mix, full_scores, weigh
from kvjax.cache.packing import unpack
from kvjax.cache.quantize import Codec

TERMS = 64
"""Slots summed in one expression: more take longer to compile, fewer leave more partial sums."""


def scores(
    codec: Codec,
    codes: UInt8[Array, "rows bytes head_dim groups"],
    scales: Shaped[Array, "rows sharing groups"],
    q: Float[Array, "rows queries head_dim"],
    centres: Shaped[Array, "rows head_dim spans"] | None = None,
) -> Float[Array, "rows queries group groups"]:
    """`q @ k.T` for the keys that `codec.decode` would give, as it would give their slots in groups."""
    scale, offset = codec.parameters(scales)
    by_channel = codec.form == "channel"
    each = q.transpose(2, 0, 1)[..., None]
    if by_channel:
        each = each * scale.swapaxes(0, 1)[:, :, None]
    each, total = jax.lax.optimization_barrier(each), [jnp.zeros(()), jnp.zeros(())]
    for d in range(codec.head_dim):  # two sums, for neither then waits for the other
        level = codec.level(jnp.moveaxis(unpack(codes[:, :, d], codec.bits), 0, 3))
        total[d % 2] = total[d % 2] + each[None, None, None, d] * level[..., None, :]
    out = jax.lax.optimization_barrier(total[0] + total[1])
    out = out.reshape(codec.group, *out.shape[3:]).transpose(1, 2, 0, 3)
    if not by_channel:
        out = out * scale[:, None]
    if centres is not None:
        shift = jnp.einsum("rqd,rds->rqs", q, centres.astype(jnp.float32))
        out = out + jnp.repeat(shift, codec.span // codec.group, axis=2)[:, :, None, : out.shape[3]]
    if offset is None:
        return out
    if by_channel:
        return out + jnp.einsum("rqd,rdn->rqn", q, offset)[:, :, None]
    return out + q.sum(-1)[..., None, None] * offset[:, None]


def mix(
    codec: Codec,
    codes: UInt8[Array, "rows bytes groups head_dim"],
    scales: Shaped[Array, "rows sharing groups"],
    weights: Float[Array, "rows queries group groups"],
) -> Float[Array, "rows queries head_dim"]:
    """`weights @ v` for the values that `codec.decode` would give."""
    scale, offset = codec.parameters(scales)
    by_channel, groups = codec.form == "channel", codes.shape[2]
    tile = 1 if by_channel else min(groups, -(-TERMS // codec.group))
    each = jax.lax.optimization_barrier(weights if by_channel else weights * scale[:, None])

    def partial_sums(first: int, size: int, count: int) -> Float[Array, "rows queries count head_dim"]:
        """Over `size` groups at a time, `count` times."""
        total = [jnp.zeros(()), jnp.zeros(())]
        for i in range(size):
            cut = slice(first + i * count, first + (i + 1) * count)
            for t in range(codec.group):
                total[t % 2] = total[t % 2] + each[:, :, t, cut, None] * codec.one(codes[:, :, cut], t)[:, None]
        return jax.lax.optimization_barrier(total[0] + total[1])

    count = groups // tile
    out = partial_sums(0, tile, count)
    out = out * scale.swapaxes(1, 2)[:, None] if by_channel else out
    out = jnp.ones(count) @ out  # a sum would be fused, and leave less room for what it sums
    if rest := groups - tile * count:
        out = out + partial_sums(tile * count, rest, 1)[:, :, 0]
    if offset is None:
        return out
    if by_channel:
        return out + jnp.einsum("rqn,rdn->rqd", weights.sum(2), offset)
    return out + (weights * offset[:, None]).sum((2, 3))[..., None]


def attend_folded(
    k: tuple[Codec, Array, Array, Array | None],
    v: tuple[Codec, Array, Array],
    full: tuple[Float[Array, "rows some head_dim"], Float[Array, "rows some head_dim"], Int[Array, "batch some"]],
    q: Float[Array, "batch width heads head_dim"],
    positions: Int[Array, "batch width"],
    slots: Int[Array, "batch slots"],
    mask: Mask,
) -> tuple[Float[Array, "batch width heads head_dim"], Float[Array, "batch width heads"]]:
    """`attend` over packed keys and values and some in full, by one softmax.

    Args:
        k, v: each a codec with its codes and scales, and keys with their spans' centres.
        full: keys, values and positions of what is not packed.
        slots: the positions of what `decode` would give, and -1 where nothing is held.
    """
    batch, width, heads, dim = q.shape
    rows, group, some = k[1].shape[0], k[0].group, full[2].shape[1]
    folded = q.astype(jnp.float32).reshape(batch, width, rows // batch, -1, dim).transpose(0, 2, 3, 1, 4)
    folded = folded.reshape(rows, -1, dim)
    packed = scores(*k[:3], k[0].turn(folded), k[3])
    products = [full_scores(folded, full[0].astype(jnp.float32)), packed.reshape(*packed.shape[:2], -1)]
    slots = slots.reshape(batch, -1, group).swapaxes(1, 2).reshape(batch, -1)
    products = jnp.concatenate(products, axis=2).reshape(batch, heads, width, -1)
    weights, peak, total = weigh(products, positions, jnp.concatenate([full[2], slots], axis=1), mask)
    weights = weights.reshape(rows, -1, weights.shape[-1])
    out = v[0].turn_back(mix(*v, weights[..., some:].reshape(packed.shape)))
    out = out + full_mix(weights[..., :some], full[1].astype(jnp.float32))
    return finish((out.reshape(batch, heads, width, dim), peak, total), q.dtype)
