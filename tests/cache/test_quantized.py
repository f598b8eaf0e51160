"""A quantised cache against an oracle that packs each row's groups by itself; its sizes, and what stays in place."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kernels.reference import Mask, attend
from kvjax.cache import Dense, LayerSpec, Quantized
from kvjax.cache.dense import DenseLayer
from kvjax.cache.quantize import Codec
from tests.cache.test_quantize import coded
from tests.kernels.test_reference import inputs
from tests.tiny import FAMILIES, prompts, tiny

TOTAL, CHUNK, GROUP, RESIDUAL = 60, 21, 8, 5
SPEC = LayerSpec(2, TOTAL, 2, 8, None, "float32")
KIVI = {"keys": "channel", "values": "token", "group": 64}


def seen_by_the_oracle(x, codec: Codec, sinks: int, packed: int):
    """`[rows, slots, head_dim]` with `packed` tokens after the sinks as a group after the other makes them."""
    full = x.copy()
    for first in range(sinks, sinks + packed, GROUP):
        cut, centre = slice(first, first + GROUP), 0.0
        if codec.span:
            start = first - (first - sinks) % codec.span
            mean = jnp.asarray(full[:, start : start + min(codec.span, RESIDUAL + GROUP)]).mean(1, keepdims=True)
            centre = codec.turn_back(codec.turn(mean).astype(codec.dtype).astype(jnp.float32))
        x[:, cut] = coded(codec, jnp.asarray(x[:, cut] - centre)) + centre
    return x


def feed(layer, qkv, plan, mask):
    """Give each row its own numbers of tokens, and yield where they lie and what came out."""
    step = jax.jit(lambda layer, *new: layer.attend(*new, mask))
    at = np.zeros(2, int)
    for width, lengths in plan:
        lengths = np.minimum(lengths, TOTAL - at)
        index = np.minimum(at[:, None] + np.arange(width), TOTAL - 1)
        new = [np.take_along_axis(np.asarray(x), index[..., None, None], 1) for x in qkv]
        valid = np.arange(width) < lengths[:, None]
        out, lse, layer = step(layer, *map(jnp.asarray, new), jnp.asarray(at[:, None] + np.arange(width)), valid)
        yield at, lengths, out, lse, layer
        at = at + lengths


def qkv_of(seed: int):
    q, k, v, positions, slots = inputs(seed, batch=2, width=TOTAL, heads=4, slots=TOTAL)
    return q, k, v, positions, slots, [x.reshape(2, 2, TOTAL, 8).swapaxes(1, 2) for x in (k, v)]


@pytest.mark.parametrize(
    ("settings", "mask"),
    [
        ({"bits": 8, "value_bits": 3, "sinks": 3, **KIVI}, Mask(0.3)),
        ({"bits": 5, "value_bits": 6, "sinks": 0, "span": 16}, Mask(0.3, window=23, softcap=5.0)),
        ({"bits": 6, "value_bits": 2, "sinks": 1, "values": "channel", "span": 0}, Mask(0.3, window=11, sinks=2)),
    ],
    ids=["KIVI", "rotated", "values by channel"],
)
def test_rows_see_their_own_groups_coded_and_the_rest_in_full(settings, mask, monkeypatch):
    """Random chunks, empty ones and single tokens; what they pack, only later ones see so; the last block laps."""
    monkeypatch.setattr("kvjax.cache.quantized_layer.BLOCK", 2 * GROUP)
    strategy = Quantized(**settings | {"group": GROUP, "residual": RESIDUAL})
    q, k, v, positions, slots, by_head = qkv_of(1)
    rng = np.random.default_rng(3)
    plan = [(width, rng.integers(0, width + 1, 2)) for width in rng.choice([1, CHUNK], 90, p=[0.8, 0.2])]
    packed, sinks = np.zeros(2, int), strategy.sinks
    for at, lengths, out, lse, layer in feed(strategy.layer(SPEC), (q, *by_head), plan, mask):
        as_seen = [
            np.stack([seen_by_the_oracle(np.array(x[2 * r : 2 * r + 2]), codec, sinks, packed[r]) for r in range(2)])
            for x, codec in ((k, layer.k_codec), (v, layer.v_codec))
        ]
        wanted = attend(q, *(jnp.asarray(x.reshape(4, TOTAL, 8)) for x in as_seen), positions, slots, mask)
        for row, n in enumerate(lengths):
            cut = slice(at[row], at[row] + n)
            np.testing.assert_allclose(out[row, :n], wanted[0][row, cut], atol=3e-6)
            np.testing.assert_allclose(lse[row, :n], wanted[1][row, cut], atol=3e-6)
        packed = np.maximum(at + lengths - sinks - RESIDUAL, 0) // GROUP * GROUP
        np.testing.assert_array_equal(layer.packed, packed)
    assert (at + lengths == TOTAL).all()


@pytest.mark.parametrize("settings", [KIVI | {"group": 8}, {}], ids=["KIVI", "rotated"])
def test_eight_bits_stay_near_dense(settings):
    """Rule 7: logits within 1% of their spread on average and 10% anywhere, over several groups."""
    model, params = tiny()
    tokens, both = prompts(0, 2, 50), []
    for strategy in (Dense(), Quantized(8, residual=0, **settings)):
        _, cache = kvjax.prefill(model, params, strategy.init(model, batch=2, capacity=90), tokens, [50, 31])
        rows = []
        for i in range(20):
            logits, cache = kvjax.decode_step(model, params, cache, tokens[:, i])
            rows.append(logits)
        both.append(np.stack(rows))
    assert 0 < np.abs(both[1] - both[0]).max() < 0.1 * both[0].std()
    assert np.abs(both[1] - both[0]).mean() < 0.01 * both[0].std()


def test_with_everything_in_the_residual_it_is_dense():
    """Rule 7, at full budget; where nothing could be packed, it is that very layer."""
    model, params = tiny()
    both = []
    for strategy in (Dense(), Quantized(2, residual=30, sinks=1)):
        cache = strategy.init(model, batch=2, capacity=40)
        _, cache = kvjax.prefill(model, params, cache, prompts(0, 2, 30), [30, 9])
        both.append(kvjax.decode_step(model, params, cache, jnp.array([1, 2]))[0])
    np.testing.assert_allclose(*both, atol=2e-5)
    assert isinstance(Quantized(2, residual=31, sinks=1).init(model, batch=1, capacity=40).layers[0], DenseLayer)


def test_a_row_may_be_set_back_by_the_residual():
    """What speculation does: rejected tokens leave no trace, even when taking them in packed a group."""
    q, *_, by_head = qkv_of(2)
    other = [x.at[:, 34:].add(1.0) for x in (q, *by_head)]
    layer = Quantized(4, group=GROUP, residual=RESIDUAL, sinks=2).layer(SPEC)
    step = jax.jit(lambda layer, *new: layer.attend(*new, Mask(0.3)))

    def one(layer, source, i, width=1):
        at = jnp.broadcast_to(i + jnp.arange(width), (2, width))
        return step(layer, *(x[:, i : i + width] for x in source), at, at >= 0)

    _, _, layer = one(layer, (q, *by_head), 0, 34)
    strayed = layer
    for i in range(34, 34 + RESIDUAL):
        _, _, strayed = one(strayed, other, i)
    assert (strayed.packed > layer.packed).all()
    for i in range(34, 38):
        straight = one(layer, (q, *by_head), i)
        after = one(strayed, (q, *by_head), i)
        layer, strayed = straight[2], after[2]
        if i == 37:
            np.testing.assert_allclose(after[0], straight[0], atol=0.2)  # a group sooner packed, no more


def test_bytes_by_hand():
    """3 and 6 bits, a 16-bit scale and offset for each channel of a group of keys, a byte for each token of values."""
    model, _ = tiny()  # 2 layers, 2 K/V heads of 8
    cache = Quantized(3, 6, 16, 9, sinks=2, keys="channel", dtype="bfloat16").shapes(model, batch=3, capacity=90)
    groups, full = (90 - 9 - 2) // 16, 16 + 9 + 2
    keys = groups * (16 * 8 * 3 // 8 + 8 * 2 * 2)
    values = groups * (16 * 8 * 6 // 8 + 16)
    assert kvjax.nbytes(cache) == 2 * 3 * (2 * (keys + values + 2 * full * 8 * 2) + 8) + 3 * 4


def test_bytes_of_centres_by_hand():
    """A byte for each token's scale, and 16 bits a channel for the centre of each 24 tokens."""
    model, _ = tiny()
    cache = Quantized(4, residual=9, sinks=2, span=24).shapes(model, batch=1, capacity=90)
    assert cache.layers[0].k_centres.shape == (2, 8, 3)  # 9 groups of 8
    bare = Quantized(4, residual=9, sinks=2, span=0).shapes(model, batch=1, capacity=90)
    assert kvjax.nbytes(cache) - kvjax.nbytes(bare) == 2 * 2 * 8 * 3 * 2
    assert Quantized(4, group=24).layer(replace(SPEC, capacity=200)).k_codec.span == 72


