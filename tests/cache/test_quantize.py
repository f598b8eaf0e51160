"""Codecs: errors within their bounds, and the quality that theory gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.packing import PLANES
from kvjax.cache.quantize import CURVES, FORMS, Codec, level, rotation


@partial(jax.jit, static_argnums=0)
def coded(codec: Codec, x):
    """What a codec makes of groups of tokens, turned back."""
    groups = x.reshape(1, -1, codec.group, codec.head_dim)
    return codec.turn_back(codec.decode(*codec.encode(groups))).reshape(x.shape)


def tokens(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", PLANES)
def test_bytes_and_error_of_normal_tokens(form, bits):
    """The squared error is that of the best fixed codebook, or, by range, near it; buffers have what is written."""
    codec = Codec(form, bits, 64, 64, "float16")
    x = tokens(bits, 3, 2, 64, 64)
    codes, scales = jax.jit(codec.encode)(x)
    empty = codec.empty(3, 2)
    assert [(y.shape, y.dtype) for y in (codes, scales)] == [(y.shape, y.dtype) for y in empty]
    assert codes.size * 8 == x.size * bits
    assert scales.nbytes == 3 * 2 * 64 * (1 if form == "rotated" else 4)
    error = float(jnp.square(coded(codec, x) - x).mean())
    best = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.0006442, 8: 4.3e-5}  # Max 1960, table I
    assert error < best[bits] * (1.2 if form == "rotated" else 1.8 if bits == 2 else 1.4)
    assert float(jnp.abs(codec.decode(*empty)).max()) == 0


@pytest.mark.parametrize("form", ["channel", "token"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_eight_bits_err_by_half_a_step_and_the_rounding_of_the_offset(form, offset):
    x = tokens(0, 64, 8) + offset
    axis = 0 if form == "channel" else 1
    step = (x.max(axis, keepdims=True) - x.min(axis, keepdims=True)) / 255
    bound = step * 0.502 + jnp.abs(x.min(axis, keepdims=True)) * 2.0**-11 + 1e-5
    assert (jnp.abs(coded(Codec(form, 8, 64, 8, "float16"), x) - x) < bound).all()


def test_an_outlier_channel_costs_keys_by_channel_little():
    """Why keys are shared by channel: one large channel spoils every scale that a token shares (KIVI, figure 2)."""
    x = tokens(1, 64, 16).at[:, 3].add(20.0)
    error = {form: jnp.square(coded(Codec(form, 4, 64, 16, "float16"), x) - x).mean() for form in FORMS}
    assert error["channel"] < min(error["rotated"], error["token"]) / 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, -3.25])
def test_constant_tokens_are_exact_but_for_a_rotation(form, value):
    x = jnp.full((16, 8), value)
    np.testing.assert_allclose(coded(Codec(form, 3, 16, 8, "float16"), x), x, atol=2.0 if form == "rotated" else 0)


@pytest.mark.parametrize("dim", [1, 2, 64, 128])
def test_a_rotation_keeps_products(dim):
    turn = np.asarray(rotation(dim))
    np.testing.assert_allclose(turn @ turn.T, np.eye(dim), atol=1e-6)
    np.testing.assert_allclose(np.abs(turn), dim**-0.5, rtol=1e-6)


def test_queries_and_keys_turn_alike():
    codec, q, k = Codec("rotated", 8, 16, 32, "float16"), tokens(2, 5, 32), tokens(3, 16, 32)
    turned = codec.turn(q) @ codec.decode(*codec.encode(k[None, None]))[0].T
    np.testing.assert_allclose(turned, q @ k.T, atol=0.15)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_are_those_of_the_literature(bits):
    """Max 1960, "Quantizing for minimum distortion", table I: the positive levels."""
    levels = {
        2: [0.4528, 1.510],
        3: [0.2451, 0.7560, 1.344, 2.152],
        4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
    }
    t = jnp.arange(2.0 ** (bits - 1)) + 0.5
    np.testing.assert_allclose(CURVES[bits][0] * level(t, bits), levels[bits], rtol=0.07)


@pytest.mark.parametrize("bits", PLANES)
def test_the_curve_is_the_best_of_its_kind(bits):
    """Neither the scale nor the curvature could be larger or smaller."""
    x = np.linspace(-6, 6, 100_001)
    t = np.arange(2.0**bits) - (2**bits - 1) / 2

    def error(scale, curvature):
        book = scale * (1 + curvature * t * t) * t
        nearest = book[np.searchsorted((book[1:] + book[:-1]) / 2, x)]
        return (np.exp(-x * x / 2) * np.square(x - nearest)).sum()

    best = error(*CURVES[bits])
    for factors in ((1.03, 1), (0.97, 1), (1, 1.06), (1, 0.94)):
        assert error(*np.multiply(CURVES[bits], factors)) > best


def test_gradients_stop_at_codes():
    codec = Codec("channel", 4, 16, 8, "float16")
    grad = jax.grad(lambda x: coded(codec, x).sum())(tokens(0, 16, 8))
    assert (grad == 0).all()
