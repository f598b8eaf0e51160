"""Writes into slots against a loop in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.slots import _scattered, _windows
from kvjax.cache.slots import take_rows


@pytest.mark.parametrize("write", [_windows, _scattered], ids=["cpu", "gpu"])
@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("width", [1, 3, 9])
@pytest.mark.parametrize(("heads", "rest"), [(1, ()), (2, (4,))])
def test_write_puts_what_is_kept_and_nothing_else(write, slots, width, heads, rest):
    """Every start, from an empty row to one past the end, and random tokens to keep, as each platform does it."""
    batch, rng = 2, np.random.default_rng(slots + width)
    written = jax.jit(write)
    for first in range(slots + 3):
        start = np.array([first, rng.integers(0, slots + 2)], np.int32)
        keep = rng.random((batch, width)) < 0.7
        old = rng.normal(size=(batch * heads, slots, *rest)).astype(np.float32)
        new = rng.normal(size=(batch * heads, width, *rest)).astype(np.float32)
        wanted = old.copy()
        for row, i in np.ndindex(batch * heads, width):
            slot = start[row // heads] + i
            if keep[row // heads, i] and slot < slots:
                wanted[row, slot] = new[row, i]
        np.testing.assert_array_equal(written(*map(jnp.asarray, (old, new, start, keep))), wanted)


def test_take_rows_keeps_heads_together():
    buffer = jnp.arange(6)[:, None].repeat(2, 1)
    np.testing.assert_array_equal(take_rows(buffer, jnp.array([2, 0]), 3)[:, 0], [4, 5, 0, 1])
