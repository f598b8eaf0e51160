"""Decode attention in Mosaic GPU: its plan on any machine, the kernel in interpret mode and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.decode_attention import decode_append, decode_attention, fitting
from kernels.decode_plan import Tiling, partials, plan
from kernels.reference import ROWS, Mask, append, attend
from kernels.slots import write
from tests.kernels.marks import interpreted, on_hopper


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=3, max_size=3),
    kv_heads=st.sampled_from([1, 3]),
    workers=st.sampled_from([2, 5, 132]),  # few shapes: each one is compiled
    whole=st.sampled_from([1, 2]),
)
@example(lengths=[1, 0, 65], kv_heads=1, workers=2, whole=1)
@example(lengths=[65, 128, 3], kv_heads=3, workers=132, whole=2)
def test_a_plan_gives_each_visible_tile_to_one_worker(lengths, kv_heads, workers, whole):
    slots, tiling = 320, Tiling(64, 2, workers, whole)
    held = np.arange(slots)[None]
    filled = np.where(held < np.asarray(lengths)[:, None], held, -1)
    work = jax.jit(plan, static_argnums=(2, 3, 4))(
        jnp.asarray(lengths)[:, None] - 1, jnp.asarray(filled), Mask(1.0), kv_heads, tiling
    )
    parts = jax.jit(partials, static_argnums=(1, 2))(work, kv_heads, tiling)
    pieces, counts, tiles, parts = (np.asarray(x) for x in (work.pieces, work.counts, work.tiles, parts))
    assert counts.tolist() == [-(-n // 64) for n in lengths]
    read = {row: [] for row in range(len(lengths) * kv_heads)}
    met = {row: [] for row in read}
    for worker, (first, stop, enter, leave, sharing, *early) in enumerate(pieces):
        for row in range(first, stop):
            begin = enter if row == first else 0
            end = leave if row == stop - 1 else counts[row // kv_heads]
            if begin == end == counts[row // kv_heads]:
                continue  # an empty row between others
            assert begin < end
            read[row] += tiles[row, begin:end].tolist()
            met[row].append(worker + row)
            if row == first:
                ahead = tiles[row, begin : min(end, begin + len(early))]
                assert early[: len(ahead)] == ahead.tolist()
        if stop > first:
            assert sharing == sum(a <= stop - 1 < b for a, b, *_ in pieces) <= tiling.most(kv_heads)
    for row, seen in read.items():
        assert sorted(seen) == list(range(counts[row // kv_heads]))
        assert met[row] == [part for part in parts[row].tolist() if part >= 0]
    numbers = sum(met.values(), [])
    assert len(set(numbers)) == len(numbers)


def test_a_plan_skips_what_a_window_hides():
    slots = jnp.arange(1024)[None]
    work = plan(jnp.asarray([[1000]]), slots, Mask(1.0, window=100, sinks=1), 2, Tiling(64, 2, 4))
    assert sorted(work.tiles[0, : int(work.counts[0])].tolist()) == [0, 14, 15]


def test_workers_take_turns_along_a_row():
    work = plan(jnp.asarray([[639]]), jnp.arange(640)[None], Mask(1.0), 2, Tiling(64, 2, 7))
    assert work.pieces[:, :3].tolist() == [[0, 1, 0], [0, 1, 3], [0, 1, 6], [0, 2, 9], [1, 2, 2], [1, 2, 5], [1, 2, 8]]
    assert work.tiles.tolist() == [[0, 4, 7, 1, 5, 8, 2, 6, 9, 3], [0, 4, 1, 5, 8, 2, 6, 9, 3, 7]]


def test_pieces_end_where_rows_of_one_length_do():
    assert [fitting(128, rows).workers for rows in (8, 64, 256, 24, 1, 1000)] == [128, 128, 128, 120, 132, 125]


def test_unsupported_shapes_are_refused():
    q, k = jnp.zeros((1, 1, 4, 128), jnp.bfloat16), jnp.zeros((2, 64, 128), jnp.bfloat16)
    at, slots = jnp.zeros((1, 1), jnp.int32), jnp.arange(64)[None]
    for bad_q, bad_k, message in (
        (q.astype(jnp.float32), k, "bfloat16"),
        (q[..., :40], k[..., :40], "head_dim"),
        (q, k[:, :60], "slots"),
        (jnp.zeros((1, 1, 2 * ROWS + 2, 128), jnp.bfloat16), k, "queries"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(bad_q, bad_k, bad_k, at, slots[:, : bad_k.shape[1]], Mask(1.0))


def compare(lengths, width, heads, kv_heads, slots, dim, mask, tiling, interpret=None):
    """Against the reference in float32, with NaN in the empty slots of the kernel's K and V."""
    keys = jax.random.split(jax.random.key(slots + dim), 3)
    batch = len(lengths)
    q = jax.random.normal(keys[0], (batch, width, heads, dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, (batch * kv_heads, slots, dim), jnp.bfloat16) for key in keys[1:])
    lengths = jnp.asarray(lengths, jnp.int32)
    filled = jnp.where(jnp.arange(slots)[None] < lengths[:, None], jnp.arange(slots, dtype=jnp.int32)[None], -1)
    at = lengths[:, None] - width + jnp.arange(width, dtype=jnp.int32)[None]
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        want_out, want_lse = attend(*wide, at, filled, mask)
    empty = jnp.repeat(filled < 0, kv_heads, axis=0)[..., None]
    k, v = (jnp.where(empty, jnp.asarray(jnp.nan, x.dtype), x) for x in (k, v))
    out, lse = decode_attention(q, k, v, at, filled, mask, tiling=tiling, interpret=interpret)
    out = out.astype(jnp.float32)
    assert jnp.linalg.norm(out - want_out) < 1e-2 * jnp.linalg.norm(want_out)
    np.testing.assert_array_equal(jnp.isfinite(lse), jnp.isfinite(want_lse))
    np.testing.assert_allclose(lse, want_lse, atol=1e-3)


