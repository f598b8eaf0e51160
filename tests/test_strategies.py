"""Every cache with every decoder gives the tokens of its own plain oracle."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from tests.strategies import CACHES, CHUNKED, DECODERS, LOSSLESS, UNSUPPORTED, crossed, table
from tests.tiny import prompts, tiny

NEW = 9
LENGTHS = [13, 4, 1]

PAIRS = [
    pair
    for decoder in DECODERS
    for pair in crossed((cache for cache in CACHES if (cache, decoder) not in UNSUPPORTED), decoder)
]


def oracle(cache: str) -> np.ndarray:
    """Greedy tokens without a cache, or, for a cache that forgets, of one row alone through it."""
    model, params = tiny()
    tokens = np.asarray(prompts(5, 3, 13))
    made = []
    for row, length in enumerate(LENGTHS):
        held = tokens[row, :length].tolist()
        state = CACHES[cache].init(model, batch=1, capacity=64)
        logits = jnp.zeros((1, 1))
        for token in [] if cache in CHUNKED else held:
            logits, state = kvjax.decode_step(model, params, state, jnp.array([token]))
        if cache in CHUNKED:
            logits, state = kvjax.prefill(model, params, state, [held])
        for _ in range(NEW):
            if cache in LOSSLESS:
                padded = jnp.array([held + [0] * (32 - len(held))])
                logits = kvjax.forward(model, params, padded)[:, len(held) - 1]
            held.append(int(logits.argmax()))
            if cache not in LOSSLESS:
                logits, state = kvjax.decode_step(model, params, state, jnp.array([held[-1]]))
        made.append(held[length:])
    return np.array(made)


@pytest.fixture(scope="module")
def oracles():
    return {cache: oracle(cache) for cache in CACHES}


@pytest.mark.parametrize(("cache", "decoder"), PAIRS)
def test_every_pair_decodes(cache, decoder, oracles):
    model, params = tiny()
    state = CACHES[cache].init(model, batch=3, capacity=64)
    made = DECODERS[decoder](model, params, state, prompts(5, 3, 13), jnp.array(LENGTHS), NEW)
    np.testing.assert_array_equal(made, oracles[cache])


def test_forgetting_changes_what_is_decoded(oracles):
    """Or the oracle of a forgetting cache would prove nothing."""
    for cache in set(CACHES) - LOSSLESS:
        assert (oracles[cache] != oracles["Dense()"]).any()


def test_every_refused_pair_is_refused_with_its_sentence():
    model, params = tiny()
    for (cache, decoder), why in UNSUPPORTED.items():
        state = CACHES[cache].init(model, batch=3, capacity=64)
        with pytest.raises(ValueError, match=why):
            DECODERS[decoder](model, params, state, prompts(5, 3, 13), jnp.array(LENGTHS), NEW)


def test_readme_shows_this_table():
    assert table() in Path(__file__).parents[1].joinpath("README.md").read_text()


def test_jax_is_strict_here():
    assert jax.config.jax_numpy_rank_promotion == "raise"
