from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from experiments import gpu_attention
from experiments.gpu_attention import KERNELS, Config
from kernels.packed import attend_packed
from kernels.reference import Mask
from kvjax import cli

SMALL = Config(("2x64",), ("cuDNN", "einsum"), heads=4, kv_heads=2, head_dim=32, dtype="float32", calls=2, turns=2)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is one")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert cli.main(["experiment", "gpu_attention"]) == 2
    assert "gpu_attention: needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.fixture
def clock(monkeypatch):
    """A GPU of 1 GB/s where einsum takes 200 µs and cuDNN 100, and a cuDNN that runs on any machine."""

    def attention(q, k, v, implementation):
        return jax.nn.dot_product_attention(q, k, v)

    monkeypatch.setitem(KERNELS, "cuDNN", lambda *args: (_cudnn(*args)[0], lambda *x: attention(*x, "xla")))
    monkeypatch.setattr(gpu_attention, "require_gpu", lambda name: None)
    monkeypatch.setattr(gpu_attention, "COLD", 200_000)
    monkeypatch.setattr(gpu_attention.rates, "bandwidth", lambda form, platform: 1e9)
    times = iter([[100.0, 110.0], [200.0, 210.0], [90.0, 100.0], [190.0, 200.0]])
    seen = []
    monkeypatch.setattr(
        gpu_attention, "microseconds", lambda call, inputs, calls: (seen.append(inputs), next(times))[1]
    )
    return seen


_cudnn = KERNELS["cuDNN"]
_int2 = KERNELS["kvjax int2"]


def test_kernels_take_turns_on_inputs_that_are_not_in_cache(clock):
    first, second = gpu_attention.run(SMALL, lambda doing, done: None)
    assert first["error"] < 1e-5 and second["error"] < 1e-5
    assert (first["kernel"], first["batch"], first["context"], first["us"]) == ("cuDNN", 2, 64, 100.0)
    assert first["range"] == [90.0, 110.0] and second["us"] == 200.0
    size = 2 * 2 * 64 * 2 * 32 * 4
    assert first["share_of_ceiling"] == pytest.approx(size / 1e9 / 100e-6)
    assert len(clock) == 4 and all(len(inputs) * size >= 200_000 for inputs in clock)
    assert not jnp.array_equal(clock[0][0][1], clock[0][1][1])


def test_a_wrong_kernel_is_refused(clock, monkeypatch):
    arrange, call = KERNELS["einsum"](SMALL, 2, 64)
    monkeypatch.setitem(KERNELS, "einsum", lambda *_: (arrange, lambda q, k, v: 1.02 * call(q, k, v)))
    with pytest.raises(RuntimeError, match="at 2x64 expected relative errors below 0.01, got {'einsum'"):
        gpu_attention.run(SMALL, lambda doing, done: None)


def test_codes_count_with_their_scales_and_are_held_against_what_they_stand_for(clock, monkeypatch):
    def by_reference(*args):
        def call(q, k, v, at, slots, work):
            return attend_packed(q, k, v, at, slots, Mask(64**-0.5))[0]

        return _int2(*args)[0], call

    monkeypatch.setitem(KERNELS, "kvjax int2", by_reference)
    config = replace(SMALL, kernels=("einsum", "kvjax int2"), head_dim=64)
    _, row = gpu_attention.run(config, lambda doing, done: None)
    assert (row["kernel"], row["dtype"]) == ("kvjax", "int2") and row["error"] < 1e-5
    size = 2 * 2 * 64 * 2 * (64 // 4 + 2)
    assert row["share_of_ceiling"] == pytest.approx(size / 1e9 / 200e-6)
    assert all(len(inputs) * size >= 200_000 for inputs in clock)


def test_settings_are_checked():
    for work in ("32768", "1x", "ax2", "0x4"):
        with pytest.raises(ValueError, match="BATCHxCONTEXT"):
            Config((work,), ())
    with pytest.raises(ValueError, match="`kernels` must be among kvjax, cuDNN, einsum"):
        Config((), ("triton",))
