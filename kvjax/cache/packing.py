"""Codes of 2 to 8 bits in bytes, none wasted: 3, 5 and 6 bits are split into two planes that fill a byte.

A plane of 1, 2, 4 or 8 bits holds `8 / width` slots a byte. Slots are split into axes `shifts, middle, run`, which are
never joined while unpacking: it is a shift and a mask over whole vectors of what follows them. With slots in one axis,
split and joined inside, a CPU unpacked one at a time; and shifts by unequal counts are slow in 8 bits, fast in 32.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
"""Bits of a code to the widths of its planes, lowest bits and widest plane first."""

UNIT = 8
"""Slots that fill whole bytes in every plane: the number packed together is a multiple of it."""


def spread_shape(bits: int, slots: int) -> tuple[int, int, int]:
    """The axes `shifts, middle, run` of unpacked codes; together, in this order, they are the slots."""
    widest, least = PLANES[bits][0], PLANES[bits][-1]
    return UNIT // widest, widest // least, least * slots // UNIT


def pack(codes: UInt8[Array, "rows slots *rest"], bits: int) -> UInt8[Array, "rows bytes *rest"]:
    """Pack codes below `2**bits` along the slots, which `UNIT` must divide, into `slots * bits / 8` bytes.

    In a plane, byte `i` of `n` holds slots `i, i + n, i + 2n, …`, the first in its lowest bits.
    """
    rows, slots, *rest = codes.shape
    planes, below = [], 0
    for width in PLANES[bits]:
        each = UNIT // width
        part = (codes >> below & (2**width - 1)).reshape(rows, each, slots // each, *rest)
        planes.append(sum((part[:, i] << width * i for i in range(1, each)), part[:, 0]))
        below += width
    return jnp.concatenate(planes, axis=1)


def unpack(packed: UInt8[Array, "rows bytes *rest"], bits: int) -> Int[Array, "rows shifts middle run *rest"]:
    """The codes that `pack` was given, with the slots' axis still split."""
    rows, size, *rest = packed.shape
    shifts, middle, run = spread_shape(bits, size * UNIT // bits)
    wide = packed.astype(jnp.int32)
    by = np.arange(shifts * middle, dtype=np.int32).reshape(1, shifts, middle, 1, *(1 for _ in rest))
    low, high = wide[:, : middle * run], wide[:, middle * run :]
    widest, least = PLANES[bits][0], PLANES[bits][-1]
    codes = low.reshape(rows, 1, middle, run, *rest) >> jnp.asarray(widest * (by[:, :, :1] // middle))
    codes &= 2**widest - 1
    if len(PLANES[bits]) == 1:
        return codes
    high = high.reshape(rows, 1, 1, run, *rest) >> jnp.asarray(least * by)
    return codes | (high & (2**least - 1)) << widest


def unpack_one(packed: UInt8[Array, "rows bytes *rest"], bits: int, slot: int) -> Int[Array, "rows *rest"]:
    """The codes of one slot."""
    slots = packed.shape[1] * UNIT // bits
    code, first, below = 0, 0, 0
    for width in PLANES[bits]:
        size = slots * width // UNIT
        byte = packed[:, first + slot % size].astype(jnp.int32)
        code = (byte >> width * (slot // size) & (2**width - 1)) << below | code
        first, below = first + size, below + width
    return jnp.asarray(code)
