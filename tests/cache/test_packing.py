"""Packing loses no code and wastes no bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache.packing import PLANES, UNIT, pack, spread_shape, unpack, unpack_one

PACK, UNPACK = (jax.jit(f, static_argnames="bits") for f in (pack, unpack))


@pytest.mark.parametrize("bits", PLANES)
@given(seed=st.integers(0, 2**32 - 1), units=st.sampled_from([1, 5]))
@settings(max_examples=10, deadline=None)
def test_unpacking_gives_what_was_packed(bits, seed, units):
    codes = jnp.asarray(np.random.default_rng(seed).integers(0, 2**bits, (2, units * UNIT, 3, 2)), jnp.uint8)
    packed = PACK(codes, bits=bits)
    assert packed.shape == (2, units * bits, 3, 2)
    spread = UNPACK(packed, bits=bits)
    assert spread.shape == (2, *spread_shape(bits, units * UNIT), 3, 2)
    np.testing.assert_array_equal(spread.reshape(codes.shape), codes)
    slot = seed % (units * UNIT)
    np.testing.assert_array_equal(unpack_one(packed, bits, slot), codes[:, slot])


@pytest.mark.parametrize("bits", PLANES)
def test_the_widths_add_up_and_fill_bytes(bits):
    assert sum(PLANES[bits]) == bits
    assert all(8 % width == 0 for width in PLANES[bits])


def test_the_layout_by_hand():
    """Eight slots of 3 bits: the low two bits of slots 0, 2, 4, 6 and of 1, 3, 5, 7, then the high bits of all."""
    codes = jnp.arange(8, dtype=jnp.uint8)[None, :, None]
    wanted = [0b10_00_10_00, 0b11_01_11_01, 0b11110000]
    np.testing.assert_array_equal(pack(codes, 3).ravel(), wanted)