@interpreted
@pytest.mark.parametrize(
    ("lengths", "mask"),
    [([192, 70], Mask(0.1)), ([150, 0], Mask(0.1, window=40, sinks=3, softcap=5.0))],
    ids=["ragged", "window, sinks, cap, an empty row"],
)
def test_the_kernel_is_the_reference(lengths, mask):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    compare(lengths, 2, 4, 2, 192, 64, mask, Tiling(64, 2, 3), plgpu.InterpretGPUParams())


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("width", [1, 4, 16])
def test_the_kernel_on_a_gpu(width, dim):
    compare([2048, 1100, 0, 65], width, 16, 4, 2048, dim, Mask(0.1, window=1500, sinks=4), None)
    compare([2048, 1100, 0, 65] * 20, width, 9, 3, 2048, dim, Mask(0.1), None)  # more rows than workers


def compare_append(lengths, to, heads, kv_heads, slots, dim, mask, tiling, interpret=None):
    """`decode_append` against the reference in float32: what it gives, and what it leaves in K and V."""
    keys = jax.random.split(jax.random.key(slots + dim), 5)
    batch = len(lengths)
    rows = batch * kv_heads
    q = jax.random.normal(keys[0], (batch, 1, heads, dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, (rows, slots, dim), jnp.bfloat16) for key in keys[1:3])
    new = [jax.random.normal(key, (rows, 1, dim), jnp.bfloat16) for key in keys[3:]]
    lengths, to = jnp.asarray(lengths, jnp.int32), jnp.asarray(to, jnp.int32)
    nth = jnp.arange(slots, dtype=jnp.int32)[None]
    held = jnp.where((nth < lengths[:, None]) & (nth != to[:, None]), nth, -1)
    at = lengths[:, None]
    wide = [x.astype(jnp.float32) for x in (q, *new, k, v)]
    with jax.default_matmul_precision("highest"):
        want_out, want_lse, *_ = append(*wide, at, held, to, mask)
    empty = jnp.repeat(held < 0, kv_heads, axis=0)[..., None]
    k, v = (jnp.where(empty, jnp.asarray(jnp.nan, x.dtype), x) for x in (k, v))
    want_k, want_v = (write(x, y, jnp.maximum(to, 0), (to >= 0)[:, None]) for x, y in zip((k, v), new, strict=True))
    out, lse, k, v = jax.jit(
        lambda *args: decode_append(*args, mask, tiling=tiling, interpret=interpret), donate_argnums=(3, 4)
    )(q, *new, k, v, at, held, to)
    np.testing.assert_array_equal(k.astype(jnp.float32), want_k.astype(jnp.float32))
    np.testing.assert_array_equal(v.astype(jnp.float32), want_v.astype(jnp.float32))
    assert jnp.linalg.norm(out.astype(jnp.float32) - want_out) < 1e-2 * jnp.linalg.norm(want_out)
    np.testing.assert_array_equal(jnp.isfinite(lse), jnp.isfinite(want_lse))
    np.testing.assert_allclose(lse, want_lse, atol=1e-3)


@interpreted
@pytest.mark.parametrize(
    ("lengths", "to", "mask"),
    [
        ([130, 0, 64], [130, 0, 3], Mask(0.1)),
        ([150, 9, 5], [7, -1, 5], Mask(0.1, window=40, sinks=3, softcap=5.0)),
    ],
    ids=["an empty row, a slot taken again", "a row without a token"],
)
def test_appending_is_the_reference(lengths, to, mask):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    compare_append(lengths, to, 6, 2, 192, 64, mask, Tiling(64, 2, 3), plgpu.InterpretGPUParams())


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (32, 8), (4, 4), (12, 1)])
def test_appending_on_a_gpu(heads, kv_heads, dim):
    compare_append(
        [2047, 1100, 0, 65], [2047, 4, 0, -1], heads, kv_heads, 2048, dim, Mask(0.1, window=1500, sinks=4), None
    )
