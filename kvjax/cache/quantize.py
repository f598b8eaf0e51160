"""Codecs: how keys or values become small integers and a few scales.

`channel` shares a scale and an offset among the tokens of a group, `token` among the channels of a token (KIVI, Liu
et al. 2024, arXiv:2402.02750, section 3.2: keys have outlier channels, values have not). `rotated` turns each token
by a signed Hadamard matrix, which makes every coordinate nearly normal (QuaRot, Ashkboos et al. 2024,
arXiv:2404.00456), so that one scale a token and the normal distribution's own codebook serve (Max 1960, Lloyd 1982).
It may subtract a centre first, which a span of tokens shares: what keys have in common costs bits and says little,
since it moves all logits of a query alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from kvjax.cache.packing import pack, unpack, unpack_one

FORMS = ("channel", "token", "rotated")

CURVES = {
    8: (0.01587, 6.63e-5),
    6: (0.06170, 8.24e-4),
    5: (0.12183, 2.764e-3),
    4: (0.24050, 8.722e-3),
    3: (0.47146, 2.457e-2),
    2: (0.89287, 5.678e-2),
}
"""Bits to the scale and the curvature of `level` that serve a standard normal best."""

FITS = 2
"""Times that a `rotated` token's scale is fitted to its codes. Fitting scale and offset of the other forms raised the
error of the attention's output by a half, though it lowered that of the keys: their extremes matter most."""

Tokens = Float[Array, "rows groups group head_dim"]
Codes = UInt8[Array, "rows bytes major minor"]
Scales = Shaped[Array, "rows sharing groups"]
Centres = Shaped[Array, "rows head_dim groups"]
"""Each group's, turned as `Codec.turn` turns queries."""


