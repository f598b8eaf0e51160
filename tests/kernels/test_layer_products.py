"""A layer's products as one kernel: in the interpreter, on a GPU, as an operation."""

import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch, layer_products
from kernels.layer_attention import Cached, reach, stretch
from kernels.layer_products import Weights, chunk, depth, refusal
from kernels.reference import Mask
from tests.kernels.marks import interpreted, on_hopper

EPS = 1e-5


def draw(rows, hidden, attended, intermediate, outputs, dtype=jnp.bfloat16):
    """What the attention gives, the residual stream, and weights."""
    keys = list(jax.random.split(jax.random.key(rows + hidden), 8))

    def normal(key, *shape):
        return (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(dtype)

    shapes = [(hidden, attended), (2 * intermediate, hidden), (hidden, intermediate), (outputs, hidden)]
    out, gate_up, down, following = (normal(key, *shape) for key, shape in zip(keys, shapes, strict=False))
    norms = [jax.random.uniform(key, (hidden,), jnp.float32, 0.5, 1.5) for key in keys[4:6]]
    x, rest = (4 * normal(key, rows, size) for key, size in zip(keys[6:], (hidden, attended), strict=True))
    return rest, x, Weights(out, norms[0], gate_up, down, norms[1], following)


def compare(got, want, rtol):
    """Row by row, and no number further off than eight times what a row is in the mean."""
    for x, y in zip(got, want, strict=True):
        x, y = (z.astype(jnp.float32) for z in (x, y))
        size = jnp.linalg.norm(y, axis=-1, keepdims=True)
        assert (jnp.linalg.norm(x - y, axis=-1, keepdims=True) < rtol * size).all()
        assert (jnp.abs(x - y) < 8 * rtol * size * y.shape[-1] ** -0.5).all()


@interpreted
@pytest.mark.parametrize("rows", [1, 3])
def test_the_kernel_is_the_reference(rows):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels.layer_kernel import run

    given = draw(rows, 128, 192, 320, 208)
    want = layer_products.reference(*given, EPS)
    assert all(jnp.abs(x).max() > 0.5 for x in want)
    compare(run(*given, eps=EPS, workers=3, interpret=plgpu.InterpretGPUParams()), want, 1e-3)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("sizes", [(576, 576, 1536, 49152), (576, 576, 1536, 960), (2048, 1024, 5632, 3072)])
def test_the_kernel_on_a_gpu(sizes, rows):
    given = draw(rows, *sizes)
    with jax.default_matmul_precision("highest"):
        want = layer_products.reference(*given, EPS)
    ours = jax.jit(lambda *args: layer_products.layer_products(*args, eps=EPS, backend="mosaic"))
    for _ in range(20):  # workers wait for each other: what goes wrong may do so seldom
        compare(ours(*given), want, 1e-2)


@interpreted
@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "slots", "mask"),
    [
        ([140], (4, 2), 64, 150, Mask(0.1)),
        ([70, 0, 100], (6, 2), 64, 100, Mask(0.1, window=30, sinks=2, softcap=5.0)),
        ([299], (2, 1), 128, 300, Mask(0.1)),
    ],
    ids=["one", "window, sinks, cap, an empty row, a full one", "wide heads"],
)
def test_a_layer_with_its_attention_is_the_reference(lengths, heads, dim, slots, mask):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels.layer_kernel import run_step

    _, x, weights = draw(len(lengths), 128, heads[0] * dim, 128, 160)
    qkv, cached = tokens(lengths, *heads, dim, slots)
    want = layer_products.reference_step(qkv, x, emptied(cached, 0.0), weights, mask, EPS)
    given = qkv, x, emptied(cached, jnp.nan), weights, mask
    got = run_step(*given, eps=EPS, workers=7, interpret=plgpu.InterpretGPUParams())
    compare(got[:2], want[:2], 1e-2)
    for ours, theirs in zip(got[2:], want[2:], strict=True):
        np.testing.assert_array_equal(jnp.nan_to_num(ours), theirs)
    assert not jnp.array_equal(want[2], emptied(cached, 0.0).k)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "slots", "mask"),
    [
        ([300], (9, 3), 64, 512, Mask(0.125)),
        ([0], (9, 3), 64, 512, Mask(0.125)),
        ([512], (9, 3), 64, 512, Mask(0.125)),
        ([300, 0, 2047, 5, 17, 900, 1024, 63], (9, 3), 64, 2048, Mask(0.125)),
        ([300, 0, 699], (9, 3), 64, 700, Mask(0.125, window=130, sinks=3, softcap=20.0)),
        ([8000, 3], (16, 4), 128, 9001, Mask(0.09)),
        ([40_000], (8, 8), 128, 40_960, Mask(0.09)),
        ([500, 30], (14, 2), 64, 1024, Mask(0.125)),
        ([700], (32, 4), 128, 1024, Mask(0.09)),
    ],
    ids=str,
)
def test_a_layer_with_its_attention_on_a_gpu(lengths, heads, dim, slots, mask):
    _, x, weights = draw(len(lengths), 576, heads[0] * dim, 1536, 960)
    qkv, cached = tokens(lengths, *heads, dim, slots)
    with jax.default_matmul_precision("highest"):
        want = layer_products.reference_step(qkv, x, emptied(cached, 0.0), weights, mask, EPS)
    ours = jax.jit(partial(layer_products.layer_step, eps=EPS, backend="mosaic"), static_argnums=4)
    for _ in range(20):  # workers wait for each other: what goes wrong may do so seldom
        got = ours(qkv, x, emptied(cached, jnp.nan), weights, mask)
        compare(got[:2], want[:2], 1e-2)
        for mine, theirs in zip(got[2:], want[2:], strict=True):
            np.testing.assert_array_equal(jnp.nan_to_num(mine), theirs)