def test_what_keys_share_costs_no_precision():
    """A hundred times the spread of a key's channels in each of them: with a centre, as exact as without both."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, TOTAL, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    at, errors = jnp.broadcast_to(jnp.arange(TOTAL), (2, TOTAL)), {}
    for shift, span in ((0.0, 0), (100.0, 16), (100.0, 0)):
        outs = []
        for strategy in (Dense(), Quantized(5, 8, residual=RESIDUAL, sinks=0, span=span)):
            layer = strategy.layer(SPEC)
            taken = jax.jit(lambda layer, k: layer.attend(q, k, v, at, at >= 0, Mask(0.3))[2])(layer, k + shift)
            outs.append(jax.jit(lambda layer: layer.look(q[:, -1:], at[:, -1:], Mask(0.3))[0])(taken))
        errors[shift, span] = float(jnp.abs(outs[1] - outs[0]).max())
    assert errors[100.0, 16] < 2 * errors[0.0, 0] < errors[100.0, 0] / 10


def test_bits_may_differ_by_layer():
    model, _ = tiny()
    cache = Quantized((8, 2), (4, 3), group=8, residual=8).init(model, batch=1, capacity=64)
    assert [(x.k_codec.bits, x.v_codec.bits) for x in cache.layers] == [(8, 4), (2, 3)]


@pytest.mark.parametrize("settings", [{"bits": 8, "value_bits": 4, **KIVI}, {"bits": 3}], ids=["KIVI", "rotated"])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_dense_copy_and_in_place(settings, batch):
    """Temporaries are far smaller than one layer's keys would be, no buffer of their size exists, none is copied."""
    model = kvjax.Transformer(replace(FAMILIES["llama"], head_dim=64, windows=(None,)))
    cache = Quantized(**settings).init(model, batch=batch, capacity=16384)
    params = kvjax.init_params(model, jax.random.key(0))
    program = kvjax.decode_step.lower(model, params, cache, jnp.zeros(batch, jnp.int32)).compile()
    memory, text = program.memory_analysis(), program.as_text()
    assert memory.alias_size_in_bytes >= kvjax.nbytes(cache) - cache.length.nbytes  # one is overwritten unread
    dense = 2 * batch * 16384 * 64 * 4
    assert memory.temp_size_in_bytes < dense / 4
    for shape in re.findall(r"= f32\[([\d,]+)\]", text):
        assert np.prod([int(n) for n in shape.split(",")]) * 4 < dense / 8, shape
    for codes in (cache.layers[0].k_codes, cache.layers[0].v_codes):
        shape = ",".join(map(str, codes.shape))
        assert f"u8[{shape}]" in text
        assert not re.search(rf"= u8\[{shape}\]\S* copy\(", text)


