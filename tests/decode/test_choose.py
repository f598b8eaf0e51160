"""Choosing a token, against NumPy oracles that do sort."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax import Sampling
from kvjax.cache import Dense
from kvjax.decode.choose import choose, keep, penalise
from kvjax.decode.sampling import rules
from tests.tiny import prompts, tiny

VOCAB = 23
KEY = jax.random.key(4)


def table(sampling, batch=1):
    return rules(sampling, batch=batch, vocab=VOCAB, max_new=8, key=KEY)


def sorted_keep(logits, top_k, top_p, min_p):
    """The usual definition: by rank, then by the mass before each token, then by the ratio to the best."""
    alive = np.ones(VOCAB, bool)
    if top_k:
        alive &= logits >= np.sort(logits)[::-1][min(top_k, VOCAB) - 1]
    mass = np.where(alive, np.exp(logits - logits.max()), 0.0)
    mass /= mass.sum()
    if top_p < 1:
        before = np.array([mass[logits > x].sum() for x in logits])
        alive &= before < top_p
    return alive & (logits >= logits.max() + np.log(min_p) if min_p else True)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**31 - 1),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.sampled_from([0.01, 0.3, 0.77, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    ties=st.booleans(),
)
def test_filters_keep_what_a_sort_would(seed, top_k, top_p, min_p, ties):
    logits = np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)
    if ties:
        logits = np.round(logits)
    kept = jax.jit(keep)(jnp.asarray(logits)[None], table(Sampling(top_k=top_k, top_p=top_p, min_p=min_p)))
    np.testing.assert_array_equal(np.isfinite(kept[0]), sorted_keep(logits, top_k, top_p, min_p))


def test_filters_are_a_setting_a_row():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32))
    kept = keep(logits, table([Sampling(top_k=2), Sampling(), Sampling(top_k=5)], 3))
    assert jnp.isfinite(kept).sum(1).tolist() == [2, VOCAB, 5]


def test_penalties_by_hand():
    logits = jnp.array([[2.0, -2.0, 1.0, 0.5] + [0.0] * (VOCAB - 4)])
    seen = jnp.zeros((1, VOCAB), bool).at[0, :3].set(True)
    counts = jnp.zeros((1, VOCAB), jnp.int32).at[0, 2].set(3)
    setting = Sampling(repetition=2.0, presence=0.25, frequency=0.5, bias={3: 1.5}, banned=[5])
    got = penalise(logits, table(setting), seen, counts)[0]
    np.testing.assert_allclose(got[:5], [1.0, -4.0, 0.5 - 0.25 - 1.5, 2.0, 0.0])
    assert jnp.isneginf(got[5])


def draws(sampling, logits, n=4000):
    """Tokens at `n` positions, as one batch of rows with one key."""
    settings = table(replace(sampling, seed=0), n)
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, VOCAB))
    nothing = jnp.zeros((n, VOCAB), bool), jnp.zeros((n, VOCAB), jnp.int32)
    return np.asarray(choose(many, settings, jnp.arange(n), jnp.zeros(n, jnp.int32), *nothing))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0), Sampling(temperature=0.6, top_k=6), Sampling(temperature=1.5, top_p=0.7)],
    ids=str,
)
def test_draws_follow_the_filtered_softmax(sampling):
    """Chi-square over 4,000 draws; the same draws must fail against a softmax of other logits."""
    logits = np.random.default_rng(1).normal(0, 1.5, VOCAB)
    warm = logits / sampling.temperature
    alive = sorted_keep(warm, sampling.top_k, sampling.top_p, 0)
    probability = np.where(alive, np.exp(warm), 0)
    probability /= probability.sum()
    counts = np.bincount(draws(sampling, logits), minlength=VOCAB)
    assert counts[~alive].sum() == 0

    def chi_square(p):
        p = np.maximum(p[alive], 1e-9)
        return ((counts[alive] - 4000 * p) ** 2 / (4000 * p)).sum()

    degrees = alive.sum() - 1
    limit = degrees + 4.5 * np.sqrt(2 * degrees) + 5  # about one in a million by chance
    assert chi_square(probability) < limit
    assert chi_square(np.roll(probability[alive], 1)[np.cumsum(alive) - 1] * alive) > limit


def test_forced_tokens_come_first_whatever_their_probability():
    model, params = tiny()
    cache = Dense().init(model, batch=2, capacity=32)
    rows = [Sampling(forced=[4, 9]), Sampling()]
    out = kvjax.generate(model, params, cache, prompts(0, 2, 3), max_new=5, sampling=rows)
    assert out.tokens[0, :2].tolist() == [4, 9]
    free = kvjax.generate(model, params, Dense().init(model, batch=2, capacity=32), prompts(0, 2, 3), max_new=5)
    np.testing.assert_array_equal(out.tokens[1], free.tokens[1])


def test_a_row_draws_the_same_in_any_company():
    """Same key and row: same tokens, whatever the other rows hold or ask for."""
    model, params = tiny()
    mine = prompts(1, 1, 6)
    others = [prompts(seed, 1, 6) for seed in (2, 3)]
    wanted = None
    for other, setting in zip(others, (Sampling(), Sampling(temperature=2.0, top_k=4, stop=[3])), strict=True):
        cache = Dense().init(model, batch=2, capacity=32)
        tokens = jnp.concatenate([other, mine])
        rows = [setting, Sampling(temperature=1.0, top_p=0.9)]
        out = kvjax.generate(model, params, cache, tokens, max_new=10, key=KEY, sampling=rows).tokens[1]
        wanted = out if wanted is None else wanted
        np.testing.assert_array_equal(out, wanted)


def test_a_seed_moves_with_its_row():
    model, params = tiny()
    tokens = prompts(1, 1, 6)
    seeded = Sampling(temperature=1.0, seed=77)
    first = kvjax.generate(
        model, params, Dense().init(model, batch=1, capacity=32), tokens, max_new=10, key=KEY, sampling=seeded
    )
    cache = Dense().init(model, batch=3, capacity=32)
    rows = [Sampling(temperature=1.0), Sampling(temperature=1.0), seeded]
    moved = kvjax.generate(model, params, cache, tokens.repeat(3, 0), max_new=10, key=KEY, sampling=rows)
    np.testing.assert_array_equal(moved.tokens[2], first.tokens[0])
    assert (moved.tokens[0] != moved.tokens[1]).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition", 0.0),
        ("presence", float("inf")),
        ("frequency", float("nan")),
        ("temperature", "1"),
        ("top_k", 2.5),
        ("top_k", 2**31),
        ("stop", 5),
        ("stop", [5.5]),
        ("bias", {1: float("nan")}),
        ("bias", {1: float("inf")}),
        ("stop_strings", "text"),
        ("stop_strings", [""]),
        ("seed", -1),
        ("limit", 0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value, unchecked):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        Sampling(**{name: value})
