"""An evicting layer in codes beside the same layer in full."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kernels.reference import Mask
from kvjax.cache import Evicting, Quantized
from kvjax.cache.evict import turn
from kvjax.cache.evict.coded import CodedLayer, encoded
from kvjax.cache.quantize import rotation
from tests.cache.evict.test_evicting import SPEC, fed, held
from tests.tiny import LLAMA, prompts, tiny


@pytest.mark.parametrize("bits", [8, 3])
def test_tokens_come_back_turned_to_the_precision_of_their_bits(bits):
    x = jax.random.normal(jax.random.key(0), (2, 50, 64))
    codes = encoded(x, bits)
    assert codes.codes.shape == (2, 50, 8 * bits) and codes.codes.dtype == jnp.uint8
    back = codes.cut(0, 50) @ rotation(64).T
    error = float(jnp.square(back - x).mean())
    assert error < {8: 1e-3, 3: 4e-2}[bits]
    np.testing.assert_array_equal(codes.cut(7, 3), codes.cut(0, 50)[:, 7:10])


@pytest.mark.parametrize("score", ["random", "h2o"])
def test_it_holds_what_it_would_in_full(score):
    """The same tokens at all times if the score does not look at codes; the same outputs but for their error."""
    settings = {"budget": ((14, 9),), "score": score, "sinks": 2, "recent": 3}
    wanted, kept, codes = [], [], []
    full = fed(Evicting(**settings).layer(SPEC), 7, Mask(0.3), lambda layer, _: wanted.append(held(layer)))

    def visit(layer, at):
        kept.append(held(layer))
        codes.append([np.asarray(x) for x in (layer.positions[:, 5:], layer.k_codes.codes)])
        for row, mine in enumerate(kept[-1]):
            n = at[row // 2]
            assert len(mine) == min(n, (14, 9)[row % 2])
            assert mine >= {p for p in range(n) if p < 2 or p >= n - 3}

    layer = Evicting(**settings, inner=Quantized(8)).layer(SPEC)
    assert isinstance(layer, CodedLayer)
    out, lse, layer, (_, k, v, _, _) = fed(layer, 7, Mask(0.3), visit)
    if score == "random":
        assert kept == wanted
        np.testing.assert_allclose(out, full[0], atol=5e-2)
        np.testing.assert_allclose(lse, full[1], atol=5e-2)
    plain = layer._decoded()
    for row, slots in enumerate(np.asarray(layer.positions)):
        filled, front = slots >= 0, np.arange(14) < 5
        for ours, theirs in ((plain.k, k), (plain.v, v)):
            ours, theirs = np.asarray(ours)[row], np.asarray(theirs)[row]
            np.testing.assert_array_equal(ours[front], theirs[slots[front]])
            np.testing.assert_allclose(ours[filled], theirs[slots[filled]], atol=0.1)
    for (before, old), (after, new) in zip(codes, codes[1:], strict=False):  # a token is coded once
        same = (before == after) & (before >= 0)
        np.testing.assert_array_equal(old[same], new[same])


def test_blocks_of_slots_are_merged(monkeypatch):
    """Attention and its sums over slots, a block of 4 at a time, the last reaching back."""
    layer = Evicting(16, "h2o", sinks=2, recent=3, inner=8).layer(SPEC)
    whole = fed(layer, 8, Mask(0.3))
    monkeypatch.setattr("kvjax.cache.evict.coded.BLOCK", 4)
    parts = fed(layer, 8, Mask(0.3))
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-5)
    np.testing.assert_array_equal(parts[2].positions, whole[2].positions)
    np.testing.assert_allclose(parts[2].worth, whole[2].worth, atol=1e-5)


def test_codes_are_written_in_place_in_fewer_bytes():
    model = kvjax.Transformer(replace(LLAMA, head_dim=64))
    params = kvjax.init_params(model, jax.random.key(0))
    cache = Evicting(16000, "h2o", inner=Quantized(4)).init(model, batch=1, capacity=32768)
    in_full = Evicting(16000, "h2o").shapes(model, batch=1, capacity=32768)
    assert kvjax.nbytes(cache) < kvjax.nbytes(in_full) / 6
    memory = kvjax.decode_step.lower(model, params, cache, jnp.zeros(1, jnp.int32)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= kvjax.nbytes(cache)
    assert memory.temp_size_in_bytes < cache.layers[0].k_codes.codes.nbytes


def test_a_small_budget_decodes():
    model, params = tiny()
    cache = Evicting(12, "peak", sinks=2, recent=4, inner=4).init(model, batch=2, capacity=64)
    out = kvjax.generate(model, params, cache, prompts(0, 2, 20), max_new=20)
    assert out.tokens.shape == (2, 20) and jnp.isfinite(out.logprobs).all()
    assert out.cache.length.tolist() == [39, 39]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inner": Quantized(4, keys="token")}, "`inner` must be `Quantized` with `rotated` keys and values"),
        ({"inner": Quantized((4, 2))}, "`inner` must have the same bits in all layers"),
        ({"inner": 7}, "`bits` must be among"),
        ({"inner": 4, "temperature": 1.0}, "`temperature` must be None with an `inner`"),
    ],
)
def test_impossible_inners_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Evicting(40, **settings)


def test_sinks_and_recent_are_fixed():
    model, _ = tiny()
    cache = Evicting(20, sinks=2, recent=4, inner=8).init(model, batch=1, capacity=64)
    assert turn(cache, budget=12).layers[0].knobs.budget.tolist() == [12, 12]
    with pytest.raises(ValueError, match="recent are fixed in a cache with an `inner`"):
        turn(cache, recent=3)
