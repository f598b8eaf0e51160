"""Decode attention over packed codes: the layout, the kernel in interpret mode and on a GPU."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.decode_packed import decode_packed
from kernels.decode_plan import Tiling
from kernels.packed import attend_packed, dequantize, pack_tokens, quantize, unpack_tokens
from kernels.reference import Mask, attend
from tests.kernels.marks import interpreted, on_hopper


@pytest.mark.parametrize(("bits", "group"), [(8, 8), (4, 8), (4, 32), (2, 8), (2, 64)])
def test_codes_come_back_and_lie_as_said(bits, group):
    codes = jax.random.randint(jax.random.key(bits), (2, 128, 4), 0, 2**bits)
    packed = pack_tokens(codes, bits, group)
    assert packed.shape == (2, 16 * bits, 4)
    np.testing.assert_array_equal(unpack_tokens(packed, bits, group), codes)
    span = group * bits // 8
    token, byte = group + span + 1 if bits < 8 else group + 1, span + 1  # of the second group, its second byte
    place = 1 if bits < 8 else 0
    np.testing.assert_array_equal((packed[1, byte] >> (bits * place)) & (2**bits - 1), codes[1, token])


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_are_within_half_a_step(bits, affine):
    x = jax.random.normal(jax.random.key(bits), (3, 32, 16)) + 0.5
    packed = quantize(x, bits, affine=affine, dtype="float32")
    step = packed.scales[..., None] * (0.5 + 1e-3)
    off = jnp.abs(dequantize(packed) - x)
    assert (off <= step).all() if affine else (off <= 2 * step).all()  # the range has one step more below than above


def drawn(bits, lengths, width, heads, kv_heads, slots, dim, group, affine, dtype="float16"):
    """Queries, packed keys and values with NaN for the scales of empty slots, positions, and what slots hold."""
    keys = jax.random.split(jax.random.key(slots + dim + bits), 3)
    batch = len(lengths)
    q = jax.random.normal(keys[0], (batch, width, heads, dim), jnp.bfloat16)
    lengths = jnp.asarray(lengths, jnp.int32)
    filled = jnp.where(jnp.arange(slots)[None] < lengths[:, None], jnp.arange(slots, dtype=jnp.int32)[None], -1)
    empty = jnp.repeat(filled < 0, kv_heads, axis=0)
    sides = []
    for key in keys[1:]:
        x = jax.random.normal(key, (batch * kv_heads, slots, dim)) + 0.3
        x = quantize(x, bits, group, dtype, affine=affine)
        nan = jnp.asarray(jnp.nan, dtype)
        offsets = None if x.offsets is None else jnp.where(empty, nan, x.offsets)
        sides.append(replace(x, scales=jnp.where(empty, nan, x.scales), offsets=offsets))
    at = lengths[:, None] - width + jnp.arange(width, dtype=jnp.int32)[None]
    return q, *sides, at, filled


def compare(inputs, mask, tiling=None, interpret=None):
    want_out, want_lse = attend_packed(inputs[0].astype(jnp.float32), *inputs[1:], mask)
    out, lse = decode_packed(*inputs, mask, tiling=tiling, interpret=interpret)
    assert out.dtype == jnp.bfloat16
    out = out.astype(jnp.float32)
    assert jnp.linalg.norm(out - want_out) < 1e-2 * jnp.linalg.norm(want_out)
    np.testing.assert_array_equal(jnp.isfinite(lse), jnp.isfinite(want_lse))
    np.testing.assert_allclose(lse, want_lse, atol=1e-3)


def test_the_reference_is_attention_to_what_codes_stand_for():
    q, k, v, at, slots = drawn(4, [30, 9], 2, 4, 2, 32, 8, 8, True, "float32")
    whole = [jnp.where(jnp.isnan(x), 0.0, x) for x in (dequantize(k), dequantize(v))]
    out, lse = attend_packed(q.astype(jnp.float32), k, v, at, slots, Mask(0.3))
    want = attend(q.astype(jnp.float32), *whole, at, slots, Mask(0.3))
    np.testing.assert_allclose(out, want[0], atol=1e-5)
    np.testing.assert_allclose(lse, want[1], atol=1e-5)


@interpreted
@pytest.mark.parametrize(
    ("bits", "group", "affine", "mask"),
    [
        (8, 8, False, Mask(0.1)),
        (4, 8, True, Mask(0.1, window=300, sinks=3, softcap=5.0)),
        (2, 64, False, Mask(0.1, window=700)),
    ],
    ids=["8", "4, window, sinks, cap", "2, window"],
)
def test_the_kernel_is_the_reference(bits, group, affine, mask):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tile = 1024 // bits
    inputs = drawn(bits, [3 * tile, tile + 70, 0], 2, 4, 2, 3 * tile, 64, group, affine)
    compare(inputs, mask, Tiling(tile, 2, 3), plgpu.InterpretGPUParams())


def test_what_the_kernel_does_not_take_is_refused(unchecked):
    q, k, v, at, slots = drawn(4, [64], 1, 4, 2, 64, 64, 8, False)
    cases = [
        (NotImplementedError, "bfloat16", (q.astype(jnp.float32), k, v, at, slots)),
        (
            NotImplementedError,
            "head_dim",
            (q[..., :32], *(replace(x, codes=x.codes[..., :32]) for x in (k, v)), at, slots),
        ),
        (NotImplementedError, "queries", (jnp.zeros((1, 20, 4, 64), jnp.bfloat16), k, v, at, slots)),
        (ValueError, "codes", (q, k, replace(v, codes=v.codes[:, :8]), at, slots)),
        (ValueError, "same bits", (q, k, replace(v, bits=2), at, slots)),
        (ValueError, "offsets", (q, replace(k, offsets=k.scales), v, at, slots)),
        (ValueError, "whole number", (q[:, :, :3], k, v, at, slots)),
    ]
    for error, message, inputs in cases:
        with pytest.raises(error, match=message):
            decode_packed(*inputs, Mask(1.0))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("width", "heads"), [(1, 16), (1, 4), (4, 16), (2, 20)])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_kernel_on_a_gpu(bits, width, heads, dim):
    group = {8: 8, 4: 8, 2: 64}[bits]
    inputs = drawn(bits, [4096, 1100, 0, 65], width, heads, 4, 4096, dim, group, width == 1)
    if dim == 256 and width * heads > 32:
        with pytest.raises(NotImplementedError, match="up to 8 queries"):
            decode_packed(*inputs, Mask(0.1))
        return
    compare(inputs, Mask(0.1, window=1500, sinks=4))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("bits", "group"), [(8, 16), (4, 32), (4, 256), (2, 8), (2, 16)])
def test_groups_scales_and_a_cap_on_a_gpu(bits, group, dtype):
    inputs = drawn(bits, [8192, 5000], 1, 32, 8, 8192, 128, group, dtype == "float32", dtype)
    compare(inputs, Mask(0.1, softcap=4.0))
