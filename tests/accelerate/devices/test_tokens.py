"""On any layout: the tokens of one device, and logits that differ by rounding only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.accelerate import Layout, Sharded, shard_cache
from kvjax.cache import Dense, Evicting, Paged, Quantized, Ring
from kvjax.draft import Heads, PromptLookup, widths
from kvjax.draft.heads import head_layer
from tests.accelerate.shared import BATCH, LENGTHS, TOKENS

CONTEXT, LARGE, ALL = Layout(context=8), Layout(data=2, heads=4), Layout(data=2, context=2, heads=2)
NEW = 6
ROUNDING = 2e-5
"""Of logits up to 10 in float32: sums over devices come in another order. No two best ones are as near here."""


def generated(model, params):
    """Tokens that `generate` chooses, and how likely each was."""
    cache = Dense().init(model, batch=BATCH, capacity=64)
    out = kvjax.generate(model, params, cache, TOKENS, LENGTHS, max_new=NEW)
    return np.asarray(out.tokens), np.asarray(out.logprobs)


@pytest.mark.parametrize(
    "layout",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in (Layout(heads=2), Layout(data=4))), CONTEXT, LARGE, ALL],
    ids=lambda x: "x".join(map(str, x.sizes)),
)
def test_tokens_of_one_device(sharded, layout):
    tokens, logprobs = generated(*sharded(None, layers=2))
    got = generated(*sharded(layout, layers=2))
    np.testing.assert_array_equal(got[0], tokens)
    np.testing.assert_allclose(got[1], logprobs, atol=ROUNDING)


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        (Ring(window=6, sinks=2), Layout(data=2, heads=2)),
        pytest.param(Quantized(8, residual=8), Layout(data=2, heads=2), marks=pytest.mark.slow),
        (Evicting(9, "random", sinks=1, recent=3), Layout(data=2, heads=2)),
        (Paged(page=4), Layout(heads=4)),
    ],
    ids=lambda x: "x".join(map(str, x.sizes)) if isinstance(x, Layout) else type(x).__name__,
)
def test_other_strategies_share_rows_and_heads(sharded, strategy, layout):
    """A prompt longer than what is kept, and enough steps that each of them makes room again."""
    logits = []
    for model, params in (sharded(None), sharded(layout)):
        cache = strategy.init(model, batch=BATCH, capacity=64)
        out, cache = kvjax.prefill(model, params, cache, TOKENS, LENGTHS)
        each = [np.asarray(out)]
        for token in range(9):
            out, cache = kvjax.decode_step(model, params, cache, jnp.full(BATCH, token, jnp.int32))
            each.append(np.asarray(out))
        logits.append(np.stack(each))
    np.testing.assert_allclose(logits[1], logits[0], atol=ROUNDING)


@pytest.mark.parametrize(
    ("name", "layout"), [("lookup", ALL), pytest.param("heads", Layout(heads=4), marks=pytest.mark.slow)]
)
def test_guesses_leave_the_tokens_as_they_are(sharded, name, layout):
    tokens = []
    for model, params in (sharded(None), sharded(layout)):
        draft = PromptLookup(k=2, shortest=1)
        if name == "heads":
            some = np.array([3, 8, 9, 17, 24, 25, 33, 40], np.int32)
            draft = Heads.of(model, params, trained=Heads.fresh(model, params, some, jax.random.key(2)), k=2)
        cache = Dense().init(model, batch=BATCH, capacity=64)
        out = kvjax.speculate(
            model, params, cache, TOKENS, LENGTHS, draft=draft, max_new=NEW, costs=[1.0] * len(widths(draft))
        )
        assert (np.asarray(out.speculated.proposed) > 0).any()
        tokens.append(np.asarray(out.tokens))
    np.testing.assert_array_equal(tokens[1], tokens[0])


def test_a_trained_draft_is_whole_on_every_device(sharded):
    """Its parameters are in their own order, whatever the target's are in."""
    model, params = sharded(None)
    trained = Heads.fresh(model, params, np.arange(64, dtype=np.int32), jax.random.key(2))
    x = jax.random.normal(jax.random.key(3), (2, 3, model.config.hidden))
    at = jnp.tile(jnp.arange(3), (2, 1))
    outs = []
    for of in (sharded(None), sharded(Layout(heads=4))):
        draft = Heads.of(*of, trained=trained)
        layer = head_layer(draft.target, draft.precision, draft.accelerate)
        outs.append(layer.apply({"params": trained["layer"]}, x, x, at, at >= 0, None)[0])
    np.testing.assert_allclose(outs[1], outs[0], atol=ROUNDING)