def tokens(lengths, heads, kv_heads, dim, slots):
    """Queries, keys and values of a new token of each row, and rows that hold `lengths` tokens."""
    keys = list(jax.random.split(jax.random.key(slots), 3))
    rows = len(lengths)
    qkv = jax.random.normal(keys[0], (rows, (heads + 2 * kv_heads) * dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, (rows * kv_heads, slots, dim), jnp.bfloat16) for key in keys[1:])
    at = jnp.asarray(lengths, jnp.int32)
    nth = jnp.arange(slots, dtype=jnp.int32)[None]
    angle = at[:, None].astype(jnp.float32) * 10_000.0 ** -(jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))[None]
    held = jnp.where(nth < at[:, None], nth, -1)
    return qkv, Cached(k, v, held, jnp.where(at < slots, at, -1), at, jnp.cos(angle), jnp.sin(angle))


def emptied(cached, value):
    """With this in the empty slots."""
    empty = jnp.repeat(cached.slots < 0, cached.k.shape[0] // cached.slots.shape[0], axis=0)[..., None]
    k, v = (jnp.where(empty, jnp.asarray(value, x.dtype), x) for x in (cached.k, cached.v))
    return replace(cached, k=k, v=v)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda qkv, c: (qkv, replace(c, k=c.k.astype(jnp.float32))), "float32"),
        (lambda qkv, c: (qkv, replace(c, cos=c.cos[:, :16], sin=c.sin[:, :16])), "turned as a whole"),
        (lambda qkv, c: (jnp.tile(qkv, (1, 5)), c), "up to 8 queries"),
    ],
    ids=["dtype", "rotary", "group"],
)
def test_an_attention_that_the_kernel_does_not_take_is_refused_by_name(change, why):
    qkv, cached = change(*tokens([3], 4, 2, 64, 16))
    _, x, weights = draw(1, 64, qkv.shape[1] - 256, 64, 64)
    with pytest.raises(ValueError, match=why):
        layer_products.layer_step(qkv, x, cached, weights, Mask(0.1), eps=EPS, backend="mosaic")


def test_the_slots_that_are_seen_are_in_reach_and_all_are_shared_out():
    _, cached = tokens([300, 0, 640], 2, 1, 64, 640)
    held, bounds = reach(cached, Mask(1.0, window=100))
    assert bounds.tolist() == [[192, 301], [0, 1], [528, 640]]
    assert held[0, 300] == 300 and held[0, 301] == -1
    piece, count = stretch(bounds[:, 0], bounds[:, 1], 4)
    assert piece.tolist() == [64, 64, 64] and count.tolist() == [2, 1, 2]
    piece, count = stretch(jnp.asarray([0, 16]), jnp.asarray([640, 16]), 3)
    assert piece.tolist() == [224, 64] and count.tolist() == [3, 1]


def test_a_row_of_nan_is_its_own():
    rest, x, weights = draw(2, 64, 64, 64, 64)
    _, projected = layer_products.layer_products(rest, x.at[0].set(jnp.nan), weights, eps=EPS)
    assert jnp.isnan(projected[0]).all() and jnp.isfinite(projected[1]).all()


