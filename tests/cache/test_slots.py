"""Writes into slots against a loop in NumPy."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache.slots import take_rows, write


@settings(deadline=None, max_examples=60)
@given(
    slots=st.sampled_from([1, 5, 8]),
    width=st.sampled_from([1, 3, 9]),
    heads=st.sampled_from([1, 2]),
    rest=st.sampled_from([(), (4,)]),
    data=st.data(),
)
def test_write_puts_what_is_kept_and_nothing_else(slots, width, heads, rest, data):
    batch = 2
    start = data.draw(st.lists(st.integers(0, slots + 2), min_size=batch, max_size=batch))
    keep = np.random.default_rng(data.draw(st.integers(0, 99))).random((batch, width)) < 0.7
    old = np.random.default_rng(0).normal(size=(batch * heads, slots, *rest)).astype(np.float32)
    new = np.random.default_rng(1).normal(size=(batch * heads, width, *rest)).astype(np.float32)
    wanted = old.copy()
    for row in range(batch * heads):
        for i in range(width):
            slot = start[row // heads] + i
            if keep[row // heads, i] and slot < slots:
                wanted[row, slot] = new[row, i]
    got = write(jnp.asarray(old), jnp.asarray(new), jnp.asarray(start, jnp.int32), jnp.asarray(keep))
    np.testing.assert_array_equal(got, wanted)


def test_take_rows_keeps_heads_together():
    buffer = jnp.arange(6)[:, None].repeat(2, 1)
    np.testing.assert_array_equal(take_rows(buffer, jnp.array([2, 0]), 3)[:, 0], [4, 5, 0, 1])
