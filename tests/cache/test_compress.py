"""A compressed cache is the one that would have been, had it been of that strategy from the start."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import Dense, Evicting, Paged, Quantized, Ring, Shared, Strategy, share
from kvjax.cache.compress import compress
from kvjax.pytree import pytree
from tests.tiny import LLAMA, prompts, tiny

LENGTHS = [37, 9, 30]


def kept(budget, score, **settings):
    return Evicting(budget, score, sinks=2, recent=4, **settings)


QUANTIZED, BY_HEAD = Quantized(4, residual=3), ((12, 9), (8, 10))
BY_KEYS, IN_CODES = kept(BY_HEAD, "key_diff"), kept(BY_HEAD, "random", inner=4)
PAIRS = {
    "quantized": (Dense(), QUANTIZED),
    "KIVI, by layer": (Dense(), Quantized((5, 2), 3, keys="channel", values="token", residual=0, sinks=1)),
    "out of pages": (Paged(page=4), QUANTIZED),
    "evicting by keys": (Dense(), BY_KEYS),
    "and in codes": (Paged(page=4), IN_CODES),
    "evicting more by sums of attention": (kept(40, "h2o"), kept(BY_HEAD, "h2o")),
    "evicting more by sums over queries": (kept(40, "expected"), kept(12, "expected")),
}


def filled(strategy, family="llama"):
    model, params = tiny(family)
    cache = strategy.init(model, batch=3, capacity=48)
    return model, params, kvjax.prefill(model, params, cache, prompts(2, 3, 37), LENGTHS)[1]


def decoded(model, params, cache, steps=4):
    rows = []
    for i in range(steps):
        logits, cache = kvjax.decode_step(model, params, cache, jnp.array([5, 6, 7]) + i)
        rows.append(logits)
    return np.stack(rows), cache


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_as_if_it_had_been_so_from_the_start(name):
    """A prompt is taken in before anything is evicted or coded, so that all layers saw the same."""
    source, target = PAIRS[name]
    model, params, old = filled(source)
    wanted, straight = decoded(*filled(target))
    held, before = jax.tree.leaves(old.layers), kvjax.nbytes(old)
    cache = compress(old, target)
    assert cache.length.tolist() == LENGTHS and kvjax.nbytes(cache) < before
    assert jax.tree.structure(cache) == jax.tree.structure(straight)
    assert all(x.is_deleted() for x in held)
    np.testing.assert_allclose(decoded(model, params, cache)[0], wanted, atol=1e-5)


def test_inside_jit_and_step_by_step():
    """Dense, 8 bits, 4 bits: near 4 bits at once."""
    model, params, dense = filled(Dense())
    wanted, _ = decoded(*filled(QUANTIZED))
    twice = jax.jit(lambda cache: compress(compress(cache, Quantized(8, residual=3)), QUANTIZED))
    got, _ = decoded(model, params, twice(dense))
    assert np.abs(got - wanted).mean() < 0.1 * wanted.std()


def test_evicting_inside_jit_and_step_by_step():
    """Everything, 20 tokens, a dozen of them in codes: as a dozen at once, for the best of the best are the best."""
    model, params, dense = filled(Dense())
    wanted, _ = decoded(*filled(IN_CODES))
    cache = jax.jit(lambda cache: compress(compress(cache, kept(20, "random")), IN_CODES))(dense)
    assert kvjax.nbytes(cache) < kvjax.nbytes(dense) / 4
    np.testing.assert_allclose(decoded(model, params, cache)[0], wanted, atol=1e-5)


def test_codes_are_evicted_and_coded_anew():
    """What stays is as it was, but for one more rounding, and worth more than what goes."""
    _, _, old = filled(kept(24, "random", inner=8))
    tokens_of = jax.jit(lambda layer: layer.tokens())
    before = [[np.asarray(x) for x in (layer.positions, layer.worth, *tokens_of(layer))] for layer in old.layers]
    cache = compress(old, IN_CODES)
    for layer, (positions, worth, *tokens), budgets in zip(cache.layers, before, BY_HEAD, strict=True):
        for row, held in enumerate(np.asarray(layer.positions)):
            last = LENGTHS[row // 2] - 1
            rank = np.where((positions[row] < 2) | (positions[row] > last - 4), 2.0, worth[row])
            rank[positions[row] < 0] = -1.0
            best = np.argsort(-rank, kind="stable")[: min(last + 1, budgets[row % 2])]
            assert sorted(held[held >= 0]) == sorted(positions[row, best])
            at = [positions[row].tolist().index(position) for position in held[held >= 0]]
            for ours, theirs in zip(tokens_of(layer), tokens, strict=True):
                error = np.asarray(ours)[row, held >= 0] - theirs[row, at]
                assert np.square(error).mean() < 0.03 * np.square(theirs[row, at]).mean()


def test_what_the_models_window_left_behind_is_evicted_first():
    """A model with a window of 7 finds all it looks for in 8 slots, though the score would keep other tokens."""
    model, params, dense = filled(Dense(), "mistral")
    wanted, _ = decoded(*filled(Dense(), "mistral"))
    cache = compress(dense, Evicting(8, "random", sinks=0, recent=1))
    np.testing.assert_allclose(decoded(model, params, cache)[0], wanted, atol=1e-5)


def test_a_shared_prefix_becomes_each_rows_own():
    model, params = tiny()
    start, rest = prompts(4, 1, 10), prompts(5, 3, 9)
    _, prefix = kvjax.prefill(model, params, kept(48, "random").init(model, batch=1, capacity=10), start)
    _, shared = kvjax.prefill(model, params, share(model, prefix, batch=3, capacity=38), rest, [9, 2, 6])
    whole = jnp.concatenate([jnp.tile(start, (3, 1)), rest], axis=1)
    dense = Dense().init(model, batch=3, capacity=48)
    _, dense = kvjax.prefill(model, params, dense, whole, [19, 12, 16])
    wanted, got = (decoded(model, params, compress(x, BY_KEYS))[0] for x in (dense, shared))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("steps", [[Ring(window=11, sinks=2)], [Ring(window=20, sinks=3), Ring(window=11, sinks=2)]])
def test_a_ring_has_the_newest_and_the_first(steps):
    """As the first layer of a ring from the start has them; deeper ones saw what such a ring never shows."""
    model, params, cache = filled(Dense())
    for strategy in steps:
        cache = compress(cache, strategy)
    jax.tree.map(np.testing.assert_array_equal, cache.layers[0], filled(steps[-1])[2].layers[0])
    assert np.isfinite(decoded(model, params, cache)[0]).all()


@pytest.mark.parametrize("target", [Ring(window=9, sinks=2), kept(11, "random")], ids=str)
def test_what_was_set_back_is_not_taken_along(target):
    _, _, dense = filled(Dense())
    cache = compress(replace(dense, length=dense.length - 5), target)
    assert cache.length.tolist() == [32, 4, 25]
    held = cache.layers[0].held(cache.length)
    assert held.reshape(3, -1).max(1).tolist() == [31, 3, 24]
    assert ((held >= 0).sum(1).reshape(3, -1) == jnp.array([[11], [4], [11]])).all()


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Dense(), Quantized(4)),
        (Dense(), Ring(window=1000)),
        (Dense(), Evicting(1000, "key_norm")),
        (Evicting(1.0, "h2o"), Evicting(1000, "h2o", inner=4)),
    ],
    ids=str,
)
def test_no_second_copy_inside_jit(source, target):
    """Temporaries are of one layer at a time, so that memory is that of the old cache and of the new one."""
    model = kvjax.Transformer(replace(LLAMA, head_dim=64, windows=(None,) * 8))
    cache = source.shapes(model, batch=1, capacity=8192)
    lowered = jax.jit(lambda cache: compress(cache, target, capacity=8192), donate_argnums=0).lower(cache)
    memory = lowered.compile().memory_analysis()
    assert memory.output_size_in_bytes < kvjax.nbytes(cache) / 3
    assert memory.temp_size_in_bytes < 2 * kvjax.nbytes(cache.layers[0])


@pytree
class EvenLayer:
    """The even positions below 8, each K/V head its own: what a strategy of one's own needs to be target and source."""

    k: Any
    v: Any
    positions: Any

    limit = None
    assured = 0, 0
    by_token = False
    attend = look = ahead = steady = fork = lambda self, *_: self

    def held(self, length):
        return self.positions

    def tokens(self):
        return self.k, self.v

    def take(self, k, v, positions, mask, old):
        held = jnp.repeat(positions, k.shape[0] // positions.shape[0], axis=0)
        slot = jnp.argsort(jnp.where((held >= 0) & (held % 2 == 0), held, 1000), axis=1)[:, :4]
        k, v = (jnp.take_along_axis(x, slot[..., None], axis=1) for x in (k, v))
        return EvenLayer(k, v, jnp.take_along_axis(held, slot, axis=1))


@dataclass(frozen=True)
class Even(Strategy):
    def layer(self, spec):
        empty = jnp.full((spec.batch * spec.kv_heads, 4), -1, jnp.int32)
        return EvenLayer(spec.zeros(4), spec.zeros(4), empty)


def test_a_strategy_of_ones_own_takes_tokens_in():
    _, _, quantized = filled(Quantized(8, residual=3))
    length = quantized.length
    first = jax.jit(lambda layer: (layer.tokens(), layer.held(length)))(quantized.layers[0])
    layer = compress(quantized, Even()).layers[0]
    assert (layer.held(length) == jnp.array([[0, 2, 4, 6]])).all()
    (k, _), held = first
    for row in range(6):
        slots = [held[row // 2].tolist().index(i) for i in (0, 2, 4, 6)]
        np.testing.assert_array_equal(layer.k[row], k[row, jnp.array(slots)])


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (Quantized(4), Quantized(8), "`strategy` must need fewer bytes than the .* there are"),
        (Ring(window=30), Quantized(2), "needs tokens that Ring.* may have dropped"),
        (Ring(window=10), Ring(window=9, sinks=1), "needs tokens that Ring.* may have dropped"),
        (Evicting(64), Quantized(2), "needs tokens that Evicting.* may have dropped"),
        (Evicting(64), Ring(4), "needs tokens that Evicting.* may have dropped"),
        (Shared(Ring(30)), Ring(4), "needs tokens that Shared.* may have dropped"),
        (Dense(), Evicting(40), "a score that needs no queries.*: key_norm, key_diff, random, or the one that `cache`"),
        (Evicting(64, "snapkv"), Evicting(40, "expected"), "a score that needs no queries.*got Expected"),
        (Dense(), Paged(pool=1), "that can be filled one by one, but Paged ones share pages"),
        (Dense(), Shared(Ring(4)), "must keep rows apart, got Shared"),
        (Dense(), Quantized((4, 4, 4)), "one entry for each of 2 layers, got 3"),
    ],
)
def test_what_cannot_work_is_refused(source, target, words):
    model, _ = tiny()
    cache = source.init(model, batch=1, capacity=96)
    with pytest.raises(ValueError, match=words):
        compress(cache, target)
    assert not any(x.is_deleted() for x in jax.tree.leaves(cache))


def test_a_smaller_capacity_is_refused():
    model, _ = tiny()
    with pytest.raises(ValueError, match="`capacity` must be at least the cache's 96, got 64"):
        compress(Dense().init(model, batch=1, capacity=96), Quantized(2), capacity=64)


@pytest.mark.parametrize("trace", [lambda f: jax.jit(f)(), jax.eval_shape], ids=["jit", "eval_shape"])
@pytest.mark.parametrize("source", [Dense(), Paged(page=4), kept(30, "h2o")], ids=str)
def test_a_program_may_close_over_the_cache(source, trace):
    """A cache that the program does not take in is a constant of it, and is there when the program runs."""
    target = kept(12, "h2o") if isinstance(source, Evicting) else QUANTIZED
    model, params, cache = filled(source)
    got = trace(lambda: compress(cache, target))
    assert not any(x.is_deleted() for x in jax.tree.leaves(cache))
    wanted = compress(cache, target)
    assert all(x.is_deleted() for x in jax.tree.leaves(cache.layers))
    assert kvjax.nbytes(got) == kvjax.nbytes(wanted)
    if trace is not jax.eval_shape:
        np.testing.assert_allclose(*(decoded(model, params, x)[0] for x in (got, wanted)), atol=1e-5)


@pytest.mark.parametrize("capacity", [0, -1, 2.5])
def test_a_capacity_that_is_none_is_refused(capacity, unchecked):
    model, _ = tiny()
    with pytest.raises(ValueError, match=f"compress: `capacity` must be at least 1, a whole number, got {capacity}"):
        compress(Dense().init(model, batch=1, capacity=96), QUANTIZED, capacity=capacity)


def test_what_is_no_strategy_or_holds_nothing_is_refused(unchecked):
    model, _ = tiny()
    with pytest.raises(ValueError, match=r"compress: `strategy` must be a strategy, such as .*, got 'quantized'"):
        compress(Dense().init(model, batch=1, capacity=96), "quantized")
    for cache in (Dense().shapes(model, batch=1, capacity=96), None):
        with pytest.raises(ValueError, match="compress: `cache` must be .*, and hold arrays; for sizes alone, take"):
            compress(cache, QUANTIZED)


def test_a_share_of_what_has_no_bound_is_of_the_capacity_that_is_named():
    model, _ = tiny()
    cache = Ring(window=30).init(model, batch=1, capacity=96)
    with pytest.raises(ValueError, match="there are, got .* at a `capacity` of 512 tokens a row"):
        compress(cache, kept(0.5, "random"))
    assert compress(cache, kept(0.25, "random"), capacity=96).layers[0].k.shape[1] == 24