def test_stages_fit_beside_the_rows():
    assert [chunk(size) for size in (4096, 576, 1536, 14336, 64)] == [1024, 576, 768, 1024, 64]
    sizes = [4096, 4096, 14336, 4096]
    assert [depth(sizes, rows) for rows in (1, 2, 4, 6, 7)] == [6, 5, 3, 1, 0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda rest, x, w: (rest, x.astype(jnp.float32), w), "float32"),
        (lambda rest, x, w: (rest, x, replace(w, down=w.down.astype(jnp.float16))), "float16"),
        (lambda rest, x, w: (jnp.tile(rest, (9, 1)), jnp.tile(x, (9, 1)), w), "rows, got 9"),
        (lambda rest, x, w: (rest, x, replace(w, mlp_norm=w.mlp_norm.astype(jnp.bfloat16))), "norms in float32"),
        (lambda rest, x, w: (rest, x, replace(w, following=w.following[:40])), "`following`.*40"),
        (lambda rest, x, w: (rest[:, :32], x, replace(w, out=w.out[:, :32])), "`out`.*32"),
    ],
    ids=["dtype", "one dtype", "rows", "norms", "outputs", "inputs"],
)
def test_what_the_kernel_does_not_take_is_refused_by_name(change, why):
    given = change(*draw(1, 64, 64, 64, 64))
    with pytest.raises(ValueError, match=why):
        layer_products.layer_products(*given, eps=EPS, backend="mosaic")


def test_rows_too_wide_for_shared_memory_are_refused():
    given = jax.eval_shape(lambda: draw(8, 4096, 4096, 14336, 6144))
    assert "no room" in refusal(*given)
    assert refusal(*jax.eval_shape(lambda: draw(4, 4096, 4096, 14336, 6144))) is None


def test_a_backend_that_there_is_not_is_refused():
    given = draw(1, 64, 256, 64, 64)
    with pytest.raises(ValueError, match=r"mosaic, xla or None, got 'cuda'"):
        layer_products.layer_products(*given, eps=EPS, backend="cuda")
    with pytest.raises(ValueError, match=r"mosaic, xla or None, got 'cuda'"):
        layer_products.layer_step(*whole(given), Mask(0.1), eps=EPS, backend="cuda")


def whole(given):
    """What a layer with its attention takes, for four heads of 64 over two."""
    qkv, cached = tokens([3], 4, 2, 64, 16)
    return qkv, given[1], cached, given[2]


@interpreted
@pytest.mark.parametrize(("hopper", "asked", "ours"), [(False, None, 0), (True, "xla", 0), (True, None, 1)])
def test_a_whole_layer_has_the_backend_that_was_asked_for(hopper, asked, ours, monkeypatch):
    monkeypatch.setattr(dispatch, "hopper", lambda: hopper)
    step = partial(layer_products.layer_step, mask=Mask(0.1), eps=EPS, backend=asked)
    assert str(jax.make_jaxpr(step)(*whole(draw(1, 64, 256, 64, 64)))).count("mpmd_map[") == ours


@interpreted
@pytest.mark.parametrize("sizes", [(2048, 6144), (576, 2304), (4096, 14_336)], ids=str)
def test_what_is_not_refused_fits_in_shared_memory(sizes):
    hidden, intermediate = sizes
    taken = 0
    for rows in (1, 4, 5, 6, 8):
        given = jax.eval_shape(lambda rows=rows: draw(rows, hidden, hidden, intermediate, 1024))
        if not refusal(*given):
            step = jax.jit(partial(layer_products.layer_products, eps=EPS, backend="mosaic"))
            step.trace(*given).lower(lowering_platforms=("cuda",))
            taken += 1
    assert taken >= 2


@interpreted
def test_derivatives_and_vmap_are_those_of_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper", lambda: True)
    rest, x, weights = draw(2, 64, 128, 64, 64)

    def loss(run):
        return lambda *args: sum(y.astype(jnp.float32).sum() for y in run(*args))

    def ours(*args):
        return layer_products.layer_products(*args, eps=EPS)

    def plain(*args):
        return layer_products.reference(*args, EPS)

    assert "mpmd_map" in str(jax.make_jaxpr(ours)(rest, x, weights))
    got, want = (jax.jit(jax.grad(loss(f), (0, 1, 2)))(rest, x, weights) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=2e-2), got, want)
    several = [jnp.stack([y, y + 1]) for y in (rest, x)]
    compare(*(jax.vmap(f, (0, 0, None))(*several, weights) for f in (ours, plain)), 1e-3)


def test_a_reason_is_given_once(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper", lambda: True)
    monkeypatch.setattr(dispatch, "_told", set())
    given = draw(1, 64, 64, 64, 64, jnp.float32)
    with pytest.warns(UserWarning, match="layer's products are left to XLA: expected bfloat16.*float32"):
        got = layer_products.layer_products(*given, eps=EPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_products.layer_products(*given, eps=EPS)
    compare(got, layer_products.reference(*given, EPS), 1e-6)
