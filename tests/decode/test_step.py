"""prefill and decode_step: chunks, compiles, what stays in place, and refusals."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Evicting, Quantized, Ring
from kvjax.cache.dense import DenseLayer
from kvjax.decode import BUCKETS, begin, rules, state
from tests.compiles import Compiles
from tests.tiny import LLAMA, prompts, tiny


def test_a_second_turn_prefills_only_what_is_new():
    model, params = tiny()
    tokens = np.asarray(prompts(0, 2, 30))
    cache = Dense().init(model, batch=2, capacity=64)
    _, cache = kvjax.prefill(model, params, cache, tokens[:, :18])
    logits, cache = kvjax.prefill(model, params, cache, tokens[:, 18:])
    full = kvjax.forward(model, params, tokens)
    np.testing.assert_allclose(logits, full[:, -1], atol=3e-4)
    assert cache.length.tolist() == [30, 30]


def test_lists_of_different_lengths_are_padded():
    model, params = tiny()
    rows = [[1, 2, 3], [4], [5, 6]]
    logits, cache = kvjax.prefill(model, params, Dense().init(model, batch=3, capacity=8), rows)
    assert cache.length.tolist() == [3, 1, 2]
    for row, ids in enumerate(rows):
        alone = kvjax.forward(model, params, jnp.array([ids]))[0, -1]
        np.testing.assert_allclose(logits[row], alone, atol=3e-4)


def test_a_thousand_lengths_cost_a_compile_a_bucket():
    model, params = tiny("qwen2")
    with Compiles() as compiles:
        for length in [*range(1, 1000, 9), 512, 513, 1000]:
            cache = Dense().init(model, batch=1, capacity=1024)
            kvjax.prefill(model, params, cache, np.ones((1, length), np.int32))
    assert compiles.of("_chunk") == len(BUCKETS)


def test_every_length_finds_its_bucket():
    """What the compile count above samples, for all lengths, by shapes alone."""
    model, params = tiny()
    cache = Dense().shapes(model, batch=1, capacity=1024)
    for length in range(1, 1001, 37):
        logits, after = jax.eval_shape(
            lambda c, n=length: kvjax.prefill(model, params, c, np.ones((1, n), np.int32)), cache
        )
        assert logits.shape == (1, 61)
        assert after.layers[0].k.shape == cache.layers[0].k.shape


def test_decode_step_traces_once():
    model, params = tiny("qwen2")
    cache = Dense().init(model, batch=2, capacity=16)
    _, cache = kvjax.prefill(model, params, cache, prompts(0, 2, 3))
    with Compiles() as compiles:
        for token in (jnp.array([3, 4]), np.array([5, 6], np.int32)):
            logits, cache = kvjax.decode_step(model, params, cache, token)
            _, cache = kvjax.decode_step(model, params, cache, logits.argmax(-1).astype(jnp.int32))
    assert compiles.of("decode_step") == 1


def compiled(name: str, strategy, batch: int, head_dim: int):
    """A program over a cache that dwarfs the model, and that cache."""
    model = kvjax.Transformer(replace(LLAMA, head_dim=head_dim))
    params = kvjax.init_params(model, jax.random.key(0))
    cache = strategy.init(model, batch=batch, capacity=16384)
    token = jnp.zeros(batch, jnp.int32)
    if name == "decode_step":
        return kvjax.decode_step.lower(model, params, cache, token).compile(), cache
    settings = rules(kvjax.Sampling(), batch=batch, vocab=61, max_new=8)
    under_way = begin(cache, token, jnp.zeros((batch, 61), bool), 8)
    return state._advance.lower(model, params, under_way, settings, jnp.int32(8)).compile(), cache


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("strategy", "head_dim"),
    [
        (Dense(), 8),
        (Ring(window=8000, sinks=4), 8),
        (Evicting(8000, "key_diff"), 8),
        (Evicting(8000, "h2o"), 64),  # where keys are larger than the logits that it needs twice
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["decode_step", "generate"])
def test_the_cache_is_written_in_place(name, strategy, head_dim, batch):
    """Rule 5: donated memory covers the cache, no temporary is as large as one buffer of one layer, no copy."""
    program, cache = compiled(name, strategy, batch, head_dim)
    buffer = cache.layers[0].k
    memory = program.memory_analysis()
    lengths = sum(layer.length.nbytes for layer in cache.layers if isinstance(layer, DenseLayer))
    assert memory.alias_size_in_bytes >= kvjax.nbytes(cache) - lengths  # these are overwritten unread
    assert memory.temp_size_in_bytes < buffer.nbytes
    shape = ",".join(map(str, buffer.shape))
    assert f"f32[{shape}]" in program.as_text()
    assert not re.search(rf"= f32\[{shape}\]\S* copy\(", program.as_text())


@pytest.mark.parametrize("batch", [1, 3])
def test_codes_stay_in_place_in_the_loop(batch):
    """Neither a copy of them nor anything of the size of what they stand for."""
    program, cache = compiled("generate", Quantized(4), batch, 64)
    memory, text, layer = program.memory_analysis(), program.as_text(), cache.layers[0]
    assert memory.alias_size_in_bytes >= kvjax.nbytes(cache) - cache.length.nbytes  # one is overwritten unread
    assert memory.temp_size_in_bytes < layer.k_codes.nbytes
    for codes in (layer.k_codes, layer.v_codes):
        shape = ",".join(map(str, codes.shape))
        assert f"u8[{shape}]" in text
        assert not re.search(rf"= u8\[{shape}\]\S* copy\(", text)


@pytest.mark.parametrize(
    ("tokens", "lengths", "words"),
    [
        ([[1] * 9], None, "need 9 slots a row.*capacity is 8"),
        ([[]], None, "empty prompt"),
        ([[61]], None, r"\[0, 61\), got \[61\]"),
        ([[-1, 2]], None, r"got \[-1\]"),
        ([[1, 2]], [0], r"`lengths` must be in \[1, 2\].*got \[0\]"),
        ([[1, 2]], [3], r"`lengths` must be in \[1, 2\].*got \[3\]"),
        ([[1, 2]], [1, 1], r"`lengths` must be \[1\]"),
        ([[1], [2]], None, "holds 1 rows, but the tokens have 2"),
        (np.ones((1, 2), np.float32), None, "integers"),
        (np.ones(3, np.int32), None, r"\[batch, width\]"),
        (np.array([[2**32 + 5]]), None, r"\[0, 61\), got \[4294967301\]"),
        ([[2**40]], None, r"\[0, 61\), got \[1099511627776\]"),
        ([[1.7, 2.2]], None, "lists of ids, one a row"),
        ([1, 2], None, "lists of ids, one a row"),
        ("ab", None, "lists of ids, one a row"),
        (None, None, "lists of ids, one a row"),
        ([[]], None, "empty prompt in row 0"),
        ([[1, 2]], [1.5], "integers, one a row"),
        ([[1, 2]], np.array([2**32 + 1]), r"`lengths` must be in \[1, 2\]"),
    ],
)
def test_bad_prompts_are_refused_by_name(tokens, lengths, words, unchecked):
    model, params = tiny()
    cache = Dense().init(model, batch=1, capacity=8)
    for call in (kvjax.prefill, lambda *args: kvjax.generate(*args, max_new=1)):
        with pytest.raises(ValueError, match=words):
            call(model, params, cache, tokens, lengths)


def test_ragged_rows_keep_their_own_lengths(unchecked):
    model, params = tiny()
    cache = Dense().init(model, batch=2, capacity=8)
    with pytest.raises(ValueError, match=r"`lengths` must not exceed the rows of `tokens`, which have \[3, 1\] ids"):
        kvjax.prefill(model, params, cache, [[1, 2, 3], [1]], [3, 3])


@pytest.mark.parametrize("token", [-1, 61])
def test_an_id_outside_the_vocabulary_gives_nan_in_its_row(token, unchecked):
    model, params = tiny()
    cache = Dense().init(model, batch=2, capacity=8)
    logits, _ = kvjax.decode_step(model, params, cache, jnp.array([token, 3]))
    assert jnp.isnan(logits[0]).all() and jnp.isfinite(logits[1]).all()
    with pytest.raises(ValueError, match=rf"forward: `tokens` must be ids in \[0, 61\), got \[{token}\]"):
        kvjax.forward(model, params, jnp.array([[token]]))


def test_other_wrong_arguments_are_named(unchecked):
    model, params = tiny("gpt2")
    with pytest.raises(ValueError, match="forward: `tokens` must be at most 96 wide.*got 97"):
        kvjax.forward(model, params, np.ones((1, 97), np.int32))
    with pytest.raises(ValueError, match="prefill: `cache` must be what a strategy's `init` makes, got Dense"):
        kvjax.prefill(model, params, Dense(), [[1]])
    cache = Dense().init(model, batch=1, capacity=8)
    for buckets in ((), (16, 8), (0, 8)):
        with pytest.raises(ValueError, match="`buckets` must be widths of at least 1, ascending"):
            kvjax.prefill(model, params, cache, [[1]], buckets=buckets)
    with pytest.raises(ValueError, match=r"decode_step: `token` must be an array \[batch\] of integers.*float32"):
        kvjax.decode_step(model, params, cache, jnp.ones(1))
    with pytest.raises(ValueError, match="Dense: `dtype` must be a floating-point type, got 'int8'"):
        Dense("int8")
    with pytest.raises(ValueError, match="`capacity` must be at least 1, a whole number, got 3.5"):
        Dense().init(model, batch=1, capacity=3.5)
    with pytest.raises(ValueError, match="`max_new` must be at least 1, a whole number, got 2.5"):
        kvjax.generate(model, params, cache, [[1]], max_new=2.5)


def test_padding_is_not_checked_as_ids():
    model, params = tiny()
    cache = Dense().init(model, batch=1, capacity=8)
    kvjax.prefill(model, params, cache, np.array([[1, -1]]), [1])


def test_what_is_held_counts_against_the_capacity():
    model, params = tiny()
    _, cache = kvjax.prefill(model, params, Dense().init(model, batch=1, capacity=8), [[1] * 6])
    with pytest.raises(ValueError, match="need 9 slots"):
        kvjax.prefill(model, params, cache, [[1] * 3])
    kvjax.prefill(model, params, cache, [[1] * 2])


def test_a_token_needs_one_id_a_row(unchecked):
    model, params = tiny()
    cache = Dense().init(model, batch=1, capacity=8)
    with pytest.raises(ValueError, match=r"\[batch\].*shape \(1, 1\)"):
        kvjax.decode_step(model, params, cache, jnp.ones((1, 1), jnp.int32))
