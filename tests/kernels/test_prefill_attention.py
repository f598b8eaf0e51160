"""Prefill attention in Mosaic GPU: its tiles on any machine, the kernel in interpret mode and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.prefill_attention import PAIR, Blocks, prefill_attention, tiles
from kernels.reference import Mask, attend, visible
from tests.kernels.marks import interpreted, on_hopper

BLOCKS = Blocks(64, 2)


@settings(max_examples=40, deadline=None)
@given(
    starts=st.lists(st.integers(0, 700), min_size=2, max_size=2),
    held=st.lists(st.integers(0, 640), min_size=2, max_size=2),
    window=st.sampled_from([None, 1, 90, 300]),
    sinks=st.integers(0, 70),
    shuffled=st.booleans(),
)
def test_tiles_that_are_seen_are_listed_and_whole_ones_are_whole(starts, held, window, sinks, shuffled):
    width, mask = 150, Mask(1.0, window=window, sinks=sinks)
    at = np.asarray(starts)[:, None] + np.arange(width)[None]
    at[1, 100:] = -1  # no query
    nth = np.arange(640)
    if shuffled:
        nth = np.random.default_rng(0).permutation(nth)
    slots = np.where(nth[None] < np.asarray(held)[:, None], nth[None], -1)
    work = tiles(jnp.asarray(at), jnp.asarray(slots), mask, BLOCKS)
    assert work.asks.shape == (2, 2 * PAIR) and work.slots.shape == (2, 640)
    seen = np.asarray(visible(work.asks, work.slots, mask)).reshape(2, 2, PAIR, 10, 64)
    for row in range(2):
        for block in range(2):
            whole, count = int(work.whole[row, block]), int(work.counts[row, block])
            numbers = work.numbers[row, block].tolist()
            assert sorted(numbers) == list(range(10))
            needed = set(np.flatnonzero(seen[row, block].any((0, 2))).tolist())
            assert needed <= set(numbers[:count])
            assert all(seen[row, block][:, number].all() for number in numbers[:whole])


def test_a_causal_prompt_reads_half_of_the_tiles():
    at = jnp.arange(1024, dtype=jnp.int32)[None]
    work = tiles(at, at, Mask(1.0), Blocks(128))
    assert work.whole.tolist() == [list(range(8))]
    assert work.counts.tolist() == [list(range(1, 9))]


def test_unsupported_shapes_are_refused():
    q, k = jnp.zeros((1, 8, 4, 128), jnp.bfloat16), jnp.zeros((2, 64, 128), jnp.bfloat16)
    at, slots = jnp.arange(8)[None], jnp.arange(64)[None]
    for bad_q, bad_k, message in (
        (q.astype(jnp.float32), k, "bfloat16"),
        (q[..., :96], k[..., :96], "head_dim"),
        (q[:, :, :3], k, "whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill_attention(bad_q, bad_k, bad_k, at, slots, Mask(1.0))


def compare(lengths, width, heads, kv_heads, slots, dim, mask, blocks, interpret=None):
    """Against the reference in float32, with NaN in the empty slots; rows end with `lengths` tokens held."""
    keys = jax.random.split(jax.random.key(slots + dim), 3)
    batch = len(lengths)
    q = jax.random.normal(keys[0], (batch, width, heads, dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, (batch * kv_heads, slots, dim), jnp.bfloat16) for key in keys[1:])
    lengths = jnp.asarray(lengths, jnp.int32)
    nth = jnp.arange(slots, dtype=jnp.int32)[None]
    filled = jnp.where(nth < lengths[:, None], nth, -1)
    at = jnp.maximum(lengths[:, None] - width, 0) + jnp.arange(width, dtype=jnp.int32)[None]
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        want_out, want_lse = jax.jit(attend, static_argnums=5)(*wide, at, filled, mask)
    empty = jnp.repeat(filled < 0, kv_heads, axis=0)[..., None]
    k, v = (jnp.where(empty, jnp.asarray(jnp.nan, x.dtype), x) for x in (k, v))
    out, lse = prefill_attention(q, k, v, at, filled, mask, blocks=blocks, interpret=interpret)
    assert jnp.linalg.norm(out.astype(jnp.float32) - want_out) < 1e-2 * jnp.linalg.norm(want_out)
    np.testing.assert_array_equal(jnp.isfinite(lse), jnp.isfinite(want_lse))
    np.testing.assert_allclose(lse, want_lse, atol=2e-3)


@interpreted
@pytest.mark.parametrize(
    ("lengths", "slots", "mask"),
    [([250, 130], 250, Mask(0.1)), ([200, 0], 256, Mask(0.1, window=60, sinks=3, softcap=5.0))],
    ids=["ragged, continued", "window, sinks, cap, an empty row"],
)
def test_the_kernel_is_the_reference(lengths, slots, mask):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    compare(lengths, 140, 4, 2, slots, 64, mask, BLOCKS, plgpu.InterpretGPUParams())


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("width", [40, 512, 2048])
def test_the_kernel_on_a_gpu(width, dim):
    compare([2048, 1100, 0, 65], width, 16, 4, 2048, dim, Mask(0.1), Blocks())
    compare([2048, 1100, 0, 65], width, 9, 3, 2048, dim, Mask(0.1, window=700, sinks=4, softcap=20.0), Blocks())
