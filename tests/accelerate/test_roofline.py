"""The work of an operation is what XLA counts of a program that does it, and the bytes of its arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kernels.packed import quantize
from kvjax.accelerate import roofline
from kvjax.accelerate.roofline import Work, bound
from tests.accelerate.made_up import FACTS


def counted(call, *args):
    """Floating-point operations of the products in a program, and bytes of what goes in and comes out."""
    lowered = jax.jit(call).lower(*args)
    return lowered.cost_analysis()["flops"], kvjax.nbytes((args, lowered.out_info))


@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (7, "bfloat16")])
def test_a_product(rows, dtype):
    x, kernel = jnp.ones((rows, 48), dtype), jnp.ones((80, 48), dtype)
    flops, moved = counted(lambda x, kernel: jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ()))), x, kernel)
    work = roofline.product(rows, 48, 80, dtype=dtype)
    assert (work.flops, work.bytes) == (flops, moved)
    few = roofline.product(rows, 48, 80, bits=4, dtype=dtype)
    assert work.bytes - few.bytes == kernel.nbytes - kernel.size / 2 and few.flops == work.flops


def mixed(q, k, v):
    """The two products of attention, without what is between them, and a log-sum-exp."""
    logits = jnp.einsum("bhgd,bhtd->bhgt", q, k)
    return jnp.einsum("bhgt,bhtd->bhgd", logits, v), jnp.zeros(q.shape[:3], jnp.float32)


@pytest.mark.parametrize("batch", [1, 3])
def test_decode_attention(batch):
    q, kv = jnp.ones((batch, 2, 4, 16)), jnp.ones((batch, 2, 96, 16))
    work = partial(roofline.decode_attention, batch, heads=8, kv_heads=2, head_dim=16, dtype="float32")
    flops, moved = counted(mixed, q, kv, kv)
    assert (work(96).flops, work(96).bytes) == (flops, moved)
    short = kv[:, :, :40]
    flops, moved = counted(mixed, q, short, short)
    assert (work(96, window=36, sinks=4).flops, work(96, window=36, sinks=4).bytes) == (
        flops,
        moved,
    )
    assert work(30, window=36, sinks=4) == work(30)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_decode_attention_of_codes_reads_codes_and_scales(bits):
    rows = jnp.ones((6, 96, 16))
    packed = quantize(rows, bits)
    sizes = {"heads": 8, "kv_heads": 2, "head_dim": 16}
    full = roofline.decode_attention(3, 96, **sizes)
    codes = roofline.decode_attention(3, 96, bits=bits, scales=2, **sizes)
    held = 2 * (packed.codes.nbytes + packed.scales.nbytes)
    assert full.bytes - codes.bytes == 2 * rows.size * 2 - held


@pytest.mark.parametrize(("before", "width", "window"), [(0, 24, None), (10, 24, None), (10, 24, 9), (3, 24, 20)])
def test_prefill_attention_counts_the_pairs_that_see_each_other(before, width, window):
    at, slots = np.arange(before, before + width)[:, None], np.arange(before + width)[None]
    seen = slots <= at
    if window is not None:
        seen &= slots > at - window
    work = roofline.prefill_attention(
        2, width, heads=8, kv_heads=2, head_dim=16, before=before, window=window, dtype="float32"
    )
    one = jnp.ones((1, 1, 1, 16))
    flops, _ = counted(mixed, one, one, one)
    assert work.flops == 2 * 8 * seen.sum() * flops
    q, lse, kv = jnp.zeros((2, width, 8, 16)), jnp.zeros((2, width, 8)), jnp.zeros((4, seen.any(0).sum(), 16))
    assert work.bytes == 2 * q.nbytes + lse.nbytes + 2 * kv.nbytes


def test_small_operations_move_their_arrays():
    x, scale = jnp.ones((5, 64), jnp.bfloat16), jnp.ones((1, 64))
    _, moved = counted(lambda x, scale: x * scale.astype(x.dtype), x, scale)
    assert roofline.norm(5, 64).bytes == moved
    logits = jnp.ones((5, 300))
    _, moved = counted(lambda x: x.argmax(-1).astype(jnp.int32), logits)
    assert roofline.sampling(5, 300).bytes == moved
    kv = jnp.ones((2, 5, 3, 16), jnp.bfloat16)
    assert roofline.append(5, kv_heads=3, head_dim=16).bytes == 2 * kv.nbytes
    packed = quantize(kv.reshape(2, 15, 16).swapaxes(0, 1).repeat(8, 1)[:, :8], 4)
    token = (packed.codes.nbytes + packed.scales.nbytes) / 8
    assert roofline.append(5, kv_heads=3, head_dim=16, bits=4, scales=2).bytes == kv.nbytes + 2 * token


def test_what_binds():
    assert bound(Work(10, 400), FACTS) == roofline.Bound(4.0, "memory")
    assert bound(Work(10, 400, "float32"), FACTS).limit == "memory"
    assert bound(Work(50, 400, "float32"), FACTS) == roofline.Bound(5.0, "compute")
    assert bound(Work(1, 1, launches=3), FACTS) == roofline.Bound(1.5, "launch")
    assert roofline.Bound(4.0, "memory").share(5.0) == 0.8
    assert (FACTS.read, FACTS.copy, FACTS.bandwidth) == (90.0, 100.0, 100.0)
    with pytest.raises(ValueError, match="must be among bfloat16, float32, got 'float16'"):
        bound(Work(1, 1, "float16"), FACTS)


def test_work_adds_up_in_one_dtype():
    assert Work(1, 2) + Work(3, 4, launches=2) == Work(4, 6, launches=3)
    with pytest.raises(ValueError, match="in one dtype, got bfloat16 and float32"):
        Work(1, 2) + Work(3, 4, "float32")