@dataclass(frozen=True)
class Codec:
    """One way to write groups of tokens. Static: bits, form and sizes are part of the program.

    Codes are `[rows, bytes, head_dim, groups]` for keys and `[rows, bytes, groups, head_dim]` for values: the axis
    that attention does not sum over comes last, so that its sums go over whole vectors.

    Args:
        form: `"channel"` and `"token"` keep a scale and an offset, `"rotated"` one scale a token, in a byte.
        bits: of a code.
        group: tokens written together.
        head_dim: channels of a token.
        dtype: of offsets, their scales, and centres.
        keys: whether it lays codes out for keys.
        span: tokens that share a centre, a multiple of `group`; 0 for none. Only `rotated` has centres.
    """

    form: str
    bits: int
    group: int
    head_dim: int
    dtype: str
    keys: bool = False
    span: int = 0

    def empty(self, rows: int, groups: int) -> tuple[Codes, Scales]:
        """Buffers for `groups` in each of `rows`, that decode to zeros."""
        last = (self.head_dim, groups) if self.keys else (groups, self.head_dim)
        codes = jnp.zeros((rows, self.group * self.bits // 8, *last), jnp.uint8)
        if self.form == "rotated":
            return codes, jnp.zeros((rows, self.group, groups), jnp.uint8)
        sharing = self.head_dim if self.form == "channel" else self.group
        return codes, jnp.zeros((rows, 2 * sharing, groups), self.dtype)

    def no_centres(self, rows: int, groups: int) -> Shaped[Array, "rows head_dim spans"] | None:
        """A buffer for the centres of `groups` in each of `rows`; None if it has none."""
        spans = -(-groups * self.group // self.span) if self.span else 0
        return jnp.zeros((rows, self.head_dim, spans), self.dtype) if spans else None

    def encode(self, x: Tokens, centres: Centres | None = None) -> tuple[Codes, Scales]:
        """Codes, and scales with the offsets after them. Gradients stop here."""
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        if self.form == "rotated":
            x = x @ rotation(self.head_dim)
            x = x if centres is None else x - centres.swapaxes(1, 2)[:, :, None].astype(jnp.float32)
            codes, scale = normal_codes(x, self.bits)
            scales = scale[..., 0]
        else:
            axis = -2 if self.form == "channel" else -1
            codes, scale, offset = affine(x, self.bits, axis, self.dtype)
            scales = jnp.concatenate([scale.squeeze(axis), offset.squeeze(axis)], 2).astype(self.dtype)
        codes = codes.transpose((0, 2, 3, 1) if self.keys else (0, 2, 1, 3))
        return pack(codes, self.bits), scales.swapaxes(1, 2)

    def decode(
        self, codes: Codes, scales: Scales, centres: Centres | None = None
    ) -> Float[Array, "rows slots head_dim"]:
        """What was written, in float32, a group after the other; for `rotated` turned, as `turn` turns queries."""
        rows, _, *last = codes.shape
        x = self.level(unpack(codes, self.bits)).reshape(rows, self.group, *last)
        x = x.transpose((0, 3, 1, 2) if self.keys else (0, 2, 1, 3))
        scale, offset = self.parameters(scales)
        axis = 2 if self.form == "channel" else 3
        x = x * jnp.expand_dims(scale.swapaxes(1, 2), axis)
        x = x if offset is None else x + jnp.expand_dims(offset.swapaxes(1, 2), axis)
        x = x if centres is None else x + centres.swapaxes(1, 2)[:, :, None].astype(jnp.float32)
        return x.reshape(rows, -1, self.head_dim)

    def one(self, codes: UInt8[Array, "rows bytes *rest"], slot: int) -> Float[Array, "rows *rest"]:
        """One slot of each group, as the numbers that scales multiply."""
        return self.level(unpack_one(codes, self.bits, slot))

    def level(self, code: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Codes as the numbers that scales multiply."""
        x = code.astype(jnp.float32)
        return level(x - (2**self.bits - 1) / 2, self.bits) if self.form == "rotated" else x

    def parameters(
        self, scales: Scales
    ) -> tuple[Float[Array, "rows shared groups"], Float[Array, "rows shared groups"] | None]:
        """Scales and offsets in float32, each shared among channels or tokens; no offsets, but None, for `rotated`."""
        if self.form == "rotated":
            return byte_scale(scales), None
        scale, offset = jnp.split(scales.astype(jnp.float32), 2, axis=1)
        return scale, offset

    def turn(self, x: Float[Array, "*lead head_dim"]) -> Float[Array, "*lead head_dim"]:
        """Queries for keys as `decode` gives them: products with them are those with the keys themselves."""
        return (x.astype(jnp.float32) @ rotation(self.head_dim)).astype(x.dtype) if self.form == "rotated" else x

    def turn_back(self, x: Float[Array, "*lead head_dim"]) -> Float[Array, "*lead head_dim"]:
        """Outputs from values as `decode` gives them, or what `decode` gives itself."""
        return (x.astype(jnp.float32) @ rotation(self.head_dim).T).astype(x.dtype) if self.form == "rotated" else x


def affine(x: Tokens, bits: int, axis: int, dtype: str):
    """Codes, scale and offset that span the range; these are rounded to `dtype` first, so that codes make up for it."""
    top = 2**bits - 1
    offset = x.min(axis, keepdims=True).astype(dtype).astype(jnp.float32)
    scale = ((x.max(axis, keepdims=True) - offset) / top).astype(dtype).astype(jnp.float32)
    codes = jnp.clip(jnp.round((x - offset) / jnp.where(scale > 0, scale, 1.0)), 0, top)
    return codes.astype(jnp.uint8), scale, offset


def normal_codes(x: Tokens, bits: int):
    """Nearest codes of the normal codebook, and each token's one-byte scale, fitted to them by least squares."""
    scale = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True)) * CURVES[bits][0]
    for _ in range(FITS):
        y = level(_nearest(x, scale, bits) - (2**bits - 1) / 2, bits)
        scale = (x * y).sum(-1, keepdims=True) / jnp.square(y).sum(-1, keepdims=True)
    byte = _byte(scale)
    return _nearest(x, byte_scale(byte), bits).astype(jnp.uint8), byte


def level(t: Float[Array, "*shape"], bits: int) -> Float[Array, "*shape"]:
    """The codebook at a centred code `t`, ±0.5, ±1.5, …: a cubic, which no table lookup slows.

    For a standard normal its squared error is the least possible at 2 bits, and above it by 0.2 % at 3, 2 % at 4, 6 %
    at 5, 11 % at 6 and 18 % at 8.
    """
    return (t * t * CURVES[bits][1] + 1.0) * t


def _nearest(x: Tokens, scale: Float[Array, "rows groups group one"], bits: int) -> Tokens:
    """The code whose level is nearest to `x / scale`: midpoints of neighbouring levels lie on a cubic too."""
    c, half = CURVES[bits][1], 2 ** (bits - 1)
    a = 1 + 0.75 * c
    y = x / jnp.where(scale > 0, scale, 1.0)
    root = 2 * np.sqrt(a / (3 * c))
    t = root * jnp.sinh(jnp.arcsinh(y * (3 / (a * root))) / 3)
    return jnp.clip(jnp.floor(t), -half, half - 1) + half


def _byte(scale: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Round to a float with five bits of exponent and three of mantissa, from 2**-16 to 2**16; 0 is 0."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32) + (1 << 19) >> 20
    return jnp.where(scale > 0, jnp.clip(bits - (111 << 3), 1, 255), 0).astype(jnp.uint8)


def byte_scale(byte: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """What `_byte` stands for: three integer instructions, where a power would cost more than all the rest."""
    bits = (byte.astype(jnp.int32) << 20) + (111 << 23)
    return jnp.where(byte > 0, jax.lax.bitcast_convert_type(bits, jnp.float32), 0.0)


@cache
def rotation_matrix(dim: int) -> np.ndarray:
    """An orthogonal matrix of ±1/sqrt(dim): Sylvester's Hadamard matrix, its rows signed, always the same."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = np.random.default_rng(dim).choice([-1.0, 1.0], dim)
    return (matrix * signs[:, None] / np.sqrt(dim)).astype(np.float32)


def rotation(dim: int) -> Float[Array, "dim dim"]:
    """`rotation_matrix` as a constant of the program."""
    return jnp.asarray(rotation_matrix(dim))