def test_samples_of_one_prompt_share_it_on_the_mesh(sharded):
    warm = kvjax.Sampling(temperature=1.0)
    tokens = []
    for model, params in (sharded(None), sharded(Layout(context=2, heads=4))):
        cache = Dense().init(model, batch=1, capacity=32)
        call = {"n": 3, "max_new": 4, "key": jax.random.key(0), "sampling": warm}
        out = kvjax.sample_n(model, params, cache, TOKENS[:1], **call)
        tokens.append(np.asarray(out.tokens))
        own = out.cache.layers[0].inner
    np.testing.assert_array_equal(tokens[1], tokens[0])
    assert own.layer.k.sharding.shard_shape(own.layer.k.shape)[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beam", "speculate"])
def test_what_shares_a_prefix_has_its_own_part_on_the_mesh(sharded, name):
    tokens = []
    for model, params in (sharded(None), sharded(Layout(heads=4))):
        cache = Dense().init(model, batch=1, capacity=32)
        if name == "beam":
            out = kvjax.beam(model, params, cache, TOKENS[:1], beams=3, max_new=5)
        else:
            _, cache = kvjax.prefill(model, params, cache, TOKENS[:1])
            cache, draft = kvjax.cache.share(model, cache, batch=2, capacity=40), PromptLookup(k=2, shortest=1)
            costs = [1.0] * len(widths(draft))
            out = kvjax.speculate(model, params, cache, TOKENS[:2], draft=draft, max_new=NEW, costs=costs)
        tokens.append(np.asarray(out.tokens))
    np.testing.assert_array_equal(tokens[1], tokens[0])


def test_a_cache_in_use_moves_to_a_mesh_and_forks_there(sharded):
    """In the order of its positions: what was dealt to devices is collected again."""
    model, params = sharded(None)
    cache = Dense().init(model, batch=BATCH, capacity=50)
    _, cache = kvjax.prefill(model, params, cache, TOKENS, LENGTHS)
    rows = jnp.array([3, 3, 0, 1])
    expected = kvjax.cache.fork(cache, rows)
    moved = kvjax.cache.fork(shard_cache(cache, ALL.mesh()), rows)
    assert isinstance(moved.strategy, Sharded) and moved.capacity == cache.capacity == 50
    for ours, theirs in zip(moved.layers, expected.layers, strict=True):
        for got, want in zip(ours.tokens(), theirs.tokens(), strict=True):
            np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(ours.held(moved.length), theirs.held(expected.length))
    token = jnp.array([5, 6, 7, 8], jnp.int32)
    want, _ = kvjax.decode_step(model, params, expected, token)
    got, _ = kvjax.decode_step(*sharded(ALL), moved, token)
    np.testing.assert_allclose(got, want, atol=ROUNDING)


def test_a_long_chunk_meets_every_device_and_the_end_of_the_cache(sharded):
    """Pages of 8 by turns, a chunk that starts inside one, and one that ends at the capacity."""
    text = np.asarray(jax.random.randint(jax.random.key(3), (BATCH, 50), 0, 61))
    logits = []
    for model, params in (sharded(None), sharded(Layout(context=4))):
        cache = Dense().init(model, batch=BATCH, capacity=50)
        for start, end in ((0, 5), (5, 38), (38, 39), (39, 50)):
            out, cache = kvjax.prefill(model, params, cache, text[:, start:end])
            logits.append(np.asarray(out))
    np.testing.assert_allclose(logits[4:], logits[:4], atol=ROUNDING)
