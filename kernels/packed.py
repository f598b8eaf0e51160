"""Keys or values as small integers, one scale a token: the layout that GPU kernels read, and its reference.

A *group* of tokens fills `group * bits / 8` bytes of each channel, and these lie behind each other, so that a new group
is written in one place and a tile of tokens is read as one block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt8

from kernels.reference import Mask, Partial, attend

BITS = (8, 4, 2)
"""Of a code: each divides a byte."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """`scale * (code - 2**(bits - 1)) + offset`, one scale and at most one offset a token.

    Args:
        codes: unsigned. Of a group's `n` bytes a channel, byte `i` holds tokens `i, i + n, i + 2n, …`, the first in
            its lowest bits.
        scales: float16, bfloat16 or float32.
        offsets: likewise; None for none.
        bits: 8, 4 or 2.
        group: tokens of a group; static, as `bits` is.
    """

    __no_type_check__ = True  # read by jaxtyping's import hook in the tests: inside JAX leaves may be placeholders
    codes: UInt8[Array, "rows bytes head_dim"]
    scales: Shaped[Array, "rows slots"]
    offsets: Shaped[Array, "rows slots"] | None = None
    bits: int = field(default=8, metadata={"static": True})
    group: int = field(default=8, metadata={"static": True})

    @property
    def span(self) -> int:
        """Bytes that a group takes in each channel."""
        return self.group * self.bits // 8

    @property
    def centre(self) -> int:
        """The code that stands for zero, but for the offset."""
        return 2 ** (self.bits - 1)


def pack_tokens(codes: Int[Array, "rows slots head_dim"], bits: int, group: int) -> UInt8[Array, "rows bytes head_dim"]:
    """Codes from 0 to `2**bits - 1` as `Packed.codes`; `group` divides the slots."""
    rows, slots, dim = codes.shape
    per, span = 8 // bits, group * bits // 8
    split = codes.astype(jnp.uint8).reshape(rows, slots // group, per, span, dim)
    joined = split[:, :, 0]
    for i in range(1, per):
        joined |= split[:, :, i] << (bits * i)
    return joined.reshape(rows, -1, dim)


def unpack_tokens(codes: UInt8[Array, "*rows bytes head_dim"], bits: int, group: int) -> Int[Array, "*rows slots dim"]:
    """What `pack_tokens` was given, in int32."""
    *rows, size, dim = codes.shape
    per, span = 8 // bits, group * bits // 8
    split = codes.astype(jnp.int32).reshape(*rows, size // span, 1, span, dim)
    parts = [(split >> (bits * i)) & (2**bits - 1) for i in range(per)]
    return jnp.concatenate(parts, axis=-3).reshape(*rows, size * per, dim)


def quantize(
    x: Float[Array, "rows slots head_dim"], bits: int, group: int = 8, dtype: str = "float16", *, affine: bool = False
) -> Packed:
    """Nearest codes over each token's range: symmetric around zero, or from its least to its greatest value."""
    x = x.astype(jnp.float32)
    centre, top = 2 ** (bits - 1), 2**bits - 1
    if affine:
        low = x.min(-1)
        scale = ((x.max(-1) - low) / top).astype(dtype)
        offset = (low + centre * scale.astype(jnp.float32)).astype(dtype)
        base = offset.astype(jnp.float32)
    else:
        scale, offset = (jnp.abs(x).max(-1) / (centre - 0.5)).astype(dtype), None
        base = jnp.zeros(scale.shape)
    each = scale.astype(jnp.float32)
    codes = jnp.round((x - base[..., None]) / jnp.where(each > 0, each, 1.0)[..., None]) + centre
    codes = jnp.clip(codes, 0, top).astype(jnp.int32)
    return Packed(pack_tokens(codes, bits, group), scale, offset, bits, group)


def dequantize(x: Packed) -> Float[Array, "rows slots head_dim"]:
    """What the codes stand for, in float32."""
    level = unpack_tokens(x.codes, x.bits, x.group).astype(jnp.float32) - x.centre
    out = level * x.scales.astype(jnp.float32)[..., None]
    return out if x.offsets is None else out + x.offsets.astype(jnp.float32)[..., None]


def attend_packed(
    q: Float[Array, "batch width heads head_dim"],
    k: Packed,
    v: Packed,
    positions: Int[Array, "batch width"],
    slots: Int[Array, "batch slots"],
    mask: Mask,
) -> Partial:
    """`kernels.reference.attend` to what `k` and `v` stand for, in float32: the specification of `decode_packed`.

    Whatever empty slots hold, NaN as a scale too, changes nothing.
    """
    empty = jnp.repeat(slots < 0, k.codes.shape[0] // slots.shape[0], axis=0)[..., None]
    k_all, v_all = (jnp.where(empty, 0.0, dequantize(x)) for x in (k, v))
    with jax.default_matmul_precision("highest"):
        out, lse = attend(q.astype(jnp.float32), k_all, v_all, positions, slots, mask)
    return out.astype(q.dtype), lse
