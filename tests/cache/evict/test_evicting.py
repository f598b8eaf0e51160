"""An evicting cache against a head that keeps its tokens in a Python list."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kernels.reference import Mask, attend
from kvjax.cache import Dense, Evicting, LayerSpec
from kvjax.cache.evict import turn
from kvjax.cache.evict.scores import SCORES, Attention
from tests.kernels.test_reference import inputs
from tests.tiny import prompts, tiny

TOTAL, CHUNK = 40, 6
SPEC = LayerSpec(2, 64, 2, 8, None, "float32", group=2)


def fed(layer, seed: int, mask: Mask, visit=lambda *_: None):
    """Give 40 tokens a row to a layer in random parts: chunks, empty chunks and single tokens.

    Yields nothing; calls `visit(layer, at)` after each part. Returns outputs and log-sum-exps by position, the last
    layer, and the tokens.
    """
    rng = np.random.default_rng(seed)
    q, k, v, positions, slots = inputs(seed, batch=2, width=TOTAL, heads=4, slots=TOTAL)
    split = [np.asarray(x.reshape(2, 2, TOTAL, 8).swapaxes(1, 2)) for x in (k, v)]
    step = jax.jit(lambda layer, *new: layer.attend(*new, mask))
    outs, lses = np.zeros((2, TOTAL, 4, 8)), np.zeros((2, TOTAL, 4))
    at = np.zeros(2, int)
    while (at < TOTAL).any():
        width = int(rng.choice([1, CHUNK]))
        lengths = np.minimum(rng.integers(0, width + 1, 2), TOTAL - at)
        index = np.minimum(at[:, None] + np.arange(width), TOTAL - 1)
        new = [jnp.asarray(np.take_along_axis(np.asarray(x), index[..., None, None], 1)) for x in (q, *split)]
        valid = np.arange(width) < lengths[:, None]
        out, lse, layer = step(layer, *new, jnp.asarray(at[:, None] + np.arange(width)), jnp.asarray(valid))
        for row, n in enumerate(lengths):
            outs[row, at[row] : at[row] + n], lses[row, at[row] : at[row] + n] = out[row, :n], lse[row, :n]
        at += lengths
        visit(layer, at)
    return outs, lses, layer, (q, k, v, positions, slots)


def held(layer) -> list[set[int]]:
    return [set(row.tolist()) - {-1} for row in np.asarray(layer.positions)]


@pytest.mark.parametrize("score", ["h2o", "peak", "key_diff", "expected"])
def test_with_room_for_all_nothing_is_lost(score):
    """Rule 7, whatever the score and however the tokens come."""
    mask = Mask(0.3, window=9) if score == "h2o" else Mask(0.3)
    out, lse, layer, tokens = fed(Evicting(99, score).layer(SPEC), 0, mask)
    wanted = attend(*tokens, mask)
    np.testing.assert_allclose(out, wanted[0], atol=3e-6)
    np.testing.assert_allclose(lse, wanted[1], atol=3e-6)
    assert held(layer) == [set(range(TOTAL))] * 4
    for row, slots in enumerate(np.asarray(layer.positions)):  # each slot's key is that of its position
        filled = slots >= 0
        np.testing.assert_array_equal(np.asarray(layer.k)[row, filled], np.asarray(tokens[1])[row, slots[filled]])


@pytest.mark.parametrize("score", SCORES)
def test_the_budget_the_sinks_and_the_recent_window_hold_at_all_times(score):
    def visit(layer, at):
        for row, kept in enumerate(held(layer)):
            n = at[row // 2]
            assert len(kept) == min(n, (12, 9)[row % 2])
            assert kept >= {p for p in range(n) if p < 2 or p >= n - 3}

    strategy = Evicting(((12, 9),), score, sinks=2, recent=3)
    layer = strategy.layer(SPEC)
    assert layer.positions.shape == (4, 12)
    fed(layer, 1, Mask(0.3), visit)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_one_token_at_a_time_the_least_attended_goes(window):
    """Each K/V head against a list of (position, worth) pairs."""
    q, k, v, _, _ = inputs(3, batch=1, width=TOTAL, heads=4, slots=TOTAL)
    layer = Evicting(8, Attention(window), sinks=1, recent=2).layer(replace(SPEC, batch=1))
    step = jax.jit(lambda layer, *new: layer.attend(*new, Mask(0.5)))
    q, k, v = (np.asarray(x) for x in (q, k, v))
    kept: list[dict[int, float]] = [{}, {}]
    for at in range(TOTAL):
        new = (x.reshape(1, 2, TOTAL, 8)[:, :, at][:, None] for x in (k, v))
        out, _, layer = step(layer, q[:, at : at + 1], *new, jnp.array([[at]]), jnp.array([[True]]))
        for head, mine in enumerate(kept):
            if len(mine) == 8:
                del mine[min((p for p in mine if 1 <= p <= at - 2), key=lambda p: mine[p])]
            mine[at] = 0.0
            here = sorted(mine)
            for group in (0, 1):
                logits = k[head, np.array(here)].astype(np.float64) @ q[0, at, 2 * head + group] * 0.5
                chance = np.exp(logits - logits.max())
                chance /= chance.sum()
                wanted = chance @ v[head, np.array(here)]
                np.testing.assert_allclose(out[0, 0, 2 * head + group], wanted, atol=3e-6)
                for p, x in zip(here, chance, strict=True):
                    if group == 0 and window is not None:
                        mine[p] *= 1 - 1 / window
                    mine[p] += x
        assert held(layer) == [set(mine) for mine in kept]


def test_a_chunk_keeps_the_most_attended_by_its_last_queries():
    """SnapKV by hand: attention of the last 4 real queries, the largest of three neighbours, sinks and window."""
    q, k, v, positions, slots = inputs(4, batch=1, width=TOTAL, heads=4, slots=TOTAL)
    layer = Evicting(12, Attention(window=4, pool=3), sinks=2, recent=4).layer(replace(SPEC, batch=1))
    new = (x.reshape(1, 2, TOTAL, 8).swapaxes(1, 2) for x in (k, v))
    length = 33
    valid = jnp.arange(TOTAL)[None] < length
    _, _, layer = jax.jit(lambda layer, *new: layer.attend(*new, Mask(0.5)))(layer, q, *new, positions, valid)
    k, q = np.asarray(k), np.asarray(q)
    for head in (0, 1):
        worth = np.zeros(length)
        for at in range(length - 4, length):
            for group in (0, 1):
                logits = k[head, : at + 1] @ q[0, at, 2 * head + group] * 0.5
                worth[: at + 1] += np.exp(logits) / np.exp(logits).sum()
        pooled = np.max([np.roll(np.pad(worth, 1), i)[1:-1] for i in (-1, 0, 1)], axis=0)
        pooled[[0, 1, *range(length - 4, length)]] = np.inf
        assert held(layer)[head] == set(np.argsort(-pooled, kind="stable")[:12].tolist())


def test_looking_takes_nothing_in_and_sees_what_is_held():
    """As attention over the tokens that `held` names, whatever is newer than the length that it is asked for."""
    layer = Evicting(((12, 9),), "key_norm", sinks=2, recent=3).layer(SPEC)
    _, _, layer, (q, k, v, _, _) = fed(layer, 6, Mask(0.5))
    positions = jnp.full((2, 1), TOTAL)
    out, lse = jax.jit(lambda layer, q, at: layer.look(q, at, Mask(0.5)))(layer, q[:, :1], positions)
    for row, kept in enumerate(np.asarray(layer.held(jnp.array([TOTAL, TOTAL])))):
        kept = np.sort(kept[kept >= 0])
        assert len(kept) == (12, 9)[row % 2]
        for head in (0, 1):
            logits = np.asarray(k)[row, kept] @ np.asarray(q)[row // 2, 0, 2 * (row % 2) + head] * 0.5
            np.testing.assert_allclose(lse[row // 2, 0, 2 * (row % 2) + head], np.log(np.exp(logits).sum()), atol=1e-5)
            wanted = np.exp(logits) / np.exp(logits).sum() @ np.asarray(v)[row, kept]
            np.testing.assert_allclose(out[row // 2, 0, 2 * (row % 2) + head], wanted, atol=1e-5)
    before = np.asarray(layer.held(jnp.array([TOTAL - 1, 0])))
    assert (before < TOTAL - 1).all() and (before[:2] >= 0).any() and (before[2:] == -1).all()


def test_what_the_models_window_left_behind_goes_first():
    """A layer with a window of 5 and 8 slots loses nothing, though the score would keep old tokens."""
    mask = Mask(0.3, window=5)
    out, _, _, tokens = fed(Evicting(11, "random", sinks=0, recent=1).layer(SPEC), 5, mask)
    np.testing.assert_allclose(out, attend(*tokens, mask)[0], atol=3e-6)


def test_rows_grow_without_end_in_fewer_bytes():
    model, params = tiny()
    cache = Evicting(10, "snapkv", sinks=2, recent=4).init(model, batch=1, capacity=128)
    assert cache.capacity is None
    assert kvjax.nbytes(cache) < kvjax.nbytes(Dense().init(model, batch=1, capacity=128)) / 6

    @jax.jit
    def fed(cache, tokens):
        return jax.lax.scan(lambda cache, token: kvjax.decode_step(model, params, cache, token)[::-1], cache, tokens)

    cache, logits = fed(cache, prompts(0, 150, 1))
    assert cache.length.tolist() == [150]
    assert jnp.isfinite(logits).all()


def test_vmap_over_a_knob_gives_what_each_value_gives():
    model, params = tiny()
    empty = Evicting(20, "key_diff", sinks=1, recent=2).init(model, batch=1, capacity=64)
    tokens = prompts(0, 30, 1)

    def last_logits(budget):
        def step(cache, token):
            return kvjax.decode_step(model, params, cache, token)[::-1]

        return jax.lax.scan(step, turn(empty, budget=budget), tokens)[1][-1]

    budgets = jnp.array([6, 11, 20])
    together, alone = jax.jit(jax.vmap(last_logits))(budgets), jax.jit(last_logits)
    for budget, logits in zip(budgets, together, strict=True):
        np.testing.assert_allclose(alone(budget), logits, atol=1e-5)
    assert not np.allclose(together[0], together[1], atol=1e-3)


def test_soft_eviction_can_be_differentiated_through_cached_decoding():
    """The gradient by threshold and temperature is the slope that is measured; far below it nothing is lost."""
    model, params = tiny()
    cache = Evicting(64, "h2o", sinks=1, recent=2, temperature=0.2).init(model, batch=1, capacity=64)
    tokens = prompts(1, 1, 16)

    @jax.jit
    @jax.value_and_grad
    def loss(knobs):
        def step(cache, pair):
            logits, cache = kvjax.decode_step(model, params, cache, pair[:1])
            return cache, -jax.nn.log_softmax(logits)[0, pair[1]]

        pairs = jnp.stack([tokens[0, :-1], tokens[0, 1:]], axis=1)
        return jax.lax.scan(step, turn(cache, threshold=knobs[0], temperature=knobs[1]), pairs)[1].sum()

    at = jnp.array([0.4, 0.3])
    for i, slope in enumerate(loss(at)[1]):
        up, down = (loss(at.at[i].add(change))[0] for change in (1e-2, -1e-2))
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(slope, (up - down) / 2e-2, rtol=0.05)
    scores = jax.nn.log_softmax(kvjax.forward(model, params, tokens))[0, :-1]
    whole = -jnp.take_along_axis(scores, tokens[0, 1:, None], axis=1).sum()
    np.testing.assert_allclose(loss(jnp.array([-1e3, 1.0]))[0], whole, atol=1e-3)


@pytest.mark.parametrize("width", [1, 5])
def test_a_soft_share_is_added_to_the_logits_as_its_logarithm(width):
    layer = Evicting(20, "random", sinks=1, recent=2, threshold=0.4, temperature=0.1).layer(SPEC)
    q, k, v, positions, _ = inputs(6, batch=2, width=16, heads=4, slots=16)
    by_token = [x.reshape(2, 2, 16, 8).swapaxes(1, 2) for x in (k, v)]
    step = jax.jit(lambda layer, *new: layer.attend(*new, new[-1] >= 0, Mask(0.5)))
    for cut in (slice(0, 16 - width), slice(16 - width, 16)):
        held = layer
        out, lse, layer = step(layer, *(x[:, cut] for x in (q, *by_token, positions)))
    k, v, q = (np.asarray(x) for x in (k, v, q))
    rate = np.asarray(held.score.rate(held.state, *map(jnp.asarray, (k, v)), jnp.repeat(positions, 2, axis=0)))
    share = 1 / (1 + np.exp((0.4 - rate) / 0.1))
    share[:, [0, *range(16 - max(width, 2), 16)]] = 1.0
    for row, i, head in np.ndindex(2, width, 4):
        at, mine = 16 - width + i, 2 * row + head // 2
        logits = k[mine, : at + 1] @ q[row, at, head] * 0.5 + np.log(share[mine, : at + 1])
        np.testing.assert_allclose(lse[row, i, head], np.log(np.exp(logits).sum()), atol=1e-5)
        wanted = np.exp(logits - lse[row, i, head]) @ v[mine, : at + 1]
        np.testing.assert_allclose(out[row, i, head], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 35}, r"`budget` must be at least `sinks` \+ `recent`, 36 tokens, got 35"),
        ({"budget": (40, 30)}, "got 30 in layer 1"),
        ({"budget": (40, 40, 40)}, "one number or 2, one a layer"),
        (
            {"budget": (40, (40, 40, 40))},
            r"layer 1 must have one number for each of its 2 K/V heads, got \(40, 40, 40\)",
        ),
        ({"budget": 40, "score": "best"}, "`score` must be one of h2o, .*, got 'best'"),
        ({"budget": 40, "split": "cone"}, "`split` must be one of uniform, pyramid, got 'cone'"),
        ({"budget": (40, 40), "split": "pyramid"}, "`budget` must be one number"),
        ({"budget": 40, "sinks": -1}, "`sinks` must not be negative, got -1"),
        ({"budget": 40, "recent": 0}, "`recent` must be at least 1 token, got 0"),
        ({"budget": 40, "temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
    ],
)
def test_impossible_evictions_are_refused(settings, words):
    model, _ = tiny()
    with pytest.raises(ValueError, match=words):
        Evicting(**settings).init(model, batch=1, capacity=64)


def test_an_unknown_knob_is_refused():
    model, _ = tiny()
    with pytest.raises(ValueError, match="`bugdet` is no knob; expected one of budget"):
        turn(Evicting(40).init(model, batch=1, capacity=64), bugdet=3)
