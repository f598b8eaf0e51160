"""Every cache with every decoder gives the tokens of its own plain oracle."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.draft import Branches, Chain, DraftModel, EarlyExit, Heads, PromptLookup, widths
from tests.strategies import CACHES, CHUNKED, CORE, DECODERS, LOSSLESS, SOME, UNSUPPORTED, crossed, table
from tests.tiny import prompts, tiny

NEW = 9
KEY = jax.random.key(3)
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


SAMPLERS = [
    kvjax.Sampling(temperature=0.9, top_k=20, top_p=0.9),
    kvjax.Sampling(repetition=1.4, presence=0.3, frequency=0.2, bias={7: 1.0}, banned=[5]),
    kvjax.Sampling(temperature=1.2, min_p=0.02, seed=4, forced=[9, 10]),
]
DRAFTS = {
    "PromptLookup": lambda model, params: PromptLookup(k=3, shortest=1),
    "DraftModel": lambda model, params: DraftModel(model, params, k=2),
    "Heads": lambda model, params: Heads.of(model, params, trained=Heads.fresh(model, params, SOME, KEY), k=2),
    "EarlyExit": lambda model, params: EarlyExit.of(
        model, params, layers=1, exit=EarlyExit.fresh(model, params, SOME), k=2
    ),
    "Chain": lambda model, params: Chain((PromptLookup(k=3, shortest=2), DraftModel(model, params, k=1))),
    "Branches": lambda model, params: Branches((DraftModel(model, params, k=2), PromptLookup(k=2, shortest=1))),
}


@pytest.mark.parametrize(
    ("cache", "draft"),
    [
        pytest.param(cache, draft, marks=() if (i - j) % len(DRAFTS) == 0 else pytest.mark.slow)
        for i, cache in enumerate(sorted(CACHES, key=lambda name: name not in CORE))
        for j, draft in enumerate(DRAFTS)
    ],
)
def test_every_draft_draws_what_generate_draws(cache, draft):
    """Each cache with each draft, and in one batch a row of every kind of sampling."""
    model, params = tiny()
    settings = {"max_new": 14, "sampling": SAMPLERS, "key": KEY}
    made = [CACHES[cache].init(model, batch=3, capacity=64) for _ in range(2)]
    one = prompts(5, 3, 1) if cache in CHUNKED else prompts(5, 3, 13)  # the prompt itself in one way
    lengths = None if cache in CHUNKED else jnp.array(LENGTHS)
    free = kvjax.generate(model, params, made[0], one, lengths, **settings)
    guesses = DRAFTS[draft](model, params)
    costs = [1.0] * len(widths(guesses))
    out = kvjax.speculate(model, params, made[1], one, lengths, draft=guesses, costs=costs, **settings)
    for name in ("tokens", "lengths", "reason"):
        np.testing.assert_array_equal(getattr(out, name), getattr(free, name))
    assert out.speculated.proposed.sum() > 0


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
