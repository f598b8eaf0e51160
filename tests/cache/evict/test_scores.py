"""Each score against its equation in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.reference import Mask, attend
from kvjax.cache import LayerSpec
from kvjax.cache.evict.expected import Expected
from kvjax.cache.evict.scores import SCORES, Attention, KeyDiff, KeyNorm, Random
from kvjax.config import Rope
from kvjax.rope import rotate

SPEC = LayerSpec(1, 32, 2, 8, None, "float32", group=3, rope=Rope(theta=100.0))


def tokens(seed: int, width: int = 12):
    """Two rows of tokens as a score sees them: q, k, v, positions."""
    q, k, v = (jax.random.normal(key, (2, width, 3, 8)) for key in jax.random.split(jax.random.key(seed), 3))
    return q, k[:, :, 0], v[:, :, 0], jnp.arange(width)[None].repeat(2, 0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_key_norm():
    _, k, v, positions = tokens(0)
    np.testing.assert_allclose(KeyNorm().rate((), k, v, positions), -np.linalg.norm(k, axis=-1), rtol=1e-6)


def test_key_diff_counts_only_real_tokens():
    q, k, v, positions = tokens(1)
    state = KeyDiff().observe(KeyDiff().begin(SPEC), q, k, positions, positions < 7)
    mean = unit(unit(np.asarray(k))[:, :7].mean(1))
    np.testing.assert_allclose(
        KeyDiff().rate(state, k, v, positions), -np.einsum("rsd,rd->rs", unit(np.asarray(k)), mean), atol=1e-6
    )


def test_random_is_even_and_the_same_whenever_it_is_asked():
    spec = LayerSpec(1, 1, 2, 8, None, "float32", index=3, layers=5)
    positions = jnp.arange(4000)[None].repeat(2, 0)
    k = jnp.zeros((2, 4000, 8))
    rate = Random(1).rate(Random(1).begin(spec), k, k, positions)
    assert abs(np.histogram(rate, 10, (0, 1))[0] - 800).max() < 120
    assert abs(np.corrcoef(rate[0], rate[1])[0, 1]) < 0.05
    some = Random(1).rate(Random(1).begin(spec), k[:, :3], k[:, :3], positions[:, 7:10])
    np.testing.assert_array_equal(some, rate[:, 7:10])
    assert (Random(2).rate(Random(2).begin(spec), k, k, positions) != rate).mean() > 0.99


@pytest.mark.parametrize("rope", [None, SPEC.rope])
def test_expected_attention(rope):
    """The same queries in two parts, against means over positions that are really visited."""
    q, k, v, positions = tokens(2)
    score, spec = Expected(horizon=4), LayerSpec(1, 32, 2, 8, None, "float32", group=3, rope=rope)
    turned = q if rope is None else rotate(q, positions, rope)
    state = score.begin(spec)
    for cut in (slice(0, 5), slice(5, 12)):
        state = score.observe(state, turned[:, cut], k[:, cut], positions[:, cut], positions[:, cut] < 9)
    mean, spread = np.asarray(q[:, :9]).mean(1), np.asarray(q[:, :9]).var(1)
    if rope is not None:
        ahead = [rotate(jnp.asarray(mean)[:, None], jnp.full((2, 1), 9 + i), rope)[:, 0] for i in range(4)]
        mean = np.mean(ahead, axis=0)
        spread = np.tile(0.5 * (spread[..., :4] + spread[..., 4:]), 2)
    logits = np.einsum("rsd,rgd->rgs", k, mean) / 8**0.5 + np.einsum("rsd,rgd->rgs", np.square(k), spread) / 16
    once = score.observe(score.begin(spec), turned, k, positions, positions < 9)  # in one part: a plain softmax
    share = np.exp(logits) / np.exp(logits[..., :9]).sum(-1, keepdims=True)
    wanted = (share.mean(1) + score.floor) * np.linalg.norm(v, axis=-1)
    np.testing.assert_allclose(score.rate(once, k, v, positions), wanted, rtol=1e-4)
    for ours, theirs in zip(jax.tree.leaves(state)[:3], jax.tree.leaves(once)[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert np.isfinite(score.rate(state, k, v, positions)).all()


def test_a_peak_is_one_later_query_times_the_value():
    """By loops over rows, tokens, queries and heads."""
    q, k, v, positions = tokens(3)
    score, mask = Attention(pool=3, near=4, peak=True, value=True), Mask(0.5)
    lse = attend(q, k, v, positions, positions, mask)[1]
    valid = (positions < 10).astype(jnp.float32)
    most = np.zeros((2, 12))
    for row, slot, at, head in np.ndindex(2, 12, 10, 3):
        if at - slot >= 4:
            chance = np.exp(float(q[row, at, head] @ k[row, slot]) * 0.5 - float(lse[row, at, head]))
            most[row, slot] = max(most[row, slot], chance)
    size = np.linalg.norm(v, axis=-1)
    args = (q, k, v, positions, positions, lse, valid, mask)
    np.testing.assert_allclose(score.received(*args), most * size, rtol=1e-5)
    wide = np.pad(most, ((0, 0), (1, 1)))
    pooled = np.max([wide[:, :-2], wide[:, 1:-1], wide[:, 2:]], axis=0)
    np.testing.assert_allclose(score.received(*args, pool=True), pooled * size, rtol=1e-5)
    np.testing.assert_array_equal(score.joined(jnp.array([[1.0, 5.0]]), jnp.array([[2.0, 3.0]])), [[2, 5]])


def test_attention_counts_its_last_real_queries():
    valid = jnp.array([[True] * 5 + [False] * 2, [False] * 7])
    np.testing.assert_array_equal(Attention(2).weights(valid), [[0, 0, 0, 1, 1, 0, 0], [0] * 7])
    np.testing.assert_array_equal(Attention().weights(valid), valid.astype(np.float32))
    np.testing.assert_array_equal(Attention(4).kept(jnp.array([0, 1, 4, 9])), [1, 0.75, 0, 0])
    np.testing.assert_array_equal(Attention().kept(jnp.array([0, 9])), [1, 1])
    np.testing.assert_array_equal(Attention(4, pool=3).pooled(jnp.array([[5.0, 0, 0, 1, 0]])), [[5, 5, 1, 1, 1]])


@pytest.mark.parametrize(
    ("settings", "words"), [((0, 1), "`window` must be at least 1 query, got 0"), ((4, 2), "`pool` must be an odd")]
)
def test_impossible_scores_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Attention(*settings)


def test_scores_are_values():
    """Equal settings share one compiled step."""
    assert len({*SCORES.values(), Attention(), Random()}) == len(SCORES)