def test_gradients_reach_queries_through_codes():
    """Those of attention to what is held: `held` and `tokens` say what that is."""
    q, *_, by_head = qkv_of(4)
    layer, at = Quantized(8, residual=0).layer(SPEC), jnp.broadcast_to(jnp.arange(TOTAL), (2, TOTAL))
    _, _, layer = jax.jit(lambda layer, *new: layer.attend(*new, Mask(0.3)))(layer, q, *by_head, at, at >= 0)
    assert (layer.packed == 56).all()
    k, v = jax.jit(lambda layer: layer.tokens())(layer)
    held = layer.held(jnp.full(2, TOTAL))
    assert sorted(held[0].tolist()) == [*[-1] * (held.shape[1] - TOTAL), *range(TOTAL)]

    def dense(q, at, mask):
        return attend(q, k, v, at, held, mask)

    def looked(q, look):
        return jnp.square(look(q, at[:, -1:], Mask(0.3))[0]).sum()

    got, wanted = (jax.jit(jax.value_and_grad(partial(looked, look=f)))(q[:, -1:]) for f in (layer.look, dense))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, wanted)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 7}, r"`bits` must be among \[2, 3, 4, 5, 6, 8\], .*got 7"),
        ({"bits": (4, 1)}, r"`bits` must be among.*got \(4, 1\)"),
        ({"value_bits": 16}, "`value_bits` must be among.*got 16"),
        ({"bits": ()}, "`bits` must be among"),
        ({"group": 12}, "`group` must be a multiple of 8 tokens, got 12"),
        ({"group": 0}, "`group` must be a multiple of 8 tokens, got 0"),
        ({"bits": 4.0}, r"`bits` must be among.*got 4\.0"),
        ({"bits": [4, 4]}, r"`bits` must be among.*or a tuple, one a layer, got \[4, 4\]"),
        ({"group": 16.0}, r"`group` must be a multiple of 8 tokens, got 16\.0"),
        ({"residual": -1}, "`residual` must be at least 0, a whole number, got -1"),
        ({"residual": 1.5}, r"`residual` must be at least 0, a whole number, got 1\.5"),
        ({"sinks": -2}, "`sinks` must be at least 0, a whole number, got -2"),
        ({"span": 64.0}, r"`span` must be a multiple of `group`, 8, or 0, got 64\.0"),
        ({"span": 20}, "`span` must be a multiple of `group`, 8, or 0, got 20"),
        ({"span": -8}, "`span` must be a multiple of `group`, 8, or 0, got -8"),
        ({"span": 64, "keys": "token"}, "`span` is for keys of the form 'rotated', and these are 'token'"),
        ({"keys": "row"}, "`keys` must be one of .*got 'row'"),
        ({"values": "row"}, "`values` must be one of .*got 'row'"),
        ({"dtype": "int8"}, "`dtype` must be a floating-point type, got 'int8'"),
        ({"scales": "int8"}, "`scales` must be .*got 'int8'"),
    ],
)
def test_impossible_settings_are_refused(settings, words, unchecked):
    with pytest.raises(ValueError, match=words):
        Quantized(**settings)


def test_settings_that_do_not_fit_the_model_are_refused():
    model, _ = tiny()
    with pytest.raises(ValueError, match="`bits` must have one entry for each of 2 layers, got 3"):
        Quantized((4, 4, 4)).init(model, batch=1, capacity=8)
    with pytest.raises(ValueError, match="power of two, got 12"):
        Quantized().layer(replace(SPEC, head_dim=12))
