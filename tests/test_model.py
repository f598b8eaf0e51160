"""Rule 7 of the design: cached equals recomputed, for every family, padding and split of the prompt."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax import ModelConfig, Precision, Rope, Transformer
from kvjax.cache import Dense, Ring
from kvjax.rope import frequencies
from tests.tiny import FAMILIES, LLAMA, prompts, tiny

WIDTH = 32
ATOL = {"float32": 3e-4, "bfloat16": 0.6}
"""By the dtype of the computation; the logits have a standard deviation of about 10."""


@st.composite
def splits(draw):
    """A family, a cache, and for each of a few chunks how many tokens every row takes in."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    strategy = draw(st.sampled_from([Dense(), Ring()]))
    batch = draw(st.sampled_from([1, 3]))
    parts = [[draw(st.integers(1, 9)) for _ in range(batch)] for _ in range(draw(st.integers(1, 3)))]
    return family, strategy, parts, draw(st.integers(0, 2**16))


@settings(deadline=None, max_examples=30)
@given(splits())
def test_cached_equals_recomputed(case):
    family, strategy, parts, seed = case
    model, params = tiny(family)
    batch = len(parts[0])
    tokens = np.asarray(prompts(seed, batch, WIDTH))
    full = kvjax.forward(model, params, tokens)
    cache = strategy.init(model, batch=batch, capacity=WIDTH)
    at = np.zeros(batch, int)

    def agrees(logits):
        np.testing.assert_allclose(logits, full[np.arange(batch), at - 1], atol=ATOL["float32"])

    for part in parts:
        rows = [tokens[row, at[row] : at[row] + n].tolist() for row, n in enumerate(part)]
        logits, cache = kvjax.prefill(model, params, cache, rows, buckets=(4, 16))
        at += part
        agrees(logits)
    for _ in range(3):
        logits, cache = kvjax.decode_step(model, params, cache, jnp.asarray(tokens[np.arange(batch), at]))
        at += 1
        agrees(logits)
    np.testing.assert_array_equal(cache.length, at)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_long_prompt_goes_in_chunks_and_blocks(dtype):
    """1,100 tokens: three chunks of the largest bucket, and attention in blocks of slots."""
    model, params = tiny("mistral", Precision(compute=dtype, cache=dtype))
    model = Transformer(replace(model.config, windows=(700, None), max_positions=2048), model.precision)
    tokens = np.asarray(prompts(1, 2, 1100))
    lengths = np.array([1100, 513])
    full = np.asarray(kvjax.forward(model, params, tokens), np.float32)
    for strategy in (Dense(), Ring()):
        cache = strategy.init(model, batch=2, capacity=1200)
        logits, cache = kvjax.prefill(model, params, cache, tokens, lengths)
        np.testing.assert_allclose(logits, full[[0, 1], lengths - 1], atol=ATOL[dtype])


def test_precision_is_a_policy():
    precision = Precision(params="bfloat16", compute="bfloat16", cache="float16", logits="float32")
    model, _ = tiny("llama", precision)
    params = kvjax.init_params(model, jax.random.key(0))
    assert params["layers"][0]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert params["norm"]["scale"].dtype == jnp.float32
    cache = Dense().init(model, batch=1, capacity=8)
    assert cache.layers[0].k.dtype == jnp.float16
    logits, _ = kvjax.prefill(model, params, cache, [[1, 2, 3]])
    assert logits.dtype == jnp.float32


def test_layers_are_a_tuple_and_shapes_are_known_before():
    model, params = tiny()
    assert isinstance(params["layers"], tuple)
    shapes = kvjax.param_shapes(model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert kvjax.nbytes(shapes) == kvjax.nbytes(params)


def test_padding_changes_nothing():
    model, params = tiny("gemma2")
    tokens = prompts(2, 2, 12)
    full = kvjax.forward(model, params, tokens, jnp.array([12, 5]))
    short = kvjax.forward(model, params, tokens[1:, :5])
    np.testing.assert_allclose(full[1, :5], short[0], atol=ATOL["float32"])


def test_an_unknown_id_poisons_its_row_only():
    model, params = tiny()
    cache = Dense().init(model, batch=2, capacity=8)
    logits, _ = kvjax.decode_step(model, params, cache, jnp.array([61, 3]))
    assert jnp.isnan(logits[0]).all()
    assert jnp.isfinite(logits[1]).all()


def test_rope_keeps_short_wavelengths_and_stretches_long_ones():
    base, _ = frequencies(Rope(), 64)
    for scaling in ("llama3", "yarn"):
        rope = Rope(scaling=scaling, factor=4.0, original_positions=2048)
        scaled, _ = frequencies(rope, 64)
        np.testing.assert_allclose(scaled[0], base[0])
        np.testing.assert_allclose(scaled[-1], base[-1] / 4)
        assert (np.diff(scaled) < 0).all()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("kv_heads", 3, "multiple of `kv_heads`"), ("vocab", 0, "`vocab`"), ("windows", (), "`windows`")],
)
def test_impossible_configs_are_refused(field, value, words):
    with pytest.raises(ValueError, match=words):
        replace(LLAMA, **{field: value})


def test_unknown_dtypes_are_refused():
    with pytest.raises(ValueError, match="`cache`"):
        Precision(cache="int8")


def test_the_config_is_hashable_and_compares_by_value():
    assert ModelConfig(**vars(LLAMA)) == LLAMA
    assert hash(Transformer(LLAMA)) == hash(Transformer(ModelConfig(**vars(LLAMA))))
